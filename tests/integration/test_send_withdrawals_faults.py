"""What may go wrong between a signature and a block, on a real PostgreSQL and a real node: each withdrawal is paid once all the
same, with the nonce that it was given first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
from structlog.testing import capture_logs

from agents.withdrawals.stored import lock
from agents.withdrawals.withdrawal import Status, Withdrawal, moved
from chain import hot_wallet
from ledger.commit import lock_writer, seal
from ledger.rows import Changes, Connection
from stablerail.dev.anvil import Anvil
from stablerail.dev.usdc import Usdc
from tests.support import ledger_rig
from tests.support import sending as sending_rig
from tests.support.invariants import may_break
from tests.support.ledger_rig import AT, assert_holds, connect_to, owner
from tests.support.patience import PATIENCE_S
from tests.support.proxies.http import HttpProxy, http_request
from tests.support.rpc_stub import LyingEndpoint, Refusal
from tests.support.sending import COIN, Sending, messages, sending
from topics.catalog import TRANSACTIONS_BROADCAST

databases, dsn, connection = ledger_rig.databases, ledger_rig.dsn, ledger_rig.connection
chain, token = sending_rig.chain, sending_rig.token

SIGNED, KNOWN = ("broadcasting", "signed"), ("confirming", "broadcast")
NOBODY = "http://127.0.0.1:9"
"""No node listens there."""
PATIENT_S = 3_600.0
"""Whoever waits for an endpoint that hangs is ended by the test's own time-out."""


@pytest.fixture
async def desk(connection: Connection, dsn: str, chain: Anvil, token: Usdc) -> AsyncIterator[Sending]:
    async with sending(connection, connect_to(dsn), chain, token) as made:
        yield made


