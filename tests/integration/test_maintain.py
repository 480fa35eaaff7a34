"""What may be forgotten goes, and nothing else; and what comes again after that is not done again."""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from agents import lone_writer
from agents.onboarding import freeze_wallets, provision_wallets, request_wallets
from agents.recovery import maintain as maintaining
from agents.recovery.maintain import Maintain
from agents.services import Services
from agents.treasury import fund_broker
from ledger.commit import claim_owners
from ledger.rows import Changes, Connection
from ledger.tables import CALL_MEMBERS, CALLS, COUNTERS, DEAD_LETTERS, INBOX, JOURNALED, SCHEDULE, WITHDRAWALS
from ledger.verify import verify
from stablerail.config import load_settings
from stablerail.dev.kafka import Kafka
from stablerail.wiring import broker_retentions
from tests.integration import test_cli, test_deposit_reorgs, test_withdrawals_path
from tests.integration.test_cli import Result
from tests.integration.test_withdrawals_path import Payer
from tests.support import ledger_rig
from tests.support import orders as orders_told
from tests.support.deposit_rig import USDC, Shore, reported
from tests.support.in_process import SCHEMA, Ground, ground, running, until
from tests.support.invariants import may_break
from tests.support.orders import fill, place, say
from tests.support.payouts import asked, store
from tests.support.rebuild import differences, empty_database, rebuild
from tests.support.wallet_rig import CHAINS, Rig, wallet_rig
from tests.support.withdrawals import balance, fund
from topics.catalog import (
    BROKER_FUNDED,
    DEPOSITS_NOTIFIED,
    ORDERS_CANCELLED,
    ORDERS_EXPIRED,
    ORDERS_REJECTED,
    ORDERS_RESERVED,
    ORDERS_SETTLED,
    TRANSACTIONS_CONFIRMED,
    TRANSACTIONS_SIGNED,
    WALLETS_FROZEN,
    WALLETS_PROVISIONED,
    WALLETS_REQUESTED,
    WITHDRAWALS_ACCEPTED,
    WITHDRAWALS_SETTLED,
    Topic,
)
from topics.events import Chain, HeadSeen

databases, run, clean = ledger_rig.databases, test_cli.run, test_cli.clean
path, shore = test_withdrawals_path.path, test_deposit_reorgs.shore

NOW = datetime(2026, 7, 1, 12, tzinfo=UTC)
DAY = timedelta(days=1)
MARGIN = 14 * DAY
LONG_AFTER_S = 400 * 86_400.0


async def declared() -> dict[str, int]:
    return {}


# -- what goes ------------------------------------------------------------------------------------------------------------


def inbox_row(stage: str, days: float, outcome: str = "done", attempt: int = 1) -> tuple[Any, ...]:
    return (stage, uuid.uuid4().hex, attempt, uuid.uuid4().hex, outcome, NOW - days * DAY)


def call_row(state: str, days: float) -> tuple[Any, ...]:
    ended = None if state == "open" else NOW - days * DAY
    return (
        uuid.uuid4().hex, "provision_wallets", "circle", "create_wallets", uuid.uuid4().hex, {}, b"f", state,
        NOW - (days + 1) * DAY, ended, 1, 0, None, None, None,
    )  # fmt: skip


GOES = (
    inbox_row("credit_deposits", 21.1), inbox_row("credit_deposits", 104.1, "rejected"),
    inbox_row("credit_deposits", 104.1, attempt=2), inbox_row("finalize_deposits", 15.1),
    *(inbox_row("accept_withdrawals", 30 + n) for n in range(5)),
)  # fmt: skip
STAYS = (
    inbox_row("credit_deposits", 20.9), inbox_row("credit_deposits", 103.9, "rejected"),
    inbox_row("credit_deposits", 103.9, attempt=2), inbox_row("finalize_deposits", 14.9),
    inbox_row("credit_deposits", 900, "retry"), inbox_row("request_wallets", 900), inbox_row("of_another_release", 900),
    inbox_row("request_wallets", 900, "rejected"),
)  # fmt: skip
STAGES = {
    "credit_deposits": "deposits.notified", "finalize_deposits": "chain.heads",
    "accept_withdrawals": "withdrawals.requested", "request_wallets": "kyc.approved",
    "provision_wallets": "wallets.requested",
}  # fmt: skip
CALLS_GO = (call_row("concluded", 104.1), call_row("split", 300))
CALLS_STAY = (call_row("concluded", 103.9), call_row("open", 300), call_row("failed", 300))


