"""Signing and sending on a real PostgreSQL and a real node: each withdrawal has one nonce and is paid once, whatever is lost."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from agents.withdrawals import requests
from agents.withdrawals.errors import LaneNotCounted
from agents.withdrawals.lanes import list_lanes, open_lane, pause_lane
from chain.fees import GWEI
from ledger.record import Message
from ledger.rows import Connection
from stablerail import denied
from stablerail.dev.anvil import Anvil
from stablerail.dev.usdc import Usdc
from tests.support import ledger_rig
from tests.support import sending as sending_rig
from tests.support.ledger_rig import assert_holds, connect_to
from tests.support.rpc_stub import LyingEndpoint
from tests.support.sending import COIN, DEPTH, USDC, Sending, accepted, messages, sending
from topics.catalog import TRANSACTIONS_BROADCAST
from topics.events import TransactionBroadcast, TransactionSigned

databases, dsn, connection = ledger_rig.databases, ledger_rig.dsn, ledger_rig.connection
chain, token = sending_rig.chain, sending_rig.token

SIGNED, KNOWN = ("broadcasting", "signed"), ("confirming", "broadcast")
WAITS = ("signing", None)


@pytest.fixture
async def desk(connection: Connection, dsn: str, chain: Anvil, token: Usdc) -> AsyncIterator[Sending]:
    async with sending(connection, connect_to(dsn), chain, token) as made:
        yield made


async def test_withdrawals_are_signed_oldest_first_sent_in_that_order_and_paid_once_each(desk: Sending) -> None:
    asked, process = await desk.ask(8), desk.process()
    told = await desk.signed(process, *asked[4:], *asked[:4])
    assert await desk.statuses() == {SIGNED: 8}
    assert await desk.in_pool() == 0, "nothing is sent before it is stored"
    events = [TransactionSigned.model_validate_json(message.value or b"") for message in told]
    assert [(event.nonce, event.withdrawal_id) for event in events] == [(n, one.id) for n, one in enumerate(asked)]
    assert {message.key for message in told} == {f"MATIC:{desk.signer.address}".encode()}
    assert [message.id for message in told] == [event.tx_hash for event in events]

    sent = await desk.sent(process, told)
    assert sent.outcomes[("done", "")] == 8
    assert await desk.statuses() == {KNOWN: 8}
    assert [message.topic for message in messages(sent)] == [TRANSACTIONS_BROADCAST.name] * 8
    again = [TransactionBroadcast.model_validate_json(message.value or b"") for message in messages(sent)]
    assert [event.tx_hash for event in again] == [event.tx_hash for event in events]

    await desk.anvil.mine()
    assert await desk.paid() == [(one.recipient, one.amount) for one in asked]
    assert await desk.lane() == (8, "open", "")
    await desk.head(process)
    assert await desk.statuses() == {("confirming", "mined"): 8}
    await assert_holds(desk.connection)


async def test_a_message_that_comes_twice_or_late_changes_nothing(desk: Sending) -> None:
    (asked,), process = await desk.ask(), desk.process()
    told = await desk.signed(process, asked)
    assert await desk.signed(process, asked) == []
    other = accepted(asked)._replace(id="another id")
    assert messages(await desk.run(process, process.sign, other)) == [], "it waits no more"
    await desk.sent(process, told)
    assert (await desk.sent(process, told)).outcomes[("repeat", "")] == 1
    await desk.anvil.mine()
    await desk.head(process)
    late = [message._replace(id=f"{message.id}:late") for message in told]
    assert messages(await desk.sent(process, late)) == [], "it is in a block"
    assert len(await desk.paid()) == 1
    await assert_holds(desk.connection)


async def test_what_a_customer_asked_for_who_was_rejected_since_waits_and_keeps_nobody_else_waiting(
    desk: Sending,
) -> None:
    (first,), (second,), process = await desk.ask(), await desk.ask(), desk.process()
    frozen = "INSERT INTO kyc_standings VALUES ($1, 'rejected', 'test', 'e1', 'now', now())"
    await desk.connection.execute(frozen, first.user_id)
    signed = await desk.signed(process, first, second)
    assert [TransactionSigned.model_validate_json(one.value or b"").withdrawal_id for one in signed] == [second.id]
    await desk.connection.execute("UPDATE kyc_standings SET standing = 'approved'")
    (last,) = await desk.head(process)
    assert TransactionSigned.model_validate_json(last.value or b"").withdrawal_id == first.id


@pytest.mark.parametrize("listed_on", ["MATIC", "ETH"], ids=["on its chain", "where addresses are alike"])
async def test_what_would_go_to_an_address_that_was_denied_since_waits_and_keeps_nobody_else_waiting(
    desk: Sending, listed_on: str
) -> None:
    to, process = "0x" + secrets.token_hex(20), desk.process()
    (first,), (second,), (third,) = await desk.ask(to=to), await desk.ask(), await desk.ask(to=to)
    elsewhere = "INSERT INTO denied_addresses VALUES ($1, $2, 'test', 'ann', 'now')"
    await desk.connection.execute(elsewhere, "SOL", second.recipient)
    assert await denied.add(desk.connection, listed_on, to, "test", "ann", desk.now)
    overtaking = await desk.signed(process, first, second, third)
    assert withdrawal_ids(overtaking) == [second.id]
    assert await desk.head(process) == []
    assert [await desk.status(one) for one in (first, third)] == [WAITS, WAITS]
    await requests.cancel(desk.connection, third.id, desk.now, actor="ann")
    assert await denied.remove(desk.connection, listed_on, to, "test", "ann", desk.now)
    told = await desk.head(process)
    assert withdrawal_ids(told) == [first.id]
    await desk.sent(process, [*overtaking, *told])
    await desk.anvil.mine()
    assert await desk.paid() == [(one.recipient, one.amount) for one in (second, first)]
    await assert_holds(desk.connection)


def withdrawal_ids(told: list[Message]) -> list[str]:
    return [TransactionSigned.model_validate_json(one.value or b"").withdrawal_id for one in told]


async def test_an_event_about_a_transaction_that_we_never_signed_is_a_dead_letter(desk: Sending) -> None:
    (asked,), process = await desk.ask(), desk.process()
    (told,) = await desk.signed(process, asked)
    event = TransactionSigned.model_validate_json(told.value or b"")
    forged = event.model_copy(update={"tx_hash": "0x" + "7" * 64})
    settled = await desk.sent(process, [told._replace(value=forged.model_dump_json().encode(), id="forged")])
    assert settled.outcomes[("rejected", "unknown_transaction")] == 1
    assert await desk.statuses() == {SIGNED: 1}


async def test_a_lane_signs_no_more_than_it_has_room_for_and_the_rest_when_blocks_make_room(desk: Sending) -> None:
    desk.in_flight_max = 2
    asked, process = await desk.ask(5), desk.process()
    signed = await desk.signed(process, *asked)
    for expected in (2, 2, 1):
        assert len(signed) == expected
        await desk.sent(process, signed)
        assert await desk.head(process) == [], "no room"
        await desk.anvil.mine()
        signed = await desk.head(process)
    assert [one for one, _ in await desk.paid()] == [one.recipient for one in asked]
    assert await desk.nonces() == [0, 1, 2, 3, 4]
    assert await desk.lane() == (5, "open", "")
    await assert_holds(desk.connection)


async def test_a_lane_pauses_before_it_signs_what_it_cannot_pay_gas_for_and_opens_when_there_is_gas(
    desk: Sending,
) -> None:
    asked, process = await desk.ask(3), desk.process()
    await desk.signed(process, asked[0])
    cost = await desk.connection.fetchval("SELECT (gas_limit * max_fee)::text FROM attempts")
    await desk.fund(coins=2 * int(cost) + int(cost) // 2)
    await desk.anvil.mine()
    with capture_logs() as logs:
        signed = await desk.head(process)
        assert len(signed) == 1, "one more is covered beside the one in flight"
        assert await desk.lane() == (2, "paused", "low_gas")
        assert await desk.head(process) == []
    assert [log["reason"] for log in logs if log["event"] == "lane.paused"] == ["low_gas"]
    assert await desk.status(asked[2]) == ("signing", None)
    await desk.fund(coins=COIN)
    await desk.anvil.mine()
    assert len(await desk.head(process)) == 1
    assert await desk.lane() == (3, "open", "")


async def test_a_lane_pauses_while_its_usdc_less_what_is_in_flight_does_not_cover_the_oldest(desk: Sending) -> None:
    asked = [*await desk.ask(2, 400 * USDC), *await desk.ask(1, 300 * USDC), *await desk.ask(1, USDC)]
    process = desk.process()
    told = await desk.signed(process, *asked)
    assert len(told) == 2
    assert await desk.lane() == (2, "paused", "low_usdc")
    await desk.sent(process, told)
    await desk.anvil.mine()  # the chain has paid them: they are in flight no more, and the balance is what is left
    assert await desk.head(process) == []
    await desk.fund(usdc=100 * USDC)
    assert len(await desk.head(process)) == 1
    await desk.fund(usdc=USDC)
    assert len(await desk.head(process)) == 1
    assert (await desk.lane())[1] == "open"
    await assert_holds(desk.connection)


async def test_a_recipient_that_the_token_refuses_is_signed_for_and_sent_like_any_other(desk: Sending) -> None:
    to = "0x" + secrets.token_hex(20)
    await desk.usdc.blacklist(to)
    await desk.anvil.mine()
    (asked,), process = await desk.ask(to=to), desk.process()
    told = await desk.signed(process, asked)
    await desk.sent(process, told)
    await desk.anvil.mine()
    receipt = await desk.anvil.wait_mined(told[0].id)
    assert receipt["status"] == "0x0", "whether it reverts is the chain's to say, at finality"
    assert await desk.statuses() == {KNOWN: 1}


async def test_signing_waits_while_the_chain_costs_more_than_the_cap(desk: Sending) -> None:
    desk.fees = replace(desk.fees, max_fee_cap=200 * GWEI)
    asked, process = await desk.ask(2), desk.process()
    await desk.anvil.rpc("anvil_setNextBlockBaseFeePerGas", hex(500 * GWEI))
    await desk.anvil.mine()
    assert await desk.signed(process, *asked) == []
    assert await desk.lane() == (0, "paused", "fees_over_cap")
    await desk.anvil.rpc("anvil_setNextBlockBaseFeePerGas", hex(GWEI))
    await desk.anvil.mine()
    assert len(await desk.head(process)) == 2
    assert (await desk.lane())[1] == "open"


async def test_a_base_fee_that_passes_what_was_signed_delays_a_payment_and_a_later_one_pays_more(desk: Sending) -> None:
    asked, process = await desk.ask(2), desk.process()
    first = await desk.signed(process, asked[0])
    await desk.anvil.rpc("anvil_setNextBlockBaseFeePerGas", hex(300 * GWEI))
    await desk.anvil.mine()
    refused = await desk.sent(process, first)
    assert refused.outcomes[("retry", "fee_too_low")] == 1
    assert await desk.status(asked[0]) == ("broadcasting", None)
    later = await desk.head(process)
    fees = [int(row[0]) for row in await desk.connection.fetch("SELECT max_fee FROM attempts ORDER BY nonce")]
    assert fees[0] < 300 * GWEI < fees[1]
    await desk.sent(process, later)
    await desk.anvil.rpc("anvil_setNextBlockBaseFeePerGas", hex(GWEI))
    await desk.anvil.mine()
    known = await desk.sent(process, first, attempt=2)
    assert known.outcomes[("done", "")] == 1
    await desk.anvil.mine(2)
    assert [one for one, _ in await desk.paid()] == [one.recipient for one in asked]
    assert await desk.nonces() == [0, 1]
    await assert_holds(desk.connection)


async def test_a_nonce_that_somebody_else_used_pauses_the_lane_until_a_person_opens_it(desk: Sending) -> None:
    asked, process = await desk.ask(2), desk.process()
    await desk.sent(process, await desk.signed(process, asked[0]))
    await desk.anvil.mine()
    await desk.anvil.rpc("anvil_setNonce", desk.signer.address, hex(3))
    await desk.anvil.mine()
    assert await desk.head(process) == []
    assert await desk.lane() == (1, "paused", "foreign_nonce")
    await desk.anvil.mine()
    assert await desk.head(process) == []
    assert await desk.lane() == (1, "paused", "foreign_nonce"), "not while the chain counts it"
    key = ("MATIC", desk.signer.address)
    with pytest.raises(LaneNotCounted, match="from 3 instead of 1"):  # the row's count is an endpoint's word of before
        await open_lane(desk.connection, key, desk.now, "ann")
    await open_lane(desk.connection, key, desk.now, "ann", counted=3)
    assert len(await desk.head(process)) == 1
    assert await desk.nonces() == [0, 3]
    assert await desk.lane() == (4, "open", "")
    await assert_holds(desk.connection)


@pytest.mark.parametrize("liars", [1, 2])
async def test_a_nonce_that_endpoints_made_up_pauses_the_lane_until_they_take_it_back(
    desk: Sending, liars: int
) -> None:
    """One of two, and two of three: nobody can tell them from the honest one. No nonce is skipped, and nobody need come."""
    async with AsyncExitStack() as stack:
        proxies = [await stack.enter_async_context(LyingEndpoint(desk.anvil.rpc_url)) for _ in range(liars)]
        process = desk.process([desk.rpc(url) for url in (desk.anvil.rpc_url, *(proxy.url for proxy in proxies))])
        asked = await desk.ask(4)
        await desk.sent(process, await desk.signed(process, asked[0]))
        await desk.anvil.mine()
        for proxy in proxies:
            proxy.lies["eth_getTransactionCount"] = lambda _params, _honest: "0x63"
        for _ in range(DEPTH + 1):
            await desk.anvil.mine()
            await desk.head(process)
            assert await desk.lane() == (1, "paused", "foreign_nonce")
        assert await desk.signed(process, *asked[1:]) == []
        proxies[0].lies.clear()  # the one that goes on lying is alone now
        await desk.anvil.mine()
        await desk.sent(process, await desk.head(process))
        assert await desk.lane() == (4, "open", "")
        assert await desk.nonces() == [0, 1, 2, 3]
        chain_nonce = await desk.connection.fetchval("SELECT chain_nonce FROM lanes")
        assert chain_nonce <= 4, "what was made up is forgotten"
        for _ in range(DEPTH + 1):
            await desk.anvil.mine()
            await desk.head(process)
        assert sorted(await desk.paid()) == sorted((one.recipient, USDC) for one in asked)
        await assert_holds(desk.connection)


async def test_a_lane_that_a_person_paused_signs_nothing_until_a_person_opens_it(desk: Sending) -> None:
    asked, process = await desk.ask(2), desk.process()
    await desk.signed(process, asked[0])
    key = ("MATIC", desk.signer.address)
    for reason in ("", "low_gas", "foreign_nonce", "two\nlines", "x" * 201):
        with pytest.raises(ValueError):
            await pause_lane(desk.connection, key, reason, desk.now, "ann")
    with pytest.raises(LookupError):
        await pause_lane(desk.connection, ("MATIC", "0x1"), "who is that", desk.now, "ann")
    await pause_lane(desk.connection, key, "the key is being moved", desk.now, "ann")
    assert await desk.signed(process, asked[1]) == []
    assert await desk.head(process) == []
    assert await desk.lane() == (1, "paused", "the key is being moved")
    await open_lane(desk.connection, key, desk.now, "bob")
    assert len(await desk.head(process)) == 1
    assert [lane.status for lane in await list_lanes(desk.connection)] == ["open"]
    logs = await desk.connection.fetch("SELECT actor, action, resource_id FROM audit_logs ORDER BY batch, n")
    assert [tuple(row) for row in logs] == [
        ("ann", "lane.paused", f"MATIC:{desk.signer.address}"),
        ("bob", "lane.opened", f"MATIC:{desk.signer.address}"),
    ]
    await assert_holds(desk.connection)


async def test_a_key_that_was_used_before_goes_on_where_the_chain_counts(desk: Sending) -> None:
    await desk.anvil.rpc("anvil_setNonce", desk.signer.address, hex(41))
    asked, process = await desk.ask(2), desk.process()
    await desk.signed(process, *asked)
    assert await desk.nonces() == [41, 42]
    assert await desk.lane() == (43, "open", "")


async def test_two_workers_that_sign_at_once_give_each_withdrawal_one_nonce(desk: Sending) -> None:
    asked = await desk.ask(12)
    one, other = desk.process(), desk.process()
    second = await desk.connect()
    try:
        results = await asyncio.gather(
            desk.run(one, one.sign, *map(accepted, asked)),
            desk.run(other, other.wait, await desk.newest(), on=second),
            return_exceptions=True,
        )
    finally:
        await second.close()
    for result in results:  # the loser of the race to make the lane runs again, as a delivery lets it
        assert not isinstance(result, BaseException) or type(result).__name__ == "UniqueViolationError", result
    again = desk.process()
    await desk.run(again, again.wait, await desk.newest())
    assert await desk.nonces() == list(range(12))
    assert await desk.statuses() == {SIGNED: 12}
    await assert_holds(desk.connection)
