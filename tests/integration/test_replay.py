"""A stage over old input once more: shown without a trace, and done once however often it is asked for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pytest

from agents.deposits import credit_deposits
from agents.deposits.policy import DepositPolicy
from agents.recovery import replay as replaying
from agents.recovery.letters import letter_of
from agents.recovery.old_input import Range
from agents.recovery.replay import Given, Replay, Verdict
from agents.sweeper import Sweeper
from ledger.accounts import spendable
from ledger.rows import Changes, Connection
from ledger.tables import WALLETS
from ledger.verify import verify
from stablerail.cli_dlq import as_json
from stablerail.cli_replay import Publishing, Sums, _replayed
from stablerail.config import Settings, load_settings
from stablerail.dev.kafka import Kafka
from stablerail.docs.asyncapi import everything, wired
from stablerail.replayable import NOT_REPLAYED, STAGES
from tests.integration import test_cli
from tests.integration.test_cli import Result
from tests.support.in_process import Ground, ground, running, until
from tests.support.ledger_rig import balance, connect_to, differences, dump
from tests.support.payouts import store
from topics.catalog import (
    DEPOSITS_CREDITED,
    DEPOSITS_FINALIZED,
    DEPOSITS_NOTIFIED,
    DEPOSITS_PARKED,
    INPUTS,
    WITHDRAWALS_ACCEPTED,
)
from topics.envelope import value_of
from topics.events import Chain, DepositNotified, Evidence, Rail, WithdrawalAccepted

run, clean = test_cli.run, test_cli.clean

USDC = 10**6
ADDRESS = {name: f"0x{number:040x}" for number, name in enumerate(("ada", "bob", "eve"), 0xA0)}
POLICY = DepositPolicy(minimum=USDC, chains_read=frozenset())
SENT = ("deposit", DEPOSITS_CREDITED.name)


@dataclass
class Desk:
    at: Ground
    settings: Settings
    connection: Connection
    sent: list[DepositNotified] = field(default_factory=list)

    async def wallet(self, user: str) -> None:
        changes = Changes()
        changes.insert(WALLETS, ("MATIC", ADDRESS[user], user, user, datetime.now(UTC)))
        await store(self.connection, changes, [], datetime.now(UTC))

    async def deposit(self, user: str, amount: int = USDC) -> None:
        number = len(self.sent)
        event = DepositNotified(
            source="bank", transfer_id=f"t{number}", chain="MATIC", tx_hash=f"0x{number:064x}", to=ADDRESS[user],
            asset="USDC", amount=amount, evidence=Evidence.CONFIRMED,
        )  # fmt: skip
        self.sent.append(event)
        await self.at.send(DEPOSITS_NOTIFIED, event.to.encode(), value_of(event))

    @asynccontextmanager
    async def worker(self) -> AsyncIterator[Any]:
        """One that reads the topic from its beginning: what it was told before comes again."""
        async with self.at.process() as services, running(credit_deposits.stage(POLICY), services, self.at) as delivery:
            yield delivery
            ends = await self.ends()
            await until(lambda: self._read(delivery, ends), "the worker has read everything")

    async def _read(self, delivery: Any, ends: dict[int, int]) -> bool:
        topic = DEPOSITS_NOTIFIED.named(self.at.prefix)
        return all(delivery.positions.get((topic, p), -1) >= end - 1 for p, end in ends.items() if end)

    async def ends(self) -> dict[int, int]:
        ends: dict[int, int] = {}
        for record in await self.at.told(DEPOSITS_NOTIFIED):
            ends[record.partition] = max(ends.get(record.partition, 0), record.offset + 1)
        return ends

    async def rehearsed(self, wanted: Range | None = None, lines: list[bytes] | None = None) -> Sums:
        return await _replayed("credit_deposits", self.settings, wanted or Range(partition=0), lines, None)

    async def applied(self, wanted: Range | None = None, *, everything: bool = False) -> Sums:
        how = Publishing("ann", "the bug of today", everything)
        return await _replayed("credit_deposits", self.settings, wanted or Range(partition=0), None, how)

    async def balances(self, *users: str) -> list[int]:
        return [await balance(self.connection, spendable(user)) or 0 for user in users]

    async def credited(self) -> list[str]:
        """Ids of what was told, repeats too."""
        records = await self.at.told(DEPOSITS_CREDITED)
        return sorted(dict(record.headers)["ce_id"].decode() for record in records)


@pytest.fixture
async def desk(database: str, kafka: Kafka, topic_prefix: str) -> AsyncIterator[Desk]:
    topics = (DEPOSITS_NOTIFIED, DEPOSITS_CREDITED, DEPOSITS_FINALIZED, DEPOSITS_PARKED, WITHDRAWALS_ACCEPTED)
    async with ground(database, kafka.bootstrap, topic_prefix, topics) as at:
        settings = load_settings(
            env_file=None, database_url=database, kafka_bootstrap=kafka.bootstrap, topic_prefix=topic_prefix,
            deposit_minimum="1",
        )  # fmt: skip
        connection = await connect_to(database)()
        yield Desk(at, settings, connection)
        await connection.close()


async def half_done(desk: Desk) -> None:
    """Ada's deposits are credited, Bob's were refused before he had a wallet, and two were never settled: a bug's work."""
    await desk.wallet("ada")
    for user in ("ada", "ada", "bob"):
        await desk.deposit(user)
    async with desk.worker():
        pass
    assert await desk.balances("ada", "bob") == [2 * USDC, 0]
    await desk.wallet("bob")
    await desk.deposit("ada", 5 * USDC)
    await desk.deposit("eve")