def letter_row(state: str, days: float, stage: str = "credit_deposits", event_id: str | None = None) -> tuple[Any, ...]:
    at = NOW - days * DAY
    return (
        uuid.uuid4().hex, "deposits.notified.dlq", stage, event_id, "bug", "", "deposits.notified", 0, 1, b"k",
        b"{}", [], 1, "1", state, 0, None, at, at, at, 1, [],
    )  # fmt: skip


LETTERS_GO = (letter_row("resolved", 104.1), letter_row("discarded", 300))
LETTERS_STAY = (
    letter_row("resolved", 103.9), letter_row("open", 900), letter_row("redriven", 900),
    letter_row("discarded", 900, *STAYS[-1][:2]),
)  # fmt: skip


def day_counter(days: float, who: str = "user ada") -> tuple[Any, ...]:
    return (f"withdrawn {(NOW - days * DAY).date()} {who}", 5, 1, NOW)


@pytest.fixture
async def full(database: str, kafka: Kafka, topic_prefix: str) -> AsyncIterator[Ground]:
    """A database with rows of all ages, at NOW."""
    async with ground(database, kafka.bootstrap, topic_prefix, [DEPOSITS_NOTIFIED]) as at:
        at.clock = lambda: NOW  # type: ignore[assignment]
        connection = await at.connect()
        async with connection.transaction():
            for stage, topic in STAGES.items():
                await claim_owners(connection, stage, [(f"{topic_prefix}{topic}", 0)], NOW)
        changes = Changes()
        for row in (*GOES, *STAYS):
            changes.insert(INBOX, row)
        waits = STAYS[4]
        changes.insert(SCHEDULE, (*waits[:2], 2, "deposits.notified", b"k", b"{}", [], "later", NOW))
        for row in (*CALLS_GO, *CALLS_STAY):
            changes.insert(CALLS, row)
            for item in ("a", "b"):
                changes.insert(
                    CALL_MEMBERS, ("provision_wallets", uuid.uuid4().hex, item, row[0], {}, {}, NOW - 300 * DAY)
                )
        for row in (*LETTERS_GO, *LETTERS_STAY):
            changes.insert(DEAD_LETTERS, row)
        for counter in (day_counter(40), day_counter(31), day_counter(30), day_counter(2, "network MATIC")):
            changes.insert(COUNTERS, counter)
        changes.insert(COUNTERS, ("outstanding ada", 0, 1, NOW - 900 * DAY))
        open_since = asked("ada", USDC, "0x1")._replace(requested_at=NOW - 30 * DAY, hold_id=None, status="pending")
        changes.insert(WITHDRAWALS, open_since)
        await store(connection, changes, at=NOW)
        crash = 'INSERT INTO crashes (stage, topic, partition, "offset", count, error, last_at) VALUES'
        await connection.execute(
            f"{crash} ('s', 't', 0, 1, 1, 'E', $1), ('s', 't', 0, 2, 1, 'E', $2)", NOW, NOW - 200 * DAY
        )
        await connection.close()
        may_break(database, "its rows are made up")
        yield at


async def left(at: Ground, query: str) -> set[str]:
    return {str(row[0]) for row in await at.observer.fetch(query)}


async def test_what_may_go_goes_in_small_commits_and_a_rebuild_forgets_the_same(
    full: Ground, databases: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maintaining, "ROWS_MAX", 3)
    counted: Counter[str] = Counter()

    def dies(table: str, rows: int) -> None:
        counted[table] += rows
        if counted.total() == 6:
            raise ZeroDivisionError("the process dies")

    async with full.process() as services:
        job = Maintain(services, full.prefix, MARGIN, declared, dies)
        connection = await services.connect()
        would = await job.would(connection)
        assert would == {"inbox": 9, "calls": 2, "dead_letters": 2, "counters": 2, "crashes": 1}
        assert await job.due(connection)
        with pytest.raises(ZeroDivisionError):
            await job.run(connection, "ann")
        assert await job.due(connection), "a run that did not end is none"
        assert counted == {"inbox": 6}
        job = Maintain(services, full.prefix, MARGIN, declared)
        ann, ben = await asyncio.gather(job.run(connection, "ann"), job.run(await services.connect(), "ben"))
        assert Counter(ann) + Counter(ben) == {
            "inbox": 3, "calls": 2, "call_members": 4, "dead_letters": 2, "counters": 2, "crashes": 1,
        }  # fmt: skip
        assert not await job.due(connection)
        assert sum((await job.would(connection)).values()) == 0
        await until(lambda: _journaled(full), "the journal has everything")
    kept = "SELECT replace(event_id::text, '-', '') FROM inbox"
    assert await left(full, kept) == {row[1] for row in STAYS}
    calls = "SELECT replace(id::text, '-', '') FROM calls"
    assert await left(full, calls) == {row[0] for row in CALLS_STAY}
    members = "SELECT DISTINCT replace(call_id::text, '-', '') FROM call_members"
    assert await left(full, members) == {row[0] for row in CALLS_STAY}
    letters = "SELECT replace(id::text, '-', '') FROM dead_letters"
    assert await left(full, letters) == {row[0] for row in LETTERS_STAY}
    names = {day_counter(30)[0], day_counter(2, "network MATIC")[0], "outstanding ada"}
    assert await left(full, "SELECT name FROM counters") == names, "a withdrawal of that day is open"
    assert await left(full, 'SELECT "offset" FROM crashes') == {"1"}
    assert await full.observer.fetch("SELECT * FROM invariant_10_events_settled_once") == []
    logs = "SELECT actor FROM audit_logs WHERE action = 'database.maintained'"
    assert await left(full, logs) == {"ann", "ben"}
    async with empty_database(full.dsn) as empty:
        await rebuild(full.bootstrap, full.prefix, empty, SCHEMA)
        assert await differences(full.dsn, empty) == {}


