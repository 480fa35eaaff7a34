"""Sumsub's webhooks: HMAC over the raw body, and what `applicantReviewed` says.

Headers: `X-Payload-Digest` (hex) and `X-Payload-Digest-Alg`. Sumsub also offers HMAC_SHA1_HEX; it is not accepted.
Source: docs.sumsub.com, webhook manager.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, SecretStr, ValidationError
from pydantic.alias_generators import to_camel

from connectors.kyc.approvals import not_understood
from connectors.webhooks.hmac_signed import check, digest, event_id_of
from connectors.webhooks.source import Ignored, NotUnderstood, Publish, RefusalCode, Refused, Translation, header
from topics.catalog import KYC_APPROVED, KYC_REJECTED
from topics.events import KycApproved, KycRejected

VENDOR: Final = "sumsub"
DIGEST_HEADER: Final = "X-Payload-Digest"
ALGORITHM_HEADER: Final = "X-Payload-Digest-Alg"
DEFAULT_ALGORITHM: Final = "HMAC_SHA256_HEX"
ALGORITHMS: Final = {"HMAC_SHA256_HEX": "sha256", "HMAC_SHA512_HEX": "sha512"}


class Verdict(StrEnum):
    """What a webhook that is no approval says."""

    REFUSED_FINAL = "refused_final"
    REFUSED_RETRY = "refused_retry"
    """The person may try again."""
    REFUSED = "refused"
    """RED with another or no reviewRejectType."""
    UNFINISHED = "unfinished"
    """A review whose reviewStatus is not `completed`."""
    OTHER_ANSWER = "other_answer"
    OTHER_TYPE = "other_type"
    """Not a review."""
    SANDBOX_MODE = "sandbox_mode"
    """An approval of a test person of Sumsub's sandbox, where such are not accepted."""


@dataclass(frozen=True, slots=True)
class Approved:
    event: KycApproved
    event_id: str
    key: bytes
    """The user id."""


@dataclass(frozen=True, slots=True)
class OtherVerdict:
    verdict: Verdict
    type: str
    answer: str | None
    event: KycRejected | None = None
    """A finished review that refused a customer of ours."""


class _ReviewResult(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, strict=True)
    review_answer: str | None = None
    review_reject_type: str | None = None


class _Body(BaseModel):
    """The fields we read; others are ignored. Values of enumerations are open: vendors add to them."""

    model_config = ConfigDict(alias_generator=to_camel, strict=True)
    type: str
    applicant_id: str | None = None
    external_user_id: str | None = None
    correlation_id: str | None = None
    review_status: str | None = None
    review_result: _ReviewResult | None = None
    sandbox_mode: bool | None = None
    created_at: str | None = None
    created_at_ms: str | None = None


def verify(headers: Mapping[str, str], body: bytes, secret: SecretStr) -> None:
    """Returns when Sumsub signed exactly these bytes. Raises Refused: missing_signature, unsupported_algorithm, bad_signature."""
    given = header(headers, DIGEST_HEADER)
    if given is None:
        raise Refused(RefusalCode.MISSING_SIGNATURE, f"the header {DIGEST_HEADER} is missing")
    algorithm = ALGORITHMS.get(header(headers, ALGORITHM_HEADER) or DEFAULT_ALGORITHM)
    if algorithm is None:
        raise Refused(RefusalCode.UNSUPPORTED_ALGORITHM, f"{ALGORITHM_HEADER} is none of {', '.join(ALGORITHMS)}")
    check(secret, body, [given], algorithm=algorithm)


def sign(
    body: bytes,
    secret: SecretStr,
    algorithm: Literal["HMAC_SHA256_HEX", "HMAC_SHA512_HEX"] = DEFAULT_ALGORITHM,
) -> dict[str, str]:
    """The headers Sumsub sends with `body`; for the local sandbox."""
    return {DIGEST_HEADER: digest(secret, body, ALGORITHMS[algorithm]).hex(), ALGORITHM_HEADER: algorithm}


