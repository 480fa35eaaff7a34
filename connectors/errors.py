"""Why a partner's system did not do what we asked.

ConnectorError (code)
 ├── Refused       the partner says no, for good: a definite 4xx (status, partner_code, message)
 ├── RateLimited   too many calls; nothing was done (retry_after_s, when the partner says it)
 ├── Unavailable   5xx, or no connection (sent: whether the request may have reached the partner)
 └── Unknown       time-out, lost or unreadable reply: it may have happened

A mutating call that ended Unknown, or Unavailable with `sent`, is repeated with the same idempotency key, never a new one.
What a partner sends us is refused by `connectors.webhooks.source.Refused`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar, Final


class ConnectorCode(StrEnum):
    """Stable codes: metric label, log field and dead-letter header alike."""

    REFUSED = "partner_refused"
    RATE_LIMITED = "partner_rate_limited"
    UNAVAILABLE = "partner_unavailable"
    UNKNOWN = "partner_outcome_unknown"


CREDENTIALS: Final = "our credentials"
KEY_USED: Final = 409
"""Status of a refusal that says that the idempotency key is known: something may have been made under it."""


class ConnectorError(Exception):
    """A call to a partner did not give a result. The text never holds a secret."""

    code: ClassVar[ConnectorCode]


class Refused(ConnectorError):
    """The partner understood and says no; the same request will be refused again."""

    code = ConnectorCode.REFUSED

    def __init__(self, status: int, partner_code: str | None, message: str, *, ours: str = "") -> None:
        """`ours`: what of ours it is about, whatever was asked for; 401 and 403 always are about our credentials."""
        super().__init__(f"{status} (code {partner_code}): {message}")
        self.ours = ours or (CREDENTIALS if status in (401, 403) else "")
        self.status = status
        self.partner_code = partner_code
        self.message = message


class RateLimited(ConnectorError):
    """The partner did nothing because we call too often."""

    code = ConnectorCode.RATE_LIMITED

    def __init__(self, retry_after_s: float | None = None) -> None:
        super().__init__("too many calls" if retry_after_s is None else f"too many calls; again in {retry_after_s:g} s")
        self.retry_after_s = retry_after_s


class Unavailable(ConnectorError):
    """The partner is not able to answer. With `sent` false the request never left, so nothing can have happened."""

    code = ConnectorCode.UNAVAILABLE

    def __init__(self, reason: str, *, sent: bool) -> None:
        super().__init__(reason)
        self.sent = sent


class Unknown(ConnectorError):
    """The request left and no readable answer came: it may have been done."""

    code = ConnectorCode.UNKNOWN


def of_a_look(error: BaseException) -> BaseException:
    """A look for what a call may have made has failed with this. That the look was refused says nothing of the call."""
    refused = isinstance(error, Refused) and not error.ours
    return Unknown(f"it was looked for: {error}") if refused else error
