"""HMAC-SHA256 over the raw body: the one check, and a source whose sender signs so.

It is the scheme of KYC vendors, and of relays and older clients of ours. Circle itself signs otherwise.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from pydantic import SecretStr

from connectors.webhooks.source import RefusalCode, Refused, Translation, WebhookSource, header

Encoding = Literal["hex", "base64"]
WINDOW_S: Final = 300.0


def digest(secret: SecretStr, signed: bytes, algorithm: str = "sha256") -> bytes:
    return hmac.new(secret.get_secret_value().encode(), signed, algorithm).digest()


def check(
    secret: SecretStr, signed: bytes, given: Iterable[str], encoding: Encoding = "hex", algorithm: str = "sha256"
) -> None:
    """Returns when one of the given signatures is ours over these bytes; raises Refused (bad_signature). In constant time."""
    ours = encoded(digest(secret, signed, algorithm), encoding).encode()
    matches = [
        hmac.compare_digest(ours, (each.lower() if encoding == "hex" else each).encode(errors="replace"))
        for each in given
    ]
    if not any(matches):
        raise Refused(RefusalCode.BAD_SIGNATURE, "the signature is not over these bytes with our secret")


def encoded(raw: bytes, encoding: Encoding) -> str:
    return raw.hex() if encoding == "hex" else base64.b64encode(raw).decode()


def check_time(given: str, now_s: float, window_s: float) -> None:
    """Returns when `given`, unix seconds that are part of what is signed, is at most `window_s` from now. Raises Refused."""
    if not (given.isascii() and given.isdigit() and len(given) <= 12):
        raise Refused(RefusalCode.BAD_SIGNATURE, "the signature's time is not a number of seconds")
    if abs(now_s - int(given)) > window_s:
        raise Refused(RefusalCode.STALE_SIGNATURE, f"the signature's time is more than {window_s:g} s from ours")


@dataclass(frozen=True, slots=True)
class HmacScheme:
    """What a sender puts where. The signed text is `<time>.<body>`; without a time header, the body."""

    secret: SecretStr
    signature_header: str = "X-Signature"
    time_header: str | None = "X-Timestamp"
    """Unix seconds."""
    encoding: Encoding = "hex"
    window_s: float = WINDOW_S

    def __post_init__(self) -> None:
        if not self.secret.get_secret_value():
            raise ValueError("the webhook secret is empty: anybody could sign")

    def verify(self, headers: Mapping[str, str], body: bytes, now_s: float) -> None:
        """Raises Refused: missing_signature, bad_signature, stale_signature."""
        given = header(headers, self.signature_header)
        if given is None:
            raise Refused(RefusalCode.MISSING_SIGNATURE, f"the header {self.signature_header} is missing")
        if self.time_header is None:
            check(self.secret, body, [given], self.encoding)
            return
        at = header(headers, self.time_header)
        if at is None:
            raise Refused(RefusalCode.MISSING_SIGNATURE, f"the header {self.time_header} is missing")
        check(self.secret, at.encode(errors="replace") + b"." + body, [given], self.encoding)
        check_time(at, now_s, self.window_s)

    def sign(self, body: bytes, now_s: float) -> dict[str, str]:
        """The headers that a sender adds."""
        at = str(int(now_s))
        signed = body if self.time_header is None else at.encode() + b"." + body
        signature = {self.signature_header: encoded(digest(self.secret, signed), self.encoding)}
        return signature if self.time_header is None else {**signature, self.time_header: at}


class HmacSource:
    """Another source's words, signed by a relay of ours instead of by the vendor."""

    def __init__(self, inner: WebhookSource, scheme: HmacScheme, *, clock: Callable[[], float] = time.time) -> None:
        self._inner = inner
        self._scheme = scheme
        self._clock = clock

    @property
    def vendor(self) -> str:
        return self._inner.vendor

    async def verify(self, headers: Mapping[str, str], body: bytes) -> None:
        self._scheme.verify(headers, body, self._clock())

    def translate(self, body: bytes) -> tuple[Translation, ...]:
        return self._inner.translate(body)


def event_id_of(parts: Iterable[str | None], body: bytes) -> str:
    """An id for a vendor that sends none: what is the same on every repeat; where that is no id, the bytes' digest."""
    given = list(parts)
    if all(given):
        event_id = ":".join(part for part in given if part)
        if len(event_id) <= 200 and event_id.isascii() and event_id.isprintable() and event_id[0] != " ":
            return event_id
    return f"sha256:{hashlib.sha256(body).hexdigest()}"
