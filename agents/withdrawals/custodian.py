"""A withdrawal's transfer at the custodian: its row, the order of its states, and how it is read and locked.

```
 ASKED ─▶ INITIATED ─▶ CLEARED ─▶ QUEUED ─▶ SENT ◀─▶ STUCK ─▶ CONFIRMED ─▶ COMPLETE | FAILED | DENIED | CANCELLED
   └─▶ REFUSED (never taken)
```

ASKED and REFUSED are ours, the others the custodian's words; a word that we do not know is of a transfer on its way. News comes
in any order: a state is never followed by one before it. NOT_SHOWN, ours too, is no state of it: the custodian does not tell.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Final, NamedTuple

from connectors.circle.transactions import FAILED
from ledger.rows import Connection, Row, Table, uuids
from ledger.sql import load
from ledger.tables import CUSTODIAN_TRANSFER_HISTORY, CUSTODIAN_TRANSFERS

_sql = load("agents.withdrawals", "custodian.sql")

ASKED: Final = "ASKED"
"""It is to be asked for, or was and no answer came."""
REFUSED: Final = "REFUSED"
"""The custodian did not take it."""
NOT_SHOWN: Final = "NOT_SHOWN"
"""The custodian, asked for it, does not know it any more, or shows what we cannot read."""
COMPLETE: Final = "COMPLETE"
UNPAID: Final = FAILED | {REFUSED}
ENDS: Final = UNPAID | {COMPLETE}
_RANK: Final = {ASKED: 0, "INITIATED": 1, "CLEARED": 2, "QUEUED": 3, "SENT": 4, "STUCK": 4, "CONFIRMED": 5}
_RANK_OF_OTHERS: Final = 2
_RANK_OF_ENDS: Final = 6

SECOND_TRANSFER: Final = "second_transfer"
"""Of a review: the custodian has two transfers with this withdrawal's reference."""
CUSTODIAN_SILENT: Final = "custodian_silent"
"""Of a review: no answer at many attempts. It goes on by itself when one comes."""
TRANSFER_NOT_SHOWN: Final = "transfer_not_shown"
"""Of a review: NOT_SHOWN, for some time. It goes on by itself with the custodian's next word of it. Of a call: what the custodian
refuses and may have made before is not in its list."""
UNTOLD: Final = frozenset({CUSTODIAN_SILENT, TRANSFER_NOT_SHOWN})
"""Reviews that end with any word of the custodian's of it, be it the one that was known before."""
UNPROVEN: Final = "unproven_payment"
"""Of a review: the custodian says that it is paid, and the chain has no such transfer."""


class Transfer(NamedTuple):
    """A row of `custodian_transfers`."""

    withdrawal_id: str
    custodian: str
    wallet_id: str
    """The custodian's id of the wallet that it leaves from."""
    transfer_id: str | None
    """The custodian's id of it, as soon as anybody told."""
    state: str
    tx_hashes: str
    """All that the custodian told of, oldest first, with spaces between."""
    block_number: int | None
    reason: str | None
    """Why it failed, in the custodian's words."""
    created_at: datetime
    updated_at: datetime
    version: int

    @property
    def hashes(self) -> tuple[str, ...]:
        return tuple(self.tx_hashes.split())


class Source(NamedTuple):
    """Where withdrawals of a chain leave from."""

    wallet_id: str
    token_id: str
    """The custodian's ids of our wallet, and of USDC on its chain."""
    fee_level: str


def rank(state: str) -> int:
    return _RANK_OF_ENDS if state in ENDS else _RANK.get(state, _RANK_OF_OTHERS)


def changed(
    transfer: Transfer, at: datetime, **fields: object
) -> tuple[Transfer, tuple[tuple[Table, Row], tuple[Table, Row]]]:
    """The transfer as it is then, and its rows: `custodian_transfers` to be upserted, its history to be inserted."""
    after = transfer._replace(updated_at=at, version=transfer.version + 1, **fields)  # type: ignore[arg-type]
    return after, rows_of(after)


def rows_of(transfer: Transfer) -> tuple[tuple[Table, Row], tuple[Table, Row]]:
    """Its row, and the line of its history that tells of this version."""
    line = (
        transfer.withdrawal_id, transfer.version, transfer.state, transfer.transfer_id, transfer.tx_hashes,
        transfer.block_number, transfer.reason, transfer.updated_at,
    )  # fmt: skip
    return (CUSTODIAN_TRANSFERS, transfer), (CUSTODIAN_TRANSFER_HISTORY, line)


async def lock(connection: Connection, ids: Iterable[str]) -> dict[str, Transfer]:
    """Those of the withdrawals that have one, locked, sorted; after the withdrawals' own rows."""
    found = [Transfer(*row) for row in await connection.fetch(_sql.lock, uuids(set(ids)))]
    return {one.withdrawal_id: one for one in found}


async def open_transfers(connection: Connection) -> tuple[list[Transfer], frozenset[str]]:
    """Those that the custodian has and whose withdrawals have not ended; and the withdrawals that are in review as it did not tell."""
    found = [(Transfer(*row), code) for *row, code in await connection.fetch(_sql.open)]
    return [one for one, _ in found], frozenset(one.withdrawal_id for one, code in found if code in UNTOLD)


def is_ours(reference: object) -> bool:
    """Whether it can be the id of a withdrawal."""
    return (
        isinstance(reference, str) and len(reference) == 32 and all(digit in "0123456789abcdef" for digit in reference)
    )