async def test_a_rehearsal_says_what_would_become_of_each_event_and_leaves_no_trace(desk: Desk) -> None:
    await half_done(desk)
    before, ends = await dump(desk.connection), await desk.ends()
    sums = await desk.rehearsed()
    assert {verdict: sums.count(verdict) for verdict in Verdict if sums.count(verdict)} == {
        Verdict.REPEAT: 2, Verdict.DONE: 2, Verdict.REFUSED: 1,
    }  # fmt: skip
    assert sums.what(Verdict.DONE) == "2 deposit 6.000000; 2 deposits.credited"
    assert sums.what(Verdict.REFUSED) == "unknown_wallet 1"
    assert differences(before, await dump(desk.connection)) == {}
    assert await desk.ends() == ends
    assert await desk.connection.fetchval("SELECT count(*) FROM outbox WHERE stage = 'replay'") == 0


async def test_what_a_bug_left_undone_is_done_once_however_often_and_by_whomever_it_is_replayed(desk: Desk) -> None:
    await half_done(desk)
    both = await asyncio.gather(desk.applied(), desk.applied())
    assert [sums.published for sums in both] == [2, 2]
    async with desk.worker():
        pass
    assert await desk.balances("ada", "bob", "eve") == [7 * USDC, USDC, 0]
    told = await desk.credited()
    assert len(told) == len(set(told)) == 4
    again = await desk.applied()
    assert again.published == 0, "what was sent twice is done, and what it said before is what it says now"
    everything = await desk.applied(everything=True)
    assert everything.published == everything.events.total() - everything.count(Verdict.REUSED)
    async with desk.worker():
        pass
    assert await desk.balances("ada", "bob", "eve") == [7 * USDC, USDC, 0]
    assert await desk.credited() == told
    assert [one for one in await verify(desk.at.observer) if not one.holds] == []
    logs = await desk.connection.fetch(
        "SELECT actor, after ->> 'reason' FROM audit_logs WHERE action = 'stage.replayed'"
    )
    assert {tuple(row) for row in logs} == {("ann", "the bug of today")}


async def test_a_replay_that_dies_after_its_commit_is_finished_by_the_sweeper_and_may_be_repeated(desk: Desk) -> None:
    await half_done(desk)
    run_over = Replay(credit_deposits.stage(POLICY), desk.connection)
    given = [_given(record) for record in await desk.at.told(DEPOSITS_NOTIFIED)]
    ready = [one for one in await run_over.rehearse(given, desk.at.clock()) if one.verdict is Verdict.DONE]
    await run_over.publish(ready, desk.at.clock(), "ann", "dies now", "partition 0")
    ends = await desk.ends()
    async with desk.at.process() as services:
        sweeper = Sweeper(services, abandoned_s=0)
        await sweeper.sweep(await services.connect())
    assert sum((await desk.ends()).values()) == sum(ends.values()) + 2
    assert (await desk.applied()).published == 2, "nothing has settled them yet"
    async with desk.worker():
        pass
    assert await desk.balances("ada", "bob") == [7 * USDC, USDC]
    assert len(await desk.credited()) == 4


