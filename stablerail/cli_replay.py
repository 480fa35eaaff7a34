"""`stablerail replay STAGE`: a stage over old input once more. Without --apply it only says what the stage would do."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from agents.recovery.old_input import InputRefused, OldInput, Range, batches_of, letters
from agents.recovery.replay import NEVER, WANTED, Given, Replay, Told, Verdict
from ledger.posting import Transaction
from stablerail.cli_base import EXIT_USAGE, Actor, actor_of, fail, needed_settings, out, run, show_table
from stablerail.cli_verify import shown_progress
from stablerail.config import Settings
from topics.catalog import Topic
from topics.money import format_amount

EVENTS_RANGE_MAX: Final = 1_000_000
"""Of one run: it remembers each event's id."""
REASON_LENGTH_MAX: Final = 500
Time = Annotated[str | None, typer.Option(metavar="TIME", help="RFC 3339 with a zone, or a date")]
Offset = Annotated[int | None, typer.Option(min=0, metavar="N", help="with --partition; included")]


@dataclass
class Sums:
    """What was told of all events so far."""

    events: Counter[tuple[Verdict, str]] = field(default_factory=Counter)
    postings: Counter[str] = field(default_factory=Counter)
    amounts: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    messages: Counter[str] = field(default_factory=Counter)
    calls: int = 0
    published: int = 0

    def add(self, told: Told) -> None:
        self.events[told.verdict, told.code] += 1
        if told.done is None:
            return
        for posting in told.done.postings:
            self.postings[posting.kind] += 1
            self.amounts[posting.kind] += _amount(posting)
        for emit in told.done.emits:
            self.messages[emit.topic.name] += 1
        self.calls += len(told.done.calls)

    def what(self, verdict: Verdict) -> str:
        """What the events of this verdict come to."""
        codes = [f"{code} {n}" for (one, code), n in sorted(self.events.items()) if one is verdict and code]
        if verdict is not Verdict.DONE:
            return ", ".join(codes)
        moved = [f"{n} {kind} {format_amount(self.amounts[kind])}" for kind, n in sorted(self.postings.items())]
        told = [f"{n} {topic}" for topic, n in sorted(self.messages.items())]
        asked = [f"{self.calls} wishes of a partner"] if self.calls else []
        return "; ".join([*moved, *told, *asked])

    def count(self, verdict: Verdict) -> int:
        return sum(n for (one, _), n in self.events.items() if one is verdict)


def _amount(posting: Transaction) -> int:
    """What it moves: its largest leg; of what only ends a hold nothing is known here."""
    legs = max((leg.amount for leg in posting.legs), default=0)
    return legs or int(getattr(posting.operation, "amount", None) or 0)


def replay(
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="a stage's name, as metrics and dead letters have it")],
    since: Annotated[str | None, typer.Option("--from", metavar="TIME", help="RFC 3339 with a zone, or a date")] = None,
    until: Annotated[str | None, typer.Option("--to", metavar="TIME", help="before this time")] = None,
    partition: Annotated[int | None, typer.Option(min=0, help="only this one")] = None,
    from_offset: Offset = None,
    to_offset: Offset = None,
    key: Annotated[str | None, typer.Option(help="only messages with this key")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help="instead of a range: dead letters, a JSON line each, as `stablerail dlq list --format json` writes them"
            " (origin, partition, offset; key and value in base64; headers in hex)"
        ),
    ] = None,
    apply: Annotated[bool, typer.Option("--apply", help="send the events to their topic again")] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="with --apply: also what is done, waits, would be refused or is nothing")
    ] = False,
    reason: Annotated[str | None, typer.Option(help="with --apply: why, for the audit")] = None,
    actor: Actor = None,
) -> None:
    """What STAGE would do with old input: shown, and done with --apply.

    A rehearsal decides each event by the stage's own rules in a transaction that is rolled back. --apply sends those that would
    be done, or wait, to their topic again, with their ids and bytes; the worker settles them. What is done is never done twice,
    so it may be repeated, cut off, or run by two at once.
    """
    from stablerail.replayable import NOT_REPLAYED, STAGES

    if stage in NOT_REPLAYED:
        fail(f"not_replayed: {stage} needs no replay: {NOT_REPLAYED[stage]}")
    if stage not in STAGES:
        fail(f"unknown_stage: {stage}; there are {', '.join(sorted(STAGES))}", EXIT_USAGE)
    wanted = _range(since, until, partition, from_offset, to_offset, key)
    if file is None and wanted == Range():
        fail("say which input: --from, --to, --partition, --key or --file", EXIT_USAGE)
    if file is not None and wanted != Range(key=wanted.key):
        fail("--file goes with --key alone: it is no part of a topic", EXIT_USAGE)
    if apply and not (reason and reason.strip() and len(reason) <= REASON_LENGTH_MAX and "\0" not in reason):
        fail(f"--apply needs --reason, in at most {REASON_LENGTH_MAX} characters", EXIT_USAGE)
    if (everything or reason) and not apply:
        fail("--all and --reason belong to --apply", EXIT_USAGE)
    try:
        lines = None if file is None else file.read_bytes().splitlines()
    except OSError as error:
        fail(f"{file}: {error.strerror}", EXIT_USAGE)
    settings = needed_settings("database_url", logs=False)
    how = Publishing(actor_of(settings, actor), reason or "", everything) if apply else None
    try:
        sums = run(lambda: _replayed(stage, settings, wanted, lines, how))
    except InputRefused as error:
        fail(f"{error.code}: {error}")
    _show(sums, how)


