"""Addresses, transaction hashes and assets: one canonical spelling, or a refusal with a code."""

from __future__ import annotations

from contextlib import suppress

import base58
import pytest
from eth_utils.address import to_checksum_address
from hypothesis import given
from hypothesis import strategies as st

from chain.addresses import check_address, check_tx_hash
from chain.assets import _USDC, Network, is_supported, usdc
from chain.errors import BadAddress, BadTxHash, ChainError, UnknownChain
from topics.events import Chain

EVM = "0xa0b86991c6218b36c1d19d4a2e9eb0ce3606eb48"
CHECKSUMMED = "0xA0b86991c6218b36c1d19D4a2e9Eb0cE3606eB48"
evm_addresses = st.binary(min_size=20, max_size=20).map(lambda raw: "0x" + raw.hex())
words = st.binary(min_size=32, max_size=32)


@given(evm_addresses)
def test_every_spelling_of_an_evm_address_has_one_canonical_form(address: str) -> None:
    upper = "0x" + address[2:].upper()
    assert {check_address("MATIC", text) for text in (address, upper, to_checksum_address(address))} == {address}


@given(evm_addresses, st.integers(2, 41))
def test_a_letter_of_the_wrong_case_is_a_wrong_checksum(address: str, place: int) -> None:
    right = to_checksum_address(address)
    wrong = right[:place] + right[place].swapcase() + right[place + 1 :]
    digits = wrong[2:]
    if wrong == right or digits in (digits.lower(), digits.upper()):
        return  # a digit has no case, and one case only is no checksum
    with pytest.raises(BadAddress):
        check_address("ETH", wrong)


@pytest.mark.parametrize(
    "text",
    ["", "0x", EVM[2:], EVM + "0", EVM[:-1], EVM + "\n", " " + EVM, "0X" + EVM[2:], EVM[:-1] + "g", EVM[:-1] + "٣"],
)
def test_what_is_not_an_evm_address_is_refused(text: str) -> None:
    with pytest.raises(BadAddress) as refused:
        check_address("ETH", text)
    assert refused.value.code == "bad_address"


@given(words)
def test_a_solana_address_is_any_32_bytes_on_the_curve_or_off(raw: bytes) -> None:
    text = base58.b58encode(raw).decode()
    assert check_address("SOL", text) == text


@given(st.binary(min_size=20, max_size=40).filter(lambda raw: len(raw) != 32))
def test_a_solana_address_of_another_length_is_refused(raw: bytes) -> None:
    with pytest.raises(BadAddress):
        check_address("SOL", base58.b58encode(raw).decode())


def test_an_aptos_address_is_the_long_form_only() -> None:
    text = "0x" + "0a" * 32
    assert check_address("APTOS", text) == text
    for wrong in ("0xa", "0x1", text[2:], text.upper(), text + "0"):
        with pytest.raises(BadAddress):
            check_address("APTOS", wrong)


@given(st.sampled_from([*Chain, "BTC", ""]), st.text())
def test_no_text_makes_a_check_raise_anything_else(chain: str, text: str) -> None:
    for check in (check_address, check_tx_hash):
        with suppress(ChainError):
            assert check(chain, check(chain, text)) == check(chain, text)


def test_an_unknown_chain_has_its_own_code() -> None:
    for check in (check_address, check_tx_hash):
        with pytest.raises(UnknownChain) as refused:
            check("BTC", EVM)
        assert refused.value.code == "unknown_chain"


@given(words)
def test_a_transaction_hash_has_one_spelling(raw: bytes) -> None:
    lower = "0x" + raw.hex()
    for chain in ("ETH", "MATIC", "APTOS"):
        assert check_tx_hash(chain, "0x" + raw.hex().upper()) == lower
        with pytest.raises(BadTxHash):
            check_tx_hash(chain, raw.hex())
    signature = base58.b58encode(raw + raw).decode()
    assert check_tx_hash("SOL", signature) == signature


def test_usdc_is_supported_everywhere_and_native_coins_nowhere() -> None:
    assert all(is_supported(chain, "USDC") for chain in Chain)
    for chain, native in (("ETH", "ETH"), ("MATIC", "POL"), ("MATIC", "MATIC"), ("SOL", "SOL"), ("BTC", "USDC")):
        assert not is_supported(chain, native)


def test_a_token_that_is_not_known_must_be_configured() -> None:
    assert usdc(Network.MAINNET, Chain.ETH) == EVM
    assert usdc(Network.TESTNET, Chain.MATIC) is None


@pytest.mark.parametrize(("network", "chain"), _USDC, ids=str)
def test_every_contract_that_is_built_in_has_a_right_checksum(network: Network, chain: Chain) -> None:
    assert usdc(network, chain) == check_address(chain, _USDC[network, chain])