async def test_rehearsals_beside_a_busy_worker_disturb_nobody_and_what_they_saw_undone_is_done_once(desk: Desk) -> None:
    await desk.wallet("ada")
    await asyncio.gather(*(desk.deposit("ada") for _ in range(300)))
    async with desk.worker():
        sums = await asyncio.gather(*(desk.applied() for _ in range(3)))
    async with desk.worker():
        pass
    for one in sums:
        assert one.count(Verdict.DONE) + one.count(Verdict.REPEAT) == one.events.total(), one.events
    assert await desk.balances("ada") == [300 * USDC]
    assert len(await desk.credited()) == 300
    assert [one for one in await verify(desk.at.observer) if not one.holds] == []


def _given(record: Any) -> Given:
    return Given(
        record.topic, record.partition, record.offset, record.timestamp, record.key, record.value, record.headers
    )


async def test_of_what_another_rails_stage_settles_nothing_is_left_to_do(desk: Desk) -> None:
    event = WithdrawalAccepted(
        withdrawal_id="7" * 32,
        user_id="ada",
        rail=Rail.CHAIN,
        chain=Chain.MATIC,
        asset="USDC",
        amount=USDC,
        to=ADDRESS["bob"],
    )
    await desk.at.send(WITHDRAWALS_ACCEPTED, b"MATIC", value_of(event))
    before = await dump(desk.connection)
    (partition,) = {record.partition for record in await desk.at.told(WITHDRAWALS_ACCEPTED)}
    sums = await _replayed("transfer_by_custodian", desk.settings, Range(partition=partition), None, None)
    assert sums.count(Verdict.IDLE) == 1
    assert differences(before, await dump(desk.connection)) == {}


async def test_ranges_by_time_offset_and_key_hold_what_they_say(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replaying, "EVENTS_MAX", 2)
    monkeypatch.setattr("agents.recovery.old_input.EVENTS_MAX", 2)
    for user in ("ada", "bob", "ada", "eve", "ada"):
        await desk.deposit(user)
    times = [datetime.fromtimestamp(one.timestamp / 1000, UTC) for one in await desk.at.told(DEPOSITS_NOTIFIED)]

    async def events(**bounds: Any) -> int:
        return (await desk.rehearsed(Range(**bounds))).events.total()

    assert await events(key=ADDRESS["ada"].encode()) == 3
    assert await events(partition=0, first=1, last=3) == 3
    assert await events(partition=1) == 0
    assert await events(since=times[0]) == 5
    assert await events(until=times[0]) == 0
    assert await events(since=times[-1]) == sum(time >= times[-1] for time in times)


async def test_events_that_stop_a_stage_cannot_be_read_or_reuse_an_id_are_named_and_never_sent(desk: Desk) -> None:
    await desk.wallet("ada")
    await desk.deposit("ada")
    async with desk.worker():
        pass
    topic, key = DEPOSITS_NOTIFIED, ADDRESS["ada"].encode()
    await desk.at.send(topic, key, b"not JSON")
    await desk.at.send(topic, key, value_of(desk.sent[0].model_copy(update={"amount": 3 * USDC})))
    sums = await desk.applied(everything=True)
    assert (sums.count(Verdict.UNREADABLE), sums.count(Verdict.REUSED), sums.published) == (1, 1, 1)

    def bug(*_: Any) -> Any:
        raise ZeroDivisionError

    await desk.deposit("ada", 2 * USDC)
    run_over = Replay(replace(credit_deposits.stage(POLICY), decide=bug), desk.connection)
    given = [_given(record) for record in await desk.at.told(topic)]
    told = await run_over.rehearse(given, desk.at.clock())
    assert [one.code for one in told if one.verdict is Verdict.BUG] == ["ZeroDivisionError"]
    # a producer that compresses gets in more than we, who do not, could ever send: the broker would refuse it for ever
    large = replace(given[-1], value=given[-1].value + b" ", headers=[("note", b"-" * 1_090_001)])
    (one,) = await Replay(credit_deposits.stage(POLICY), desk.connection).rehearse([large], desk.at.clock())
    assert (one.verdict, Publishing("ann", "r", everything=True).takes(one)) == (Verdict.LARGE, False)


