"""What the chain does with our transactions, on a real node that reorganises and a second endpoint that may lie: each
withdrawal is paid once or released once, by the chain's own Transfer logs."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from agents.withdrawals.errors import NonceNotTaken
from agents.withdrawals.foreign import release
from chain.health import Health
from ledger.rows import Connection
from stablerail.dev.fetch import Tools
from tests.support import ledger_rig
from tests.support.ledger_rig import assert_holds, connect_to, owner
from tests.support.payouts import DEPTH, Payouts, asked, payouts
from tests.support.rpc_stub import Refusal
from topics.events import HeadSeen

databases, dsn, connection = ledger_rig.databases, ledger_rig.dsn, ledger_rig.connection

AMOUNT = 25_000_000
HEAD = HeadSeen(chain="MATIC", chain_id=80_002, number=1, block_hash="0x" + "1" * 64, timestamp_s=1)


@pytest.fixture
async def desk(connection: Connection, dsn: str, tmp_path: Path, tools: Tools) -> AsyncIterator[Payouts]:
    async with payouts(connection, connect_to(dsn), tmp_path, tools) as made:
        yield made


async def test_a_payment_is_confirming_once_mined_and_completed_at_its_depth_and_not_before(desk: Payouts) -> None:
    withdrawal, attempt = await desk.sent()
    await desk.head()
    assert await desk.status(withdrawal) == ("confirming", None)
    assert await desk.attempt_status(attempt) == "mined"
    await desk.head(DEPTH - 1)
    assert await desk.status(withdrawal) == ("confirming", None)
    assert await desk.balances(withdrawal) == (0, AMOUNT)
    await desk.head(1)
    assert await desk.status(withdrawal) == ("completed", None)
    assert await desk.attempt_status(attempt) == "confirmed"
    assert await desk.balances(withdrawal) == (0, 0)
    assert await desk.paid_on_chain(withdrawal) == AMOUNT
    assert desk.settled() == [("completed", None)]
    await desk.head(2)
    assert desk.settled() == [("completed", None)]
    await assert_holds(desk.connection)


async def test_a_payment_to_a_blacklisted_address_is_released_with_the_reason_once_that_is_final(desk: Payouts) -> None:
    to = "0x" + secrets.token_hex(20)
    await desk.usdc.blacklist(to)
    withdrawal, attempt = await desk.sent(to=to)
    await desk.head(DEPTH - 1)
    assert await desk.balances(withdrawal) == (0, AMOUNT)
    await desk.head(1)
    assert await desk.status(withdrawal) == ("failed", "blacklisted")
    assert await desk.attempt_status(attempt) == "reverted"
    assert await desk.balances(withdrawal) == (AMOUNT, 0)
    assert await desk.paid_on_chain(withdrawal) == 0
    assert desk.settled() == [("failed", "blacklisted")]
    (error,) = await desk.connection.fetchrow("SELECT error FROM attempts WHERE tx_hash = $1", attempt.tx_hash)
    assert error == "Blacklistable: account is blacklisted"
    await assert_holds(desk.connection)


@pytest.mark.parametrize("asked_first", [0, 1])
async def test_a_reason_that_no_database_keeps_ends_a_payment_as_any_other(desk: Payouts, asked_first: int) -> None:
    to = "0x" + secrets.token_hex(20)
    await desk.usdc.blacklist(to)
    withdrawal, attempt = await desk.sent(to=to)

    def says_nul(_params: list[Any], _honest: Any) -> Any:
        raise Refusal(3, "execution reverted: a\0b")

    desk.endpoint.lies["eth_call"] = says_nul
    for _ in range(asked_first):  # another endpoint is read each time
        await desk.head()
    await desk.head(DEPTH)
    assert await desk.attempt_status(attempt) == "reverted"
    assert (await desk.status(withdrawal))[0] == "failed"
    assert await desk.balances(withdrawal) == (AMOUNT, 0)
    await assert_holds(desk.connection)


async def test_blocks_made_up_far_above_by_the_only_endpoint_that_answered_hold_no_payment_up_for_good(
    desk: Payouts,
) -> None:
    withdrawal, attempt = await desk.sent()
    await desk.head()

    def made_up(params: list[Any], _honest: Any) -> Any:
        number = 1_000_000 if params[0] == "latest" else int(params[0], 16)
        word, before = f"0x{number:064x}", f"0x{number - 1:064x}"
        return {"number": hex(number), "hash": word, "parentHash": before, "timestamp": "0x1", "transactions": []}

    desk.endpoint.lies["eth_getBlockByNumber"] = made_up
    desk.rpc.health.rest(60)  # it told us to wait
    await desk.run(desk.track, HEAD, "made up")
    desk.rpc.health, desk.liar.health = Health(), Health()
    desk.endpoint.lies.clear()
    await desk.head(DEPTH)
    assert await desk.attempt_status(attempt) == "confirmed"
    assert await desk.status(withdrawal) == ("completed", None)
    assert await desk.paid_on_chain(withdrawal) == AMOUNT
    await assert_holds(desk.connection)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
async def test_a_payment_that_a_reorg_dropped_is_sent_again_as_it_was_and_paid_once(desk: Payouts, depth: int) -> None:
    withdrawal, attempt = await desk.sent()
    await desk.head()
    await desk.head(depth - 1) if depth > 1 else None
    await desk.anvil.rpc("anvil_reorg", depth, [])
    await desk.head()
    assert await desk.status(withdrawal) == ("broadcasting", None)
    assert await desk.attempt_status(attempt) == "broadcast"
    assert await desk.paid_on_chain(withdrawal) == 0
    assert await desk.send_again() == 1
    await desk.head(DEPTH + 1)
    assert await desk.status(withdrawal) == ("completed", None)
    assert await desk.paid_on_chain(withdrawal) == AMOUNT
    await assert_holds(desk.connection)


@pytest.mark.parametrize("depth", [2, 5])
async def test_a_payment_that_a_reorg_moved_counts_its_depth_from_where_it_is_now(desk: Payouts, depth: int) -> None:
    withdrawal, attempt = await desk.sent()
    await desk.head()
    await desk.head(depth - 1)
    await desk.anvil.rpc("anvil_reorg", depth, [["0x" + attempt.raw.hex(), depth - 1]])
    await desk.head()
    assert await desk.attempt_status(attempt) == "mined"
    assert await desk.status(withdrawal) == ("confirming", None)
    assert await desk.send_again() == 0
    await desk.head(DEPTH - 1)
    assert await desk.status(withdrawal) == ("confirming", None)
    await desk.head(1)
    assert await desk.status(withdrawal) == ("completed", None)
    assert await desk.paid_on_chain(withdrawal) == AMOUNT
    await assert_holds(desk.connection)


async def test_the_attempt_that_was_mined_decides_whichever_is_the_newest(desk: Payouts) -> None:
    """The peers' window: A is sent, bumped to B, A is mined; who looks only at B pays twice."""
    await desk.anvil.rpc("evm_setAutomine", False)
    withdrawal, first = await desk.sent()
    second = await desk.sign(withdrawal, nonce=first.nonce, n=2)
    await desk.head(1)
    assert [await desk.attempt_status(a) for a in (first, second)] == ["mined", "broadcast"]
    await desk.head(DEPTH)
    assert [await desk.attempt_status(a) for a in (first, second)] == ["confirmed", "replaced"]
    assert await desk.status(withdrawal) == ("completed", None)
    assert await desk.paid_on_chain(withdrawal) == AMOUNT
    await assert_holds(desk.connection)


