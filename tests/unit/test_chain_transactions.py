"""What we sign is what eth-account signs, byte for byte, and a key does not leave its signer."""

from __future__ import annotations

import copy
import json
import pickle
import resource
import traceback
from pathlib import Path
from typing import Any

import pytest
from eth_account import Account
from eth_utils.address import to_checksum_address
from hypothesis import given
from hypothesis import strategies as st

from chain.errors import BadKeystore, KeystoreError, KeyUnavailable, WrongPassword, WrongSigner
from chain.keys import load_keystore
from chain.signer import KeySigner
from chain.transactions import digest, signed, transfer_data, unsigned_call
from stablerail.dev.keystore import write_keystore
from stablerail.dev.usdc import calldata

KEY = bytes.fromhex("4c0883a69102937d6231471b5dbb6204fe5129617082792ae468d01a3f362318")
PASSWORD = "correct horse battery staple"
HALF_OF_THE_ORDER = 0x7FFFFFFFFFFFFFFFFFFFFFFFFFFFFFFF5D576E7357A4501DDFE92F46681B20A0

addresses = st.binary(min_size=20, max_size=20).map(lambda raw: "0x" + raw.hex())
keys = st.integers(1, 2**255).map(lambda number: number.to_bytes(32, "big"))


@given(
    key=keys,
    chain_id=st.integers(1, 2**40),
    nonce=st.integers(0, 2**63),
    priority_fee=st.integers(0, 2**80),
    more=st.integers(0, 2**80),
    gas_limit=st.integers(0, 2**40),
    token=addresses,
    data=st.one_of(
        st.binary(max_size=300), st.tuples(addresses, st.integers(0, 2**128)).map(lambda t: transfer_data(*t))
    ),
)
def test_a_transaction_is_byte_for_byte_what_eth_account_signs(
    key: bytes, chain_id: int, nonce: int, priority_fee: int, more: int, gas_limit: int, token: str, data: bytes
) -> None:
    fields = unsigned_call(
        chain_id=chain_id, nonce=nonce, priority_fee=priority_fee, max_fee=priority_fee + more, gas_limit=gas_limit,
        to=token, data=data,
    )  # fmt: skip
    ours = signed(fields, KeySigner(key).sign(digest(fields)))
    theirs = Account.sign_transaction(
        {
            "type": 2, "chainId": chain_id, "nonce": nonce, "maxPriorityFeePerGas": priority_fee,
            "maxFeePerGas": priority_fee + more, "gas": gas_limit, "to": to_checksum_address(token), "value": 0,
            "data": data, "accessList": [],
        },
        key,
    )  # fmt: skip
    assert ours.raw == bytes(theirs.raw_transaction)
    assert ours.tx_hash == "0x" + bytes(theirs.hash).hex()
    assert theirs.s <= HALF_OF_THE_ORDER


@given(key=keys)
def test_a_signer_has_the_address_of_its_key(key: bytes) -> None:
    assert KeySigner(key).address == Account.from_key(key).address.lower()


@given(to=addresses, amount=st.integers(0, 2**256 - 1))
def test_a_transfer_is_called_as_the_abi_has_it(to: str, amount: int) -> None:
    assert "0x" + transfer_data(to, amount).hex() == calldata("transfer(address,uint256)", to, amount)


@pytest.fixture
def keystore(tmp_path: Path) -> Path:
    path = tmp_path / "wallet.json"
    path.write_text(json.dumps(Account.encrypt(KEY, PASSWORD, kdf="scrypt", iterations=1024)))
    return path


def test_a_keystore_of_eth_account_opens(keystore: Path) -> None:
    address = Account.from_key(KEY).address
    assert load_keystore(keystore, PASSWORD).address == address.lower()
    assert load_keystore(keystore, PASSWORD, address).address == address.lower()


