"""ERC-20 Transfer logs, decoded strictly: a log that is nearly a transfer is an error, never a guess."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from chain.errors import BadLog
from chain.wire import address20, hash32, items, mapping, quantity, uint256
from topics.money import AMOUNT_MAX

TRANSFER_TOPIC = "0xddf252ad1be2c89b69c2b068fc378daa952ba7f163c4a11628f55a4df523b3ef"
"""keccak256("Transfer(address,address,uint256)")"""

LOG_INDEX_MAX = 2**31 - 1
"""What an event can carry."""


@dataclass(frozen=True, slots=True)
class TransferLog:
    """One transfer. Hashes and addresses are lower case; `amount` is in the token's base units and may be zero."""

    block_hash: str
    block_number: int
    tx_hash: str
    log_index: int
    """The place among all logs of the block."""
    token: str
    sender: str
    to: str
    amount: int


def topic_of(address: str) -> str:
    """An address as a node's topic filter wants it."""
    return "0x" + "0" * 24 + address[2:]


def decode_transfer(raw: Any) -> TransferLog | None:
    """A log as JSON-RPC gives it; None when it says `removed: true`. Raises BadLog for whatever is not a transfer."""
    try:
        return _decode(mapping(raw))
    except (ValueError, KeyError) as error:
        raise BadLog(f"{type(error).__name__}: {error}"[:200]) from None


def transfers_of(raws: Iterable[Any], token: str) -> list[TransferLog]:
    """The transfers of `token` among a receipt's logs, in log order. Logs of other contracts and events are passed by,
    because a receipt holds whatever the transaction touched; a malformed one of this token raises BadLog."""
    decoded = [decode_transfer(raw) for raw in raws if _is_transfer_of(raw, token)]
    return sorted((transfer for transfer in decoded if transfer is not None), key=lambda transfer: transfer.log_index)


def _is_transfer_of(raw: Any, token: str) -> bool:
    try:
        log = mapping(raw)
        topics = items(log["topics"])
        return address20(log["address"]) == token and bool(topics) and hash32(topics[0]) == TRANSFER_TOPIC
    except (ValueError, KeyError) as error:
        raise BadLog(f"{type(error).__name__}: {error}"[:200]) from None


def _decode(log: dict[str, Any]) -> TransferLog | None:
    removed = log.get("removed", False)
    if type(removed) is not bool:
        raise ValueError("removed is not a boolean")
    if removed:
        return None
    topics = items(log["topics"])
    if len(topics) != 3 or hash32(topics[0]) != TRANSFER_TOPIC:
        raise ValueError("not Transfer(address indexed, address indexed, uint256)")
    log_index = quantity(log["logIndex"])
    if log_index > LOG_INDEX_MAX:
        raise ValueError(f"log index {log_index}")
    amount = uint256(log["data"])
    if amount > AMOUNT_MAX:
        raise ValueError(f"{amount} base units are more than any stablecoin has")
    return TransferLog(
        block_hash=hash32(log["blockHash"]),
        block_number=quantity(log["blockNumber"]),
        tx_hash=hash32(log["transactionHash"]),
        log_index=log_index,
        token=address20(log["address"]),
        sender=_address_in(topics[1]),
        to=_address_in(topics[2]),
        amount=amount,
    )


def _address_in(topic: Any) -> str:
    word = hash32(topic)
    if word[2:26] != "0" * 24:
        raise ValueError(f"the topic {word} is not an address")
    return "0x" + word[26:]
