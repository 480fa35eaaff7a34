"""The ledger beside a company's own table of balances (legacy.py): what is posted is written there, what is read is compared.

| phase | legacy table is written | balances are read from | a difference |
| --- | --- | --- | --- |
| off | no | legacy | |
| shadow | in the same transaction | legacy | is stored, logged, counted |
| ledger | in the same transaction | ledger | is stored, logged, counted |
| strict | in the same transaction | ledger | … and the read is refused |
| cut_over | no | ledger | |

Which connection has such a table beside it, the connection says (`mirrored`): `seal` and the readers need not be told.

**Differences, never balances, are written**: value += shown(balance) − shown(mark). Written as balances, an edit behind our
back would be overwritten by the customer's next posting and never be found. A mark says which of an account's balances the
table has; it moves in the transaction that writes there, so what a phase without writing left out, or what the table once
would not take, is written with the account's next posting or by `catch_up`, exactly once.

**The phase is decided inside the transaction**: the writing statement takes the phase's row FOR KEY SHARE, which `move` takes
FOR UPDATE, after both queued for one lock. A posting is either committed before the phase moves, or reads the new one: none falls between.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Decimal
from enum import StrEnum
from functools import cached_property
from typing import Any, ClassVar, Final, NamedTuple, Protocol

import asyncpg
import structlog

from ledger.accounts import SYSTEM, AccountType, asset_of
from ledger.errors import LegacyAway, LegacyUnusable
from ledger.folding import rows_of
from ledger.legacy import DIGITS, Held, Legacy
from ledger.reading import OwnerBalance, Reader
from ledger.rows import PASSING, Block, Connection, numbers, uuids
from ledger.sql import load
from ledger.tables import ENTRIES

_log = structlog.get_logger()
_sql = load("ledger", "sql/shadow.sql")


class Phase(StrEnum):
    """In the order they are gone through."""

    OFF = "off"
    SHADOW = "shadow"
    LEDGER = "ledger"
    STRICT = "strict"
    CUT_OVER = "cut_over"

    @property
    def writes(self) -> bool:
        """The legacy table is written, and so compared."""
        return self in (Phase.SHADOW, Phase.LEDGER, Phase.STRICT)

    @property
    def reads_ledger(self) -> bool:
        return self in (Phase.LEDGER, Phase.STRICT, Phase.CUT_OVER)


_BACK: Final = "ROLLBACK TO SAVEPOINT shadow; RELEASE SAVEPOINT shadow"
_WRITING: Final = [phase for phase in Phase if phase.writes]


class Watcher(Protocol):
    """Who counts. `source`: ledger or legacy."""

    def shadow_written(self, lag_ms: float, *, ok: bool) -> None: ...
    def shadow_read(self, source: str, took_ms: float) -> None: ...
    def shadow_differs(self, type: str) -> None: ...
    def shadow_waiting(self, count: int, oldest_s: float) -> None: ...


class Difference(NamedTuple):
    """Base units; `legacy` as the table has it, `ledger` as the table should show it."""

    user_id: str
    type: AccountType
    ledger: int
    legacy: Decimal


class Step(NamedTuple):
    """How one posting, or several, moved an account."""

    account_id: str
    before: int
    after: int
    version: int


@dataclass(frozen=True, slots=True)
class Look:
    """What both say of some customers, in one snapshot. A customer's type that has no value is left out."""

    phase: Phase
    ledger: Mapping[str, Mapping[str, int]]
    legacy: Mapping[str, Mapping[str, Decimal]]

    def differences(self, legacy: Legacy) -> list[Difference]:
        found: list[Difference] = []
        for user in sorted({*self.ledger, *self.legacy}):
            held, there = self.ledger.get(user, _NONE), self.legacy.get(user, _NONE)
            for type in legacy.types:
                shown, shows = legacy.shown(held.get(type, 0)), there.get(type, 0)
                if shown != shows:
                    found.append(Difference(user, type, shown, Decimal(shows)))
        return found