async def test_dead_letters_of_a_file_are_replayed_like_a_range(desk: Desk) -> None:
    await half_done(desk)
    (record,) = await desk.at.told(DEPOSITS_NOTIFIED.dlq)
    line = orjson.dumps(as_json(letter_of(record, DEPOSITS_NOTIFIED.dlq.name, desk.at.clock())[0]))
    sums = await desk.rehearsed(Range(), [line, b""])
    assert sums.events == {(Verdict.DONE, ""): 1}
    assert (await desk.rehearsed(Range(key=b"another"), [line])).events == {}


def test_every_stage_is_replayed_or_says_why_it_need_not_be() -> None:
    stages, _ = asyncio.run(wired(everything()))
    names = {stage.name for _, stage in stages if stage.source in INPUTS}
    assert names == {*STAGES, *NOT_REPLAYED}


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["credit_deposit", "--partition", "0"], 2, "unknown_stage: credit_deposit; there are accept_withdrawals,"),
        (["sign_transactions", "--partition", "0"], 1, "not_replayed: sign_transactions needs no replay"),
        (["credit_deposits"], 2, "say which input"),
        (["credit_deposits", "--from", "yesterday"], 2, "a time is RFC 3339"),
        (["credit_deposits", "--from", "2026-02-02", "--to", "2026-02-01"], 2, "is not before --to"),
        (["credit_deposits", "--from-offset", "3"], 2, "are of one --partition"),
        (["credit_deposits", "--partition", "0", "--from-offset", "3", "--to-offset", "2"], 2, "is after"),
        (["credit_deposits", "--partition", "0", "--apply"], 2, "--apply needs --reason"),
        (["credit_deposits", "--partition", "0", "--reason", "x"], 2, "belong to --apply"),
        (["credit_deposits", "--file", "none.jsonl"], 2, "none.jsonl: No such file"),
        (["credit_deposits", "--file", "none.jsonl", "--partition", "0"], 2, "--file goes with --key alone"),
    ],
)
def test_a_replay_that_makes_no_sense_is_refused_in_one_line(
    run: Callable[..., Result], arguments: list[str], code: int, told: str
) -> None:
    result = run("replay", *arguments, database_url="postgresql://u:p@127.0.0.1:1/d")
    assert (result.exit_code, told in result.stderr) == (code, True), result.output + result.stderr


async def test_the_command_shows_its_table_and_refuses_what_is_not_there(
    desk: Desk, run: Callable[..., Result], tmp_path: Path
) -> None:
    await half_done(desk)
    given = {
        "database_url": desk.at.dsn, "kafka_bootstrap": desk.at.bootstrap, "topic_prefix": desk.at.prefix,
        "deposit_minimum": "1",
    }  # fmt: skip

    async def command(*arguments: str) -> Result:
        return await asyncio.to_thread(run, "replay", "credit_deposits", *arguments, **given)

    shown = await command("--partition", "0")
    assert shown.exit_code == 0, shown.output
    assert "2       would be done     2 deposit 6.000000; 2 deposits.credited" in shown.output
    assert '2 would be sent again: --apply --reason "…"' in shown.output
    gone = await command("--partition", "0", "--from-offset", "77")
    assert (gone.exit_code, "holds offsets 0 to 4, not 77" in gone.stderr) == (1, True)
    (tmp_path / "bad.jsonl").write_text('{"origin": "deposits.notified"}\n')
    bad = await command("--file", "bad.jsonl")
    assert (bad.exit_code, "bad_file: line 1 is no dead letter" in bad.stderr) == (1, True)
    (tmp_path / "other.jsonl").write_text('{"origin": "kyc.approved"}\n')
    other = await command("--file", "other.jsonl")
    assert "line 1 is an event of kyc.approved; the stage reads deposits.notified" in other.stderr
    done = await command("--partition", "0", "--apply", "--reason", "yesterday's bug", "--actor", "ann")
    assert "2 sent to their topic again; their stage settles them" in done.output
