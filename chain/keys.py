"""Where keys are: the only place that loads one.

| source | the key | needs |
| --- | --- | --- |
| `/path`, `file:/path` | a file in Web3 Secret Storage, version 3 with scrypt | the password |
| `secretsmanager:NAME` | AWS Secrets Manager: the secret's text is the contents of such a file; an ARN is a name too | the password |
| `kms:KEY` | AWS KMS: a key ECC_SECG_P256K1 for SIGN_VERIFY by id, ARN or alias/…; it never leaves there | |

Credentials, region and endpoint of AWS are the SDK's own affair (AWS_REGION, AWS_ENDPOINT_URL, a role …); of an ARN its region is taken.
"""

from __future__ import annotations

import errno
import hmac
import json
from pathlib import Path
from typing import Any, Final, TypeVar

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from chain.errors import BadKeystore, KeyUnavailable, WrongPassword, WrongSigner
from chain.signer import KeySigner, Signer
from chain.transactions import keccak

BYTES_MAX: Final = 100_000
SCRYPT_BYTES_MAX: Final = 1024**3
"""What deriving the key may take: 128 · n · r. The usual n = 262,144 and r = 8 take 256 MiB."""
_NOT_NOW: Final = frozenset({errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT})
"""Of a file that may be read the next time."""

S = TypeVar("S", bound=Signer)


def needs_password(source: str) -> bool:
    return not source.startswith("kms:")


def load_key(source: str, password: str, expected: str | None = None) -> Signer:
    """The signer of a source. It may take seconds: AWS is asked, a password is stretched.

    Raises BadKeystore for what is no key, WrongPassword, WrongSigner when it is another address's than `expected` (or than
    the keystore itself says), KeyUnavailable when AWS, the disk or the memory does not give it now. No text of theirs holds anything of a key or a password.
    """
    kind, _, name = source.partition(":")
    if kind not in ("kms", "secretsmanager"):
        return load_keystore(Path(source.removeprefix("file:")), password, expected)
    from chain import aws  # it takes half a second, and most deployments need none of it

    if kind == "kms":
        return _of(expected, source, aws.kms_signer(name))
    return _of(expected, source, _opened(source, aws.secret(name), password))


def load_keystore(path: Path, password: str, expected: str | None = None) -> KeySigner:
    """The signer of a file, as geth and eth-account write it. Raises as load_key."""
    try:
        if path.stat().st_size > BYTES_MAX:
            raise BadKeystore(f"{path} is larger than {BYTES_MAX} bytes")
        text = path.read_bytes()
    except OSError as error:
        kind = KeyUnavailable if error.errno in _NOT_NOW else BadKeystore
        raise kind(f"{path}: {error.strerror}") from None
    return _of(expected, str(path), _opened(str(path), text, password))


def _opened(name: str, text: bytes | str, password: str) -> KeySigner:
    try:
        stored = json.loads(text)
    except ValueError:
        raise BadKeystore(f"{name} is not JSON") from None
    try:
        signer = KeySigner(_decrypted(name, stored, password))
    except ValueError:  # zero, or beyond the curve's order
        raise BadKeystore(f"{name} holds no key of the curve") from None
    named = str(stored.get("address") or "").lower().removeprefix("0x")
    if named and f"0x{named}" != signer.address:
        raise WrongSigner(f"{name} says that it is of 0x{named[:40]} and holds the key of {signer.address}")
    return signer


def _of(expected: str | None, name: str, signer: S) -> S:
    if expected is not None and expected.lower() != signer.address:
        raise WrongSigner(f"{name} is of {signer.address}, expected {expected}")
    return signer


def _decrypted(name: str, stored: Any, password: str) -> bytes:
    try:
        crypto = {field.lower(): value for field, value in stored.items()}["crypto"]
        params = crypto["kdfparams"]
        if (stored["version"], crypto["kdf"], crypto["cipher"]) != (3, "scrypt", "aes-128-ctr"):
            raise BadKeystore(f"{name}: version 3 with scrypt and aes-128-ctr is read, no other")
        n, r, p, length = (params[one] for one in ("n", "r", "p", "dklen"))
        positive = all(type(value) is int and value > 0 for value in (n, r, p, length))
        if not positive or 128 * n * r > SCRYPT_BYTES_MAX or p > 16 or length > 64:
            raise BadKeystore(f"{name}: scrypt's parameters are out of bounds")
        ciphertext, mac = (bytes.fromhex(crypto[one]) for one in ("ciphertext", "mac"))
        iv, salt = bytes.fromhex(crypto["cipherparams"]["iv"]), bytes.fromhex(params["salt"])
        derived = Scrypt(salt=salt, length=length, n=n, r=r, p=p).derive(password.encode())
        if len(derived) < 32 or len(ciphertext) != 32:
            raise BadKeystore(f"{name}: a key of {len(ciphertext)} bytes")
        if not hmac.compare_digest(keccak(derived[16:32] + ciphertext), mac):
            raise WrongPassword(f"the password does not open {name}")
        reader = Cipher(algorithms.AES(derived[:16]), modes.CTR(iv)).decryptor()
        return reader.update(ciphertext) + reader.finalize()
    except MemoryError:
        raise KeyUnavailable(f"{name}: there is no memory for deriving the key") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadKeystore(f"{name} is no keystore: {type(error).__name__}") from None
