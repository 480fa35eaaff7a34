"""Reconciliation, as far as the database can tell: the ledger against its custody mirror; what every run found, stored.

A deposit and a withdrawal move a customer's balance and the mirror by the same amount, only not at the same time, so (chart of
accounts: accounts.py):

    custody_usdc[chain] = deposits finalized or parked − withdrawals completed, by their rows + corrections of that account

    usdc_balance + pending_withdrawal + pending_investment of all customers + suspense_usdc + shortfall_usdc
        = custody_usdc of all chains + deposits credited and not final − the company's own

A withdrawal that is held is still in pending_withdrawal and still on chain; its end moves both in one transaction. A reversal takes
from the customer and, where nothing is left, from shortfall_usdc (which is then negative), and the deposit counts no more. The
company's own is the USDC on customers' wallets that customers gave for something else: what orders and `moved_to_broker` took,
less what was credited without a deposit (a backfill's openings too), and what corrections moved between the two sides (DEALT).
Buffer and treasury are the contra of all of it and have no place on chain; that everything sums to zero is invariant 2.

A run is one commit, made when it has ended: one that dies leaves nothing, and is due as before.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Final, NamedTuple

import orjson

from ledger.accounts import SYSTEM, USDC, AccountType, custody
from ledger.audit_logs import Log
from ledger.commit import Sealed, lock_writer, seal
from ledger.reading import AccountName, Reader
from ledger.rows import Block, Connection, Op, block
from ledger.sql import load
from ledger.tables import RECONCILIATION_DIFFERENCES, RECONCILIATIONS

_sql = load("ledger", "sql/reconciling.sql")

WRITER: Final = "reconcile"
EVERY: Final = timedelta(days=1)
AGAIN: Final = timedelta(hours=1)
"""After a run that could not ask everybody."""
RUNS_KEPT: Final = 400
"""A year of days, and some by hand."""
DIFFERENCES_KEPT: Final = 1_000
"""Of a run, the first; all are counted, and the export has them all."""

CORRECTION: Final = "correction"
DEALT: Final = ("order_filled", "order_filled_late", "moved_to_broker", "credit", "opening", CORRECTION)
"""Kinds of transactions that move one side of the second identity and not the other: what they moved is the company's own."""
SOMEBODYS: Final = (
    AccountType.USDC_BALANCE,
    AccountType.PENDING_WITHDRAWAL,
    AccountType.PENDING_INVESTMENT,
    AccountType.SUSPENSE_USDC,
    AccountType.SHORTFALL_USDC,
)


class Comparison(StrEnum):
    LEGACY = "legacy"
    """The ledger and the legacy table, by customer."""
    MIRROR = "mirror"
    """The ledger and the custody mirror."""
    CHAIN = "chain"
    """The mirror and what our wallets hold on chain at a final block."""
    CIRCLE = "circle"
    """The mirror and what Circle says our wallets at Circle hold."""


class Difference(NamedTuple):
    """Two values of one thing that are not the same, in base units. None: that side does not know it."""

    comparison: Comparison
    user_id: str
    """Empty where it is the system's."""
    account: str
    """As `stablerail ledger` names it; a wallet is <chain>:<address>."""
    ledger: int | None
    other: int | None

    @property
    def difference(self) -> int:
        """What the other has above the ledger."""
        return (self.other or 0) - (self.ledger or 0)


class GapCode(StrEnum):
    AWAY = "away"
    """Somebody did not answer; an hour later they are asked again."""
    NOT_CONFIGURED = "not_configured"
    """A setting is missing."""


class Gap(NamedTuple):
    """What could not be compared."""

    comparison: Comparison
    about: str
    """A chain, or empty."""
    code: GapCode
    reason: str

    def __str__(self) -> str:
        return f"{self.comparison} {self.about}: {self.reason}" if self.about else f"{self.comparison}: {self.reason}"


class Compared(NamedTuple):
    """What one comparison came to."""

    checked: int
    differences: int
    base_units: int
    """The differences' sizes, summed."""


@dataclass(slots=True)
class Found:
    """Takes what a run finds. `tell` is told of each difference; the first are kept."""

    tell: Callable[[Difference], None] = lambda _: None
    checked: Counter[Comparison] = field(default_factory=Counter)
    kept: list[Difference] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    _counts: Counter[Comparison] = field(default_factory=Counter)
    _sizes: Counter[Comparison] = field(default_factory=Counter)

    def compared(self, comparison: Comparison, things: int = 1) -> None:
        self.checked[comparison] += things

    def differ(self, one: Difference) -> None:
        self._counts[one.comparison] += 1
        self._sizes[one.comparison] += abs(one.difference)
        if len(self.kept) < DIFFERENCES_KEPT:
            self.kept.append(one)
        self.tell(one)

    def results(self) -> dict[Comparison, Compared]:
        """Of what was compared, in the order of the comparisons."""
        return {
            one: Compared(self.checked[one], self._counts[one], self._sizes[one])
            for one in Comparison
            if one in self.checked
        }

    @property
    def differences(self) -> int:
        return self._counts.total()


