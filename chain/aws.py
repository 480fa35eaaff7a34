"""Keys in AWS: a secret of Secrets Manager, and KMS, which signs and keeps its key.

botocore waits in threads: of a signer as many as it may ask at once. What KMS answers is taken for no signature of ours before
the address is recovered from it. KMS draws its nonces, so a digest that is signed again has another signature, and half of
them are in the upper half of the curve's order, which no node takes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Final, NoReturn

from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from botocore.session import get_session
from coincurve import PublicKey
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import load_der_public_key

from chain.errors import BadKeystore, BadSignature, KeyUnavailable
from chain.signer import Signature, address_of

ORDER: Final = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
"""Of secp256k1."""
CONNECT_S: Final = 1.0
READ_S: Final = 1.5
ATTEMPTS: Final = 2
"""Of one request; the SDK waits a little between them."""
SIGN_S_MAX: Final = 3.0
"""All signatures of a batch; the lane is locked meanwhile, and PostgreSQL ends a transaction that is idle for 5 s."""
THREADS: Final = 16
AT_ONCE: Final = 100
"""16 threads at 50 ms each make 320 a second, about what AWS allows an account."""

# at DEBUG it would log what Secrets Manager answers
logging.getLogger("botocore").setLevel(logging.INFO)


class KmsSigner:
    """A key that KMS keeps."""

    at_once_max: Final = AT_ONCE

    def __init__(self, client: Any, key: str, address: str) -> None:
        self.address: Final = address
        self._client = client
        self._key = key
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="kms")

    async def signatures(self, digests: Sequence[bytes]) -> Sequence[Signature]:
        loop = asyncio.get_running_loop()
        asked = [loop.run_in_executor(self._threads, self._sign, digest) for digest in digests]
        try:
            async with asyncio.timeout(SIGN_S_MAX):
                return await asyncio.gather(*asked)
        except TimeoutError:
            raise KeyUnavailable(f"kms:{self._key} has not signed {len(digests)} digests in {SIGN_S_MAX:g} s") from None
        finally:
            for one in asked:
                one.cancel()

    def _sign(self, digest: bytes) -> Signature:
        name = f"kms:{self._key}"
        found = _asked(
            name,
            self._client.sign,
            KeyId=self._key,
            Message=digest,
            MessageType="DIGEST",
            SigningAlgorithm="ECDSA_SHA_256",
        )
        return checked(name, found["Signature"], digest, self.address)

    def __repr__(self) -> str:
        return f"KmsSigner({self._key}, {self.address})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a signer does not leave its process")


def kms_signer(key: str) -> KmsSigner:
    """Its address is that of the public key that KMS shows. Raises KeyUnavailable, and BadKeystore for a key of another curve."""
    name = f"kms:{key}"
    client = _client("kms", name, key)
    found = _asked(name, client.get_public_key, KeyId=key)
    try:
        public = load_der_public_key(found["PublicKey"])
    except (ValueError, UnsupportedAlgorithm):  # UnsupportedAlgorithm is no ValueError
        raise BadKeystore(f"{name} is of a kind that is not read here") from None
    if not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, ec.SECP256K1):
        raise BadKeystore(f"{name} is no key of secp256k1 (ECC_SECG_P256K1)")
    if found.get("KeyUsage") != "SIGN_VERIFY":
        raise BadKeystore(f"{name} is not for signing (SIGN_VERIFY)")
    numbers = public.public_numbers()
    return KmsSigner(client, key, address_of(numbers.x.to_bytes(32, "big") + numbers.y.to_bytes(32, "big")))


def secret(name: str) -> str:
    """The text of a secret. Raises KeyUnavailable, and BadKeystore where it is bytes."""
    source = f"secretsmanager:{name}"
    found = _asked(source, _client("secretsmanager", source, name).get_secret_value, SecretId=name)
    text = found.get("SecretString")
    if not isinstance(text, str):
        raise BadKeystore(f"{source} is binary; its text must be a keystore")
    return text


def checked(name: str, der: bytes, digest: bytes, address: str) -> Signature:
    """A signature as a node takes it: low s, and the parity by which `address` is recovered. BadSignature for another's."""
    with suppress(ValueError):
        r, s = decode_dss_signature(der)
        if 0 < r < ORDER and 0 < s < ORDER:
            s = min(s, ORDER - s)
            for parity in (0, 1):
                whole = r.to_bytes(32, "big") + s.to_bytes(32, "big") + bytes((parity,))
                with suppress(Exception):  # no point of the curve has it
                    point = PublicKey.from_signature_and_message(whole, digest, hasher=None)
                    if address_of(point.format(compressed=False)[1:]) == address:
                        return Signature(r, s, parity)
    raise BadSignature(f"{name} answered what is no signature of {address}")


def _client(service: str, source: str, name: str) -> Any:
    parts = name.split(":")
    region = parts[3] if parts[0] == "arn" and len(parts) > 3 else None
    config = Config(
        connect_timeout=CONNECT_S,
        read_timeout=READ_S,
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
        max_pool_connections=THREADS,
    )
    return _asked(source, get_session().create_client, service, region_name=region, config=config)


def _asked(name: str, call: Any, *args: Any, **more: Any) -> Any:
    """Its errors say which, never what was sent or answered."""
    try:
        return call(*args, **more)
    except ClientError as error:
        raise KeyUnavailable(f"{name}: {error.response.get('Error', {}).get('Code', 'ClientError')}") from None
    except (BotoCoreError, ValueError) as error:  # ValueError: an endpoint that is no URL
        raise KeyUnavailable(f"{name}: {type(error).__name__}") from None