@pytest.fixture
async def liar(desk: Sending) -> AsyncIterator[LyingEndpoint]:
    """Before the node; what it is told to lie about is a test's."""
    async with LyingEndpoint(desk.anvil.rpc_url) as endpoint:
        yield endpoint


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every endpoint is heard, however busy the machine is."""
    for name in ("GRACE_S", "LOOK_S_MAX"):
        monkeypatch.setattr(hot_wallet, name, PATIENCE_S)


async def test_a_reply_that_is_lost_after_the_node_took_the_payment_is_not_a_failure_and_not_a_second_payment(
    desk: Sending,
) -> None:
    asked = await desk.ask(3)
    with HttpProxy("127.0.0.1", desk.anvil.port) as proxy:
        process = desk.process([desk.rpc(proxy.url)])
        told = await desk.signed(process, *asked)
        hold = proxy.hold(http_request(body_contains="eth_sendRawTransaction"), "reply")
        sending_them = asyncio.create_task(desk.sent(process, told))
        await hold.wait_hit_async()
        hold.drop()
        lost = await sending_them
        assert lost.outcomes[("retry", "rpc_unavailable")] == 3
        assert await desk.statuses() == {SIGNED: 3}
        assert await desk.in_pool() == 3
        known = await desk.sent(process, told, attempt=2)
    assert known.outcomes[("done", "")] == 3
    assert await desk.statuses() == {KNOWN: 3}
    await desk.anvil.mine()
    assert [one for one, _ in await desk.paid()] == [one.recipient for one in asked]
    assert await desk.nonces() == [0, 1, 2]
    await assert_holds(desk.connection)


async def test_a_reply_that_is_lost_and_a_block_before_the_repeat_is_still_one_payment(desk: Sending) -> None:
    (asked,), process = await desk.ask(), desk.process()
    told = await desk.signed(process, asked)
    raw = await desk.connection.fetchval("SELECT raw FROM attempts")
    await desk.anvil.rpc("eth_sendRawTransaction", "0x" + raw.hex())  # the reply to this is what was lost
    await desk.anvil.mine()
    again = await desk.sent(process, told)
    assert again.outcomes[("retry", "nonce_too_low")] == 1
    assert await desk.statuses() == {SIGNED: 1}, "nobody knows yet"
    await desk.head(process)
    assert await desk.statuses() == {("confirming", "mined"): 1}
    assert messages(await desk.sent(process, told, attempt=2)) == []
    assert len(await desk.paid()) == 1
    await assert_holds(desk.connection)


async def test_without_a_node_nothing_is_signed_or_lost_and_all_goes_on_when_it_is_back(desk: Sending) -> None:
    asked = await desk.ask(3)
    away = desk.process([desk.rpc(NOBODY)])
    with capture_logs() as logs:
        assert await desk.signed(away, *asked) == []
    assert [log["event"] for log in logs] == ["lane.unseen"]
    assert await desk.statuses() == {("signing", None): 3}
    back = desk.process()
    told = await desk.head(back)
    assert len(told) == 3
    refused = await desk.sent(away, told)
    assert refused.outcomes[("retry", "rpc_unavailable")] == 3
    due = await desk.connection.fetch("SELECT extract(epoch FROM available_at - $1)::int FROM schedule", desk.now)
    assert [row[0] for row in due] == [1, 1, 1]
    assert (await desk.sent(away, told, attempt=9)).outcomes[("retry", "rpc_unavailable")] == 3
    due = await desk.connection.fetch("SELECT extract(epoch FROM available_at - $1)::int FROM schedule", desk.now)
    assert [row[0] for row in due] == [60, 60, 60], "later and later, but never given up"
    assert (await desk.sent(back, told, attempt=10)).outcomes[("done", "")] == 3
    assert await desk.connection.fetchval("SELECT count(*) FROM schedule") == 0
    await desk.anvil.mine()
    assert len(await desk.paid()) == 3


async def test_a_node_that_hangs_or_serves_another_chain_does_not_stop_a_second_one(
    desk: Sending, liar: LyingEndpoint
) -> None:
    await desk.head(desk.process())  # its lane is begun: on one of two it is not
    asked = await desk.ask(2)
    liar.hangs = True
    hanging = desk.process([desk.rpc(liar.url, 0.3), desk.rpc(desk.anvil.rpc_url)])
    told = await desk.signed(hanging, asked[0])
    assert (await desk.sent(hanging, told)).outcomes[("done", "")] == 1
    liar.hangs = False
    liar.lies["eth_chainId"] = lambda _params, _result: hex(1)
    liar.lies["eth_getTransactionCount"] = lambda _params, _result: hex(99)
    other = desk.process([desk.rpc(liar.url), desk.rpc(desk.anvil.rpc_url)])
    assert len(await desk.signed(other, asked[1])) == 1
    assert await desk.nonces() == [0, 1]


@pytest.mark.usefixtures("patient")
async def test_an_endpoint_that_is_behind_or_wrong_makes_us_wait_and_never_overspend(
    desk: Sending, liar: LyingEndpoint
) -> None:
    asked = await desk.ask(1)
    liar.lies["eth_getBalance"] = lambda _params, _result: hex(1)
    process = desk.process([desk.rpc(desk.anvil.rpc_url), desk.rpc(liar.url)])
    assert await desk.signed(process, *asked) == []
    assert await desk.lane() == (0, "paused", "low_gas")
    liar.lies.clear()
    await desk.anvil.mine()
    assert len(await desk.head(process)) == 1


async def test_a_payment_that_a_pool_lost_is_sent_again_as_it_was(desk: Sending) -> None:
    asked, process = await desk.ask(2), desk.process()
    told = await desk.signed(process, *asked)
    await desk.sent(process, told)
    await desk.anvil.rpc("anvil_dropAllTransactions")
    assert await desk.in_pool() == 0
    again = [message._replace(id=f"{message.id}:unseen:2") for message in told]
    sent = await desk.sent(process, again)
    assert [message.id for message in messages(sent)] == [message.id for message in again]
    assert await desk.in_pool() == 2
    assert await desk.statuses() == {KNOWN: 2}
    await desk.anvil.mine()
    assert [one for one, _ in await desk.paid()] == [one.recipient for one in asked]
    await assert_holds(desk.connection)


async def test_what_a_pool_lost_and_no_node_takes_is_tried_again_each_minute_without_a_growing_list_of_repeats(
    desk: Sending,
) -> None:
    (asked,), process = await desk.ask(), desk.process()
    await desk.sent(process, await desk.signed(process, asked))
    coins = await desk.anvil.rpc("eth_getBalance", desk.signer.address, "latest")
    await desk.anvil.rpc("anvil_dropAllTransactions")
    await desk.fund(coins=0)  # no node takes what its sender cannot pay for
    away = desk.process([desk.rpc(NOBODY)])
    away.epochs = process.epochs  # the same worker, every other minute without its node
    for n in range(10):
        desk.now += timedelta(seconds=61)
        (again,) = await desk.head(process)
        sent = await desk.sent(away if n % 2 else process, [again])
        assert (sent.outcomes, messages(sent)) == ({("done", ""): 1, ("repeat", ""): 0}, [])
        assert await desk.head(process) == [], "once a minute"
    assert await desk.connection.fetchval("SELECT count(*) FROM schedule") == 0
    assert await desk.status(asked) == ("broadcasting", None)
    await desk.fund(coins=int(coins, 16))
    desk.now += timedelta(seconds=61)
    (sent,) = messages(await desk.sent(process, await desk.head(process)))
    assert sent.topic == TRANSACTIONS_BROADCAST.name
    assert await desk.statuses() == {KNOWN: 1}
    await desk.anvil.mine()
    assert await desk.paid() == [(asked.recipient, asked.amount)]
    await assert_holds(desk.connection)


async def test_a_payment_that_a_reorg_dropped_is_broadcasting_again_and_then_sent_and_paid_once(desk: Sending) -> None:
    (asked,), process = await desk.ask(), desk.process()
    await desk.sent(process, await desk.signed(process, asked))
    await desk.anvil.mine()
    await desk.head(process)
    assert await desk.statuses() == {("confirming", "mined"): 1}
    await desk.anvil.rpc("anvil_reorg", 1, [])
    again = await desk.head(process)
    assert await desk.statuses() == {("broadcasting", "broadcast"): 1}
    assert (await desk.sent(process, again)).outcomes[("done", "")] == 1
    assert await desk.statuses() == {KNOWN: 1}
    await desk.anvil.mine()
    assert [one for one, _ in await desk.paid()] == [asked.recipient]
    await assert_holds(desk.connection)


@pytest.mark.usefixtures("patient")
async def test_a_lane_is_not_begun_where_two_endpoints_count_its_nonces_differently(
    desk: Sending, liar: LyingEndpoint
) -> None:
    asked = await desk.ask(2)
    liar.lies["eth_getTransactionCount"] = lambda _params, _honest: hex(1_000)
    process = desk.process([desk.rpc(liar.url), desk.rpc(desk.anvil.rpc_url)])
    with capture_logs() as logs:
        assert await desk.signed(process, *asked) == []
    assert "lane.disputed" in [line["event"] for line in logs]
    assert (await desk.connection.fetchval("SELECT count(*) FROM lanes"), await desk.nonces()) == (0, [])
    liar.lies.clear()
    await desk.anvil.mine()
    told = await desk.head(process)
    await desk.sent(process, told)
    await desk.anvil.mine()
    assert [one for one, _ in await desk.paid()] == [one.recipient for one in asked]
    assert await desk.nonces() == [0, 1]
    await assert_holds(desk.connection)


@pytest.mark.parametrize("honest", ["late", "away", "hanging"])
async def test_a_lane_is_not_begun_on_the_word_of_the_one_endpoint_that_is_quick(
    desk: Sending, liar: LyingEndpoint, honest: str
) -> None:
    async def late(params: list[str], count: object) -> object:
        await asyncio.sleep(0.5 if params[1] == "latest" else 0)
        return count

    asked = await desk.ask(2)
    liar.lies["eth_getTransactionCount"] = lambda _params, _honest: hex(7)
    async with LyingEndpoint(desk.anvil.rpc_url) as other:
        other.lies["eth_getTransactionCount"] = late
        other.hangs = honest == "hanging"
        process = desk.process([desk.rpc(NOBODY if honest == "away" else other.url), desk.rpc(liar.url)])
        with capture_logs() as logs:
            assert await desk.signed(process, *asked) == []
            await desk.anvil.mine()
            assert await desk.head(process) == []
    assert [line["event"] for line in logs] == ["lane.disputed"] * 2
    assert (await desk.connection.fetchval("SELECT count(*) FROM lanes"), await desk.nonces()) == (0, [])
    assert len(await desk.head(desk.process())) == 2
    assert await desk.nonces() == [0, 1]
    await assert_holds(desk.connection)


async def test_two_endpoints_that_are_slow_begin_a_lane_and_one_that_hangs_then_slows_no_look(
    desk: Sending, liar: LyingEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def late(_params: object, chain_id: object) -> object:
        await asyncio.sleep(0.5)
        return chain_id

    monkeypatch.setattr(hot_wallet, "LOOK_S_MAX", PATIENT_S)
    monkeypatch.setattr(hot_wallet, "ALONE_S", 0.25)
    liar.lies["eth_chainId"] = late
    asked = await desk.ask(2)
    process = desk.process([desk.rpc(liar.url, PATIENT_S), desk.rpc(desk.anvil.rpc_url)])
    assert len(await desk.signed(process, asked[0])) == 1
    liar.hangs = True
    await desk.anvil.mine()
    assert len(messages(await desk.run(process, process.wait, await desk.newest()))) == 1
    assert await desk.nonces() == [0, 1]


def refusing(endpoint: LyingEndpoint, text: str) -> None:
    def refuse(_params: object, _result: object) -> object:
        raise Refusal(-32000, text)

    endpoint.lies["eth_sendRawTransaction"] = refuse


async def test_bytes_that_no_node_will_ever_take_are_for_a_person_and_release_nothing(
    desk: Sending, liar: LyingEndpoint
) -> None:
    await desk.head(desk.process())
    (asked,) = await desk.ask()
    refusing(liar, "intrinsic gas too low: gas 20000, minimum needed 21000")
    process = desk.process([desk.rpc(liar.url), desk.rpc(NOBODY)])
    told = await desk.signed(process, asked)
    settled = await desk.sent(process, told)
    assert settled.outcomes[("done", "")] == 1
    assert await desk.status(asked) == ("manual_review", "intrinsic_gas_too_low")
    error = await desk.connection.fetchval("SELECT error FROM attempts")
    assert error == "intrinsic_gas_too_low"
    held = await desk.connection.fetchval("SELECT remaining::bigint FROM holds WHERE id = $1", asked.hold_id)
    assert held == asked.amount
    again = [message._replace(id=f"{message.id}:again") for message in told]
    assert messages(await desk.sent(process, again)) == []
    assert await desk.status(asked) == ("manual_review", "intrinsic_gas_too_low")
    await assert_holds(desk.connection)


async def test_a_refusal_of_one_node_counts_nothing_against_another_that_has_the_payment(
    desk: Sending, liar: LyingEndpoint
) -> None:
    (asked,) = await desk.ask()
    refusing(liar, "intrinsic gas too low")
    process = desk.process([desk.rpc(liar.url), desk.rpc(desk.anvil.rpc_url)])
    told = await desk.signed(process, asked)
    await desk.sent(process, told)
    assert await desk.statuses() == {KNOWN: 1}
    only = desk.process([desk.rpc(liar.url)])
    again = [message._replace(id=f"{message.id}:again") for message in told]
    settled = await desk.sent(only, again)
    assert settled.outcomes[("retry", "intrinsic_gas_too_low")] == 1, "a node had it: the refusal is not believed"
    assert await desk.statuses() == {KNOWN: 1}


@pytest.mark.parametrize(
    "text", ["nonce too low", "insufficient funds", "txpool is full", "what nobody has read before"]
)
async def test_whatever_is_no_definite_refusal_is_sent_again_and_releases_nothing(
    desk: Sending, liar: LyingEndpoint, text: str
) -> None:
    (asked,) = await desk.ask()
    process = desk.process([desk.rpc(liar.url)])
    told = await desk.signed(process, asked)
    refusing(liar, text)
    for attempt in (1, 2, 3):
        settled = await desk.sent(process, told, attempt=attempt)
        assert sum(number for (kind, _), number in settled.outcomes.items() if kind == "retry") == 1
        assert await desk.statuses() == {SIGNED: 1}
    liar.lies.clear()
    assert (await desk.sent(process, told, attempt=4)).outcomes[("done", "")] == 1
    await desk.anvil.mine()
    assert len(await desk.paid()) == 1


async def cancel(connection: Connection, withdrawal: Withdrawal, at_commit: asyncio.Event) -> bool:
    """As the API does: under the row's lock, while nothing is signed. Commits when it is told to; whether it cancelled."""
    async with connection.transaction():
        owners = await lock_writer(connection, "test.cancel")
        found = (await lock(connection, [withdrawal.id]))[withdrawal.id]
        if found.status != Status.SIGNING:
            return False
        changes = Changes()
        _, (row, line) = moved(found, Status.CANCELLED, AT, "test")
        changes.upsert(*row)
        changes.insert(*line)
        await at_commit.wait()
        await seal(
            connection, "test.cancel", owners, blocks=changes.blocks(), messages=[], at=AT, actor="test", summary={}
        )
    return True