_NONE: Final[Mapping[str, Any]] = {}
SAMPLE_EVERY: Final = 50
"""Comparing reads ask both in one statement; one in so many asks each alone too, so that their times can be compared."""

AT_ONCE: Final = "SET CONSTRAINTS ALL IMMEDIATE"

# What a login that lost a right, its password or the table itself is told; as while the server is away, nothing is compared.
UNREADABLE: Final[tuple[type[Exception], ...]] = (
    asyncpg.SyntaxOrAccessError,
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    LegacyUnusable,
)


def is_refused(error: asyncpg.PostgresError) -> bool:
    """Whether it ends only the writing of the legacy table, and not the commit, which runs again: a trigger may raise any code."""
    return not isinstance(error, PASSING)


def not_read(error: Exception) -> LegacyAway:
    """Its text goes to customers, the error's own to the log."""
    _log.warning("shadow.not_read", error=type(error).__name__, reason=str(error))
    return LegacyAway(f"the legacy table cannot be read: {type(error).__name__}")


class Mirror:
    """A legacy table in the ledger's own database."""

    _into = _sql.to_rows

    def __init__(self, legacy: Legacy, watcher: Watcher | None = None) -> None:
        self.legacy = legacy
        self._watcher = watcher
        self._reads = 0

    async def follow(self, connection: Connection, blocks: Iterable[Block]) -> None:
        """In the transaction that wrote the blocks, after them: what they posted to customers' accounts, if the phase writes.

        A table that does not take it stays behind, which every read finds, until the account's next posting: the ledger is
        written always. Raises asyncpg's errors when another writer was first; the commit runs again.
        """
        steps = steps_of(blocks)
        if not steps:
            return
        started = time.monotonic()
        ok = True
        try:
            await self._write_safely(connection, steps)
        except asyncpg.PostgresError as error:
            if not is_refused(error) or self._overtaken(error):
                raise
            await connection.execute(_BACK)
            ok = False
            ids, before = uuids(step.account_id for step in steps), numbers(step.before for step in steps)
            await connection.execute(_sql.mark_before, ids, before, list(self.legacy.types), _WRITING)
            _log.error("shadow.not_written", error=type(error).__name__, table=self.legacy.table, accounts=len(steps))
        if self._watcher is not None:
            self._watcher.shadow_written((time.monotonic() - started) * 1_000, ok=ok)

    async def _write_safely(self, connection: Connection, steps: Sequence[Step]) -> None:
        """In a phase that writes, behind a savepoint, which stays where it fails: four commands in one message, since each of them
        alone would be a tenth of the ledger's own commit. What the table's constraints put off until the commit they say now: there
        it would be the ledger's that fails. The statement is prepared by the first that does not find it."""
        arrays = ", ".join(f"'{array}'" for array in _arrays(steps))
        phases = ", ".join(f"'{phase}'" for phase in _WRITING)
        write = f"EXECUTE shadow_write ({arrays}, ARRAY[{phases}]); {AT_ONCE}; RELEASE SAVEPOINT shadow"
        try:
            await connection.execute(f"SAVEPOINT shadow; {write}")
        except asyncpg.InvalidSQLStatementNameError:
            prepare = f"PREPARE shadow_write (text, text, text, text, text[]) AS {self._write}"
            await connection.execute(f"ROLLBACK TO SAVEPOINT shadow; {prepare}; {write}")

    def _overtaken(self, error: asyncpg.PostgresError) -> bool:
        """Another writer was first with the customer's row or the mark; not another rule of the table's, which would hold for ever."""
        if isinstance(error, asyncpg.UniqueViolationError):
            own = error.table_name == self.legacy.table.partition(".")[2]
            return not own or f"({self.legacy.user_column})=" in (error.detail or "").replace('"', "")
        return isinstance(error, asyncpg.LockNotAvailableError)

    async def write(self, connection: Connection, steps: Sequence[Step]) -> None:
        """Brings the table to where the steps end, whatever the phase: the caller holds it."""
        await connection.execute(self._write, *_arrays(steps), list(Phase))

    async def check(self, connection: Connection) -> None:
        """Whether the table is as it is configured. Raises LegacyUnusable."""
        await self.legacy.check(connection)

    async def read(self, connection: Reader, users: Sequence[str]) -> dict[str, Held]:
        """What the table shows of them. As the other readings of the table raises LegacyAway."""
        return await self.legacy.read(connection, users)

    async def page(self, connection: Reader, after: str | None, limit: int) -> list[str]:
        """The table's next customers, in the order of its key."""
        return [user for user, _ in await self.legacy.page(connection, after, limit)]

    async def confirmed(self, _connection: Connection, differences: list[Difference]) -> list[Difference]:
        """Those that are not merely of two moments: here both sides were seen in one."""
        return differences

    async def close(self) -> None:
        """Whatever it has of its own."""

    async def look(self, connection: Reader, users: Sequence[str]) -> Look:
        """Both, in one statement."""
        phase = Phase.OFF
        found: dict[str, dict[str, dict[str, Any]]] = {"ledger": {}, "legacy": {}}
        for source, user, type, value in await connection.fetch(self._look, users):
            if source == "phase":
                phase = Phase(value)
            else:
                found[source].setdefault(user, {})[type] = Decimal(value) if source == "legacy" else int(value)
        return Look(phase, found["ledger"], found["legacy"])

    async def _look_at(self, connection: Reader, user: str) -> Look:
        """As `look`, of one customer."""
        (row,) = await connection.fetch(self._look_at_one, user)
        phase, held, is_there, *values = row
        ledger: dict[str, int] = {}
        for type, _, balance in (one.partition(" ") for one in held):
            ledger[type] = ledger.get(type, 0) + int(balance)
        legacy: dict[str, Decimal] = {}
        if is_there:
            legacy.update(zip(self.legacy.types, map(Decimal, values), strict=True))
        return Look(Phase(phase or Phase.OFF), {user: ledger}, {user: legacy})

    async def balances(self, connection: Reader, user: str) -> tuple[dict[str, OwnerBalance], Look, list[Difference]]:
        """What the phase says that the customer has, by asset; and what differs, where the phase compares. Raises LegacyAway."""
        try:
            look = await self._look_at(connection, user)
        except UNREADABLE as error:
            raise not_read(error) from error
        if look.phase.writes:
            self._reads += 1
            if self._reads % SAMPLE_EVERY == 1:
                await self._sample(connection, user)
        differences = look.differences(self.legacy) if look.phase.writes else []
        held = dict(look.ledger.get(user, {}))
        if not look.phase.reads_ledger:
            held |= {type.value: 0 for type in self.legacy.types if type.value in held}
            held |= {type: whole(value) for type, value in look.legacy.get(user, {}).items()}
        by_asset: dict[str, dict[str, int]] = {}
        for type_, balance in sorted(held.items()):
            by_asset.setdefault(asset_of(AccountType(type_)), {})[type_] = balance
        return {asset: OwnerBalance(asset, types) for asset, types in by_asset.items()}, look, differences

    def tell(self, differences: Sequence[Difference]) -> None:
        """Logs and counts them."""
        for one in differences:
            _log.warning(
                "shadow.discrepancy",
                user_id=one.user_id,
                type=one.type.value,
                ledger=str(one.ledger),
                legacy=str(one.legacy),
            )
            if self._watcher is not None:
                self._watcher.shadow_differs(one.type.value)

    async def _sample(self, connection: Reader, user: str) -> None:
        if self._watcher is None:
            return
        started = time.monotonic()
        await connection.fetch(_sql.ledger_alone, user)
        between = time.monotonic()
        await self.read(connection, [user])
        self._watcher.shadow_read("ledger", (between - started) * 1_000)
        self._watcher.shadow_read("legacy", (time.monotonic() - between) * 1_000)

    @cached_property
    def _write(self) -> str:
        return self._filled_for(f"{_sql.moved}\n{self._into}")

    def _filled_for(self, statement: str) -> str:
        """With the names, amounts and columns of the table that are written."""
        legacy = self.legacy
        columns = [legacy.column(type) for type in legacy.types]
        # an amount in base units as the table keeps it: a whole number, or a decimal one
        one = "1" if legacy.integer else f"{Decimal(legacy.step).scaleb(-DIGITS):f}"
        sums = ", ".join(
            f"coalesce(sum(steps) FILTER (WHERE type = '{type.value}'), 0) * {one} AS c{n}"
            for n, type in enumerate(legacy.types)
        )
        sets = ", ".join(f"{column} = coalesce(l.{column}, 0) + c.c{n}" for n, column in enumerate(columns))
        return filled(
            statement,
            table=legacy.quoted,
            user=legacy.user,
            key=legacy.key("owner"),
            types=", ".join(f"'{type.value}'" for type in legacy.types),
            step=str(legacy.step),
            sums=sums,
            sets=sets,
            columns=", ".join(columns),
            values=", ".join(f"c.c{n}" for n in range(len(columns))),
        )

    @cached_property
    def _look_at_one(self) -> str:
        legacy = self.legacy
        return filled(
            _sql.look_at_one, table=legacy.quoted, user=legacy.user, key=legacy.key("$1::text"), system=f"'{SYSTEM}'",
            values=legacy.shows,
        )  # fmt: skip

    @cached_property
    def _look(self) -> str:
        legacy = self.legacy
        values = ", ".join(
            f"('{type.value}', (coalesce(l.{legacy.column(type)}, 0) * {legacy.unit}::numeric)::text)"
            for type in legacy.types
        )
        return filled(
            _sql.look, table=legacy.quoted, user=legacy.user, key=legacy.key("x"), system=f"'{SYSTEM}'", values=values
        )


