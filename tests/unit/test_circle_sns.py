"""Amazon SNS: whose message is it? Nothing it says is believed, and nobody is called, before its addresses are Amazon's."""

from __future__ import annotations

import asyncio
import base64
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from connectors import errors
from connectors.circle.sns import CERTIFICATES_MAX, LOOKUPS_PER_MIN, SnsVerifier, Trust, read
from connectors.webhooks.source import RefusalCode, Refused

ARN = "arn:aws:sns:us-east-1:908968368384:sandbox_platform-notifications-topic"
CERTIFICATE = "https://sns.us-east-1.amazonaws.com/SimpleNotificationService-1.pem"
NOW = 1_780_000_000.0
KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)


def certificate(key: Any = KEY, days: int = 30) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "sns.amazonaws.com")])
    at = datetime.fromtimestamp(NOW, UTC)
    built = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
    built = built.not_valid_before(at - timedelta(days=60)).not_valid_after(at + timedelta(days=days))
    return built.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def message(
    kind: str = "Notification", version: str = "1", key: rsa.RSAPrivateKey = KEY, **fields: Any
) -> dict[str, Any]:
    """Signed by the words of Amazon's page, not by our own code."""
    body = {
        "Type": kind, "MessageId": "m-1", "TopicArn": ARN, "Message": '{"a": 1}\n', "Timestamp": "2026-11-21T02:00:00.000Z",
        "SignatureVersion": version, "SigningCertURL": CERTIFICATE, **fields,
    }  # fmt: skip
    order = ["Message", "MessageId", "Subject", "Timestamp", "TopicArn", "Type"]
    if kind != "Notification":
        order = ["Message", "MessageId", "SubscribeURL", "Timestamp", "Token", "TopicArn", "Type"]
    signed = "".join(f"{name}\n{body[name]}\n" for name in order if name in body).encode()
    algorithm = hashes.SHA256() if version == "2" else hashes.SHA1()
    body["Signature"] = base64.b64encode(key.sign(signed, padding.PKCS1v15(), algorithm)).decode()
    return body


class Amazon:
    """Serves certificates by address, and counts who asks."""

    def __init__(self, **served: bytes) -> None:
        self.served: dict[str, bytes | Exception] = {CERTIFICATE: certificate(), **served}
        self.asked: list[str] = []
        self.now = NOW

    async def get(self, url: str) -> bytes:
        self.asked.append(url)
        await asyncio.sleep(0)
        found = self.served.get(url, errors.Refused(404, None, "none"))
        if isinstance(found, Exception):
            raise found
        return found

    def verifier(self) -> SnsVerifier:
        return SnsVerifier(Trust(frozenset({ARN})), self.get, clock=lambda: self.now)


async def code_of(verifier: SnsVerifier, body: bytes | dict[str, Any]) -> RefusalCode:
    with pytest.raises(Refused) as refused:
        await verifier.verify(body if isinstance(body, bytes) else json.dumps(body).encode())
    return refused.value.code


@pytest.mark.parametrize("version", ["1", "2"])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"Subject": "a subject"},
        {"kind": "SubscriptionConfirmation", "SubscribeURL": "https://sns.us-east-1.amazonaws.com/?a=b", "Token": "t"},
        {"kind": "UnsubscribeConfirmation", "SubscribeURL": "https://sns.us-east-1.amazonaws.com/?a=b", "Token": "t"},
    ],
)
async def test_what_amazon_signed_is_accepted_and_the_certificate_is_fetched_once(
    version: str, given: dict[str, Any]
) -> None:
    amazon = Amazon()
    verifier = amazon.verifier()
    body = json.dumps(message(version=version, **given)).encode()
    await asyncio.gather(*(verifier.verify(body) for _ in range(5)))
    assert amazon.asked == [CERTIFICATE]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"Message": '{"a": 2}\n'}, RefusalCode.BAD_SIGNATURE),
        ({"MessageId": "m-2"}, RefusalCode.BAD_SIGNATURE),
        ({"Timestamp": "2026-11-22T02:00:00.000Z"}, RefusalCode.BAD_SIGNATURE),
        ({"Type": "UnsubscribeConfirmation"}, RefusalCode.BAD_SIGNATURE),
        ({"Subject": "added"}, RefusalCode.BAD_SIGNATURE),
        ({"SignatureVersion": "2"}, RefusalCode.BAD_SIGNATURE),
        ({"SignatureVersion": "3"}, RefusalCode.UNSUPPORTED_ALGORITHM),
        ({"Signature": "no base64"}, RefusalCode.BAD_SIGNATURE),
        ({"Signature": ""}, RefusalCode.BAD_SIGNATURE),
        ({"Signature": None}, RefusalCode.MISSING_SIGNATURE),
        ({"Type": "Other"}, RefusalCode.MISSING_SIGNATURE),
        ({"TopicArn": ARN.replace("908968368384", "123456789012")}, RefusalCode.UNKNOWN_TOPIC),
    ],
)
async def test_what_amazon_did_not_sign_for_us_is_refused(changes: dict[str, Any], code: RefusalCode) -> None:
    assert await code_of(Amazon().verifier(), message() | changes) is code