async def comes(connection: Connection, query: str, *arguments: object) -> None:
    """Until the query has an answer that is true."""
    async with asyncio.timeout(100):
        while not await connection.fetchval(query, *arguments):
            await asyncio.sleep(0.01)


WAITS_FOR_A_LOCK = (
    "SELECT count(*) > 0 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
)
IS_LOCKED = "SELECT NOT EXISTS (SELECT 1 FROM withdrawals WHERE id = $1 FOR UPDATE SKIP LOCKED)"


async def test_a_cancel_that_is_first_is_not_signed_and_one_that_is_late_does_nothing(desk: Sending, dsn: str) -> None:
    may_break(dsn, "cancelled as another process would in its first half: the hold is left")
    asked, process = await desk.ask(2), desk.process()
    other, watching, at_commit = await desk.connect(), await owner(dsn), asyncio.Event()
    try:
        async with asyncio.TaskGroup() as group:
            cancelling = group.create_task(cancel(other, asked[0], at_commit))
            await comes(watching, IS_LOCKED, asked[0].id)
            signing = group.create_task(desk.signed(process, *asked))
            await comes(watching, WAITS_FOR_A_LOCK)
            at_commit.set()
        assert cancelling.result()
        assert len(signing.result()) == 1
        assert await desk.statuses() == {("cancelled", None): 1, SIGNED: 1}
        assert not await cancel(other, asked[1], at_commit), "it is signed"
    finally:
        await other.close()
        await watching.close()
    assert await desk.nonces() == [0]


