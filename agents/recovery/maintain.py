"""Forgets, once a day and in one worker of the deployment, what nothing can ask for any more (docs/adr/0018).

| rows | go when | what guards against a repeat then |
| --- | --- | --- |
| inbox | Kafka can bring the event no more (retention.py) | the stage's own rows, whose ids are for ever |
| calls, call_members | the call has ended, and no dead letter of its event is left | the state of what was asked for |
| counters of a day | the day's withdrawals have all ended | nothing is counted towards that day any more |
| dead_letters | resolved or discarded, and neither their topic nor the inbox has them still | no copy is left; the audit keeps what was discarded |
| crashes | Kafka can bring the event no more | - |

Rows go in small commits, each a record of the journal, so that a rebuild forgets the same. What is found without a lock is looked
at again under it. It may stop at any point, or run twice at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import structlog
from aiokafka.errors import KafkaError

from agents.lone_writer import LoneWriter
from agents.recovery.retention import kept, longest
from agents.services import Services, tell
from agents.withdrawals.limits import DAY_COUNTER
from ledger.audit_logs import Log
from ledger.commit import OVERTAKEN, TRANSIENT, Sealed, Unchanged, lock_writer, seal
from ledger.rows import Block, Connection, Op, Table, block
from ledger.sql import load
from ledger.tables import CALL_MEMBERS, CALLS, COUNTERS, DEAD_LETTERS, INBOX

_log = structlog.get_logger()
_sql = load("agents.recovery", "maintain.sql")

WRITER: Final = "maintain"
EVERY: Final = timedelta(days=1)
LOOK_S: Final = 60.0
ROWS_MAX: Final = 2_000
"""Of one commit: a stage that wants one of them waits some milliseconds."""
TRIES_MAX: Final = 5

Retentions = Callable[[], Awaitable[Mapping[str, int]]]
"""Asks the broker: topic without prefix -> its retention in milliseconds."""


@dataclass(frozen=True, slots=True)
class Rule:
    """Which rows of a table may go."""

    table: Table
    find: str
    """Their keys."""
    still: str
    """Those of the keys that may still go, locked in order."""
    args: tuple[Any, ...]
    """Of both, before the keys."""
    along: tuple[tuple[Table, str], ...] = ()
    """Tables whose rows go with them: keys by theirs."""


class Maintain:
    """`work` never returns. `run` needs no leadership to be right, only to be economical."""

    def __init__(
        self,
        services: Services,
        prefix: str,
        margin: timedelta,
        retentions: Retentions,
        counted: Callable[[str, int], None] = lambda _table, _rows: None,
        ended: Callable[[datetime], None] = lambda _at: None,
    ) -> None:
        """`prefix`: of topics. `counted`: is told of rows that are gone, by table; `ended`: when the last run ended."""
        self._services = services
        self._prefix = prefix
        self._margin = margin
        self._retentions = retentions
        self._counted = counted
        self._ended = ended
        self._writer = LoneWriter(WRITER, services)

    async def work(self) -> None:
        await self._writer.rounds(self._work, _failed, (KafkaError,))

    async def _work(self, connection: Connection) -> float:
        if await self.due(connection):
            gone = await self.run(connection, WRITER)
            _log.info("database.maintained", **gone)
        return LOOK_S

    async def due(self, connection: Connection) -> bool:
        last: datetime | None = await connection.fetchval(_sql.last_run, WRITER)
        if last is not None:
            self._ended(last)
        return last is None or last + EVERY <= self._services.clock()

    async def would(self, connection: Connection) -> dict[str, int]:
        """How many rows of each table may go now."""
        rules, before = await self._rules(connection)
        found = {}
        for rule in rules:
            found[rule.table.name] = await connection.fetchval(
                f"SELECT count(*) FROM ({rule.find}) AS found",  # noqa: S608  (a named statement)
                *rule.args,
            )
        found["crashes"] = await connection.fetchval(_sql.count_crashes, before)
        return found

    async def run(self, connection: Connection, actor: str) -> dict[str, int]:
        """Forgets what may go; rows by table. Raises what a database or a broker that is away raises: what is gone is gone."""
        rules, before = await self._rules(connection)
        gone: Counter[str] = Counter()
        for rule in rules:
            gone[rule.table.name] += 0
            async for keys in self._found(rule):
                gone.update(await self._forget(connection, rule, keys))
        deleted = await connection.execute(_sql.crashes, before)
        gone["crashes"] = int(deleted.rpartition(" ")[2])
        self._counted("crashes", gone["crashes"])
        log = Log(actor, "database.maintained", "database", "-", None, dict(gone))
        async with connection.transaction():
            owners = await lock_writer(connection, WRITER)
            sealed = await seal(
                connection, WRITER, owners, blocks=[], messages=[], at=self._services.clock(), actor=actor,
                summary={"maintained": gone.total()}, logs=[log],
            )  # fmt: skip
        await tell(self._services, sealed)
        return dict(gone)

    async def _rules(self, connection: Connection) -> tuple[list[Rule], datetime]:
        """What may go, and before when nothing is of use whatever it is."""
        now, retentions = self._services.clock(), await self._retentions()
        rows = await connection.fetch(_sql.stages)
        stages = kept(
            [(stage, topic.removeprefix(self._prefix)) for stage, topic in rows], retentions, self._margin, now
        )
        names, plain, other = [list(column) for column in zip(*stages, strict=True)] or [[], [], []]
        oldest = min(now - self._margin, await connection.fetchval(_sql.oldest_open) or now)
        ended = longest(retentions, self._margin, now)
        day = oldest.astimezone(UTC).date().isoformat()
        rules = [
            Rule(INBOX, _sql.inbox, _sql.inbox_still, (names, plain, other)),
            Rule(CALLS, _sql.calls, _sql.calls_still, (names, other), ((CALL_MEMBERS, _sql.members),)),
            Rule(DEAD_LETTERS, _sql.letters, _sql.letters_still, (ended,)),
            Rule(COUNTERS, _sql.counters, _sql.counters_still, (DAY_COUNTER, day)),
        ]
        return rules, ended

    async def _found(self, rule: Rule) -> AsyncIterator[list[tuple[Any, ...]]]:
        """Keys in runs of ROWS_MAX, in one reading of the table: there is no index for it that every event would pay for."""
        reader = await self._services.connect()
        try:
            async with reader.transaction(isolation="repeatable_read", readonly=True):
                cursor = await reader.cursor(rule.find, *rule.args)
                while rows := await cursor.fetch(ROWS_MAX):
                    yield [tuple(row) for row in rows]
        finally:
            with suppress(*TRANSIENT):
                await reader.close()

    async def _forget(self, connection: Connection, rule: Rule, keys: list[tuple[Any, ...]]) -> dict[str, int]:
        for tries in range(1, TRIES_MAX + 1):
            try:
                gone, sealed = await self._commit(connection, rule, keys)
                break
            except Unchanged:
                return {}
            except OVERTAKEN:
                if tries == TRIES_MAX:
                    raise
        await tell(self._services, sealed)
        for table, rows in gone.items():
            self._counted(table, rows)
        return gone

    async def _commit(
        self, connection: Connection, rule: Rule, keys: list[tuple[Any, ...]]
    ) -> tuple[dict[str, int], Sealed]:
        async with connection.transaction():
            owners = await lock_writer(connection, WRITER)
            rows = [tuple(row) for row in await connection.fetch(rule.still, *rule.args, *_columns(keys))]
            if not rows:
                raise Unchanged
            gone: list[tuple[Table, list[tuple[Any, ...]]]] = [(rule.table, rows)]
            for table, query in rule.along:
                gone.append((table, [tuple(row) for row in await connection.fetch(query, *_columns(rows))]))
            blocks: list[Block] = [block(table, Op.DELETE, some) for table, some in gone if some]
            counts = {table.name: len(some) for table, some in gone}
            sealed = await seal(
                connection, WRITER, owners, blocks=blocks, messages=[], at=self._services.clock(), actor=WRITER,
                summary=counts,
            )  # fmt: skip
        return counts, sealed


def _failed(error: Exception) -> float:
    _log.warning("maintain.retry", error=type(error).__name__)
    return LOOK_S


def _columns(keys: list[tuple[Any, ...]]) -> list[list[Any]]:
    return [list(column) for column in zip(*keys, strict=True)]
