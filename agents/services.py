"""What every stage of a process runs on, and how its figures leave it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, Protocol

from agents.crash import Stop
from agents.emitter import Emitter
from agents.fuse import WINDOW
from ledger import journal
from ledger.commit import Sealed
from ledger.record import told_of
from ledger.rows import Connection


class Observer(Protocol):
    """Where figures go; stablerail/metrics.py has the real one."""

    def event_settled(
        self, stage: str, outcome: Literal["done", "rejected", "retry", "repeat", "reused", "skipped"], events: int = 1
    ) -> None: ...
    def refused(self, stage: str, code: str, events: int = 1) -> None: ...
    def dead_letter(self, topic: str, code: str, events: int = 1) -> None: ...
    def batch(
        self, stage: str, events: int, *, commit_s: float, journal_s: float, emit_s: float, ack_s: float
    ) -> None: ...
    def alert(self, stage: str, code: str) -> None: ...
    def letter(self, whose: str) -> None: ...
    def fuse(self, stage: str, *, blown: bool) -> None: ...
    def deposits(self, source: str, outcome: str, events: int = 1) -> None: ...
    def webhooks_in_ledger(self, waits_s: Mapping[float, int]) -> None: ...
    def withdrawal_ended(self, outcome: str, seconds: float) -> None: ...
    def call(self, partner: str, outcome: Literal["ok", "refused", "retry", "unknown"], seconds: float) -> None: ...
    def breaker(self, partner: str, state: int) -> None: ...
    def outbox_rows(self, rows: int) -> None: ...


@dataclass(frozen=True)
class Services:
    """What a stage runs on; one per process."""

    connect: Callable[[], Awaitable[Connection]]
    relay: journal.Relay
    emitter: Emitter
    observer: Observer
    stop: Stop
    events_max: int = 2_000
    bytes_max: int = 8_000_000
    in_flight: int = 2
    fenced_s_max: float = 20.0
    """How long a fenced worker waits for Kafka to say what it owns: above two session time-outs."""
    fuse_ratio: float = 0.5
    fuse_run: int = 500
    fuse_window: int = WINDOW
    clock: Callable[[], datetime] = field(default=lambda: datetime.now(UTC))
    unready: dict[str, str] = field(default_factory=dict)
    """Stage -> why it does not work; /readyz says so."""


async def tell(services: Services, sealed: Sealed) -> None:
    """What was just committed: into the journal, then to everybody. Nothing is told that a rebuilt database would not know."""
    await services.relay.journal([(sealed.seq, sealed.record)])
    await services.emitter.emit(sealed.messages, sealed.stage, sealed.at)
    services.relay.emitted([sealed.seq])


async def tell_left(services: Services, read: Callable[[int], Awaitable[Sequence[Any]]]) -> None:
    """Emits what is committed and journaled but may not have left. `read`: of the outbox the next (seq, record) above a number, some
    at a time. Repeats are possible, losses are not."""
    last = 0
    while rows := await read(last):
        for last, packed in rows:
            told = told_of(packed)
            await services.emitter.emit(told.messages, told.stage, told.at)
            services.relay.emitted([last])
