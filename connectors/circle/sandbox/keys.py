"""Keys: the entity's RSA pair, the pair that signs notifications, and each chain's key pairs with valid addresses."""

from __future__ import annotations

import base64
import hashlib
import os
from dataclasses import dataclass, field
from functools import cache
from uuid import uuid4

from coincurve import PrivateKey
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from eth_utils.crypto import keccak
from solders.keypair import Keypair

_OAEP = padding.OAEP(mgf=padding.MGF1(hashes.SHA256()), algorithm=hashes.SHA256(), label=None)


@cache
def entity_key(bits: int) -> rsa.RSAPrivateKey:
    """One per process: a 4096-bit pair takes a second or more to make."""
    return rsa.generate_private_key(public_exponent=65_537, key_size=bits)


def entity_public_pem(key: rsa.RSAPrivateKey) -> str:
    info = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_key().public_bytes(serialization.Encoding.PEM, info).decode()


def decrypt(key: rsa.RSAPrivateKey, ciphertext: str) -> bytes | None:
    """The entity secret, or None when this is no ciphertext of ours."""
    try:
        return key.decrypt(base64.b64decode(ciphertext, validate=True), _OAEP)
    except ValueError:
        return None


class NotificationKey:
    """The P-256 pair that signs notifications, and its id."""

    def __init__(self) -> None:
        self.id = str(uuid4())
        self._private = ec.generate_private_key(ec.SECP256R1())

    @property
    def public_key(self) -> str:
        """Base64 of the DER SubjectPublicKeyInfo."""
        info = serialization.PublicFormat.SubjectPublicKeyInfo
        return base64.b64encode(self._private.public_key().public_bytes(serialization.Encoding.DER, info)).decode()

    def sign(self, body: bytes) -> str:
        """Base64 of the DER signature; another one at each call."""
        return base64.b64encode(self._private.sign(body, ec.ECDSA(hashes.SHA256()))).decode()


@dataclass(frozen=True)
class KeyPair:
    address: str
    private_key: bytes = field(repr=False)


def new_key_pair(family: str) -> KeyPair:
    """A fresh pair of `evm`, `solana` or `aptos`, its address in Circle's spelling (EVM: lower case)."""
    if family == "evm":
        secret = PrivateKey()
        return KeyPair("0x" + keccak(secret.public_key.format(compressed=False)[1:])[-20:].hex(), secret.secret)
    if family == "solana":
        pair = Keypair()
        return KeyPair(str(pair.pubkey()), bytes(pair))
    seed = os.urandom(32)
    public = ed25519.Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()
    single_signer = b"\x00"  # Aptos: the scheme's byte after the key
    return KeyPair("0x" + hashlib.sha3_256(public + single_signer).hexdigest(), seed)
