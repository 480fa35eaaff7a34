"""Persona: is it theirs, lately, and whom did they approve?"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from connectors.kyc.persona import WINDOW_S, PersonaSource, sign, translate, verify
from connectors.webhooks.source import Ignored, NotUnderstood, Publish, RefusalCode, Refused
from topics.catalog import KYC_APPROVED, KYC_REJECTED
from topics.events import KycApproved, KycRejected

# the vector of our contract notes
SECRET = SecretStr("wbhsec_demo")
BODY = b'{"data":{"type":"event","id":"evt_demo1","attributes":{"name":"inquiry.approved"}}}'
AT = 1763690400
DIGEST = "6d695dab12fa1fc4df583a692767e3fbfc4cc1b748bc6feac1b9eae1dc6ba34d"
FOREIGN = "0" * 64


def event(name: str = "inquiry.approved", reference: Any = "user_42") -> bytes:
    given = {
        "status": "approved", "reference-id": reference, "created-at": "2026-11-21T02:00:00.000Z",
        "completed-at": "2026-11-21T02:00:01.000Z",
    }  # fmt: skip
    inquiry = {"type": "inquiry", "id": "inq_2CVZ", "attributes": given, "relationships": {}}
    attributes = {"name": name, "created-at": "2026-11-21T02:00:02.000Z", "payload": {"data": inquiry}}
    return json.dumps({"data": {"type": "event", "id": "evt_XGuY", "attributes": attributes}}).encode()


def code_of(value: str | None, body: bytes = BODY, now_s: float = AT) -> RefusalCode:
    with pytest.raises(Refused) as refused:
        verify({} if value is None else {"Persona-Signature": value}, body, SECRET, now_s)
    assert "wbhsec" not in str(refused.value)
    assert DIGEST not in str(refused.value)
    return refused.value.code


@pytest.mark.parametrize(
    "value",
    [
        f"t={AT},v1={DIGEST}",
        f"t={AT},v1={DIGEST.upper()}",
        f"t={AT},v1={FOREIGN} t={AT},v1={DIGEST}",
        f"t={AT},v1={DIGEST} t={AT},v1={FOREIGN}",
        f"t={AT - 9},v1={FOREIGN} t={AT},v0=x,v1={DIGEST}",
    ],
    ids=["one", "upper case", "rotated, ours second", "rotated, ours first", "other fields"],
)
def test_a_signature_that_persona_made_is_accepted(value: str) -> None:
    verify({"persona-signature": value}, BODY, SECRET, AT + WINDOW_S)


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (None, RefusalCode.MISSING_SIGNATURE),
        ("", RefusalCode.MISSING_SIGNATURE),
        ("garbage", RefusalCode.BAD_SIGNATURE),
        (f"v1={DIGEST}", RefusalCode.BAD_SIGNATURE),
        (f"t={AT}", RefusalCode.BAD_SIGNATURE),
        (f"t={AT},v1=", RefusalCode.BAD_SIGNATURE),
        (f"t={AT},v1={FOREIGN}", RefusalCode.BAD_SIGNATURE),
        (f"t={AT + 1},v1={DIGEST}", RefusalCode.BAD_SIGNATURE),
        (f"t=+{AT},v1={DIGEST}", RefusalCode.BAD_SIGNATURE),
        (f"t={AT},v1=\udcffünïcode", RefusalCode.BAD_SIGNATURE),
        (f"t=²,v1={DIGEST}", RefusalCode.BAD_SIGNATURE),
        (" ".join([f"t={AT},v1={FOREIGN}"] * 20 + [f"t={AT},v1={DIGEST}"]), RefusalCode.BAD_SIGNATURE),
    ],
)
def test_what_persona_did_not_sign_is_refused(value: str | None, code: RefusalCode) -> None:
    assert code_of(value) is code


@pytest.mark.parametrize("late_s", [WINDOW_S + 1, -WINDOW_S - 1])
def test_a_replay_from_outside_the_window_is_refused(late_s: float) -> None:
    assert code_of(f"t={AT},v1={DIGEST}", now_s=AT + late_s) is RefusalCode.STALE_SIGNATURE


def test_another_body_is_refused() -> None:
    assert code_of(f"t={AT},v1={DIGEST}", body=BODY + b" ") is RefusalCode.BAD_SIGNATURE


async def test_an_approval_is_published_under_the_user() -> None:
    source = PersonaSource(SECRET, clock=lambda: AT)
    body = event()
    await source.verify(sign(body, SECRET, AT), body)
    (said,) = source.translate(body)
    assert said == Publish(
        KYC_APPROVED,
        b"user_42",
        KycApproved(
            user_id="user_42", vendor="persona", applicant_id="inq_2CVZ", vendor_event_id="evt_XGuY",
            approved_at="2026-11-21T02:00:01.000Z",
        ),
        "evt_XGuY",
        "persona",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("inquiry.expired", "unfinished"),
        ("inquiry.marked-for-review", "unfinished"),
        ("inquiry.Approved", "other_type"),
        ("report.ready", "other_type"),
    ],
)
def test_nobody_is_approved_by_another_event(name: str, code: str) -> None:
    said = translate(event(name))
    assert isinstance(said, Ignored)
    assert said.code == code


@pytest.mark.parametrize(("name", "final"), [("inquiry.declined", True), ("inquiry.failed", False)])
async def test_a_refusal_is_published_under_the_user_and_of_nobody_is_ignored(name: str, final: bool) -> None:
    source = PersonaSource(SECRET, clock=lambda: AT)
    body = event(name)
    await source.verify(sign(body, SECRET, AT), body)
    rejected = KycRejected(
        user_id="user_42", vendor="persona", applicant_id="inq_2CVZ", vendor_event_id="evt_XGuY",
        rejected_at="2026-11-21T02:00:01.000Z", final=final,
    )  # fmt: skip
    assert source.translate(body) == (Publish(KYC_REJECTED, b"user_42", rejected, "evt_XGuY", "persona"),)
    said = translate(event(name, reference=None))
    assert isinstance(said, Ignored)
    assert said.code == ("refused_final" if final else "refused_retry")


@pytest.mark.parametrize(
    "body",
    [
        BODY,
        event(reference=None),
        event(reference=""),
        event(reference=7),
        b"{}",
        b"\xff",
    ],
)
def test_an_approval_of_nobody_is_kept_and_approves_nobody(body: bytes) -> None:
    assert isinstance(translate(body), NotUnderstood)


@given(st.binary() | st.text().map(str.encode))
def test_no_bytes_make_it_raise(body: bytes) -> None:
    assert not isinstance(translate(body), Publish)


def test_an_empty_secret_is_no_secret() -> None:
    with pytest.raises(ValueError, match="empty"):
        PersonaSource(SecretStr(""))
