"""Keystore files for a hot wallet on a chain of this machine. They are made weak, so that opening one takes no time."""

from __future__ import annotations

import json
import secrets
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from chain.signer import KeySigner
from chain.transactions import keccak

SCRYPT_N: Final = 1024


def write_keystore(path: Path, password: str, key: bytes | None = None) -> str:
    """Web3 Secret Storage, version 3, of a new key when none is given; its address."""
    key = secrets.token_bytes(32) if key is None else key
    salt, iv = secrets.token_bytes(32), secrets.token_bytes(16)
    derived = Scrypt(salt=salt, length=32, n=SCRYPT_N, r=8, p=1).derive(password.encode())
    writer = Cipher(algorithms.AES(derived[:16]), modes.CTR(iv)).encryptor()
    ciphertext = writer.update(key) + writer.finalize()
    address = KeySigner(key).address
    crypto = {
        "cipher": "aes-128-ctr",
        "cipherparams": {"iv": iv.hex()},
        "ciphertext": ciphertext.hex(),
        "kdf": "scrypt",
        "kdfparams": {"dklen": 32, "n": SCRYPT_N, "r": 8, "p": 1, "salt": salt.hex()},
        "mac": keccak(derived[16:32] + ciphertext).hex(),
    }
    path.touch(mode=0o600)
    path.write_text(json.dumps({"version": 3, "address": address[2:], "crypto": crypto}))
    return address
