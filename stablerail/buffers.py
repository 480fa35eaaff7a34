"""The Faust table of buffer levels in the app of the movement `treasury`, its page /buffers and its gauges.

Shown only while the app has the topic's one partition: another worker has the table otherwise, and what is left in memory
here is old.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from html import escape
from typing import Any

from agents.transport import ack, batched_topic
from agents.treasury.watch_buffers import Level, levels, take, thresholds_of, totals
from stablerail.config import Settings
from stablerail.metrics import Metrics
from stablerail.page import page
from topics.catalog import BUFFERS_LEVELS, BUFFERS_TABLE
from topics.money import format_amount


class Buffers:
    """`mount` it on an app before it starts; `measure` once a second."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._prefix = settings.topic_prefix
        self._thresholds = thresholds_of(settings.buffer_alert_threshold)
        self._metrics = metrics
        self._table: Any = {}
        self._held = False

    def mount(self, app: Any) -> None:
        """The table, the agent that alone writes it, and the page."""
        log = app.topic(
            BUFFERS_TABLE.named(self._prefix),
            partitions=1,
            key_serializer="json",
            value_serializer="json",
            internal=True,
        )
        self._table = app.Table("buffers", partitions=1, changelog_topic=log)
        source = batched_topic(app, BUFFERS_LEVELS.named(self._prefix))

        async def watch_buffers(stream: Any) -> None:
            async for event in stream.noack().events():
                for record in event.value.records:
                    take(self._table, record.value, record.headers)
                ack(app, event)

        app.agent(source, name="watch_buffers")(watch_buffers)
        app.on_rebalance_complete.connect(partial(self._rebalanced, source.get_topic_name()), weak=False)
        app.on_partitions_revoked.connect(self._revoked, weak=False)

        async def buffers(web: Any, request: Any) -> Any:
            found = self.levels()
            if "json" in request.headers.get("accept", ""):
                return web.json({"held": self._held, "buffers": [level.plain() for level in found]})
            return web.html(_html(found, held=self._held))

        app.page("/buffers", name="buffers")(buffers)

    async def _rebalanced(self, topic: str, sender: Any, **_: Any) -> None:
        self._held = any(tp.topic == topic for tp in sender.consumer.assignment())

    async def _revoked(self, _sender: Any, _revoked: Any, **_: Any) -> None:
        self._held = False

    def levels(self) -> list[Level]:
        """As far as this worker knows them; empty where another has them."""
        return levels(dict(self._table), self._thresholds) if self._held else []

    def measure(self) -> None:
        """The gauges, anew: what another worker has now, it reports."""
        self._metrics.buffers([(level.type, level.balance, level.threshold) for level in totals(self.levels())])


def _html(found: Iterable[Level], *, held: bool) -> str:
    rows = "".join(map(_row, found))
    if not rows:
        rows = '<tr><td colspan="5">' + ("No level was told yet." if held else "Another worker has the levels.")
    heads = "<th>buffer<th>level<th>threshold<th>state<th>version"
    return page("buffers", "levels as the commits tell them", heads, rows)


def _row(level: Level) -> str:
    threshold = "" if level.threshold is None else format_amount(level.threshold)
    state = "" if level.threshold is None else '<span class="bad">low</span>' if level.low else "ok"
    version = "" if level.version is None else f"{level.version:,}"
    return (
        f"<tr><td><b>{escape(level.account)}</b><td>{format_amount(level.balance)} {escape(level.asset)}"
        f"<td>{threshold}<td>{state}<td>{version}"
    )
