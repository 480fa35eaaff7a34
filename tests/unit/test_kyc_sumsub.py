"""Sumsub: is it theirs, and whom did they approve?"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from connectors.kyc.sumsub import Approved, OtherVerdict, SumsubSource, Verdict, sign, translate, verify
from connectors.webhooks.source import Ignored, NotUnderstood, Publish, RefusalCode, Refused
from topics.catalog import KYC_APPROVED, KYC_REJECTED
from topics.events import KycRejected

# (secret, body, headers). The first is the vector of our contract notes; the others were made with
# `printf '%s' "$BODY" | openssl dgst -sha256 -hmac openssl-made-secret` (and -sha512, -sha1).
NOTES_SECRET = SecretStr("sumsub-demo-secret")
NOTES_BODY = (
    b'{"applicantId":"5cb56e8e0a975a35f333cb83","externalUserId":"usr_42","type":"applicantReviewed",'
    b'"reviewStatus":"completed","reviewResult":{"reviewAnswer":"GREEN"}}'
)
NOTES_DIGEST = "15249395e0bf7ff7a0e771717a519d3e669189bed914ffd87f4c2cb6fbf65dff"
OPENSSL_SECRET = SecretStr("openssl-made-secret")
OPENSSL_BODY = (
    '{"type":"applicantReviewed","applicantId":"a1","externalUserId":"user_7","reviewStatus":"completed",'
    '"reviewResult":{"reviewAnswer":"GREEN"},"note":"Zoë"}'
).encode()
OPENSSL_SHA256 = "b95507cfb50735384756ae290beaf782d853db47e122d28e6ed0b2b260054e2d"
OPENSSL_SHA512 = (
    "52d77c7e32b6c247bb055393bdfbd4c7b7b725301df6dd91e9c48096b3353f27"
    "1bd297dd98d091927935d24f41f09c80d6bedda7a769fdf773a89c074bb7c728"
)
OPENSSL_SHA1 = "b2c13f310b79e0769873f3ddde1a05b39fdab140"

REVIEW: dict[str, Any] = {
    "applicantId": "5cb56e8e0a975a35f333cb83",
    "inspectionId": "5cb56e8e0a975a35f333cb84",
    "applicantType": "individual",
    "correlationId": "req-7f1",
    "levelName": "basic-kyc-level",
    "sandboxMode": False,
    "externalUserId": "user_42",
    "type": "applicantReviewed",
    "reviewResult": {"reviewAnswer": "GREEN"},
    "reviewStatus": "completed",
    "createdAt": "2026-11-21 02:00:00+0000",
    "createdAtMs": "2026-11-21 02:00:00.704",
    "clientId": "acme",
}


def review(**changes: Any) -> bytes:
    return json.dumps({name: value for name, value in (REVIEW | changes).items() if value is not ...}).encode()


@pytest.mark.parametrize(
    ("secret", "body", "headers"),
    [
        (NOTES_SECRET, NOTES_BODY, {"X-Payload-Digest": NOTES_DIGEST, "X-Payload-Digest-Alg": "HMAC_SHA256_HEX"}),
        (NOTES_SECRET, NOTES_BODY, {"X-Payload-Digest": NOTES_DIGEST}),
        (NOTES_SECRET, NOTES_BODY, {"x-payload-digest": NOTES_DIGEST.upper()}),
        (OPENSSL_SECRET, OPENSSL_BODY, {"X-Payload-Digest": OPENSSL_SHA256}),
        (OPENSSL_SECRET, OPENSSL_BODY, {"X-Payload-Digest": OPENSSL_SHA512, "X-Payload-Digest-Alg": "HMAC_SHA512_HEX"}),
    ],
    ids=["named algorithm", "no algorithm", "other case", "openssl sha256", "openssl sha512"],
)
def test_a_digest_made_by_others_is_accepted(secret: SecretStr, body: bytes, headers: dict[str, str]) -> None:
    verify(headers, body, secret)


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, RefusalCode.MISSING_SIGNATURE),
        ({"X-Payload-Digest": ""}, RefusalCode.MISSING_SIGNATURE),
        (
            {"X-Payload-Digest": OPENSSL_SHA1, "X-Payload-Digest-Alg": "HMAC_SHA1_HEX"},
            RefusalCode.UNSUPPORTED_ALGORITHM,
        ),
        ({"X-Payload-Digest": OPENSSL_SHA256, "X-Payload-Digest-Alg": "sha256"}, RefusalCode.UNSUPPORTED_ALGORITHM),
        ({"X-Payload-Digest": OPENSSL_SHA256, "X-Payload-Digest-Alg": "HMAC_SHA512_HEX"}, RefusalCode.BAD_SIGNATURE),
        ({"X-Payload-Digest": OPENSSL_SHA512}, RefusalCode.BAD_SIGNATURE),
        ({"X-Payload-Digest": OPENSSL_SHA1}, RefusalCode.BAD_SIGNATURE),
        ({"X-Payload-Digest": OPENSSL_SHA256[:-1]}, RefusalCode.BAD_SIGNATURE),
        ({"X-Payload-Digest": "ünïcode \udcff"}, RefusalCode.BAD_SIGNATURE),
    ],
)
def test_a_digest_that_is_not_one_is_refused(headers: dict[str, str], code: RefusalCode) -> None:
    with pytest.raises(Refused) as refused:
        verify(headers, OPENSSL_BODY, OPENSSL_SECRET)
    assert refused.value.code is code
    assert "openssl-made-secret" not in str(refused.value)
    assert OPENSSL_SHA256 not in str(refused.value)


def test_every_flipped_bit_of_the_body_is_noticed() -> None:
    for position in range(len(OPENSSL_BODY)):
        flipped = bytearray(OPENSSL_BODY)
        flipped[position] ^= 1
        with pytest.raises(Refused, match="bad_signature"):
            verify({"X-Payload-Digest": OPENSSL_SHA256}, bytes(flipped), OPENSSL_SECRET)


def test_another_key_is_refused() -> None:
    with pytest.raises(Refused, match="bad_signature"):
        verify({"X-Payload-Digest": OPENSSL_SHA256}, OPENSSL_BODY, NOTES_SECRET)


def test_an_empty_secret_is_no_secret() -> None:
    with pytest.raises(ValueError, match="empty"):
        SumsubSource(SecretStr(""))


def test_an_approval_is_published_under_the_user() -> None:
    (said,) = SumsubSource(NOTES_SECRET).translate(review())
    assert isinstance(said, Publish)
    assert (said.topic, said.key, said.source) == (KYC_APPROVED, b"user_42", "sumsub")
    assert said.event_id == "req-7f1:applicantReviewed:2026-11-21 02:00:00.704"
    assert said.event.model_dump() == {
        "version": 1,
        "user_id": "user_42",
        "vendor": "sumsub",
        "applicant_id": "5cb56e8e0a975a35f333cb83",
        "vendor_event_id": said.event_id,
        "approved_at": "2026-11-21 02:00:00.704",
    }


def test_a_repeat_has_the_id_of_the_first_and_a_later_review_another() -> None:
    first, repeat, later = (
        translate(body) for body in (review(), review(clientId="acme2"), review(createdAtMs="2026-11-22 09:00:00.000"))
    )
    assert isinstance(first, Approved)
    assert isinstance(repeat, Approved)
    assert isinstance(later, Approved)
    assert first.event_id == repeat.event_id != later.event_id


@pytest.mark.parametrize(
    "changes", [{"correlationId": ...}, {"createdAtMs": ...}, {"correlationId": "ü"}, {"correlationId": "x" * 200}]
)
def test_without_usable_identity_the_bytes_are_the_id(changes: dict[str, Any]) -> None:
    said = translate(review(**changes))
    assert isinstance(said, Approved)
    assert said.event_id.startswith("sha256:")
    assert said == translate(review(**changes))


def test_the_vector_of_the_notes_is_an_approval() -> None:
    said = translate(NOTES_BODY)
    assert isinstance(said, Approved)
    assert (said.key, said.event.user_id, said.event.approved_at) == (b"usr_42", "usr_42", "unknown")


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"reviewResult": {"reviewAnswer": "RED", "reviewRejectType": "FINAL"}}, Verdict.REFUSED_FINAL),
        ({"reviewResult": {"reviewAnswer": "RED", "reviewRejectType": "RETRY"}}, Verdict.REFUSED_RETRY),
        ({"reviewResult": {"reviewAnswer": "RED"}}, Verdict.REFUSED),
        ({"reviewResult": {"reviewAnswer": "RED", "reviewRejectType": "NEW"}}, Verdict.REFUSED),
        ({"reviewResult": {"reviewAnswer": "YELLOW"}}, Verdict.OTHER_ANSWER),
        ({"reviewResult": {"reviewAnswer": "green"}}, Verdict.OTHER_ANSWER),
        ({"reviewResult": {}}, Verdict.OTHER_ANSWER),
        ({"reviewResult": None}, Verdict.OTHER_ANSWER),
        ({"reviewStatus": "onHold"}, Verdict.UNFINISHED),
        ({"reviewStatus": ...}, Verdict.UNFINISHED),
        ({"type": "applicantPending"}, Verdict.OTHER_TYPE),
        ({"type": "somethingNew"}, Verdict.OTHER_TYPE),
        ({"sandboxMode": True}, Verdict.SANDBOX_MODE),
    ],
)
def test_only_a_finished_green_review_approves(changes: dict[str, Any], verdict: Verdict) -> None:
    said = translate(review(**changes))
    assert isinstance(said, OtherVerdict)
    assert said.verdict is verdict
    (told,) = SumsubSource(NOTES_SECRET).translate(review(**changes))
    if verdict.startswith("refused"):
        assert isinstance(told, Publish)
        assert isinstance(told.event, KycRejected)
        assert (told.topic, told.key) == (KYC_REJECTED, told.event.user_id.encode())
        assert told.event.final == (verdict is Verdict.REFUSED_FINAL)
    else:
        assert isinstance(told, Ignored)
        assert told.code == verdict


def test_a_rejection_of_nobody_we_know_or_of_a_sandbox_is_ignored() -> None:
    red = {"reviewResult": {"reviewAnswer": "RED"}}
    for changes in ({"externalUserId": ...}, {"sandboxMode": True}):
        (told,) = SumsubSource(NOTES_SECRET).translate(review(**red, **changes))
        assert isinstance(told, Ignored)


def test_a_sandbox_approval_counts_only_where_it_is_accepted() -> None:
    assert isinstance(translate(review(sandboxMode=True), accept_sandbox_mode=True), Approved)


@pytest.mark.parametrize(
    ("body", "code", "reason"),
    [
        (b"", "not_json", "EOF"),
        (b"hello", "not_json", ""),
        (b'{"type": "applicantReviewed"', "not_json", "EOF"),
        (b"\xff\xfe", "not_json", ""),
        (b"[" * 100_000, "not_json", "recursion"),
        (b"[]", "wrong_schema", ""),
        (b"null", "wrong_schema", ""),
        (b"{}", "wrong_schema", "type"),
        (review(type=7), "wrong_schema", "type"),
        (review(externalUserId=...), "wrong_schema", "user_id"),
        (review(externalUserId=""), "wrong_schema", "user_id"),
        (review(externalUserId=42), "wrong_schema", "externalUserId"),
        (review(externalUserId="Zoë"), "wrong_schema", "user_id"),
        (review(applicantId=...), "wrong_schema", "applicant_id"),
        (review(reviewResult="GREEN"), "wrong_schema", "reviewResult"),
    ],
)
def test_what_cannot_be_read_is_said_to_be_so(body: bytes, code: str, reason: str) -> None:
    said = translate(body)
    assert isinstance(said, NotUnderstood)
    assert said.code == code
    assert reason in said.reason


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(
    st.binary() | st.dictionaries(st.sampled_from(sorted(REVIEW)), JSON).map(lambda d: json.dumps(REVIEW | d).encode())
)
def test_no_bytes_make_the_translator_raise(body: bytes) -> None:
    assert isinstance(translate(body), Approved | OtherVerdict | NotUnderstood)


@given(st.binary(), st.text(min_size=1), st.sampled_from(["HMAC_SHA256_HEX", "HMAC_SHA512_HEX"]))
def test_what_the_sandbox_signs_verifies(body: bytes, secret: str, algorithm: Any) -> None:
    verify(sign(body, SecretStr(secret), algorithm), body, SecretStr(secret))