async def _journaled(at: Ground) -> bool:
    return not await at.observer.fetchval("SELECT count(*) FROM outbox WHERE NOT journaled")


async def test_what_is_settled_again_while_it_is_forgotten_stays(full: Ground) -> None:
    """Between the reading and the lock a dead letter of a hundred days ago is redriven."""
    async with full.process() as services:
        job = Maintain(services, full.prefix, MARGIN, declared)
        connection = await services.connect()
        rules, _ = await job._rules(connection)
        found = [keys async for keys in job._found(rules[0])]
        redriven = GOES[1]
        await full.observer.execute(
            "UPDATE inbox SET outcome = 'done', attempt = 2, at = $1 WHERE event_id = $2", NOW, redriven[1]
        )
        for keys in found:
            await job._forget(connection, rules[0], keys)
    kept = await left(full, "SELECT replace(event_id::text, '-', '') FROM inbox")
    assert kept == {row[1] for row in STAYS} | {redriven[1]}


async def test_a_topic_that_the_broker_keeps_longer_keeps_its_rows(full: Ground) -> None:
    settings = load_settings(env_file=None, kafka_bootstrap=full.bootstrap, topic_prefix=full.prefix)
    found = await broker_retentions(settings)()
    assert found[DEPOSITS_NOTIFIED.name] == DEPOSITS_NOTIFIED.retention_ms
    assert found[DEPOSITS_NOTIFIED.dlq.name] == DEPOSITS_NOTIFIED.dlq.retention_ms

    async def longer() -> dict[str, int]:
        return {**found, DEPOSITS_NOTIFIED.name: 30 * 86_400_000}

    async with full.process() as services:
        would = await Maintain(services, full.prefix, MARGIN, longer).would(await services.connect())
    assert would["inbox"] == 8


async def test_one_worker_forgets_once_a_day(full: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maintaining, "LOOK_S", 0.02)
    monkeypatch.setattr(lone_writer, "STANDBY_S", 0.02)
    days = 0
    ends: list[datetime] = []
    full.clock = lambda: NOW + days * DAY  # type: ignore[assignment]
    logs = "SELECT at FROM audit_logs WHERE action = 'database.maintained' AND actor = 'maintain'"
    async with full.process() as one, full.process() as other:
        jobs = [Maintain(services, full.prefix, MARGIN, declared, ended=ends.append) for services in (one, other)]
        tasks = [asyncio.create_task(job.work()) for job in jobs]
        for days in range(3):

            async def ran(wanted: int = days + 1) -> bool:
                return len(await left(full, logs)) == wanted

            await until(ran, f"the run of day {days}")
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (one.stop.reason, other.stop.reason) == (None, None)
    assert await full.observer.fetchval(f"SELECT count(*) FROM ({logs}) AS runs") == 3
    assert set(ends) <= {NOW + n * DAY for n in range(3)}


def rows_of(shown: Result) -> dict[str, int]:
    """Table -> rows."""
    lines = [line.split() for line in shown.output.splitlines()[1:-1]]
    return {name: int(rows.replace(",", "")) for rows, name in lines}