async def test_a_reorg_that_mines_the_other_attempt_completes_by_that_one(desk: Payouts) -> None:
    withdrawal, first = await desk.sent()
    second = await desk.sign(withdrawal, nonce=first.nonce, n=2)
    await desk.head()
    await desk.head(1)
    await desk.anvil.rpc("anvil_reorg", 2, [["0x" + second.raw.hex(), 0]])
    await desk.head()
    assert [await desk.attempt_status(a) for a in (first, second)] == ["broadcast", "mined"]
    assert await desk.status(withdrawal) == ("confirming", None)
    await desk.head(DEPTH)
    assert [await desk.attempt_status(a) for a in (first, second)] == ["replaced", "confirmed"]
    assert await desk.paid_on_chain(withdrawal) == AMOUNT
    await assert_holds(desk.connection)


@pytest.mark.parametrize("depth", [1, 3, 5])
async def test_a_nonce_that_something_else_used_finally_goes_to_a_person_and_releases_nothing(
    desk: Payouts, depth: int
) -> None:
    withdrawal, attempt = await desk.sent()
    await desk.head()
    await desk.head(depth - 1) if depth > 1 else None
    foreign = {"from": desk.signer, "to": desk.signer, "value": "0x1", "nonce": hex(attempt.nonce)}
    await desk.anvil.rpc("anvil_reorg", depth, [[foreign, 0]])
    await desk.head()
    assert await desk.status(withdrawal) == ("broadcasting", None)
    await desk.head(DEPTH - depth)
    assert await desk.status(withdrawal) == ("broadcasting", None), "the foreign transaction is not final yet"
    await desk.head(1)
    assert await desk.status(withdrawal) == ("manual_review", "nonce_taken")
    await desk.head(3)
    assert await desk.status(withdrawal) == ("manual_review", "nonce_taken")
    assert await desk.balances(withdrawal) == (0, AMOUNT)
    assert desk.settled() == []
    lane = await desk.connection.fetchrow("SELECT status, reason FROM lanes WHERE signer = $1", desk.signer)
    assert tuple(lane) == ("paused", "nonce_taken")
    await assert_holds(desk.connection)

    async def released() -> None:
        place, rpcs = ("MATIC", desk.signer), (desk.rpc, desk.liar)
        await release(desk.connection, place, attempt.nonce, rpcs, DEPTH, "an old key", desk.now, "ann")

    ours = {
        **await desk.anvil.rpc("eth_getTransactionReceipt", await _some_hash(desk)),
        "transactionHash": attempt.tx_hash,
    }
    desk.endpoint.lies["eth_getTransactionReceipt"] = lambda _params, _honest: ours
    with pytest.raises(NonceNotTaken):
        await released()  # one of two endpoints has it
    desk.endpoint.lies.clear()
    await released()
    assert await desk.status(withdrawal) == ("failed", "nonce_taken")
    assert await desk.balances(withdrawal) == (AMOUNT, 0)
    assert await desk.attempt_status(attempt) == "replaced"
    with pytest.raises(NonceNotTaken):
        await released()
    await desk.head(1)
    assert await desk.status(withdrawal) == ("failed", "nonce_taken")
    await assert_holds(desk.connection)


