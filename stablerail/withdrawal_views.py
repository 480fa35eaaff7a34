"""What the worker of withdrawals shows: /withdrawals (how many are open, by state), /nonces (each lane), and their gauges.

Both are read from the database, the authority, every few seconds, so every worker shows all of it. Beside a lane's next nonce
stands what a Faust table over transactions.signed says, as far as this worker has the lane's partition: the two differ only
while something is on its way.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from html import escape
from typing import Any, Final

import structlog

from agents.looking import look_again_and_again
from agents.transport import ack, batched_topic
from agents.withdrawals.watch_nonces import take
from ledger.rows import Connection
from ledger.sql import load
from stablerail.metrics import Metrics
from stablerail.page import page
from topics.catalog import NONCES_TABLE, TRANSACTIONS_SIGNED

_log = structlog.get_logger()
_sql = load("stablerail", "withdrawals.sql")

LOOK_S: Final = 2.0
LATE_S: Final = 10.0
"""What was read so long ago is no longer what is."""

Row = dict[str, Any]


class WithdrawalViews:
    """`mount` it on an app before it starts. `work` never returns."""

    def __init__(
        self,
        prefix: str,
        connect: Callable[[], Awaitable[Connection]],
        metrics: Metrics,
        clock: Callable[[], datetime],
    ) -> None:
        self._prefix, self._connect, self._metrics, self._clock = prefix, connect, metrics, clock
        self._table: Any = {}
        self.states: list[Row] = []
        self.lanes: list[Row] = []
        self.read_at: datetime | None = None

    async def work(self) -> None:
        await look_again_and_again(self._connect, self.look, LOOK_S, "withdrawals.unseen")

    async def look(self, connection: Connection) -> None:
        """Reads both once, and sets the gauges anew."""
        now = self._clock()
        self.states = [_aged(row, now) for row in await connection.fetch(_sql.open_by_state)]
        self.lanes = [_aged(row, now) for row in await connection.fetch(_sql.lanes)]
        self.read_at = now
        self._metrics.withdrawals_open(
            [(row["chain"], row["status"], row["withdrawals"], row["oldest_age_s"]) for row in self.states]
        )
        self._metrics.lanes([(row["chain"], row["signer"], row["reason"], row["unmined"]) for row in self.lanes])

    def mount(self, app: Any) -> None:
        """The table, the agent that alone writes it, and the pages."""
        log = app.topic(
            NONCES_TABLE.named(self._prefix),
            partitions=NONCES_TABLE.partitions,
            key_serializer="json",
            value_serializer="json",
            internal=True,
        )
        self._table = app.Table("nonces", partitions=NONCES_TABLE.partitions, changelog_topic=log)
        source = batched_topic(app, TRANSACTIONS_SIGNED.named(self._prefix))

        async def watch_nonces(stream: Any) -> None:
            async for event in stream.noack().events():
                # a write for each lane, not for each transaction: while Faust's producer has a hundred changes to send, it takes
                # in no event of any stage
                found = ChainMap[str, int]({}, self._table)
                for record in event.value.records:
                    take(found, record.value, record.headers)
                self._table.update(found.maps[0])
                ack(app, event)

        app.agent(source, name="watch_nonces")(watch_nonces)

        async def withdrawals(web: Any, request: Any) -> Any:
            if "json" in request.headers.get("accept", ""):
                return web.json({"read_at": self._read_at(), "withdrawals": self.states})
            return web.html(self.withdrawals_html())

        async def nonces(web: Any, request: Any) -> Any:
            if "json" in request.headers.get("accept", ""):
                return web.json({"read_at": self._read_at(), "lanes": self.told()})
            return web.html(self.nonces_html())

        for handler in (withdrawals, nonces):
            app.page(f"/{handler.__name__}", name=handler.__name__)(handler)

    def told(self) -> list[Row]:
        """The lanes, each with the next nonce by what was told of it (`told`), None where another worker was told."""
        table = dict(self._table)
        return [{**row, "told": table.get(f"{row['chain']}:{row['signer']}")} for row in self.lanes]

    def withdrawals_html(self) -> str:
        """The page."""
        rows = "".join(
            f"<tr><td><b>{escape(row['status'])}</b><td>{escape(row['chain'])}<td>{row['withdrawals']:,}<td>{_age(row)}"
            for row in self.states
        )
        heads = "<th>state<th>chain<th>withdrawals<th>oldest"
        return page("withdrawals", self._about("that have not ended"), heads, rows or self._none(4, "None is open."))

    def nonces_html(self) -> str:
        """The page."""
        rows = "".join(map(_lane_html, self.told()))
        heads = "<th>lane<th>next nonce<th>as told<th>chain's nonce<th>in flight<th>oldest<th>state"
        return page("nonces", self._about("lanes that sign"), heads, rows or self._none(7, "No lane has signed yet."))

    def _read_at(self) -> str | None:
        return None if self.read_at is None else self.read_at.isoformat(timespec="seconds")

    def _about(self, what: str) -> str:
        """With the time of what is shown: while the database is away that is all there is."""
        if self.read_at is None:
            return f'{what} · <span class="bad">the database was not read yet</span>'
        read = f"as of {self.read_at:%H:%M:%S} UTC"
        if self._clock() - self.read_at > timedelta(seconds=LATE_S):
            read = f'<span class="bad">{read}; the database does not answer</span>'
        return f"{what} · {read}"

    def _none(self, columns: int, why: str) -> str:
        return "" if self.read_at is None else f'<tr><td colspan="{columns}">{why}'


def _aged(row: Any, now: datetime) -> Row:
    found = dict(row)
    oldest = found.pop("oldest")
    age_s = None if oldest is None else round(max((now - oldest).total_seconds(), 0.0), 1)
    return {**found, "oldest_age_s": age_s}


def _age(row: Row) -> str:
    return "" if row["oldest_age_s"] is None else f"{row['oldest_age_s']:,.0f} s"


def _lane_html(row: Row) -> str:
    paused = row["status"] == "paused"
    state = f'<span class="bad">paused: {escape(row["reason"])}</span>' if paused else escape(row["status"])
    told = "elsewhere" if row["told"] is None else f"{row['told']:,}"
    return (
        f"<tr><td><b>{escape(row['chain'])}</b><small>{escape(row['signer'])}</small><td>{row['next_nonce']:,}<td>{told}"
        f"<td>{row['chain_nonce']:,}<td>{row['in_flight']:,}<td>{_age(row)}<td>{state}"
    )