async def test_the_command_says_what_may_go_and_forgets_it(full: Ground, run: Callable[..., Result]) -> None:
    given = {"database_url": full.dsn, "kafka_bootstrap": full.bootstrap, "topic_prefix": full.prefix}
    long_ago = datetime(2020, 1, 1, tzinfo=UTC)  # whatever the wall's clock says
    statement = "UPDATE inbox SET at = $1 WHERE stage IN ('accept_withdrawals', 'finalize_deposits')"
    await full.observer.execute(statement, long_ago)
    shown = await asyncio.to_thread(run, "maintain", "--dry-run", **given)
    assert (shown.exit_code, shown.output.splitlines()[-1]) == (0, "would be forgotten"), shown.output
    done = await asyncio.to_thread(run, "maintain", "--actor", "ann")
    assert (done.exit_code, done.output.splitlines()[-1]) == (0, "forgotten"), done.output
    would, went = rows_of(shown), rows_of(done)
    assert would["inbox"] >= 7
    assert would == {name: went[name] for name in would}
    again = await asyncio.to_thread(run, "maintain", "--dry-run")
    assert set(rows_of(again).values()) == {0}
    wrong = await asyncio.to_thread(run, "maintain", retention_margin_days="7")
    assert (wrong.exit_code, "STABLERAIL_RETENTION_MARGIN_DAYS" in wrong.stderr) == (78, True)


# -- what comes again after that ------------------------------------------------------------------------------------------


async def state(connection: Connection, *but: str) -> dict[str, list[str]]:
    """Every journaled row but the guards and the proof of commits."""
    outside = {"inbox", "owners", "audit", "audit_logs", *but}
    return {
        table.name: [row[0] for row in await connection.fetch(f"SELECT t::text FROM {table.name} t ORDER BY 1")]
        for table in JOURNALED
        if table.name not in outside
    }


async def forget_all(services: Services, at: Ground) -> None:
    """What `maintain` leaves after more than a year, and no inbox at all."""
    at.clock.forward(LONG_AFTER_S)
    await Maintain(services, at.prefix, MARGIN, declared).run(await services.connect(), "ann")
    await at.observer.execute("DELETE FROM inbox")


@asynccontextmanager
async def all_again(at: Ground, *stages: Any, services: Services) -> AsyncIterator[None]:
    """The stages read their topics from the beginning to the end."""
    async with AsyncExitStack() as stack:
        ends: dict[tuple[str, int], int] = {}
        deliveries = []
        for stage in stages:
            for record in await at.told(stage.source):
                ends[record.topic, record.partition] = record.offset
            deliveries.append(await stack.enter_async_context(running(stage, services, at)))

        async def read() -> bool:
            return all(
                delivery.positions.get(key, -1) >= offset
                for delivery in deliveries
                for key, offset in ends.items()
                if key[0] == delivery.stage.source.named(at.prefix)
            )

        yield
        await until(read, "everything was read again")


async def ids(at: Ground, topic: Topic) -> list[bytes]:
    return sorted(dict(record.headers)["ce_id"] for record in await at.told(topic))


async def test_withdrawals_that_come_again_when_the_inbox_is_forgotten_are_neither_held_nor_signed_nor_paid_again(
    path: Payer,
) -> None:
    at, topics = path.at, (WITHDRAWALS_ACCEPTED, TRANSACTIONS_SIGNED, TRANSACTIONS_CONFIRMED, WITHDRAWALS_SETTLED)
    async with path.worker():
        done = [await path.ask(f"user-{n}") for n in range(2)]
        await path.until_ended(2)
        waits = await path.ask("late")
        await path.until_rows(f"SELECT status FROM attempts WHERE withdrawal_id = '{waits[0]}'", [("broadcast",)])
    before, told = await state(at.observer, "chain_cursors", "counters"), [await ids(at, topic) for topic in topics]
    async with at.process() as services:
        await forget_all(services, at)
        async with all_again(at, *path.stages(services.connect), services=services):
            pass
        after = await state(at.observer, "chain_cursors", "counters")
        assert {name: set(before[name]) ^ set(after[name]) for name in before if before[name] != after[name]} == {}
        assert [await ids(at, topic) for topic in topics] == told
        assert await left(at, "SELECT outcome FROM inbox") == {"done"}
    assert await path.paid() == {to: 1 for _, to in done}
    assert [one for one in await verify(at.observer) if not one.holds] == []


async def test_deposits_that_come_again_when_the_inbox_is_forgotten_are_credited_no_second_time(shore: Shore) -> None:
    till = shore.till
    _, to = await shore.wallet()
    await shore.pay((to, 5 * USDC), (to, 5 * USDC))
    await shore.head()
    events = [reported(one) for one in await shore.rpc.logs(shore.usdc.address.lower(), {to}, 0, 10**6)]
    for _ in range(2):
        assert [row[0] for row in await till.rows("DELETE FROM inbox RETURNING outcome")]
        before = await state(till.connection)
        told = len(till.told)
        again = await till.settle(shore.credit, *events)
        assert again.outcomes["done", ""] == 2
        assert await state(till.connection) == before
        assert len(till.told) == told
        await shore.final()
    newest = await shore.rpc.head()
    head = HeadSeen(
        chain=Chain.MATIC, chain_id=1, number=newest.number, block_hash=newest.hash, timestamp_s=newest.timestamp_s
    )
    final, told = await state(till.connection), len(till.told)
    for _ in range(2):
        await till.rows("DELETE FROM inbox")
        assert (await till.settle(shore.finalize, head)).outcomes["done", ""] == 1
    assert (await state(till.connection), len(till.told)) == (final, told)
    assert await till.statuses(to) == [("finalized", 1)] * 2
    await shore.verified()


