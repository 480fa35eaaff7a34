"""Onfido: is it theirs, and whom did they approve?"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from connectors.kyc.onfido import OnfidoSource, sign, translate, verify
from connectors.webhooks.source import Ignored, NotUnderstood, Publish, RefusalCode, Refused
from topics.catalog import KYC_APPROVED, KYC_REJECTED
from topics.events import KycApproved, KycRejected

# the vector of our contract notes
TOKEN = SecretStr("onfido-demo-token")
BODY = (
    b'{"payload":{"resource_type":"workflow_run","action":"workflow_run.completed",'
    b'"object":{"id":"1d2f","status":"approved"}}}'
)
DIGEST = "5100f6c477820e79312ad5da0498ab449aeebf9ed752c762cfa671425543d0a8"


def run(status: Any = "approved", action: str = "workflow_run.completed", **changes: Any) -> bytes:
    at = "2026-11-21T02:00:00Z"
    payload = {
        "resource_type": "workflow_run", "action": action,
        "object": {"id": "1d2f", "status": status, "completed_at_iso8601": at, "href": "https://api.eu.onfido.com/v3.6/x"},
        "resource": {"id": "1d2f", "applicant_id": "7c0a", "customer_user_id": "user_42", "status": status} | changes,
    }  # fmt: skip
    return json.dumps({"payload": payload}).encode()


@pytest.mark.parametrize("value", [DIGEST, DIGEST.upper()])
def test_a_signature_that_onfido_made_is_accepted(value: str) -> None:
    verify({"x-sha2-signature": value}, BODY, TOKEN)


@pytest.mark.parametrize(
    ("headers", "body", "code"),
    [
        ({}, BODY, RefusalCode.MISSING_SIGNATURE),
        ({"X-SHA2-Signature": ""}, BODY, RefusalCode.MISSING_SIGNATURE),
        ({"X-SHA2-Signature": DIGEST[:-1]}, BODY, RefusalCode.BAD_SIGNATURE),
        ({"X-SHA2-Signature": "0" * 64}, BODY, RefusalCode.BAD_SIGNATURE),
        ({"X-SHA2-Signature": "\udcffé"}, BODY, RefusalCode.BAD_SIGNATURE),
        ({"X-SHA2-Signature": DIGEST}, BODY + b"\n", RefusalCode.BAD_SIGNATURE),
    ],
)
def test_what_onfido_did_not_sign_is_refused(headers: dict[str, str], body: bytes, code: RefusalCode) -> None:
    with pytest.raises(Refused) as refused:
        verify(headers, body, TOKEN)
    assert refused.value.code is code
    assert "onfido-demo-token" not in str(refused.value)


async def test_an_approval_is_published_under_the_user() -> None:
    source = OnfidoSource(TOKEN)
    body = run()
    await source.verify(sign(body, TOKEN), body)
    (said,) = source.translate(body)
    event_id = "1d2f:workflow_run.completed:2026-11-21T02:00:00Z"
    event = KycApproved(
        user_id="user_42", vendor="onfido", applicant_id="7c0a", vendor_event_id=event_id,
        approved_at="2026-11-21T02:00:00Z",
    )  # fmt: skip
    assert said == Publish(KYC_APPROVED, b"user_42", event, event_id, "onfido")


async def test_a_refusal_is_published_under_the_user() -> None:
    source = OnfidoSource(TOKEN)
    body = run("declined")
    await source.verify(sign(body, TOKEN), body)
    event_id = "1d2f:workflow_run.completed:2026-11-21T02:00:00Z"
    rejected = KycRejected(
        user_id="user_42", vendor="onfido", applicant_id="7c0a", vendor_event_id=event_id,
        rejected_at="2026-11-21T02:00:00Z", final=True,
    )  # fmt: skip
    assert source.translate(body) == (Publish(KYC_REJECTED, b"user_42", rejected, event_id, "onfido"),)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (run("declined", customer_user_id=None), "refused"),
        (run("review"), "unfinished"),
        (run("abandoned"), "unfinished"),
        (run("Approved"), "other_answer"),
        (run(None), "other_answer"),
        (run(action="workflow_run.started"), "other_type"),
        (run(action="check.completed"), "other_type"),
    ],
)
def test_nobody_is_approved_by_another_event(body: bytes, code: str) -> None:
    said = translate(body)
    assert isinstance(said, Ignored)
    assert said.code == code


@pytest.mark.parametrize("body", [BODY, run(customer_user_id=None), run(applicant_id=3), b"[]", b"\xff"])
def test_an_approval_of_nobody_is_kept_and_approves_nobody(body: bytes) -> None:
    assert isinstance(translate(body), NotUnderstood)


@given(st.binary() | st.text().map(str.encode))
def test_no_bytes_make_it_raise(body: bytes) -> None:
    assert not isinstance(translate(body), Publish)


def test_an_empty_token_is_no_token() -> None:
    with pytest.raises(ValueError, match="empty"):
        OnfidoSource(SecretStr(""))
