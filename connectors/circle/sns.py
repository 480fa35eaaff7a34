"""Amazon SNS messages: is it Amazon's, of a topic of ours, and unchanged? Source: docs.aws.amazon.com, SNS, verify signatures.

An SNS message carries its signature inside the JSON body and says where the certificate is. So nothing it says is believed before
the address of the certificate is one of Amazon's: https, `sns.<region>.amazonaws.com`, a path that ends in `.pem`, no redirects.
Only the signed fields are handed on: whoever repeats a genuine message with further fields has said nothing new.

Amazon gives a message up for good when it is answered 4xx. So what only tells that we have no certificate for now (or think so, by
a clock that is wrong) is key_unavailable: it is sent again.
"""

from __future__ import annotations

import asyncio
import base64
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Final, Literal
from urllib.parse import urlsplit

import orjson
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from connectors import errors
from connectors.circle.lookups import Lookups
from connectors.webhooks.source import RefusalCode, Refused

CERTIFICATES_MAX: Final = 16
"""Each came from Amazon's own host, so nobody else can fill the cache."""
LOOKUPS_PER_MIN: Final = 10
"""Certificates we have not seen: an attacker who invents addresses must not make us call Amazon without end."""
RSA_BITS_MIN: Final = 2048
FETCH_S_MAX: Final = 2.5

Fetch = Callable[[str], Awaitable[bytes]]
"""GET without redirects; raises connectors.errors.ConnectorError."""

_TYPES = Literal["Notification", "SubscriptionConfirmation", "UnsubscribeConfirmation"]
_URL = Annotated[str, StringConstraints(max_length=2_000)]
_ID = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[\x21-\x7e]+$")]


class Envelope(BaseModel):
    """The fields that are signed, and what the signature needs."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)
    Type: _TYPES
    MessageId: _ID
    TopicArn: _ID
    Message: str
    Timestamp: _ID
    SignatureVersion: str
    Signature: str
    SigningCertURL: _URL
    Subject: str | None = None
    SubscribeURL: _URL | None = None
    Token: str | None = None

    def signed(self) -> bytes:
        """Each present key and its value, a line each, in the order that Amazon prescribes."""
        names: tuple[str, ...] = ("Message", "MessageId", "Subject", "Timestamp", "TopicArn", "Type")
        if self.Type != "Notification":
            names = ("Message", "MessageId", "SubscribeURL", "Timestamp", "Token", "TopicArn", "Type")
        pairs = ((name, getattr(self, name)) for name in names)
        return "".join(f"{name}\n{value}\n" for name, value in pairs if value is not None).encode()


@dataclass(frozen=True, slots=True)
class Trust:
    """Whom we believe."""

    topic_arns: frozenset[str]
    """Of our subscriptions; any AWS account can make topics, and Amazon signs for all of them."""
    host: re.Pattern[str] = re.compile(r"https://sns\.[a-z0-9-]{1,40}\.amazonaws\.com", re.ASCII)
    """Scheme, host and port of certificates and confirmations. Another one is for sandboxes of ours only."""

    def allows(self, url: str) -> bool:
        try:
            parts = urlsplit(url)
            plain = parts.username is None and parts.password is None and not parts.fragment
        except ValueError:
            return False
        return (
            plain
            and url.isascii()
            and url.isprintable()
            and " " not in url
            and "\\" not in url
            and (self.host.fullmatch(f"{parts.scheme}://{parts.netloc}") is not None)
        )

    def is_certificate(self, url: str) -> bool:
        return self.allows(url) and urlsplit(url).path.endswith(".pem") and not urlsplit(url).query


class SnsVerifier:
    """Verifies messages, and keeps the certificates it has seen."""

    def __init__(
        self,
        trust: Trust,
        fetch: Fetch,
        *,
        lookups_per_min: int = LOOKUPS_PER_MIN,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.trust = trust
        self._fetch = fetch
        self._clock = clock
        self._certificates: OrderedDict[str, x509.Certificate] = OrderedDict()
        self._fetching = asyncio.Lock()
        self._budget = Lookups(lookups_per_min, clock)

    async def verify(self, body: bytes) -> None:
        """Returns when Amazon signed this message of a topic of ours. Raises Refused."""
        message = read(body)
        if message is None:
            raise Refused(RefusalCode.MISSING_SIGNATURE, "the body is no message of Amazon SNS")
        if message.TopicArn not in self.trust.topic_arns:
            raise Refused(RefusalCode.UNKNOWN_TOPIC, "the topic is none of ours")
        algorithm = {"1": hashes.SHA1, "2": hashes.SHA256}.get(message.SignatureVersion)
        if algorithm is None:
            raise Refused(RefusalCode.UNSUPPORTED_ALGORITHM, "SignatureVersion is neither 1 nor 2")
        try:
            signature = base64.b64decode(message.Signature, validate=True)
        except ValueError:
            raise Refused(RefusalCode.BAD_SIGNATURE, "the signature is not Base64") from None
        if not self.trust.is_certificate(message.SigningCertURL):
            raise Refused(RefusalCode.UNKNOWN_KEY, "SigningCertURL is not an address of Amazon SNS")
        key = await self._key(message.SigningCertURL)
        try:
            key.verify(signature, message.signed(), padding.PKCS1v15(), algorithm())
        except InvalidSignature:
            raise Refused(RefusalCode.BAD_SIGNATURE, "the signature is not over this message by that key") from None

    async def _key(self, url: str) -> rsa.RSAPublicKey:
        certificate = self._certificates.get(url)
        if certificate is None:
            async with self._fetching:  # whoever waited finds it here
                certificate = self._certificates.get(url) or await self._look_up(url)
        now = datetime.fromtimestamp(self._clock(), UTC)
        if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
            raise Refused(RefusalCode.KEY_UNAVAILABLE, "the certificate is not valid now, by our clock")
        key = certificate.public_key()
        if not isinstance(key, rsa.RSAPublicKey) or key.key_size < RSA_BITS_MIN:
            raise Refused(RefusalCode.UNSUPPORTED_ALGORITHM, f"the certificate's key is not RSA of {RSA_BITS_MIN} bits")
        return key

    async def _look_up(self, url: str) -> x509.Certificate:
        if not self._budget.spend(url):
            raise Refused(RefusalCode.KEY_UNAVAILABLE, "too many unknown certificates: we do not ask for more now")
        try:
            async with asyncio.timeout(FETCH_S_MAX):
                certificate = x509.load_pem_x509_certificate(await self._fetch(url))
        except (errors.ConnectorError, TimeoutError):
            raise Refused(RefusalCode.KEY_UNAVAILABLE, "the certificate cannot be fetched now") from None
        except ValueError:
            raise Refused(RefusalCode.KEY_UNAVAILABLE, "there is no certificate at SigningCertURL now") from None
        self._certificates[url] = certificate
        if len(self._certificates) > CERTIFICATES_MAX:
            self._certificates.popitem(last=False)
        return certificate


def read(body: bytes) -> Envelope | None:
    """The message; None for what is none."""
    try:
        return Envelope.model_validate(orjson.loads(body))
    except (orjson.JSONDecodeError, ValidationError):
        return None
