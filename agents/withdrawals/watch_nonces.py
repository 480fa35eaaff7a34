"""transactions.signed -> the table of nonces (a Faust table) -> /nonces

Decides:  whether a transaction's nonce is higher than what the table knows of its lane.
Key:      the lane: the worker that has its partition alone writes its row.
Repeats:  harmless, and so is any order: the highest nonce wins.
Refuses:  what cannot be read, silently: broadcast_transactions makes a dead letter of it.

A view for people; nonces are given by the lane's row in PostgreSQL.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping

from topics.catalog import TRANSACTIONS_SIGNED
from topics.envelope import read
from topics.errors import EventRefused
from topics.events import TransactionSigned


def take(table: MutableMapping[str, int], value: bytes | None, headers: Iterable[tuple[str, bytes | None]]) -> None:
    """One message into the table: lane -> the next nonce after it. No bytes make it raise: a view stops for nothing."""
    try:
        event = read(TRANSACTIONS_SIGNED, value, list(headers)).event
    except EventRefused:
        return
    assert isinstance(event, TransactionSigned)
    lane = f"{event.chain.value}:{event.signer}"
    if table.get(lane, 0) <= event.nonce:
        table[lane] = event.nonce + 1