@pytest.mark.parametrize(
    "url",
    [
        "http://sns.us-east-1.amazonaws.com/a.pem",
        "https://sns.us-east-1.amazonaws.com.evil.test/a.pem",
        "https://evil.test/sns.us-east-1.amazonaws.com/a.pem",
        "https://sns.us-east-1.amazonaws.com@evil.test/a.pem",
        "https://user@sns.us-east-1.amazonaws.com/a.pem",
        "https://sns.us-east-1.amazonaws.com:444/a.pem",
        "https://sns.us.east.1.amazonaws.com/a.pem",
        "https://s3.us-east-1.amazonaws.com/a.pem",
        "https://sns.us-east-1.amazonaws.com/a.txt",
        "https://sns.us-east-1.amazonaws.com/a?x=.pem",
        "https://sns.us-east-1.amazonaws.com/a.pem?x=y",
        "https://sns.us-east-1.amazonaws.com\\@evil.test/a.pem",
        "https://sns.us-east-1.amazonaws.com/ a.pem",
        "https://sns.us-east-1.amazonaws.com/a.pem#f",
        "https://[::1/a.pem",
        "file:///etc/passwd.pem",
        "//sns.us-east-1.amazonaws.com/a.pem",
        "",
    ],
)
async def test_nobody_is_asked_for_a_certificate_but_amazon(url: str) -> None:
    amazon = Amazon()
    amazon.served[url] = certificate()
    assert await code_of(amazon.verifier(), message(SigningCertURL=url)) is RefusalCode.UNKNOWN_KEY
    assert amazon.asked == []


@pytest.mark.parametrize(
    ("served", "code"),
    [
        (b"no certificate", RefusalCode.KEY_UNAVAILABLE),
        (certificate(days=-1), RefusalCode.KEY_UNAVAILABLE),
        (certificate(ec.generate_private_key(ec.SECP256R1())), RefusalCode.UNSUPPORTED_ALGORITHM),
        (
            certificate(rsa.generate_private_key(public_exponent=65537, key_size=1024)),
            RefusalCode.UNSUPPORTED_ALGORITHM,
        ),
        (certificate(rsa.generate_private_key(public_exponent=65537, key_size=2048)), RefusalCode.BAD_SIGNATURE),
        (errors.Refused(404, None, "none"), RefusalCode.KEY_UNAVAILABLE),
        (errors.Unavailable("down", sent=True), RefusalCode.KEY_UNAVAILABLE),
        (TimeoutError(), RefusalCode.KEY_UNAVAILABLE),
    ],
)
async def test_a_certificate_that_is_none_or_cannot_be_had_verifies_nothing(served: Any, code: RefusalCode) -> None:
    amazon = Amazon()
    amazon.served[CERTIFICATE] = served
    assert await code_of(amazon.verifier(), message()) is code


async def test_a_certificate_that_could_not_be_had_is_asked_for_again() -> None:
    amazon = Amazon()
    verifier = amazon.verifier()
    amazon.served[CERTIFICATE] = errors.Unavailable("down", sent=True)
    assert await code_of(verifier, message()) is RefusalCode.KEY_UNAVAILABLE
    amazon.served[CERTIFICATE] = certificate()
    await verifier.verify(json.dumps(message()).encode())


async def test_a_certificate_that_we_keep_ends_with_its_time() -> None:
    amazon = Amazon()
    verifier = amazon.verifier()
    body = message()
    await verifier.verify(json.dumps(body).encode())
    amazon.now += timedelta(days=31).total_seconds()
    assert await code_of(verifier, body) is RefusalCode.KEY_UNAVAILABLE


async def test_invented_addresses_do_not_make_us_call_amazon_without_end_nor_forget_what_we_know() -> None:
    amazon = Amazon()
    verifier = amazon.verifier()
    await verifier.verify(json.dumps(message()).encode())
    invented = [message(SigningCertURL=CERTIFICATE.replace("1.pem", f"x{n}.pem")) for n in range(30)]
    codes = [await code_of(verifier, each) for each in invented]
    assert codes == [RefusalCode.KEY_UNAVAILABLE] * 30
    assert len(amazon.asked) == LOOKUPS_PER_MIN
    await verifier.verify(json.dumps(message()).encode())
    amazon.now += 60
    for number in range(2 * CERTIFICATES_MAX):
        amazon.now += 60
        url = CERTIFICATE.replace("1.pem", f"y{number}.pem")
        amazon.served[url] = certificate()
        await verifier.verify(json.dumps(message(SigningCertURL=url)).encode())
    assert len(verifier._certificates) == CERTIFICATES_MAX


async def test_a_flood_of_invented_addresses_does_not_keep_amazons_own_out() -> None:
    """Before we know any certificate: the flood has spent every look-up of the minute, whenever Amazon comes."""
    amazon = Amazon()
    verifier = amazon.verifier()
    for number in range(30):
        await code_of(verifier, message(SigningCertURL=CERTIFICATE.replace("1.pem", f"x{number}.pem")))
    assert await code_of(verifier, message()) is RefusalCode.KEY_UNAVAILABLE
    for number in range(30):
        await code_of(verifier, message(SigningCertURL=CERTIFICATE.replace("1.pem", f"y{number}.pem")))
    await verifier.verify(json.dumps(message()).encode())
    assert len(amazon.asked) == LOOKUPS_PER_MIN + 1


async def test_fields_that_are_not_signed_are_not_handed_on() -> None:
    body = json.dumps(
        message() | {"notificationType": "transactions.inbound", "notification": {"id": "forged"}}
    ).encode()
    await Amazon().verifier().verify(body)
    said = read(body)
    assert said is not None
    assert "forged" not in said.model_dump_json()


@given(
    st.binary()
    | st.text().map(str.encode)
    | st.dictionaries(st.text(), st.text()).map(lambda d: json.dumps(d).encode())
)
def test_no_bytes_are_a_message_by_accident_and_none_make_it_raise(body: bytes) -> None:
    assert read(body) is None