@dataclass(frozen=True, slots=True)
class Run:
    """A run as it is stored."""

    id: str
    """32 hex digits."""
    started_at: datetime
    ended_at: datetime
    actor: str
    compared: dict[Comparison, Compared]
    differences: int
    gaps: tuple[Gap, ...]

    @property
    def due_at(self) -> datetime:
        """When the next is due after it."""
        return self.started_at + (AGAIN if any(gap.code is GapCode.AWAY for gap in self.gaps) else EVERY)

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "compared": {
                one.value: {**result._asdict(), "base_units": str(result.base_units)}  # a sum may be too large a number
                for one, result in self.compared.items()
            },
            "differences": self.differences,
            "gaps": [gap._asdict() for gap in self.gaps],
        }


async def compare_mirror(connection: Reader, found: Found) -> None:
    """Both identities. For a snapshot: their statements speak of the same moment."""
    for chain, mirror, rows in await connection.fetch(_sql.mirrors, CORRECTION):
        found.compared(Comparison.MIRROR)
        if mirror != rows:
            found.differ(Difference(Comparison.MIRROR, "", str(custody(chain)), int(mirror), int(rows)))
    row = await connection.fetchrow(_sql.owed, list(SOMEBODYS), list(DEALT))
    assert row is not None
    owed, backed = row
    found.compared(Comparison.MIRROR)
    if owed != backed:
        all_chains = AccountName(SYSTEM, AccountType.CUSTODY_USDC.value, USDC)
        found.differ(Difference(Comparison.MIRROR, "", str(all_chains), int(owed), int(backed)))


async def newest(connection: Reader, limit: int = 1) -> list[Run]:
    """The last runs, newest first."""
    return [_run(row) for row in await connection.fetch(_sql.newest, limit)]


async def run_of(connection: Reader, run_id: str) -> Run | None:
    row = await connection.fetchrow(_sql.one, uuid.UUID(run_id))
    return None if row is None else _run(row)


async def last_whole(connection: Reader) -> datetime | None:
    """When everything was last compared."""
    at: datetime | None = await connection.fetchval(_sql.last_whole)
    return at


async def differences_of(connection: Reader, run_id: str) -> list[Difference]:
    """Those that are kept, in the order they were found in."""
    rows = await connection.fetch(_sql.differences, uuid.UUID(run_id))
    return [
        Difference(Comparison(comparison), user, account, *(None if value is None else int(value) for value in values))
        for comparison, user, account, *values in rows
    ]


async def commit(
    connection: Connection, found: Found, started_at: datetime, ended_at: datetime, actor: str
) -> tuple[Run, Sealed]:
    """Stores a run that has ended, and forgets those that are too old. For the relay: what was sealed."""
    results = found.results()
    run = Run(
        uuid.uuid4().hex, started_at, max(started_at, ended_at), actor, results, found.differences, tuple(found.gaps)
    )
    plain = run.plain()
    row = (run.id, run.started_at, run.ended_at, actor, plain["compared"], run.differences, plain["gaps"])
    blocks = [block(RECONCILIATIONS, Op.INSERT, [row])]
    if found.kept:
        lines = [(run.id, n, *difference) for n, difference in enumerate(found.kept)]
        blocks.append(block(RECONCILIATION_DIFFERENCES, Op.INSERT, lines))
    async with connection.transaction():
        owners = await lock_writer(connection, WRITER)
        blocks += await _outlived(connection)
        sealed = await seal(
            connection, WRITER, owners, blocks=blocks, messages=[], at=run.ended_at, actor=actor,
            summary={"differences": run.differences, "gaps": len(run.gaps)},
            logs=[Log(actor, "ledger.reconciled", "reconciliation", run.id, None, plain)],
        )  # fmt: skip
    return run, sealed


async def _outlived(connection: Connection) -> Sequence[Block]:
    runs = [tuple(row) for row in await connection.fetch(_sql.outlived, RUNS_KEPT - 1)]
    if not runs:
        return ()
    lines = await connection.fetch(_sql.outlived_differences, [uuid.UUID(key) for (key,) in runs])
    gone = [block(RECONCILIATIONS, Op.DELETE, runs)]
    return [*gone, block(RECONCILIATION_DIFFERENCES, Op.DELETE, [tuple(line) for line in lines])] if lines else gone


def _run(row: Any) -> Run:
    run_id, started_at, ended_at, actor, compared, differences, gaps = row
    return Run(
        run_id,
        started_at,
        ended_at,
        actor,
        {
            Comparison(one): Compared(result["checked"], result["differences"], int(result["base_units"]))
            for one, result in orjson.loads(compared).items()
        },
        differences,
        tuple(
            Gap(Comparison(gap["comparison"]), gap["about"], GapCode(gap["code"]), gap["reason"])
            for gap in orjson.loads(gaps)
        ),
    )
