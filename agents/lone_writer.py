"""A writer that no topic feeds, of which one in the whole deployment is at work: watchers and pollers.

Whoever holds the advisory lock leads; the others stand by. The lock is the connection's, and the commits are made on it: who
lost the one can do no more of the other. Cursor and messages are one commit, so nothing is skipped; what a crash left between
commit and emission, the next leader tells before anything of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Final, NoReturn

import asyncpg

from agents.services import Services, tell, tell_left
from ledger import journal
from ledger.commit import NO_TOPIC, TRANSIENT, lock_writer, lost_not_cancelled, seal
from ledger.record import Message
from ledger.rows import Block, Connection
from ledger.sql import load

_sql = load("agents", "lone_writer.sql")
_journal = load("ledger", "sql/journal.sql")

STANDBY_S = 2.0
"""Between two tries of who stands by."""
SILENCE_S: Final = 300.0
"""Far above what a round without a word to the database takes."""


class LoneWriter:
    def __init__(self, name: str, services: Services, silence_s: float | None = None) -> None:
        """`name`: the owner row's stage, and the lock's name. `silence_s`: who leads and says nothing to the database for so long is
        frozen, and leads no more; None where one round may take any time."""
        self.name = name
        self._silence_s = silence_s
        self._services = services
        self._connection: Connection | None = None
        self.leads = False

    async def lead(self) -> Connection | None:
        """The connection that holds the lock, or None while another leads."""
        if self._connection is None or self._connection.is_closed():
            self.leads = False
            self._connection = await self._services.connect()
        if not self.leads and await self._connection.fetchval(_sql.lead, self.name):
            if self._silence_s is not None:
                await self._connection.execute(_sql.silence, f"{int(self._silence_s * 1000)}ms")
            await self._drain(self._connection)
            self.leads = True
        return self._connection if self.leads else None

    async def _drain(self, connection: Connection) -> None:
        """Emits what the last leader left, or this one on a connection that it lost, before anything newer."""
        await self._services.relay.journal()
        owned = (self.name, NO_TOPIC, [0])
        await tell_left(
            self._services,
            lambda last: connection.fetch(_journal.left_by_partitions, *owned, last, journal.BYTES_AT_ONCE),
        )

    def give_up(self) -> None:
        """The connection, and with it the lead."""
        if self._connection is not None:
            self._connection.terminate()

    async def rounds(
        self,
        round: Callable[[Connection], Awaitable[float]],
        failed: Callable[[Exception], float],
        again: tuple[type[Exception], ...] = (),
        standing_by: Callable[[], None] = lambda: None,
    ) -> NoReturn:
        """`round` again and again while this process leads, `standing_by` while another does.

        `round` answers the seconds until the next one, `failed` those until another try, for an error of TRANSIENT or of `again`.
        Any other error stops the process.
        """
        while True:
            try:
                with lost_not_cancelled():
                    connection = await self.lead()
                    if connection is None:
                        pause_s = STANDBY_S
                        standing_by()
                    else:
                        pause_s = await round(connection)
            except (*TRANSIENT, *again) as error:
                if isinstance(error, asyncpg.InternalClientError):
                    self.give_up()  # while it lives it holds the lock, and nobody can lead
                pause_s = failed(error)
            except Exception as error:
                self._services.stop(f"{self.name}: {error!r}", error)
                raise
            await asyncio.sleep(pause_s)

    async def commit(self, blocks: Iterable[Block], messages: Sequence[Message], summary: dict[str, Any]) -> None:
        """Commits, journals and emits. For who leads."""
        connection = self._connection
        assert connection is not None
        async with connection.transaction():
            owners = await lock_writer(connection, self.name)
            sealed = await seal(
                connection,
                self.name,
                owners,
                blocks=blocks,
                messages=messages,
                at=self._services.clock(),
                actor=self.name,
                summary=summary,
            )
        await tell(self._services, sealed)