async def test_a_lane_that_lost_a_nonce_opens_by_itself_when_ours_was_mined_with_it_after_all(desk: Payouts) -> None:
    withdrawal, attempt = await desk.sent()
    await desk.head()
    foreign = {"from": desk.signer, "to": desk.signer, "value": "0x1", "nonce": hex(attempt.nonce)}
    await desk.anvil.rpc("anvil_reorg", 1, [[foreign, 0]])
    await desk.head(DEPTH)
    assert await desk.status(withdrawal) == ("manual_review", "nonce_taken")
    reasons = "SELECT status, reason FROM lanes WHERE signer = $1"
    assert tuple(await desk.connection.fetchrow(reasons, desk.signer)) == ("paused", "nonce_taken")
    await desk.anvil.rpc("anvil_reorg", DEPTH + 1, [["0x" + attempt.raw.hex(), 0]])
    await desk.head()
    assert tuple(await desk.connection.fetchrow(reasons, desk.signer)) == ("open", "")
    await desk.head(DEPTH)
    assert await desk.status(withdrawal) == ("completed", None)
    assert await desk.paid_on_chain(withdrawal) == AMOUNT
    await assert_holds(desk.connection)


async def _some_hash(desk: Payouts) -> str:
    block = await desk.anvil.rpc("eth_getBlockByNumber", "0x1", False)
    found: str = block["transactions"][0]
    return found


async def test_a_payment_that_one_endpoint_does_not_show_waits_until_both_agree(desk: Payouts) -> None:
    withdrawal, _ = await desk.sent()
    await desk.head()
    for lie in (lambda _params, _honest: [], lambda _params, _honest: None):
        desk.endpoint.lies["eth_getBlockReceipts"] = lie
        await desk.head(DEPTH)
        assert await desk.status(withdrawal) == ("confirming", None)
    stale = await desk.anvil.rpc("eth_getBlockByNumber", "latest", False)
    desk.endpoint.lies = {"eth_getBlockByNumber": lambda params, honest: {**stale, "number": "0x1"}}
    await desk.head(1)
    assert await desk.status(withdrawal) == ("confirming", None)
    desk.endpoint.lies.clear()
    desk.endpoint.whole = (503, b"")
    await desk.head(1)
    assert await desk.status(withdrawal) == ("confirming", None)
    desk.endpoint.whole = None
    await desk.head()
    assert await desk.status(withdrawal) == ("completed", None)