@pytest.fixture
async def orders(database: str, kafka: Kafka, topic_prefix: str) -> AsyncIterator[Ground]:
    async with ground(database, kafka.bootstrap, topic_prefix, [*orders_told.TOPICS, BROKER_FUNDED]) as at:
        yield at


async def test_orders_that_come_again_when_the_inbox_is_forgotten_are_neither_reserved_nor_spent_nor_given_back_again(
    orders: Ground,
) -> None:
    at, topics = orders, (ORDERS_RESERVED, ORDERS_REJECTED, ORDERS_SETTLED)
    stages = (*orders_told.stages(), fund_broker.stage(1))
    await fund(at, "ada", 1_000 * USDC)
    async with orders_told.investing(at, *stages):
        await place(at, "spent", "100")
        await fill(at, "spent", "f1", "30")
        await fill(at, "spent", "f2", "60", filled_total="90")
        await place(at, "open", "50")
        await fill(at, "open", "f1", "20")
        await place(at, "ended", "10")
        await say(at, ORDERS_CANCELLED, "ended", filled_total="0")
        await place(at, "late", "10")
        await say(at, ORDERS_EXPIRED, "late")
        await place(at, "dear", "2000")
        await say(at, BROKER_FUNDED, "wire", funding_id="wire", amount="500")
        ends = {"spent": ("filled", 90 * USDC), "open": ("reserved", 20 * USDC), "ended": ("cancelled", 0)}
        await orders_told.until_orders(at, {**ends, "late": ("expired", 0), "dear": ("rejected", 0)})
        await until(lambda: balance(at, fund_broker.BROKER), "the broker has the company's own")
    before, told = await state(at.observer), [await ids(at, topic) for topic in topics]
    async with at.process() as services:
        await forget_all(services, at)
        async with all_again(at, *stages, services=services):
            pass
        assert await state(at.observer) == before
        assert [await ids(at, topic) for topic in topics] == told
        assert await left(at, "SELECT outcome FROM inbox") == {"done"}
    assert await orders_told.letters(at, *orders_told.TOPICS) == []


@pytest.fixture
async def rig(database: str, kafka: Kafka, topic_prefix: str) -> AsyncIterator[Rig]:
    async with wallet_rig(database, kafka.bootstrap, topic_prefix) as it:
        yield it


async def test_approvals_that_come_again_when_inbox_and_calls_are_forgotten_make_no_second_wallet(rig: Rig) -> None:
    """And set nobody free: of words whose times cannot be read only the inbox knows the order, so those rows stay."""
    at, topics = rig.at, (WALLETS_REQUESTED, WALLETS_PROVISIONED, WALLETS_FROZEN)
    await rig.approve("kim", "lee")
    async with rig.worker():
        await rig.ended(Counter(completed=2), "wallets")
        await rig.reject("lee")
        await until(lambda: ids(at, WALLETS_FROZEN), "lee is frozen")
    before, told, calls = await state(at.observer), [await ids(at, topic) for topic in topics], rig.calls
    made = rig.at_circle()
    async with at.process() as services:
        at.clock.forward(LONG_AFTER_S)
        await Maintain(services, at.prefix, MARGIN, declared).run(await services.connect(), "ann")
    rows = await at.observer.fetch("SELECT stage, count(*) FROM inbox GROUP BY stage")
    assert {tuple(row) for row in rows} == {("request_wallets", 2), ("freeze_wallets", 1)}
    assert await left(at, "SELECT state FROM calls") == set(), "they have ended"
    async with at.process() as services:
        stages = (request_wallets.stage(CHAINS), freeze_wallets.stage(), provision_wallets.stage())
        async with all_again(at, *stages, services=services):
            pass
    after = await state(at.observer)
    assert {name for name in before if before[name] != after[name]} == {"calls", "call_members"}
    assert after["calls"] == after["call_members"] == []
    assert (rig.calls, rig.at_circle()) == (calls, made)
    assert [await ids(at, topic) for topic in topics] == told
