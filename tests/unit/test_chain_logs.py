"""Transfer logs are decoded strictly; finality counts the blocks above."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chain.errors import BadLog
from chain.finality import is_final
from chain.logs import TRANSFER_TOPIC, TransferLog, decode_transfer, topic_of, transfers_of

hashes = st.binary(min_size=32, max_size=32).map(lambda raw: "0x" + raw.hex())
addresses = st.binary(min_size=20, max_size=20).map(lambda raw: "0x" + raw.hex())
transfers = st.builds(
    TransferLog,
    block_hash=hashes,
    block_number=st.integers(0, 2**63 - 1),
    tx_hash=hashes,
    log_index=st.integers(0, 2**31 - 1),
    token=addresses,
    sender=addresses,
    to=addresses,
    amount=st.integers(0, 2**96),
)
ONE = TransferLog("0x" + "b" * 64, 7, "0x" + "c" * 64, 3, "0x" + "1" * 40, "0x" + "2" * 40, "0x" + "3" * 40, 25)


def raw_of(transfer: TransferLog) -> dict[str, Any]:
    return {
        "address": transfer.token,
        "topics": [TRANSFER_TOPIC, topic_of(transfer.sender), topic_of(transfer.to)],
        "data": f"0x{transfer.amount:064x}",
        "blockHash": transfer.block_hash,
        "blockNumber": hex(transfer.block_number),
        "transactionHash": transfer.tx_hash,
        "transactionIndex": "0x0",
        "logIndex": hex(transfer.log_index),
        "removed": False,
    }


@given(transfers)
def test_a_transfer_is_read_back_as_it_was_written(transfer: TransferLog) -> None:
    assert decode_transfer(raw_of(transfer)) == transfer


def test_a_removed_log_is_ignored() -> None:
    assert decode_transfer(raw_of(ONE) | {"removed": True}) is None


@pytest.mark.parametrize(
    "change",
    [
        {"topics": [TRANSFER_TOPIC]},
        {"topics": [TRANSFER_TOPIC, topic_of(ONE.to), topic_of(ONE.to), "0x" + "0" * 64]},  # an NFT's transfer
        {"topics": ["0x" + "0" * 64, topic_of(ONE.to), topic_of(ONE.to)]},
        {"topics": [TRANSFER_TOPIC, topic_of(ONE.to), "0x" + "1" * 64]},
        {"data": "0x"},
        {"data": "0x1"},
        {"data": f"0x{2**96 + 1:064x}"},
        {"data": "0x" + "0" * 128},
        {"blockHash": None},
        {"blockNumber": None},
        {"blockNumber": 7},
        {"blockNumber": "0x" + "f" * 16},
        {"logIndex": "0x80000000"},
        {"logIndex": "3"},
        {"removed": "false"},
        {"address": "0x1"},
    ],
)
def test_a_malformed_log_is_an_error_with_a_code(change: dict[str, Any]) -> None:
    with pytest.raises(BadLog) as refused:
        decode_transfer(raw_of(ONE) | change)
    assert refused.value.code == "bad_log"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner)
)


@given(st.sampled_from([*raw_of(ONE), "none"]), json_values, st.booleans())
def test_no_json_makes_decoding_raise_anything_but_a_bad_log(field: str, value: Any, missing: bool) -> None:
    raw = raw_of(ONE)
    if missing:
        raw.pop(field, None)
    else:
        raw[field] = value
    for read in (lambda: decode_transfer(raw), lambda: transfers_of([raw], ONE.token), lambda: decode_transfer(value)):
        with suppress(BadLog):
            read()


def test_a_receipts_other_logs_are_passed_by() -> None:
    second = TransferLog(ONE.block_hash, 7, ONE.tx_hash, 1, ONE.token, ONE.sender, ONE.to, 25)
    other_token = raw_of(ONE) | {"address": "0x" + "9" * 40, "data": "0x", "topics": [TRANSFER_TOPIC]}
    approval = raw_of(ONE) | {"topics": ["0x" + "8" * 64]}
    anonymous = raw_of(ONE) | {"topics": []}
    raws = [raw_of(ONE), other_token, approval, anonymous, raw_of(second)]
    assert transfers_of(raws, ONE.token) == [second, ONE]


def test_a_block_is_final_when_depth_blocks_are_above_it() -> None:
    assert [is_final(head, 100, 12) for head in (99, 100, 111, 112, 500)] == [False, False, False, True, True]
