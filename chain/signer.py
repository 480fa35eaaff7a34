"""Who signs for a lane. `load_keystore` is the only place that sees a private key.

The key stays inside libsecp256k1's object: no attribute, repr, pickle, copy or exception of a signer shows it. A signer in
a remote key store is another class with the same two members.
"""

from __future__ import annotations

import hmac
import json
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn, Protocol

from coincurve import PrivateKey
from Crypto.Hash import keccak
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from chain.errors import BadKeystore, WrongPassword, WrongSigner

FILE_BYTES_MAX: Final = 100_000
SCRYPT_BYTES_MAX: Final = 1024**3
"""What deriving the key may take: 128 · n · r. The usual n = 262,144 and r = 8 take 256 MiB."""


class Signature(NamedTuple):
    r: int
    s: int
    """In the lower half of the curve's order (EIP-2): a node takes no other."""
    y_parity: int


class Signer(Protocol):
    @property
    def address(self) -> str:
        """0x and 40 hex digits in lower case."""
        ...

    def sign(self, digest: bytes) -> Signature:
        """Of 32 bytes. Deterministic (RFC 6979): signing again gives the same bytes, so a repeat is the same transaction."""
        ...


class KeySigner:
    """A key in this process's memory."""

    __slots__ = ("_sign", "address")

    def __init__(self, key: bytes) -> None:
        private = PrivateKey(key)
        point = private.public_key.format(compressed=False)[1:]
        self.address: Final = "0x" + _keccak(point)[-20:].hex()
        self._sign: Final = private.sign_recoverable

    def sign(self, digest: bytes) -> Signature:
        signed = self._sign(digest, hasher=None)
        return Signature(int.from_bytes(signed[:32], "big"), int.from_bytes(signed[32:64], "big"), signed[64])

    def __repr__(self) -> str:
        return f"KeySigner({self.address})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a signer does not leave its process")


def load_keystore(path: Path, password: str, expected: str | None = None) -> KeySigner:
    """The signer of a Web3 Secret Storage file, version 3 with scrypt, as geth and eth-account write it.

    Raises BadKeystore for the file, WrongPassword, and WrongSigner when it holds another address's key than `expected` (or
    than the file itself says). No text of theirs holds anything of the key or the password.
    """
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise BadKeystore(f"{path} is larger than {FILE_BYTES_MAX} bytes")
        stored = json.loads(path.read_bytes())
    except OSError as error:
        raise BadKeystore(f"{path}: {error.strerror}") from None
    except ValueError:
        raise BadKeystore(f"{path} is not JSON") from None
    try:
        signer = KeySigner(_decrypted(path, stored, password))
    except ValueError:  # zero, or beyond the curve's order
        raise BadKeystore(f"{path} holds no key of the curve") from None
    named = str(stored.get("address") or "").lower().removeprefix("0x")
    if named and f"0x{named}" != signer.address:
        raise WrongSigner(f"{path} says that it is of 0x{named[:40]} and holds the key of {signer.address}")
    if expected is not None and expected.lower() != signer.address:
        raise WrongSigner(f"{path} is of {signer.address}, expected {expected}")
    return signer


def _decrypted(path: Path, stored: Any, password: str) -> bytes:
    try:
        crypto = {name.lower(): value for name, value in stored.items()}["crypto"]
        params = crypto["kdfparams"]
        if (stored["version"], crypto["kdf"], crypto["cipher"]) != (3, "scrypt", "aes-128-ctr"):
            raise BadKeystore(f"{path}: version 3 with scrypt and aes-128-ctr is read, no other")
        n, r, p, length = (params[name] for name in ("n", "r", "p", "dklen"))
        positive = all(type(value) is int and value > 0 for value in (n, r, p, length))
        if not positive or 128 * n * r > SCRYPT_BYTES_MAX or p > 16 or length > 64:
            raise BadKeystore(f"{path}: scrypt's parameters are out of bounds")
        ciphertext, mac = (bytes.fromhex(crypto[name]) for name in ("ciphertext", "mac"))
        iv, salt = bytes.fromhex(crypto["cipherparams"]["iv"]), bytes.fromhex(params["salt"])
        derived = Scrypt(salt=salt, length=length, n=n, r=r, p=p).derive(password.encode())
        if len(derived) < 32 or len(ciphertext) != 32:
            raise BadKeystore(f"{path}: a key of {len(ciphertext)} bytes")
        if not hmac.compare_digest(_keccak(derived[16:32] + ciphertext), mac):
            raise WrongPassword(f"the password does not open {path}")
        reader = Cipher(algorithms.AES(derived[:16]), modes.CTR(iv)).decryptor()
        return reader.update(ciphertext) + reader.finalize()
    except (KeyError, TypeError, ValueError, AttributeError, MemoryError) as error:
        raise BadKeystore(f"{path} is no keystore: {type(error).__name__}") from None


def _keccak(data: bytes) -> bytes:
    return keccak.new(digest_bits=256, data=data).digest()