async def test_a_success_without_our_transfer_is_neither_paid_nor_released(desk: Payouts) -> None:
    withdrawal = asked("ada", AMOUNT, "0x" + secrets.token_hex(20))
    attempt = await desk.sign(withdrawal, to="0x" + secrets.token_hex(20))
    await desk.send(attempt)
    await desk.head()
    await desk.head(DEPTH + 2)
    assert await desk.status(withdrawal) == ("manual_review", "unexpected_transfers")
    assert await desk.balances(withdrawal) == (0, AMOUNT)
    assert desk.settled() == []


async def test_an_endpoint_without_block_receipts_is_asked_for_each(desk: Payouts) -> None:
    def refused(_params: object, _honest: object) -> None:
        raise Refusal(-32601, "the method eth_getBlockReceipts does not exist")

    desk.endpoint.lies["eth_getBlockReceipts"] = refused
    some = [await desk.sent() for _ in range(3)]
    await desk.head()
    await desk.head(DEPTH)
    assert [await desk.status(withdrawal) for withdrawal, _ in some] == [("completed", None)] * 3


async def test_a_payment_that_the_mempool_forgot_is_sent_again_and_never_failed(desk: Payouts) -> None:
    await desk.anvil.rpc("evm_setAutomine", False)
    withdrawal, attempt = await desk.sent()
    desk.forward(61)
    await desk.head()
    assert await desk.send_again() == 0, "it is in the mempool"
    await desk.anvil.rpc("anvil_dropTransaction", attempt.tx_hash)
    await desk.head()
    await desk.head()
    assert await desk.send_again() == 1, "and not with every head"
    await desk.head(DEPTH + 1)
    assert await desk.status(withdrawal) == ("completed", None)
    assert await desk.paid_on_chain(withdrawal) == AMOUNT


async def test_what_was_mined_while_nobody_looked_is_found_by_its_receipt(desk: Payouts) -> None:
    before, _ = await desk.sent()
    await desk.head()
    await desk.head(DEPTH)
    assert await desk.status(before) == ("completed", None)
    withdrawal, attempt = await desk.sent()
    await desk.anvil.mine(300)
    await desk.head()
    assert await desk.attempt_status(attempt) == "mined"
    await desk.head()
    assert await desk.status(withdrawal) == ("completed", None)
    assert await desk.paid_on_chain(withdrawal) == AMOUNT


async def test_while_the_endpoint_is_away_nothing_changes_and_the_other_is_read(desk: Payouts) -> None:
    withdrawal, _ = await desk.sent()
    desk.endpoint.whole = (500, b"")
    await desk.head()
    assert await desk.status(withdrawal) == ("confirming", None)
    await desk.head(DEPTH)
    assert await desk.status(withdrawal) == ("confirming", None), (
        "one endpoint alone is not believed where there are two"
    )
    desk.endpoint.whole = None
    await desk.head()
    assert await desk.status(withdrawal) == ("completed", None)


async def test_a_lost_connection_or_no_endpoint_at_all_only_puts_the_look_off(desk: Payouts, dsn: str) -> None:
    withdrawal, _ = await desk.sent()
    await desk.head()
    administrator = await owner(dsn)
    mine = desk.connection.get_server_pid()
    killed = await administrator.fetch(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid NOT IN ($1, pg_backend_pid()) AND backend_type = 'client backend'",
        mine,
    )
    await administrator.close()
    assert len(killed) == 1, "the connection that the stage reads by"
    await desk.head()
    await desk.head(DEPTH)
    assert await desk.status(withdrawal) == ("completed", None)
    second, _ = await desk.sent()
    await desk.rpc.close()
    url, desk.rpc._url = desk.rpc._url, "http://127.0.0.1:1"
    desk.endpoint.whole = (503, b"")
    assert await desk.run(desk.track, HEAD, "nobody answers") == []
    assert await desk.status(second) == ("broadcasting", None)
    desk.rpc._url, desk.endpoint.whole = url, None
    await desk.head()
    await desk.head(DEPTH)
    assert await desk.status(second) == ("completed", None)


async def test_repeats_of_a_confirmation_change_nothing(desk: Payouts) -> None:
    withdrawal, _ = await desk.sent()
    await desk.head()
    messages = await desk.head(DEPTH)
    (confirmed,) = [m for m in messages if m.topic == "transactions.confirmed"]
    for id in (confirmed.id, "another id"):
        assert await desk.run_raw(desk.settle, confirmed._replace(id=id)) == []
    assert desk.settled() == [("completed", None)]
    assert await desk.balances(withdrawal) == (0, 0)
    await assert_holds(desk.connection)
