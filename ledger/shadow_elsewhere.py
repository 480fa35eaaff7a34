"""A legacy table in another server: it is given by way of an outbox what it cannot have in the posting's own transaction.

| step | where | if we die after it |
| --- | --- | --- |
| the difference into `shadow_outbox`, the mark moved | the posting's transaction | it waits there |
| rows added to the table, their ids to `stablerail_shadow` | one transaction in the table's server | they are known by their ids |
| the rows deleted from the outbox | the ledger | |

`stablerail_shadow` is a table of ours beside the legacy one, of one row: the ids that were told last, and the epoch of who may tell.
Who takes over raises the epoch, which waits for a transaction of the one before, deletes what that had told, and goes on; the one
before finds the epoch moved and stops. So each difference is added once, whoever dies or freezes wherever.

**Reading both**: ours, theirs, ours again. Where our side of a customer did not change meanwhile, what waited and is not among
the told was not there yet: it is added to what the table shows, which then is the table's value once all is told. A customer
whose side did change is read again.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from decimal import Decimal
from functools import cached_property
from typing import Any, Final
from uuid import UUID

import asyncpg
import structlog

from ledger.accounts import SYSTEM
from ledger.commit import lost_not_cancelled
from ledger.errors import LegacyAway, LegacyUnusable
from ledger.legacy import Held, Legacy
from ledger.reading import Reader
from ledger.rows import Connection
from ledger.shadow import AT_ONCE, UNREADABLE, Difference, Look, Mirror, Phase, Watcher, filled, is_refused, not_read
from ledger.sql import load

_log = structlog.get_logger()
_sql = load("ledger", "sql/shadow.sql")

BATCH: Final = 500
"""Rows of the outbox in one transaction there."""
TRIES_MAX: Final = 20
"""Readings of a customer whose balances change all the time; then nothing is said of it."""
TIMEOUT_S: Final = 10.0
GLANCE_S: Final = 2.0
"""For a customer's balance, whose reader holds a connection of the API's meanwhile, and a snapshot of the ledger."""
SILENT_S: Final = 10.0
"""A server that let a glance wait is asked by one in so long; the others go on without it."""
REFUSED_S: Final = 60.0
"""What the table did not take is offered again after so long."""
OURS: Final = "stablerail_shadow"

AWAY: Final = (
    OSError, asyncpg.PostgresConnectionError, asyncpg.OperatorInterventionError, asyncpg.InterfaceError,
    asyncpg.InternalClientError, asyncpg.LockNotAvailableError, asyncpg.DeadlockDetectedError, asyncpg.SerializationError,
    asyncpg.InsufficientResourcesError,
    asyncpg.ReadOnlySQLTransactionError,  # a standby has its address
)  # fmt: skip


class Elsewhere(Mirror):
    """`close` it. One connection there, taken in turns."""

    _into = _sql.to_outbox

    def __init__(self, legacy: Legacy, dsn: str, watcher: Watcher | None = None) -> None:
        super().__init__(legacy, watcher)
        self._dsn = dsn
        self._there: Connection | None = None
        self._turn = asyncio.Lock()
        self._epoch = 0
        self._told: list[UUID] = []
        self._refused: dict[str, float] = {}
        """Customers whose rows the table did not take: until when they are left alone, by the loop's clock."""
        self._silent_until = 0.0
        """By the loop's clock; 0.0: it answers."""
        self._last = 0
        """Of what waited at a look, some of which still waits, and when that was, by the loop's clock."""
        self._last_at = 0.0

    @asynccontextmanager
    async def there(self) -> AsyncIterator[Connection]:
        """The connection. Raises LegacyAway; what was under way there may have been done."""
        async with self._turn:
            try:
                if self._there is None or self._there.is_closed():
                    with lost_not_cancelled():
                        self._there = await asyncpg.connect(
                            self._dsn, timeout=TIMEOUT_S, command_timeout=TIMEOUT_S,
                            server_settings={"application_name": "stablerail", "lock_timeout": "5s"},
                        )  # fmt: skip
                    await self._make_ours(self._there)
                yield self._there
            except AWAY as error:
                await self.close()
                raise LegacyAway(f"the legacy table's server: {type(error).__name__}") from error
            except asyncio.CancelledError:  # half asked
                await self.close()
                raise

    async def close(self) -> None:
        there, self._there = self._there, None
        if there is not None:
            there.terminate()

    async def check(self, connection: Connection) -> None:
        async with self.there() as there:
            await self.legacy.check(there)

    async def _make_ours(self, there: Connection) -> None:
        """Our table beside the legacy one, where there is none."""
        try:
            if await there.fetchval("SELECT to_regclass($1)", self._ours) is None:
                await there.execute(self._filled(_sql.make_ours))
            if not await there.fetchval(self._filled(_sql.has_ours)):  # a standby can be read
                await there.execute(self._filled(_sql.first_of_ours))
        except (asyncpg.InsufficientPrivilegeError, asyncpg.InvalidSchemaNameError) as error:
            statement = " ".join(self._filled(_sql.make_ours).split())
            remedy = f"as an owner run: {statement}; and grant SELECT, INSERT and UPDATE on it"
            raise LegacyUnusable("LEGACY_URL", f"{error}; {remedy}") from None

    # -- reading -------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _readable(self) -> AsyncIterator[Connection]:
        """The connection. Raises LegacyAway, also where the login may not read any more."""
        try:
            async with self.there() as there:
                yield there
        except UNREADABLE as error:
            raise not_read(error) from error

    async def read(self, _connection: Reader, users: Sequence[str]) -> dict[str, Held]:
        async with self._readable() as there:
            return await self.legacy.read(there, users)

    async def page(self, _connection: Reader, after: str | None, limit: int) -> list[str]:
        async with self.there() as there:
            return [user for user, _ in await self.legacy.page(there, after, limit)]

    async def look(self, connection: Reader, users: Sequence[str]) -> Look:
        """The legacy side as it will be when all that waits is told. Who changes all the time is left out. Raises LegacyAway."""
        ledger: dict[str, dict[str, int]] = {}
        legacy: dict[str, dict[str, Decimal]] = {}
        asked = list(users)
        phase, ours = await self._here(connection, asked)
        for _ in range(TRIES_MAX):
            theirs = await self._shown(asked)
            phase, after = await self._here(connection, asked)
            for user in asked:
                if ours[user] == after[user]:
                    ledger[user], legacy[user] = _both(ours[user], *theirs[user])
            asked = [user for user in asked if user not in ledger]
            if not asked:
                break
            ours = after
        return Look(phase, ledger, {user: types for user, types in legacy.items() if types})

    async def _look_at(self, connection: Reader, user: str) -> Look:
        """Theirs, then ours: on a connection whose snapshot may stand still, what was told in between is missing for a moment, and
        nothing is there twice. Whoever finds a difference has it confirmed."""
        try:
            told, shown = await self._glance(user)
        except LegacyAway:
            phase, ours = await self._here(connection, [user])
            if not phase.reads_ledger:
                raise
            _log.warning("shadow.not_compared", user_id=user)
            ledger, _ = _both(ours[user], [], None)
            return Look(phase, {user: ledger}, {user: self._as_it_should_be(ledger)})
        phase, ours = await self._here(connection, [user])
        ledger, legacy = _both(ours[user], told, shown)
        return Look(phase, {user: ledger}, {user: legacy} if legacy else {})

    async def _glance(self, user: str) -> tuple[list[UUID], dict[str, Decimal] | None]:
        """What the table shows of the customer. Raises LegacyAway, soon: a server that hangs must not hold up the API."""
        now = asyncio.get_running_loop().time()
        if self._silent_until:
            if now < self._silent_until:
                raise LegacyAway("the legacy table's server: it has not answered lately")
            self._silent_until = now + SILENT_S
        try:
            async with asyncio.timeout(GLANCE_S):
                found = (await self._shown([user]))[user]
        except TimeoutError:
            self._silent_until = now + GLANCE_S + SILENT_S
            raise LegacyAway(f"the legacy table's server: no answer within {GLANCE_S:g} s") from None
        self._silent_until = 0.0
        return found

    def _as_it_should_be(self, ledger: Mapping[str, int]) -> dict[str, Decimal]:
        return {type.value: Decimal(self.legacy.shown(ledger.get(type, 0))) for type in self.legacy.types}

    async def _sample(self, connection: Reader, user: str) -> None:
        with suppress(LegacyAway):
            await super()._sample(connection, user)

    async def confirmed(self, connection: Connection, differences: list[Difference]) -> list[Difference]:
        """A read's snapshot is of one moment for the ledger and of another for the table: both are read again without."""
        users = sorted({one.user_id for one in differences})
        return (await self.look(connection, users)).differences(self.legacy) if users else []

    async def _here(self, connection: Reader, users: Sequence[str]) -> tuple[Phase, dict[str, list[Any]]]:
        phase = Phase.OFF
        found: dict[str, list[Any]] = {user: [] for user in users}
        for source, user, *rest in await connection.fetch(self._filled(_sql.look_here), users):
            if source == "phase":
                phase = Phase(rest[1])
            else:
                found[user].append((source, *rest))
        return phase, found

    async def _shown(self, users: Sequence[str]) -> dict[str, tuple[list[UUID], dict[str, Decimal] | None]]:
        async with self._readable() as there:
            rows = await there.fetch(self._filled(_sql.look_there), users)
        types = [type.value for type in self.legacy.types]
        return {
            user: (told, dict(zip(types, map(Decimal, values), strict=True)) if is_there else None)
            for told, user, is_there, *values in rows
        }

    # -- telling -------------------------------------------------------------------------------------------------------

    async def give(self, connection: Connection) -> int:
        """Gives the table the next of what waits; how many rows. For one at a time, on the ledger's connection: who is overtaken
        stops by itself. Raises LegacyAway, also where the login has lost its rights."""
        now = asyncio.get_running_loop().time()
        await self._tell_waiting(connection, now)
        self._refused = {owner: until for owner, until in self._refused.items() if until > now}
        if not self._epoch:
            async with self._readable() as there:
                (row,) = await there.fetch(self._filled(_sql.take_over))
                self._epoch, self._told = row
        await connection.execute(_sql.forget, self._told)
        rows = await connection.fetch(_sql.untold, list(self._refused), BATCH)
        if not rows:
            return 0
        epoch, self._epoch = self._epoch, 0  # should this fail: whether it was done, the table says
        async with self._readable() as there, there.transaction():
            if await there.fetchval(self._filled(_sql.fence)) != epoch:
                _log.warning("shadow.overtaken", table=self.legacy.table)
                return 0
            told = await self._give(there, rows, now + REFUSED_S)
            await there.execute(self._filled(_sql.told), told)
        self._epoch, self._told = epoch, told
        await connection.execute(_sql.forget, told)
        return len(told)

    def stand_by(self) -> None:
        """Another gives, and tells what waits."""
        if self._watcher is not None:
            self._watcher.shadow_waiting(0, 0.0)

    async def _tell_waiting(self, connection: Connection, now: float) -> None:
        """How much waits, and for how long some of it has at least: where much is posted, something waits at every look."""
        ((count, first),) = await connection.fetch(_sql.waiting)
        if not count or first > self._last:  # all that waited then has been given
            self._last, self._last_at = first + count - 1 if count else 0, now
        if self._watcher is not None:
            self._watcher.shadow_waiting(count, now - self._last_at)

    async def _give(self, there: Connection, rows: Sequence[Any], again_at: float) -> list[UUID]:
        """All together; where the table does not take that, each customer alone. The ids of what it took."""
        if await self._refusal(there, rows) is None:
            return [row[0] for row in rows]
        by_owner: dict[str, list[Any]] = {}
        for row in rows:
            by_owner.setdefault(row[1], []).append(row)
        taken: list[UUID] = []
        for owner, own in by_owner.items():
            if (error := await self._refusal(there, own)) is None:
                taken += [row[0] for row in own]
                continue
            self._refused[owner] = again_at
            _log.error("shadow.not_written", error=type(error).__name__, table=self.legacy.table, user_id=owner)
        return taken

    async def _refusal(self, there: Connection, rows: Sequence[Any]) -> asyncpg.PostgresError | None:
        """What the table does not take them by; None: they are there. Raises what is no refusal."""
        try:
            async with there.transaction():
                await self._add(there, rows)
        except asyncpg.PostgresError as error:
            if isinstance(error, AWAY) or not is_refused(error):
                raise
            return error
        return None

    async def _add(self, there: Connection, rows: Sequence[Any]) -> None:
        owners, types, amounts = ([row[column] for row in rows] for column in (1, 2, 3))
        await there.execute(self._given, owners, types, amounts)
        await there.execute(AT_ONCE)  # its commit is everybody's

    @cached_property
    def _given(self) -> str:
        return self._filled_for(f"{_sql.given}\n{_sql.to_rows}")

    @cached_property
    def _ours(self) -> str:
        schema, _, _ = self.legacy.quoted.partition(".")
        return f"{schema}.{OURS}"

    def _filled(self, statement: str) -> str:
        legacy = self.legacy
        return filled(
            statement, ours=self._ours, table=legacy.quoted, user=legacy.user, key=legacy.key("x"),
            values=legacy.shows, system=f"'{SYSTEM}'",
        )  # fmt: skip


def _both(
    ours: Sequence[Any], told: Sequence[UUID], shown: dict[str, Decimal] | None
) -> tuple[dict[str, int], dict[str, Decimal]]:
    """A customer's balances, and what the table shows once it is told what waits."""
    ledger: dict[str, int] = {}
    legacy = dict(shown or {})
    for source, type, amount, id in ours:
        if source == "ledger":
            ledger[type] = int(amount)
        elif id not in told:
            legacy[type] = legacy.get(type, Decimal(0)) + Decimal(amount)
    return ledger, legacy
