"""What a worker shows of itself, on Faust's own web: /flow, /healthz, /readyz, /metrics.

Bound to loopback by default: Faust's web has no authentication.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any, Final, get_args

from faust.types import TP

from agents.delivery import Delivery
from agents.services import Services
from stablerail.metrics import Metrics, Outcome
from stablerail.page import page
from stablerail.wiring import Movement

MEASURE_S: Final = 1.0
OUTCOMES: Final[tuple[Outcome, ...]] = get_args(Outcome)


@dataclass
class StageFigures:
    """One line of /flow. Counts since this process started; seconds; events."""

    stage: str
    source: str
    events_in: int = 0
    events_out: int = 0
    refused: int = 0
    retried: int = 0
    repeats: int = 0
    rate_per_s: float = 0.0
    lag: int = 0
    oldest_age_s: float = 0.0
    partitions: int = 0
    trouble: str = ""


class View:
    """Gathers figures once a second; the handlers only show them."""

    def __init__(
        self, name: str, app: Any, movement: Movement, shared: Services, metrics: Metrics, unassigned_s: float
    ) -> None:
        self._name = name
        self._app = app
        self._shared = shared
        self.metrics = metrics
        self._unassigned_s = unassigned_s
        self._deliveries = movement.deliveries
        self._measures = movement.measures
        self._last: dict[str, tuple[float, int]] = {}
        # per stage: where one topic is missing, the others' partitions come all the same
        self._assigned_at = {delivery.stage.name: time.monotonic() for delivery in movement.deliveries}
        self.figures = [StageFigures(d.stage.name, d.stage.source.name) for d in movement.deliveries]
        self._held: dict[str, set[tuple[str, int]]] = {d.stage.name: set() for d in movement.deliveries}
        self.stopping = False
        self.beat: Callable[[], None] = lambda: None
        """Called with every measurement: the event loop lives."""

    def unready(self) -> dict[str, str]:
        """Stage or part -> why it does not work; empty when ready."""
        found = dict(self._shared.unready)
        if self.stopping:
            found["worker"] = "stopping"
        without = {stage: time.monotonic() - at for stage, at in self._assigned_at.items()}
        idle = [f"{name} has no partition for {s:.0f} s" for name, s in without.items() if s > self._unassigned_s]
        if idle:
            found["assignment"] = ", ".join(idle)
        return found

    async def measure(self) -> None:
        """Never returns."""
        while True:
            for delivery, figures in zip(self._deliveries, self.figures, strict=True):
                self._measure(delivery, figures)
            for measure in self._measures:
                measure()
            self.beat()
            self.metrics.worker_ready(self._name, ready=not self.unready())
            await asyncio.sleep(MEASURE_S)

    def _measure(self, delivery: Delivery, figures: StageFigures) -> None:
        now, name = time.monotonic(), delivery.stage.name
        counts = {kind: self.metrics.settled[name, kind] for kind in OUTCOMES}
        figures.events_in = sum(counts.values())
        figures.events_out = delivery.messages_emitted
        figures.refused = counts["rejected"] + counts["reused"]
        figures.retried, figures.repeats = counts["retry"], counts["repeat"]
        then, before = self._last.get(name, (now, figures.events_in))
        figures.rate_per_s = (figures.events_in - before) / (now - then) if now > then else 0.0
        self._last[name] = (now, figures.events_in)
        held = delivery.held()
        for _, partition in self._held[name] - held:
            self.metrics.partition_gone(name, partition)
        self._held[name] = held
        figures.partitions = len(held)
        if held:
            self._assigned_at[name] = now
        figures.lag = 0
        for topic, partition in held:
            waiting = self._app.consumer.lag(TP(topic, partition))
            self.metrics.lag(name, partition, waiting)
            figures.lag += waiting
        oldest = delivery.oldest_ms
        figures.oldest_age_s = max(time.time() - oldest / 1000, 0.0) if oldest is not None else 0.0
        self.metrics.oldest_event_age(name, figures.oldest_age_s)
        figures.trouble = self._shared.unready.get(name, "")

    def html(self) -> str:
        """The page."""
        rows = "".join(_row(figures) for figures in self.figures)
        trouble = "; ".join(f"{part}: {why}" for part, why in self.unready().items())
        state = f'<span class="bad">{escape(trouble)}</span>' if trouble else "ready"
        if not rows:
            rows = '<tr><td colspan="10">No stage here: this movement reads no topic.'
        heads = "<th>stage<th>in<th>out<th>refused<th>retried<th>repeats<th>events/s<th>lag<th>oldest<th>partitions"
        return page(f"{self._name} flow", f"{state} · counts since this worker started", heads, rows)


def _row(f: StageFigures) -> str:
    refused = f'<span class="bad">{f.refused:,}</span>' if f.refused else "0"
    trouble = f' <span class="bad">{escape(f.trouble)}</span>' if f.trouble else ""
    return (
        f"<tr><td><b>{escape(f.stage)}{trouble}</b><small>{escape(f.source)}</small>"
        f"<td>{f.events_in:,}<td>{f.events_out:,}<td>{refused}<td>{f.retried:,}<td>{f.repeats:,}"
        f"<td>{f.rate_per_s:,.1f}<td>{f.lag:,}<td>{f.oldest_age_s:.1f} s<td>{f.partitions}"
    )


def mount(app: Any, view: View) -> None:
    """Adds the pages to the app's web server."""

    async def flow(web: Any, request: Any) -> Any:
        if "json" in request.headers.get("accept", ""):
            return web.json([vars(figures) for figures in view.figures])
        return web.html(view.html())

    async def healthz(web: Any, _request: Any) -> Any:
        return web.json({"status": "ok"})

    async def readyz(web: Any, _request: Any) -> Any:
        trouble = view.unready()
        body = {"status": "unready" if trouble else "ready", "trouble": trouble}
        return web.json(body, status=503 if trouble else 200)

    async def metrics(web: Any, _request: Any) -> Any:
        return web.bytes(view.metrics.render(), content_type="text/plain")

    for handler in (flow, healthz, readyz, metrics):
        app.page(f"/{handler.__name__}", name=handler.__name__)(handler)
