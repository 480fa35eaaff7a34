"""Persona's webhooks: `Persona-Signature: t=<unix>,v1=<hex>` over `<t>.<body>`, and what `inquiry.approved`,
`inquiry.declined` and `inquiry.failed` say.

While a secret is rotated the header has two such pairs with a space between; one that is ours is enough. The time is signed,
so what is older than the window is refused; within it the event's id makes a replay harmless. The window is a day, because it is
not known whether Persona signs a late repeat anew. Source: docs.withpersona.com, webhooks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Final

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError

from connectors.kyc.approvals import not_understood
from connectors.webhooks.hmac_signed import check, check_time, digest
from connectors.webhooks.source import Ignored, Publish, RefusalCode, Refused, Translation, header
from topics.catalog import KYC_APPROVED, KYC_REJECTED
from topics.events import KycApproved, KycRejected

VENDOR: Final = "persona"
HEADER: Final = "Persona-Signature"
WINDOW_S: Final = 24 * 3600.0
PAIRS_MAX: Final = 8

APPROVED: Final = "inquiry.approved"
REFUSALS: Final = {"inquiry.declined": "refused_final", "inquiry.failed": "refused_retry"}
"""Ignored under these codes where they name nobody that we know."""
OTHER_VERDICTS: Final = {
    "inquiry.expired": "unfinished",
    "inquiry.marked-for-review": "unfinished",
}
"""Further names are ignored as other_type: Persona has dozens, and adds to them."""


class _Attributes(BaseModel):
    model_config = ConfigDict(strict=True)
    status: str | None = None
    reference_id: str | None = Field(None, alias="reference-id")
    completed_at: str | None = Field(None, alias="completed-at")
    decisioned_at: str | None = Field(None, alias="decisioned-at")


class _Inquiry(BaseModel):
    model_config = ConfigDict(strict=True)
    id: str
    attributes: _Attributes


class _Payload(BaseModel):
    model_config = ConfigDict(strict=True)
    data: _Inquiry


class _EventAttributes(BaseModel):
    model_config = ConfigDict(strict=True)
    name: str
    created_at: str | None = Field(None, alias="created-at")
    payload: dict[str, object] | None = None


class _Event(BaseModel):
    model_config = ConfigDict(strict=True)
    id: str
    attributes: _EventAttributes


class _Body(BaseModel):
    """JSON:API; the fields we read, others are ignored."""

    model_config = ConfigDict(strict=True)
    data: _Event


def verify(
    headers: Mapping[str, str], body: bytes, secret: SecretStr, now_s: float, window_s: float = WINDOW_S
) -> None:
    """Returns when Persona signed exactly these bytes, lately. Raises Refused: missing_signature, bad_signature,
    stale_signature."""
    given = header(headers, HEADER)
    if given is None:
        raise Refused(RefusalCode.MISSING_SIGNATURE, f"the header {HEADER} is missing")
    problem: Refused | None = None
    for at, signature in _pairs(given):
        try:
            check(secret, at.encode() + b"." + body, [signature])
        except Refused as refused:
            problem = problem or refused
        else:
            check_time(at, now_s, window_s)
            return
    raise problem or Refused(RefusalCode.BAD_SIGNATURE, f"{HEADER} has no pair of t and v1")


def _pairs(text: str) -> list[tuple[str, str]]:
    """(t, v1) of each pair; what is not one is passed over."""
    pairs = []
    for part in text.split(" ")[:PAIRS_MAX]:
        fields = dict(field.partition("=")[::2] for field in part.split(",")[:PAIRS_MAX])
        at, signature = fields.get("t", ""), fields.get("v1", "")
        if at.isascii() and at.isdigit() and signature:
            pairs.append((at, signature))
    return pairs


def sign(body: bytes, secret: SecretStr, now_s: float) -> dict[str, str]:
    """The header Persona sends with `body`; for tests and sandboxes."""
    at = str(int(now_s))
    return {HEADER: f"t={at},v1={digest(secret, at.encode() + b'.' + body).hex()}"}


def translate(body: bytes) -> Translation:
    """What verified bytes say. Pure and total."""
    try:
        said = _Body.model_validate_json(body).data
        name = said.attributes.name
        if name in REFUSALS:
            return _refused(said)
        if name != APPROVED:
            return Ignored(OTHER_VERDICTS.get(name, "other_type"), f"name={name[:100]!r}")
        inquiry = _Payload.model_validate(said.attributes.payload or {}).data
        event = KycApproved.model_validate(
            {
                "user_id": inquiry.attributes.reference_id,
                "vendor": VENDOR,
                "applicant_id": inquiry.id,
                "vendor_event_id": said.id,
                "approved_at": inquiry.attributes.decisioned_at
                or inquiry.attributes.completed_at
                or said.attributes.created_at
                or "unknown",
            }
        )
    except ValidationError as error:
        return not_understood(error)
    return Publish(KYC_APPROVED, event.user_id.encode(), event, said.id, VENDOR)


def _refused(said: _Event) -> Translation:
    """Persona's last word on a customer, whom it may have approved before."""
    name = said.attributes.name
    try:
        inquiry = _Payload.model_validate(said.attributes.payload or {}).data
        event = KycRejected.model_validate(
            {
                "user_id": inquiry.attributes.reference_id,
                "vendor": VENDOR,
                "applicant_id": inquiry.id,
                "vendor_event_id": said.id,
                "rejected_at": inquiry.attributes.decisioned_at
                or inquiry.attributes.completed_at
                or said.attributes.created_at
                or "unknown",
                "final": name == "inquiry.declined",
            }
        )
    except ValidationError:
        return Ignored(REFUSALS[name], f"name={name[:100]!r}")
    return Publish(KYC_REJECTED, event.user_id.encode(), event, said.id, VENDOR)


class PersonaSource:
    """Persona for the bridge."""

    def __init__(
        self, secret: SecretStr, *, window_s: float = WINDOW_S, clock: Callable[[], float] = time.time
    ) -> None:
        if not secret.get_secret_value():
            raise ValueError("the Persona webhook secret is empty: anybody could sign")
        self._secret = secret
        self._window_s = window_s
        self._clock = clock

    @property
    def vendor(self) -> str:
        return VENDOR

    async def verify(self, headers: Mapping[str, str], body: bytes) -> None:
        verify(headers, body, self._secret, self._clock(), self._window_s)

    def translate(self, body: bytes) -> tuple[Translation, ...]:
        return (translate(body),)
