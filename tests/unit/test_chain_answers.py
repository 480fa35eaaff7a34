"""Every text that a node or a provider is known to answer a transaction with, and what we make of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chain.answers import _TABLE, Verdict, classify
from chain.errors import RpcRefused
from chain.outcomes import ERROR_STRING, _reason

# (who says so, its text, the row's code). Sources: go-ethereum core/txpool/errors.go, validation.go, core/error.go and
# internal/ethapi; bor is geth. erigon txnprovider/txpool/txpoolcfg. nethermind TxPool/AcceptTxResult.cs, the names of
# before 2026 and the texts since. reth rpc-eth-types and transaction-pool. foundry anvil/src/eth/error.rs. besu
# JsonRpcError. openethereum rpc/helpers/errors.rs. Support pages of Alchemy, Infura and QuickNode.
TEXTS = [
    ("geth", "already known", "already_known"),
    ("geth before 1.9", "known transaction: 0x5d3c", "already_known"),
    ("erigon", "existing txn with same hash", "already_known"),
    ("erigon before 3", "INTERNAL_ERROR: existing tx with same hash", "already_known"),
    ("nethermind", "AlreadyKnown", "already_known"),
    ("besu", "Known transaction", "already_known"),
    ("openethereum", "Transaction with the same hash was already imported.", "already_known"),
    ("anvil 1.7", "transaction already imported", "already_known"),
    ("anvil", "Tx: [0x5d3c] already Imported", "already_known"),
    ("geth", "nonce too low: next nonce 7, tx nonce 3", "nonce_too_low"),
    ("geth", "nonce too low: address 0xAb5801a7, tx: 3 state: 7", "nonce_too_low"),
    ("erigon", "nonce too low", "nonce_too_low"),
    ("erigon", "mined", "nonce_too_low"),
    ("nethermind", "OldNonce, Current nonce: 7, nonce of rejected tx: 3", "nonce_too_low"),
    ("besu", "Nonce too low", "nonce_too_low"),
    ("openethereum", "Transaction nonce is too low. Try incrementing the nonce.", "nonce_too_low"),
    ("geth", "nonce too high", "nonce_too_high"),
    ("anvil", "Nonce too high", "nonce_too_high"),
    ("nethermind", "NonceGap, Future nonce. Expected nonce: 7", "nonce_too_high"),
    ("geth", "gapped-nonce tx from delegated accounts", "nonce_too_high"),
    ("geth", "replacement transaction underpriced", "replacement_underpriced"),
    ("geth", "replacement transaction underpriced: new tx gas fee cap 9 <= 8 queued", "replacement_underpriced"),
    ("erigon", "could not replace existing tx", "replacement_underpriced"),
    ("erigon", "replaced by transaction with higher tip", "replacement_underpriced"),
    ("nethermind", "ReplacementNotAllowed", "replacement_underpriced"),
    ("nethermind", "OwnNonceAlreadyUsed", "replacement_underpriced"),
    ("reth", "insufficient gas price to replace existing transaction", "replacement_underpriced"),
    ("anvil", "Tx: [0x5d3c] insufficient gas price to replace existing transaction", "replacement_underpriced"),
    (
        "openethereum",
        "Transaction gas price 1 is too low. There is another transaction with same nonce in the queue",
        "replacement_underpriced",
    ),
    ("geth", "tx fee (1.21 ether) exceeds the configured cap (1.00 ether)", "over_node_fee_cap"),
    ("besu", "Transaction fee cap exceeded", "over_node_fee_cap"),
    ("geth", "transaction underpriced", "fee_too_low"),
    ("bor", "transaction underpriced: gas tip cap 1000000000, minimum needed 25000000000", "fee_too_low"),
    ("geth", "max fee per gas less than block base fee: address 0xAb58, maxFeePerGas: 1, baseFee: 7", "fee_too_low"),
    ("anvil", "max fee per gas less than block base fee", "fee_too_low"),
    ("erigon", "underpriced", "fee_too_low"),
    ("erigon", "fee too low", "fee_too_low"),
    ("nethermind", "FeeTooLow, MaxFeePerGas too low. MaxFeePerGas: 1, BaseFee: 7", "fee_too_low"),
    ("nethermind", "FeeTooLowToCompete", "fee_too_low"),
    ("besu", "Gas price below configured minimum gas price", "fee_too_low"),
    (
        "openethereum",
        "Transaction gas price is too low. It does not satisfy your node's minimal gas price",
        "fee_too_low",
    ),
    ("reth", "[0x5d3c] Transaction feeCap 1 below chain minimum.", "fee_too_low"),
    ("geth", "insufficient funds for gas * price + value: balance 0, tx cost 21, overshot 21", "insufficient_funds"),
    ("anvil", "Insufficient funds for gas * price + value", "insufficient_funds"),
    ("erigon", "insufficient funds", "insufficient_funds"),
    ("nethermind", "InsufficientFunds, Account balance: 0, cumulative cost: 21", "insufficient_funds"),
    ("besu", "Upfront cost exceeds account balance", "insufficient_funds"),
    ("geth", "transaction would cause overdraft", "insufficient_funds"),
    (
        "openethereum",
        "Insufficient funds. The account you tried to send transaction from does not have enough funds.",
        "insufficient_funds",
    ),
    ("geth", "txpool is full", "pool_full"),
    ("erigon", "pending sub-pool is full", "pool_full"),
    ("erigon", "baseFee sub-pool is full", "pool_full"),
    ("geth", "in-flight transaction limit reached for delegated accounts", "pool_full"),
    (
        "openethereum",
        "There are too many transactions in the queue. Your transaction was dropped due to limit.",
        "pool_full",
    ),
    (
        "Alchemy",
        "Your app has exceeded its compute units per second capacity. If you have retries enabled",
        "rate_limited",
    ),
    ("Infura", "daily request count exceeded, request rate limited", "rate_limited"),
    ("QuickNode", "credits limited to 500/sec", "rate_limited"),
    ("QuickNode", "50/second request limit reached - reduce calls per second", "rate_limited"),
    ("others", "Too Many Requests", "rate_limited"),
    ("geth", "invalid sender: invalid chain id for signer: have 1 want 137", "wrong_chain"),
    ("anvil", "invalid chain id for signer", "wrong_chain"),
    ("anvil", "Incompatible EIP-155 transaction, signed for another chain", "wrong_chain"),
    ("reth", "invalid chain ID", "wrong_chain"),
    ("geth", "intrinsic gas too low: gas 20000, minimum needed 21000", "intrinsic_gas_too_low"),
    ("geth", "insufficient gas for floor data gas cost: gas 21000, minimum needed 22000", "intrinsic_gas_too_low"),
    ("erigon", "IntrinsicGas", "intrinsic_gas_too_low"),
    ("besu", "Intrinsic gas exceeds gas limit", "intrinsic_gas_too_low"),
    (
        "openethereum",
        "Transaction gas is too low. There is not enough gas to cover minimal cost of the transaction",
        "intrinsic_gas_too_low",
    ),
    ("geth", "exceeds block gas limit", "gas_limit_too_high"),
    ("geth", "transaction gas limit too high (cap: 16777216, tx: 20000000)", "gas_limit_too_high"),
    ("erigon", "gas limit is too high", "gas_limit_too_high"),
    ("nethermind", "GasLimitExceeded, Gas limit: 30000000, gas limit of rejected tx: 40000000", "gas_limit_too_high"),
    ("besu", "Transaction gas limit exceeds block gas limit", "gas_limit_too_high"),
    ("anvil", "intrinsic gas too high -- CallerGasLimitMoreThanBlock", "gas_limit_too_high"),
    ("openethereum", "Supplied gas is beyond limit.", "gas_limit_too_high"),
    ("geth", "invalid sender", "invalid_sender"),
    ("nethermind", "FailedToResolveSender", "invalid_sender"),
    ("besu", "Invalid signature", "invalid_sender"),
    ("geth", "invalid transaction v, r, s values", "invalid_sender"),
    ("geth", "sender not an eoa: address 0xAb58, len(code): 7", "sender_not_eoa"),
    ("nethermind", "SenderIsContract", "sender_not_eoa"),
    ("openethereum", "Sender is banned in local queue.", "sender_denied"),
    ("geth", "max priority fee per gas higher than max fee per gas: address 0xAb58", "tip_above_fee_cap"),
    ("geth", "gas uint64 overflow", "overflow"),
    ("erigon", "GasUintOverflow", "overflow"),
    ("nethermind", "Int256Overflow", "overflow"),
    ("anvil", "nonce has max value", "overflow"),
    ("geth", "rlp: value size exceeds available input length", "malformed"),
    ("openethereum", "Invalid RLP data.", "malformed"),
    ("anvil", "Failed to decode signed transaction", "malformed"),
    ("geth", "typed transaction too short", "malformed"),
    ("geth", "transaction type not supported", "malformed"),
    ("geth", "oversized data: transaction size 200000, limit 131072", "malformed"),
    ("geth", "header not found", "unknown_answer"),
    ("nethermind", "Invalid", "unknown_answer"),
    ("a proxy", "Internal error", "unknown_answer"),
    ("a proxy", "request timed out", "unknown_answer"),
    ("a proxy", "", "unknown_answer"),
]
VERDICTS = {code: verdict for verdict, code, _ in _TABLE} | {"unknown_answer": Verdict.AGAIN}


def says(text: str, code: int = -32000) -> RpcRefused:
    return RpcRefused("http://node", "eth_sendRawTransaction", code, text)


@pytest.mark.parametrize(("who", "text", "code"), TEXTS, ids=[f"{who}: {text[:40]}" for who, text, _ in TEXTS])
def test_an_answer_is_understood(who: str, text: str, code: str) -> None:
    assert classify(says(text)) == (VERDICTS[code], code), who


def test_every_row_of_the_table_is_tried_with_a_text() -> None:
    assert {code for _, code, _ in _TABLE} <= {code for _, _, code in TEXTS}


def test_nothing_but_an_answer_for_these_very_bytes_is_taken_for_success() -> None:
    assert [code for verdict, code, _ in _TABLE if verdict is Verdict.KNOWN] == ["already_known"]


def test_what_may_pass_or_may_hide_a_success_is_never_a_refusal() -> None:
    for code in ("nonce_too_low", "replacement_underpriced", "insufficient_funds", "rate_limited", "wrong_chain"):
        assert VERDICTS[code] is Verdict.AGAIN


@pytest.mark.parametrize("code", [429, -32005, -32007])
def test_a_providers_limit_is_known_by_its_code(code: int) -> None:
    assert classify(says("intrinsic gas too low", code)) == (Verdict.AGAIN, "rate_limited")


@given(text=st.text(max_size=60), code=st.integers(-40_000, 600))
def test_a_text_that_nobody_knows_is_sent_again(text: str, code: int) -> None:
    answer = classify(says(text, code))
    assert answer.verdict is Verdict.AGAIN or answer.code in VERDICTS


@pytest.mark.parametrize("length", [2**62, 2**63, 2**256 - 1])
def test_a_reason_whose_length_no_text_has_is_told_in_the_node_s_words(length: int) -> None:
    data = ERROR_STRING + f"{32:064x}{length:064x}" + "61" * 32
    assert _reason(RpcRefused("https://a.example", "eth_call", 3, "execution reverted: why", data)) == "why"


def test_a_reason_has_no_character_that_a_database_refuses() -> None:
    data = ERROR_STRING + f"{32:064x}{3:064x}" + "610062" + "00" * 29
    for refusal in (("execution reverted", data), ("execution reverted: a\0b", ""), ("a\0b", "")):
        assert _reason(RpcRefused("https://a.example", "eth_call", 3, *refusal)) == "a\ufffdb"