@dataclass(frozen=True)
class Publishing:
    actor: str
    reason: str
    everything: bool

    def takes(self, told: Told) -> bool:
        return told.verdict in WANTED or (self.everything and told.verdict not in NEVER)


def _range(
    since: str | None, until: str | None, partition: int | None, first: int | None, last: int | None, key: str | None
) -> Range:
    from stablerail.answers import parse_time

    times = []
    for name, text in (("--from", since), ("--to", until)):
        try:
            times.append(None if text is None else parse_time(text))
        except ValueError as error:
            fail(f"{name} {text}: {error}", EXIT_USAGE)
    if (first is not None or last is not None) and partition is None:
        fail("--from-offset and --to-offset are of one --partition", EXIT_USAGE)
    if first is not None and last is not None and first > last:
        fail(f"--from-offset {first} is after --to-offset {last}", EXIT_USAGE)
    if times[0] and times[1] and times[0] >= times[1]:
        fail(f"--from {since} is not before --to {until}", EXIT_USAGE)
    return Range(times[0], times[1], partition, first, last, None if key is None else key.encode())


async def _replayed(
    name: str, settings: Settings, wanted: Range, lines: list[bytes] | None, how: Publishing | None
) -> Sums:
    from agents.crash import Stop
    from agents.services import Services, tell
    from stablerail.metrics import Metrics
    from stablerail.replayable import made
    from stablerail.wiring import Movement, services

    shared: Services = services(settings, Metrics(), Stop(ends=False))
    parts = Movement("replay")
    opened: list[Any] = []

    async def connect() -> Any:
        opened.append(await shared.connect())
        return opened[-1]

    sums = Sums()
    try:
        stage = await made(name, settings, connect, parts)
        run_over = Replay(stage, await connect())
        if how is not None:
            await shared.emitter.start()
            await shared.relay.check()
        what = str(wanted) if lines is None else f"{len(lines)} dead letters"
        async with _input(stage.source, settings, wanted, lines) as batches:
            async for batch in batches:
                told = await run_over.rehearse(batch, shared.clock())
                for one in told:
                    sums.add(one)
                chosen = [one for one in told if how is not None and how.takes(one)]
                if how is None or not chosen:
                    continue
                sealed = await run_over.publish(chosen, shared.clock(), how.actor, how.reason, what)
                await tell(shared, sealed)
                sums.published += len(chosen)
        return sums
    finally:
        if how is not None:
            await shared.relay.close()
            await shared.emitter.stop()
        for close in (*parts.closing, *(connection.close for connection in opened)):
            await close()


@asynccontextmanager
async def _input(
    topic: Topic, settings: Settings, wanted: Range, lines: list[bytes] | None
) -> AsyncIterator[AsyncIterator[list[Given]]]:
    if lines is not None:
        yield _listed(letters(lines, topic, settings.topic_prefix, wanted.key))
        return
    from aiokafka import AIOKafkaConsumer

    from agents import lenient_records

    lenient_records.install()
    consumer = AIOKafkaConsumer(
        bootstrap_servers=settings.kafka_bootstrap.replace(";", ","), group_id=None, enable_auto_commit=False,
        auto_offset_reset="earliest",
    )  # fmt: skip
    try:
        await consumer.start()
        source = OldInput(consumer, topic, settings.topic_prefix, wanted)
        spans = await source.spans()
        total = sum(span.end - span.first for span in spans)
        if total > EVENTS_RANGE_MAX:
            raise InputRefused(f"the range holds {total:,} offsets; at most {EVENTS_RANGE_MAX:,} in one run")
        with shown_progress() as progress:
            yield source.batches(spans, _steps(progress, total))
    finally:
        await consumer.stop()


async def _listed(given: list[Given]) -> AsyncIterator[list[Given]]:
    for batch in batches_of(given):
        yield batch


def _steps(progress: Callable[..., None], total: int) -> Callable[[int], None]:
    done = 0

    def step(read: int) -> None:
        nonlocal done
        done += read
        progress("reading", done, total)

    return step


def _show(sums: Sums, how: Publishing | None) -> None:
    counted = [(f"{sums.count(one):,}", one.value, sums.what(one)) for one in Verdict if sums.count(one)]
    show_table(("events", "verdict", "what"), counted)
    if not sums.events:
        out.print("no events in that range")
    elif how is not None:
        out.print(f"{sums.published:,} sent to their topic again; their stage settles them")
    elif ready := sum(map(sums.count, WANTED)):
        out.print(f'{ready:,} would be sent again: --apply --reason "…"')
    else:
        out.print("nothing to repair")
