"""What a stage in one process has in hand: runs of records as the transport brings them, read, and gathered into the next batch."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from agents.item import Item, is_for, read_item
from agents.outcome import Stage
from agents.services import Services

READ_AT_ONCE: Final = 50
"""Half a millisecond."""
QUEUED_RUNS_MAX: Final = 12
"""Read ahead of the batch in PostgreSQL: three batches; what is read much earlier has left the caches again."""


class Run(Protocol):
    """Consecutive records of one partition, as transport.py brings them."""

    @property
    def topic(self) -> str: ...
    @property
    def partition(self) -> int: ...
    @property
    def records(self) -> Sequence[Any]: ...


@dataclass(slots=True)
class Delivered:
    """A run and how it is acknowledged."""

    run: Run
    ack: Callable[[], Any]
    term: int = 0
    """Which assignment of its partition brought it, counted by `Delivery`."""
    items: list[Item] = field(default_factory=list)
    """Its records as the stage reads them; filled by `Intake.take`."""


class Intake:
    def __init__(self, stage: Stage[Any], services: Services) -> None:
        self._stage = stage
        self._services = services
        self._incoming: asyncio.Queue[Delivered | None] = asyncio.Queue(maxsize=QUEUED_RUNS_MAX)
        self._left_over: Delivered | None = None
        self._in_hand: deque[int] = deque()
        """Broker time of the first record of each run that was taken and is not finished, in order."""

    @property
    def oldest_ms(self) -> int | None:
        """Broker time of the oldest record in hand; None when there is none."""
        return min(self._in_hand, default=None)

    async def take(self, delivered: Delivered) -> bool:
        """Reads a run, here, while the batch before waits for PostgreSQL, and in slices, so that this batch never waits for them; then
        waits while enough are queued. False: all of its records are other stages'."""
        records = delivered.run.records
        for start in range(0, len(records), READ_AT_ONCE):
            if start:
                await asyncio.sleep(0)
            delivered.items += [read_item(self._stage, record) for record in records[start : start + READ_AT_ONCE]]
        delivered.items = [item for item in delivered.items if is_for(self._stage, item)]
        if others := len(records) - len(delivered.items):
            self._services.observer.event_settled(self._stage.name, "skipped", others)
        if not delivered.items:
            return False
        self._in_hand.append(records[0].timestamp)
        try:
            await self._incoming.put(delivered)
        except BaseException:  # nobody has it
            self._in_hand.pop()
            raise
        return True

    async def gather(self) -> list[Delivered]:
        """What waits, up to the limit; a run that would pass it is the first of the next batch. Waits for something, or for `nudge`."""
        events = size = 0
        found: list[Delivered] = []
        first, self._left_over = self._left_over or await self._incoming.get(), None
        while True:
            if first is not None:
                run = first.run
                size += sum(len(record.value or b"") for record in run.records)
                if found and (events + len(run.records) > self._services.events_max or size > self._services.bytes_max):
                    self._left_over = first
                    return found
                events += len(run.records)
                found.append(first)
            if self._incoming.empty():
                return found
            first = self._incoming.get_nowait()

    def nudge(self) -> None:
        """Whoever gathers goes on, with nothing where nothing waits."""
        if not self._incoming.full():
            self._incoming.put_nowait(None)  # a full queue is looked at anyway

    def finished(self, runs: int) -> None:
        """So many of the runs that were gathered, the oldest."""
        for _ in range(runs):
            self._in_hand.popleft()