def whole(value: Decimal) -> int:
    """The base units in what the table has; of what is no number, none."""
    return int(value.to_integral_value(ROUND_FLOOR)) if value.is_finite() else 0


def filled(statement: str, **parts: str) -> str:
    """Checked names and numbers only."""
    for name, text in parts.items():
        statement = statement.replace(f"{{{name}}}", text)
    return statement


def _arrays(steps: Sequence[Step]) -> tuple[str, str, str, str]:
    """Of hexadecimal digits and numbers, as PostgreSQL reads them."""
    return (
        uuids(step.account_id for step in steps),
        numbers(step.before for step in steps),
        numbers(step.after for step in steps),
        numbers(step.version for step in steps),
    )


def steps_of(blocks: Iterable[Block]) -> list[Step]:
    """How a commit's entries moved each account, the system's too."""
    steps: dict[str, Step] = {}
    for block in blocks:
        if block.table is not ENTRIES:
            continue
        for account_id, version, _, _, direction, amount, after, _ in rows_of(block):
            known = steps.get(account_id)
            before = after - amount if direction == "d" else after + amount
            steps[account_id] = Step(account_id, before if known is None else known.before, after, version)
    return list(steps.values())


class _Connection(asyncpg.Connection):
    mirror: ClassVar[Mirror | None] = None


def mirrored(mirror: Mirror | None) -> type[asyncpg.Connection[asyncpg.Record]]:
    """The `connection_class` of connections whose ledger has a legacy table beside it."""
    if mirror is None:
        return asyncpg.Connection
    return type("MirroredConnection", (_Connection,), {"mirror": mirror, "__slots__": ()})


def mirror_of(connection: Any) -> Mirror | None:
    """The table that is beside the connection's ledger; a pool's connections say it too."""
    found: Mirror | None = getattr(connection, "mirror", None)
    return found
