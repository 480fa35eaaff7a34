"""HMAC-SHA256 where it is configured: which header, which spelling, and how old it may be."""

from __future__ import annotations

import base64
import hashlib
import hmac

import pytest
from pydantic import SecretStr

from connectors.kyc.onfido import OnfidoSource
from connectors.webhooks.hmac_signed import HmacScheme, HmacSource
from connectors.webhooks.source import NotUnderstood, RefusalCode, Refused

SECRET = SecretStr("relay-secret")
BODY, AT = b'{"a": 1}', 1_780_000_000
MAC = hmac.new(b"relay-secret", f"{AT}.".encode() + BODY, hashlib.sha256).digest()
PLAIN = hmac.new(b"relay-secret", BODY, hashlib.sha256).digest()
TIMED = HmacScheme(SECRET)
UNTIMED = HmacScheme(SECRET, signature_header="X-Hub", time_header=None, encoding="base64")


@pytest.mark.parametrize(
    ("scheme", "headers"),
    [
        (TIMED, {"x-signature": MAC.hex(), "X-TIMESTAMP": str(AT)}),
        (TIMED, {"X-Signature": MAC.hex().upper(), "X-Timestamp": str(AT)}),
        (UNTIMED, {"X-Hub": base64.b64encode(PLAIN).decode()}),
        (TIMED, TIMED.sign(BODY, AT)),
        (UNTIMED, UNTIMED.sign(BODY, AT)),
    ],
)
def test_a_relays_signature_is_accepted(scheme: HmacScheme, headers: dict[str, str]) -> None:
    scheme.verify(headers, BODY, AT + 299)


@pytest.mark.parametrize(
    ("scheme", "headers", "now_s", "code"),
    [
        (TIMED, {}, AT, RefusalCode.MISSING_SIGNATURE),
        (TIMED, {"X-Signature": MAC.hex()}, AT, RefusalCode.MISSING_SIGNATURE),
        (TIMED, {"X-Timestamp": str(AT)}, AT, RefusalCode.MISSING_SIGNATURE),
        (TIMED, {"X-Signature": PLAIN.hex(), "X-Timestamp": str(AT)}, AT, RefusalCode.BAD_SIGNATURE),
        (TIMED, {"X-Signature": MAC.hex(), "X-Timestamp": str(AT + 1)}, AT, RefusalCode.BAD_SIGNATURE),
        (TIMED, {"X-Signature": MAC.hex(), "X-Timestamp": str(AT)}, AT + 301, RefusalCode.STALE_SIGNATURE),
        (TIMED, {"X-Signature": MAC.hex(), "X-Timestamp": str(AT)}, AT - 301, RefusalCode.STALE_SIGNATURE),
        (TIMED, TIMED.sign(BODY, AT) | {"X-Timestamp": "\udcff"}, AT, RefusalCode.BAD_SIGNATURE),
        (UNTIMED, {"X-Hub": PLAIN.hex()}, AT, RefusalCode.BAD_SIGNATURE),
        (UNTIMED, {"X-Hub": base64.b64encode(PLAIN).decode().lower()}, AT, RefusalCode.BAD_SIGNATURE),
    ],
)
def test_what_the_relay_did_not_sign_or_signed_long_ago_is_refused(
    scheme: HmacScheme, headers: dict[str, str], now_s: float, code: RefusalCode
) -> None:
    with pytest.raises(Refused) as refused:
        scheme.verify(headers, BODY, now_s)
    assert refused.value.code is code
    assert "relay-secret" not in str(refused.value) + repr(scheme)


def test_a_signed_time_that_is_no_time_is_refused() -> None:
    for odd in ("1e9", "-1", "9" * 13, "²"):
        mac = hmac.new(b"relay-secret", odd.encode() + b"." + BODY, hashlib.sha256).hexdigest()
        with pytest.raises(Refused) as refused:
            TIMED.verify({"X-Signature": mac, "X-Timestamp": odd}, BODY, AT)
        assert refused.value.code is RefusalCode.BAD_SIGNATURE


async def test_a_relayed_webhook_says_what_the_vendors_own_says() -> None:
    source = HmacSource(OnfidoSource(SecretStr("token")), TIMED, clock=lambda: AT)
    await source.verify(TIMED.sign(BODY, AT), BODY)
    assert source.vendor == "onfido"
    assert isinstance(source.translate(BODY)[0], NotUnderstood)


def test_an_empty_secret_is_no_secret() -> None:
    with pytest.raises(ValueError, match="empty"):
        HmacScheme(SecretStr(""))
