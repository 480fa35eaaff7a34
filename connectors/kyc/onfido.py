"""Onfido's webhooks: `X-SHA2-Signature`, HMAC-SHA256 in hex over the raw body, and what `workflow_run.completed` says.

Onfido signs no time: a replay is harmless because it is the same event. Only Studio workflows are read; a classic `check.completed`
holds no result, which would have to be asked for. Source: onfido-python 6.2.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from pydantic import BaseModel, ConfigDict, SecretStr, ValidationError

from connectors.kyc.approvals import not_understood
from connectors.webhooks.hmac_signed import check, digest, event_id_of
from connectors.webhooks.source import Ignored, Publish, RefusalCode, Refused, Translation, header
from topics.catalog import KYC_APPROVED, KYC_REJECTED
from topics.events import KycApproved, KycRejected

VENDOR: Final = "onfido"
HEADER: Final = "X-SHA2-Signature"
COMPLETED: Final = "workflow_run.completed"
DECLINED: Final = "declined"
OTHER_VERDICTS: Final = {
    DECLINED: "refused",  # of nobody that we know
    "review": "unfinished",
    "abandoned": "unfinished",
    "error": "unfinished",
}
"""Of a completed run; another status is ignored as other_answer."""


class _Object(BaseModel):
    model_config = ConfigDict(strict=True)
    id: str | None = None
    status: str | None = None
    completed_at_iso8601: str | None = None


class _Resource(BaseModel):
    model_config = ConfigDict(strict=True)
    applicant_id: str | None = None
    customer_user_id: str | None = None


class _Payload(BaseModel):
    model_config = ConfigDict(strict=True)
    action: str
    object: _Object = _Object()
    resource: _Resource = _Resource()


class _Body(BaseModel):
    """The fields we read, others are ignored."""

    model_config = ConfigDict(strict=True)
    payload: _Payload


def verify(headers: Mapping[str, str], body: bytes, token: SecretStr) -> None:
    """Returns when Onfido signed exactly these bytes. Raises Refused: missing_signature, bad_signature."""
    given = header(headers, HEADER)
    if given is None:
        raise Refused(RefusalCode.MISSING_SIGNATURE, f"the header {HEADER} is missing")
    check(token, body, [given])


def sign(body: bytes, token: SecretStr) -> dict[str, str]:
    """The header Onfido sends with `body`; for tests and sandboxes."""
    return {HEADER: digest(token, body).hex()}


def translate(body: bytes) -> Translation:
    """What verified bytes say. Pure and total. The user is `customer_user_id`: a run without it names nobody that we know."""
    try:
        said = _Body.model_validate_json(body).payload
        if said.action != COMPLETED:
            return Ignored("other_type", f"action={said.action[:100]!r}")
        status = said.object.status or ""
        refused = _declined(said, body) if status == DECLINED else None
        if refused is not None:
            return refused
        if status != "approved":
            return Ignored(OTHER_VERDICTS.get(status, "other_answer"), f"status={status[:100]!r}")
        event_id = event_id_of([said.object.id, said.action, said.object.completed_at_iso8601], body)
        event = KycApproved.model_validate(
            {
                "user_id": said.resource.customer_user_id,
                "vendor": VENDOR,
                "applicant_id": said.resource.applicant_id,
                "vendor_event_id": event_id,
                "approved_at": said.object.completed_at_iso8601 or "unknown",
            }
        )
    except ValidationError as error:
        return not_understood(error)
    return Publish(KYC_APPROVED, event.user_id.encode(), event, event_id, VENDOR)


def _declined(said: _Payload, body: bytes) -> Translation | None:
    """None where it names nobody that we know."""
    event_id = event_id_of([said.object.id, said.action, said.object.completed_at_iso8601], body)
    try:
        event = KycRejected.model_validate(
            {
                "user_id": said.resource.customer_user_id,
                "vendor": VENDOR,
                "applicant_id": said.resource.applicant_id,
                "vendor_event_id": event_id,
                "rejected_at": said.object.completed_at_iso8601 or "unknown",
                "final": True,
            }
        )
    except ValidationError:
        return None
    return Publish(KYC_REJECTED, event.user_id.encode(), event, event_id, VENDOR)


class OnfidoSource:
    """Onfido for the bridge."""

    def __init__(self, token: SecretStr) -> None:
        if not token.get_secret_value():
            raise ValueError("the Onfido webhook token is empty: anybody could sign")
        self._token = token

    @property
    def vendor(self) -> str:
        return VENDOR

    async def verify(self, headers: Mapping[str, str], body: bytes) -> None:
        verify(headers, body, self._token)

    def translate(self, body: bytes) -> tuple[Translation, ...]:
        return (translate(body),)