def test_eth_account_opens_a_keystore_of_ours(tmp_path: Path) -> None:
    address = write_keystore(tmp_path / "k", PASSWORD, KEY)
    assert bytes(Account.decrypt((tmp_path / "k").read_text(), PASSWORD)) == KEY
    assert (tmp_path / "k").stat().st_mode & 0o077 == 0
    assert load_keystore(tmp_path / "k", PASSWORD, address).address == address


def damaged(stored: dict[str, Any], *path: str, value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(stored)
    inner = changed
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return changed


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("version",), 4),
        (("crypto",), None),
        (("crypto", "kdf"), "pbkdf2"),
        (("crypto", "cipher"), "aes-128-cbc"),
        (("crypto", "ciphertext"), "zz"),
        (("crypto", "mac"), 7),
        (("crypto", "cipherparams", "iv"), "00"),
        (("crypto", "kdfparams", "n"), 2**40),
        (("crypto", "kdfparams", "n"), 1023),
        (("crypto", "kdfparams", "n"), "1024"),
        (("crypto", "kdfparams", "r"), -1),
        (("crypto", "kdfparams", "dklen"), 16),
        (("crypto", "kdfparams", "p"), 1000),
    ],
)
def test_a_damaged_keystore_is_refused_with_its_name(keystore: Path, path: tuple[str, ...], value: Any) -> None:
    keystore.write_text(json.dumps(damaged(json.loads(keystore.read_text()), *path, value=value)))
    with pytest.raises(BadKeystore, match="wallet"):
        load_keystore(keystore, PASSWORD)


@pytest.mark.parametrize("content", ["", "[]", "null", "{}", '"x"', "\xff", "[" * 50_000])
def test_what_is_no_keystore_is_refused(keystore: Path, content: str) -> None:
    keystore.write_text(content, encoding="latin-1")
    with pytest.raises(BadKeystore):
        load_keystore(keystore, PASSWORD)


def test_a_missing_file_a_wrong_password_and_another_key_are_told_apart(keystore: Path, tmp_path: Path) -> None:
    with pytest.raises(BadKeystore, match="No such file"):
        load_keystore(tmp_path / "none", PASSWORD)
    with pytest.raises(BadKeystore, match="directory"):
        load_keystore(tmp_path, PASSWORD)
    with pytest.raises(WrongPassword):
        load_keystore(keystore, "guess")
    with pytest.raises(WrongSigner, match="expected 0x0123"):
        load_keystore(keystore, PASSWORD, "0x0123")
    keystore.write_text(json.dumps(damaged(json.loads(keystore.read_text()), "address", value="ab" * 20)))
    with pytest.raises(WrongSigner):
        load_keystore(keystore, PASSWORD)


def test_a_keystore_that_cannot_be_read_now_is_no_wrong_one(keystore: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who takes it for one ends for good where the next start would have found the key."""
    files, more = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, more))
    try:
        with pytest.raises(KeyUnavailable, match="Too many open files"):
            load_keystore(keystore, PASSWORD)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, more))

    def derive(*_: object) -> bytes:
        raise MemoryError("Not enough memory to derive key.")

    monkeypatch.setattr("chain.keys.Scrypt.derive", derive)
    with pytest.raises(KeyUnavailable, match="no memory"):
        load_keystore(keystore, PASSWORD)


def test_a_key_and_a_password_are_in_no_text_pickle_or_exception(keystore: Path) -> None:
    signer = load_keystore(keystore, PASSWORD)
    shown = [repr(signer), str(signer), f"{signer!s}", repr({"signer": signer})]
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="does not leave"):
            attempt(signer)  # type: ignore[operator]
    with pytest.raises(KeystoreError) as caught:
        load_keystore(keystore, "a guessed password")
    shown += traceback.format_exception(caught.value)
    with pytest.raises(Exception) as caught_signing:
        signer.sign(b"short")
    shown += traceback.format_exception(caught_signing.value)
    for text in shown:
        assert KEY.hex() not in text
        assert repr(KEY) not in text
        assert PASSWORD not in text
        assert "guessed" not in text.replace('a guessed password")', "")  # the test's own source line
