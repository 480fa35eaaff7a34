"""After a restore no lane signs or sends before it was compared with its chain: on a real PostgreSQL and a real node."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest

from agents.recovery import restoring
from agents.recovery.comparing import NONCES_UNKNOWN, NOT_REACHED, Compared, compare_lane
from agents.withdrawals.errors import LaneRestored
from agents.withdrawals.foreign import release
from agents.withdrawals.lanes import add_lane, drain_lane, open_lane, pause_lane, retire_lane
from chain.transactions import digest, signed, transfer_data, unsigned_call
from ledger.rows import Connection
from stablerail.dev.anvil import Anvil
from stablerail.dev.usdc import Usdc
from tests.support import ledger_rig
from tests.support import sending as sending_rig
from tests.support.ledger_rig import assert_holds, connect_to
from tests.support.rpc_stub import LyingEndpoint
from tests.support.sending import DEPTH, USDC, Process, Sending, sending

databases, dsn, connection = ledger_rig.databases, ledger_rig.dsn, ledger_rig.connection
chain, token = sending_rig.chain, sending_rig.token

HELD = ("retry", "lane_restored")


@pytest.fixture
async def desk(connection: Connection, dsn: str, chain: Anvil, token: Usdc) -> AsyncIterator[Sending]:
    async with sending(connection, connect_to(dsn), chain, token) as made:
        yield made


async def restored(desk: Sending, records: int = 7) -> Any:
    """The database as a rebuild leaves it."""
    return await restoring.close(desk.connection, desk.now, "ann", first_seq=1_000_000, records=records)


async def compared(desk: Sending, *rpcs: Any) -> Compared:
    """The one closed lane, compared, and opened where it agrees: what `recovery open` does."""
    (lane,) = await restoring.closed_lanes(desk.connection)
    found = await compare_lane(desk.connection, lane, rpcs or [desk.rpc(desk.anvil.rpc_url)])
    await restoring.open_compared(
        desk.connection, [] if found.code else [lane], [], [found.log("ann")], desk.now, "ann"
    )
    return found


async def send(desk: Sending, nonce: int) -> None:
    """A payment with our key that the database knows nothing of."""
    fee = 500 * 10**9
    fields = unsigned_call(
        chain_id=desk.anvil.chain_id, nonce=nonce, priority_fee=fee, max_fee=fee, gas_limit=100_000,
        to=desk.usdc.address.lower(), data=transfer_data("0x" + secrets.token_hex(20), USDC),
    )  # fmt: skip
    (signature,) = await desk.signer.signatures([digest(fields)])
    await desk.anvil.rpc("eth_sendRawTransaction", "0x" + signed(fields, signature).raw.hex())


async def blocks(desk: Sending, process: Process, number: int) -> None:
    for _ in range(number):
        await desk.anvil.mine()
        await desk.head(process)


async def test_nothing_is_signed_or_sent_until_the_lane_was_compared_and_then_each_is_paid_once(desk: Sending) -> None:
    asked, process = await desk.ask(4), desk.process()
    told = await desk.signed(process, *asked[:3])
    await desk.sent(process, told[:2])
    await desk.anvil.mine()
    await restored(desk)

    process = desk.process()
    assert await desk.signed(process, asked[3]) == []
    assert await desk.head(process) == [], "a block wakes nobody either"
    assert (await desk.sent(process, told[2:])).outcomes[HELD] == 1
    again = [message._replace(id=f"{message.id}:reorg") for message in told]
    assert (await desk.sent(process, again)).outcomes[HELD] == 1, "those in a block are in no need of sending"
    assert await desk.in_pool() == 0
    assert await desk.lane() == (3, "paused", "restored")

    found = await compared(desk)
    assert (found.code, found.unknown) == ("", ())
    assert await desk.lane() == (3, "open", "")
    assert (await desk.sent(process, told[2:], attempt=2)).outcomes[("done", "")] == 1
    await desk.sent(process, await desk.head(process))
    await desk.anvil.mine()
    assert sorted(await desk.paid()) == sorted((one.recipient, one.amount) for one in asked)
    assert await desk.nonces() == [0, 1, 2, 3]
    await assert_holds(desk.connection)


async def test_what_a_reorg_dropped_is_not_sent_again_before_the_lane_was_compared(desk: Sending) -> None:
    asked, process = await desk.ask(1), desk.process()
    await desk.sent(process, await desk.signed(process, *asked))
    await desk.head(process)
    await desk.anvil.rpc("anvil_dropAllTransactions")
    await restored(desk)
    desk.now += timedelta(seconds=120)
    process = desk.process()
    again = await desk.head(process)
    assert len(again) == 1, "it is told that it is in no pool"
    assert (await desk.sent(process, again)).outcomes[("done", "")] == 1
    assert await desk.in_pool() == 0
    await compared(desk)
    assert await desk.head(process) == [], "a moment ago it was told"
    desk.now += timedelta(seconds=61)
    again = await desk.head(process)
    assert (await desk.sent(process, again)).outcomes[("done", "")] == 1
    assert await desk.in_pool() == 1
    await desk.anvil.mine()
    assert await desk.paid() == [(asked[0].recipient, asked[0].amount)]


async def test_what_is_not_sent_for_hours_is_repeated_by_its_own_event_alone_and_paid_when_the_lane_opens(
    desk: Sending,
) -> None:
    asked, process = await desk.ask(1), desk.process()
    told = await desk.signed(process, *asked)
    await restored(desk)
    process = desk.process()
    assert (await desk.sent(process, told)).outcomes[HELD] == 1
    for _ in range(10):
        desk.now += timedelta(seconds=61)
        again = await desk.head(process)
        assert len(again) == 1, "it is said as long as it is so"
        await desk.sent(process, again)
    assert await scheduled(desk) == ["lane_restored"]
    await compared(desk)
    assert (await desk.sent(process, told, attempt=2)).outcomes[("done", "")] == 1
    assert await scheduled(desk) == []
    await desk.anvil.mine()
    assert await desk.paid() == [(asked[0].recipient, asked[0].amount)]
    await assert_holds(desk.connection)


async def scheduled(desk: Sending) -> list[str]:
    """Why an event is to be taken up again by itself, of each."""
    rows = await desk.connection.fetch("SELECT code FROM schedule WHERE stage = 'broadcast_transactions'")
    return [row[0] for row in rows]


@pytest.mark.parametrize("mined", [True, False], ids=["in a block", "in a pool"])
async def test_a_payment_that_the_database_has_forgotten_keeps_its_lane_closed_and_is_listed(
    desk: Sending, mined: bool
) -> None:
    asked, process = await desk.ask(2), desk.process()
    await desk.sent(process, await desk.signed(process, asked[0]))
    await send(desk, 1)
    if mined:
        await desk.anvil.mine()
    await restored(desk)
    found = await compared(desk)
    assert (found.code, found.unknown) == (NONCES_UNKNOWN, ("nonce 1",))
    assert await desk.lane() == (1, "paused", "restored")
    assert await desk.signed(desk.process(), asked[1]) == []
    at, code, what = (await restoring.findings(desk.connection))[f"MATIC:{desk.signer.address}"]
    assert (at, code, what["unknown"]) == (desk.now, NONCES_UNKNOWN, "nonce 1")
    with pytest.raises(LaneRestored):
        await open_lane(desk.connection, ("MATIC", desk.signer.address), desk.now, "ann")


async def test_another_transaction_with_a_nonce_of_ours_keeps_the_lane_closed(desk: Sending) -> None:
    asked, process = await desk.ask(1), desk.process()
    await desk.signed(process, *asked)
    await send(desk, 0)
    await desk.anvil.mine()
    await restored(desk)
    assert (await compared(desk)).unknown == ("nonce 0",)


async def test_after_a_restore_a_stranger_s_nonce_that_a_person_has_ended_is_known_and_no_other(desk: Sending) -> None:
    asked, process = await desk.ask(3), desk.process()
    told = await desk.signed(process, *asked[:2])
    await desk.sent(process, told[:1])
    await desk.anvil.mine()
    await send(desk, 1)
    await desk.anvil.mine()
    await blocks(desk, process, DEPTH + 1)
    assert await desk.status(asked[1]) == ("manual_review", "nonce_taken")
    key, rpcs = ("MATIC", desk.signer.address), [desk.rpc(desk.anvil.rpc_url) for _ in range(2)]
    await release(desk.connection, key, 1, rpcs, DEPTH, "an old key", desk.now, "ann")
    assert await desk.status(asked[1]) == ("failed", "nonce_taken")
    await open_lane(desk.connection, key, desk.now, "ann")
    await desk.signed(process, asked[2])
    await restored(desk)
    await send(desk, 2)
    await desk.anvil.mine()
    assert (await compared(desk)).unknown == ("nonce 2",), "nobody has ended this one"
    await desk.anvil.rpc("anvil_reorg", 1, [])
    await desk.anvil.rpc("anvil_dropAllTransactions")
    found = await compared(desk)
    assert (found.code, found.unknown) == ("", ())
    assert await desk.lane() == (3, "open", "")
    await assert_holds(desk.connection)


async def test_a_person_who_knows_better_opens_a_lane_unseen_and_the_audit_says_why(desk: Sending) -> None:
    (asked,), process = await desk.ask(), desk.process()
    await desk.signed(process, asked)
    await restored(desk)
    key = ("MATIC", desk.signer.address)
    for reason in ("", " ", "x" * 201):
        with pytest.raises(ValueError):
            await open_lane(desk.connection, key, desk.now, "ann", forced=reason)
    for reason in ("restored", "restored: by me"):
        with pytest.raises(ValueError):
            await pause_lane(desk.connection, key, reason, desk.now, "ann")
    with pytest.raises(LaneRestored):
        await pause_lane(desk.connection, key, "so that I can open it", desk.now, "ann")
    await open_lane(desk.connection, key, desk.now, "ann", forced="I read the chain myself")
    assert await desk.lane() == (1, "open", "")
    (said,) = await desk.connection.fetchrow("SELECT after->>'forced' FROM audit_logs WHERE action = 'lane.opened'")
    assert said == "I read the chain myself"


async def test_a_lane_that_a_person_had_paused_is_still_paused_when_it_was_compared(desk: Sending) -> None:
    (asked,), process = await desk.ask(), desk.process()
    await desk.signed(process, asked)
    await pause_lane(desk.connection, ("MATIC", desk.signer.address), "the key is being moved", desk.now, "ann")
    await restored(desk)
    assert await desk.lane() == (1, "paused", "restored: the key is being moved")
    assert (await compared(desk)).code == ""
    assert await desk.lane() == (1, "paused", "the key is being moved")


async def test_a_lane_that_was_short_of_gas_looks_for_itself_when_it_was_compared(desk: Sending) -> None:
    (asked,), process = await desk.ask(), desk.process()
    await desk.fund(coins=1)
    assert await desk.signed(process, asked) == []
    assert await desk.lane() == (0, "paused", "low_gas")
    await restored(desk)
    assert (await compared(desk)).code == ""
    assert await desk.lane() == (0, "open", "")
    assert await desk.head(process) == []
    assert await desk.lane() == (0, "paused", "low_gas")


async def test_a_signer_that_the_database_has_forgotten_altogether_is_not_used_unseen(desk: Sending) -> None:
    await restored(desk)
    await send(desk, 0)
    await desk.anvil.mine()
    (asked,), process = await desk.ask(), desk.process()
    assert await desk.signed(process, asked) == []
    assert await desk.lane() == (1, "paused", "restored")


async def test_a_new_signer_after_a_restore_signs_at_once(desk: Sending) -> None:
    await restored(desk)
    (asked,), process = await desk.ask(), desk.process()
    assert len(await desk.signed(process, asked)) == 1


async def test_after_a_restore_a_draining_lane_signs_nothing_more_and_a_retired_one_never(desk: Sending) -> None:
    process, key = desk.process(), ("MATIC", desk.signer.address)
    await desk.sent(process, await desk.signed(process, *await desk.ask(1)))
    await drain_lane(desk.connection, key, desk.now, "ann")
    await restored(desk)
    with pytest.raises(LaneRestored):
        await retire_lane(desk.connection, key, desk.now, "ann")
    with pytest.raises(LaneRestored):
        await add_lane(desk.connection, key, "kms:new", desk.now, "ann")
    assert (await compared(desk)).code == ""
    assert await desk.lane() == (1, "draining", "")
    for blocks in (DEPTH, 1):  # seen in its block, then final
        await desk.anvil.mine(blocks)
        await desk.head(process)
    await retire_lane(desk.connection, key, desk.now, "ann")
    await restored(desk, 99)
    assert await restoring.closed_lanes(desk.connection) == []
    assert await desk.lane() == (1, "retired", "")


async def test_what_endpoints_do_not_agree_about_or_cannot_say_keeps_the_lane_closed(desk: Sending) -> None:
    asked, process = await desk.ask(2), desk.process()
    told = await desk.signed(process, *asked)
    await desk.sent(process, told[:1])
    await desk.anvil.mine()
    await desk.head(process)
    await restored(desk)
    honest = desk.rpc(desk.anvil.rpc_url)
    async with LyingEndpoint(desk.anvil.rpc_url) as endpoint:
        liar = desk.rpc(endpoint.url)
        assert (await compared(desk, honest, desk.rpc("http://127.0.0.1:1"))).code == NOT_REACHED
        endpoint.lies["eth_chainId"] = lambda _params, _honest: "0x1"
        assert (await compared(desk, honest, liar)).code == NOT_REACHED
        endpoint.lies = {"eth_getBlockByNumber": lambda _params, honest: {**honest, "number": "0x0"}}
        assert (await compared(desk, honest, liar)).code == NOT_REACHED, "it is behind what we have seen"
        endpoint.lies = {"eth_getTransactionCount": lambda _params, _honest: "0x9"}
        assert (await compared(desk, honest, honest, liar)).code == NONCES_UNKNOWN
        endpoint.lies = {"eth_getTransactionReceipt": lambda _params, _honest: None}
        assert (await compared(desk, honest, liar)).unknown == ("nonce 0",), "one word is not two"
        assert (await compared(desk)).code == "", "where one is configured it is all there is"


async def test_a_rebuild_that_is_run_again_says_anew_where_the_line_begins_and_closes_what_was_opened(
    desk: Sending,
) -> None:
    (asked,), process = await desk.ask(), desk.process()
    await desk.signed(process, asked)
    versions = set()
    # cut off before its journal; then its closing commit is the journal's last
    for id, records in ((1, 41), (2, 41), (3, 42)):
        made, _ = await restored(desk, records)
        assert made == restoring.Restore(id, desk.now, "ann", 1_000_000, records)
        versions.add(await desk.connection.fetchval("SELECT version FROM lanes"))
        assert await desk.lane() == (1, "paused", "restored")
    assert len(versions) == 1, "it is closed once"
    assert (await compared(desk)).code == ""
    assert await desk.lane() == (1, "open", "")
    await restored(desk, 99)
    assert await desk.lane() == (1, "paused", "restored")
    await assert_holds(desk.connection)