def translate(body: bytes, *, accept_sandbox_mode: bool = False) -> Approved | OtherVerdict | NotUnderstood:
    """What verified bytes say. Pure and total.

    `accept_sandbox_mode`: whether an approval in Sumsub's sandbox, which anybody with our dashboard can simulate, counts.
    """
    try:
        said = _Body.model_validate_json(body)
    except ValidationError as error:
        return not_understood(error)
    answer = said.review_result.review_answer if said.review_result else None
    verdict = _other_verdict(said, answer, accept_sandbox_mode)
    if verdict is not None:
        return OtherVerdict(verdict, said.type, answer, _rejected(said, verdict, body, accept_sandbox_mode))
    event_id = _event_id(said, body)
    try:
        event = KycApproved.model_validate(
            {
                "user_id": said.external_user_id,
                "vendor": VENDOR,
                "applicant_id": said.applicant_id,
                "vendor_event_id": event_id,
                "approved_at": said.created_at_ms or said.created_at or "unknown",
            }
        )
    except ValidationError as error:
        return not_understood(error)
    return Approved(event, event_id, event.user_id.encode())


def _other_verdict(said: _Body, answer: str | None, accept_sandbox_mode: bool) -> Verdict | None:
    """None for an approval."""
    if said.type != "applicantReviewed":
        return Verdict.OTHER_TYPE
    if said.review_status != "completed":
        return Verdict.UNFINISHED
    if answer == "RED":
        reject_type = said.review_result.review_reject_type if said.review_result else None
        return {"FINAL": Verdict.REFUSED_FINAL, "RETRY": Verdict.REFUSED_RETRY}.get(reject_type or "", Verdict.REFUSED)
    if answer != "GREEN":
        return Verdict.OTHER_ANSWER
    if said.sandbox_mode and not accept_sandbox_mode:
        return Verdict.SANDBOX_MODE
    return None


def _rejected(said: _Body, verdict: Verdict, body: bytes, accept_sandbox_mode: bool) -> KycRejected | None:
    """None where nobody that we know was refused."""
    red = verdict in (Verdict.REFUSED, Verdict.REFUSED_FINAL, Verdict.REFUSED_RETRY)
    if not red or (said.sandbox_mode and not accept_sandbox_mode):
        return None
    try:
        return KycRejected.model_validate(
            {
                "user_id": said.external_user_id,
                "vendor": VENDOR,
                "applicant_id": said.applicant_id,
                "vendor_event_id": _event_id(said, body),
                "rejected_at": said.created_at_ms or said.created_at or "unknown",
                "final": verdict is Verdict.REFUSED_FINAL,
            }
        )
    except ValidationError:
        return None


def _event_id(said: _Body, body: bytes) -> str:
    """Sumsub sends no event id; these three are the same on every repeat of a webhook."""
    return event_id_of([said.correlation_id, said.type, said.created_at_ms], body)


class SumsubSource:
    """Sumsub for the bridge."""

    def __init__(self, secret: SecretStr, *, accept_sandbox_mode: bool = False) -> None:
        if not secret.get_secret_value():
            raise ValueError("the Sumsub webhook secret is empty: anybody could sign")
        self._secret = secret
        self._accept_sandbox_mode = accept_sandbox_mode

    @property
    def vendor(self) -> str:
        return VENDOR

    async def verify(self, headers: Mapping[str, str], body: bytes) -> None:
        verify(headers, body, self._secret)

    def translate(self, body: bytes) -> tuple[Translation, ...]:
        match translate(body, accept_sandbox_mode=self._accept_sandbox_mode):
            case Approved(event, event_id, key):
                return (Publish(KYC_APPROVED, key, event, event_id, VENDOR),)
            case OtherVerdict(event=KycRejected() as rejected):
                return (Publish(KYC_REJECTED, rejected.user_id.encode(), rejected, rejected.vendor_event_id, VENDOR),)
            case OtherVerdict(verdict, type_, answer):
                return (Ignored(verdict, f"type={type_[:100]!r} answer={(answer or '')[:100]!r}"),)
            case NotUnderstood() as unknown:
                return (unknown,)