async def test_five_hundred_in_flight_and_a_restart_are_five_hundred_payments(desk: Sending) -> None:
    desk.in_flight_max = 600
    await desk.fund(coins=1_000 * COIN)
    asked, process = await desk.ask(500), desk.process()
    told = await desk.signed(process, *asked)
    assert await desk.statuses() == {SIGNED: 500}
    half = desk.process([desk.rpc(desk.anvil.rpc_url)])
    await desk.sent(half, told[:180])
    raws = await desk.connection.fetch("SELECT raw FROM attempts WHERE nonce BETWEEN 180 AND 260")
    for (raw,) in raws:  # sent, and the process died before it could say so
        await desk.anvil.rpc("eth_sendRawTransaction", "0x" + raw.hex())
    restarted = desk.process()
    sent = await desk.sent(restarted, told)
    assert sent.outcomes == {("done", ""): 320, ("repeat", ""): 180}
    assert await desk.statuses() == {KNOWN: 500}
    assert await desk.in_pool() == 500
    while await desk.in_pool():
        await desk.anvil.mine()
    assert [one for one, _ in await desk.paid()] == [one.recipient for one in asked]
    assert await desk.nonces() == list(range(500))
    await desk.head(restarted)
    assert await desk.statuses() == {("confirming", "mined"): 500}
    await assert_holds(desk.connection)
