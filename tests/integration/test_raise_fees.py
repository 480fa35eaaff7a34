"""Nonces that no block takes, on a real PostgreSQL and a real node: each withdrawal is paid once or given back once, whatever was
signed for it, and what is offered stays under the caps."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import orjson
import pytest

from agents.withdrawals import raise_fees, wishes
from agents.withdrawals.errors import NotRaisable, UnknownWithdrawal
from agents.withdrawals.lanes import open_lane, pause_lane
from agents.withdrawals.raising import ATTEMPTS_MAX
from chain.errors import KeyUnavailable
from chain.fees import GWEI
from chain.signer import Signature
from ledger.errors import Fenced
from ledger.rows import Connection
from stablerail.dev.anvil import Anvil
from stablerail.dev.usdc import Usdc
from tests.support import ledger_rig
from tests.support import sending as sending_rig
from tests.support.ledger_rig import assert_holds, connect_to
from tests.support.rpc_stub import LyingEndpoint
from tests.support.sending import COIN, DEPTH, USDC, messages, sending
from tests.support.storm import BLOCKS, RULE, Storm

databases, dsn, connection = ledger_rig.databases, ledger_rig.dsn, ledger_rig.connection
chain, token = sending_rig.chain, sending_rig.token

STORM = 270 * GWEI
"""Ten times what the first attempts offer."""
OVER_CAP = 3_000 * GWEI


@pytest.fixture
async def storm(connection: Connection, dsn: str, chain: Anvil, token: Usdc) -> AsyncIterator[Storm]:
    async with sending(connection, connect_to(dsn), chain, token) as desk:
        desk.rule = RULE
        made = Storm(desk, desk.process())
        await made.mine()
        yield made


async def test_a_base_fee_up_tenfold_with_everything_stuck_is_paid_by_speed_ups_within_the_cap_each_once(
    storm: Storm,
) -> None:
    asked = await storm.sent(5)
    storm.base_fee = STORM
    assert await storm.heads(BLOCKS) == [], "not before so many blocks"
    told = await storm.heads(1)
    assert len(told) == 5, "all of them offer less than the base fee"
    assert [(nonce, n) for nonce, n, _, _ in await storm.attempts()] == [(k, n) for k in range(5) for n in (1, 2)]
    rows = await storm.desk.connection.fetch("SELECT max_fee, priority_fee FROM attempts ORDER BY n, nonce")
    for before, after in zip(rows[:5], rows[5:], strict=True):
        assert after["max_fee"] * 8 >= before["max_fee"] * 9
        assert after["priority_fee"] * 8 >= before["priority_fee"] * 9
        assert STORM < after["max_fee"] <= storm.desk.fees.max_fee_cap
    await storm.heads(DEPTH + 1)
    await storm.assert_paid(asked)
    assert {(n, status) for _, n, _, status in await storm.attempts()} == {(1, "replaced"), (2, "confirmed")}
    actions = await storm.desk.connection.fetch("SELECT action, actor FROM audit_logs")
    assert [tuple(row) for row in actions] == [("withdrawal.sped_up", "raise_fees")] * 5


async def test_only_the_next_of_a_lane_is_raised_and_those_behind_it_go_with_it(storm: Storm) -> None:
    asked = await storm.desk.ask(3)
    first = await storm.desk.signed(storm.process, *asked)
    await storm.desk.sent(storm.process, first)
    await storm.lose()
    await storm.heads(1)
    assert len(await storm.heads(BLOCKS)) == 1
    assert [(nonce, n) for nonce, n, _, _ in await storm.attempts()] == [(0, 1), (0, 2), (1, 1), (2, 1)]
    for message in first[1:]:  # as track_confirmations tells what a pool lost
        await storm.desk.sent(storm.process, [message._replace(id=f"{message.id}:unseen:2")])
    await storm.heads(DEPTH + 1)
    await storm.assert_paid(asked)
    assert [(n, status) for _, n, _, status in await storm.attempts()] == [
        (1, "replaced"), (2, "confirmed"), (1, "confirmed"), (1, "confirmed"),
    ]  # fmt: skip


async def test_above_the_cap_nothing_is_signed_a_person_is_told_once_and_it_is_paid_when_the_storm_is_over(
    storm: Storm,
) -> None:
    asked = await storm.sent(2)
    storm.base_fee = OVER_CAP
    assert await storm.heads(2 * BLOCKS) == []
    told = [(alert.code, alert.about["nonce"], alert.about["reason"]) for alert in storm.alerts]
    assert told == [("speed_up_not_signed", str(nonce), "fees_over_cap") for nonce in (0, 1)]
    storm.base_fee = STORM
    assert len(await storm.heads(1)) == 2
    await storm.heads(DEPTH + 1)
    await storm.assert_paid(asked)


class Locked:
    """A signer whose key store does not answer now."""

    at_once_max = 16

    def __init__(self, address: str) -> None:
        self.address = address

    async def signatures(self, _digests: Sequence[bytes]) -> Sequence[Signature]:
        raise KeyUnavailable("kms:hot")


async def test_while_a_lane_s_key_does_not_sign_nothing_is_raised_a_wish_waits_and_then_each_is_paid_once(
    storm: Storm,
) -> None:
    asked = await storm.sent(2)
    storm.base_fee = STORM
    desks, desk = storm.process.desks, storm.desk
    whole = desks.get(("MATIC", desk.signer.address))
    assert whole is not None
    desks.put(replace(whole, signer=Locked(desk.signer.address)))
    await storm.wish(asked[1], "cancel")
    assert await storm.heads(BLOCKS + 2) == []
    told = {(alert.code, alert.about["nonce"], alert.about["reason"]) for alert in storm.alerts}
    assert told == {("speed_up_not_signed", "0", "key_unavailable")}
    wish = await wishes.wish_of(desk.connection, asked[1].id)
    assert wish is not None
    assert (wish.state, wish.code) == ("open", "key_unavailable")
    desks.put(whole)
    await storm.heads(DEPTH + 2)
    await storm.assert_paid(asked[:1])
    assert [(nonce, n, kind) for nonce, n, kind, _ in await storm.attempts()] == [
        (0, 1, "payment"), (0, 2, "payment"), (1, 1, "payment"), (1, 2, "cancel"),
    ]  # fmt: skip


async def test_what_a_hundred_wishes_wait_for_hides_no_other(storm: Storm) -> None:
    """Of a lane that is closed, say, while another's may be granted."""
    asked = await storm.sent(1)
    await storm.lose()
    connection = storm.desk.connection
    await connection.execute(
        "INSERT INTO attempt_wishes SELECT gen_random_uuid(), 'MATIC', 'speed_up', 5, 'open', 'lane_paused', NULL, 'ann', 'x', $1"
        " FROM generate_series(1, 150)",
        storm.desk.now - timedelta(hours=1),
    )
    found = set(await wishes.wished(connection, "MATIC"))
    while len(found) < 150:  # others each time
        found |= set(await wishes.wished(connection, "MATIC"))
    await storm.wish(asked[0], "speed_up")
    assert await storm.heads(1) != [], "it is granted under the next head"
    wish = await wishes.wish_of(connection, asked[0].id)
    assert wish is not None
    assert wish.state == "done"


async def test_at_so_many_attempts_the_rule_ends_and_a_person_may_insist_up_to_a_bound(storm: Storm) -> None:
    asked = await storm.sent(1)
    await storm.lose()
    unsent = await storm.heads(4 * BLOCKS, send=False)
    assert [n for _, n, _, _ in await storm.attempts()] == [1, 2], "what nobody was sent is not raised"
    await storm.desk.sent(storm.process, unsent)
    for _ in range(4 * BLOCKS):
        await storm.lose()
        await storm.heads(1)
    assert [n for _, n, _, _ in await storm.attempts()] == [1, 2, 3]
    assert [alert.about["reason"] for alert in storm.alerts] == ["attempts_max"]
    with pytest.raises(NotRaisable, match="attempts_max"):
        await storm.wish(asked[0], "speed_up")
    await storm.wish(asked[0], "speed_up", ATTEMPTS_MAX)
    await storm.lose()
    assert len(await storm.heads(1)) == 1
    await storm.heads(DEPTH + 1)
    assert [(n, status) for _, n, _, status in await storm.attempts()][-1] == (4, "confirmed")
    await storm.assert_paid(asked)


@pytest.mark.parametrize("winner", [1, 2], ids=["original", "speed_up"])
async def test_a_speed_up_and_its_original_in_different_pools_pay_once_whichever_is_mined(
    storm: Storm, winner: int
) -> None:
    (asked,) = await storm.sent(1)
    await storm.wish(asked, "speed_up")
    told = await storm.raised(await storm.desk.newest())
    await storm.desk.sent(storm.process, told)
    assert [status for _, _, _, status in await storm.attempts()] == ["broadcast", "broadcast"]
    if winner == 1:  # whoever makes the block has it from another endpoint, which never saw the speed-up
        original = await storm.desk.connection.fetchval("SELECT raw FROM attempts WHERE n = 1")
        await storm.lose()
        await storm.desk.anvil.rpc("eth_sendRawTransaction", "0x" + original.hex())
    await storm.heads(1)
    assert [n for _, n, _, status in await storm.attempts() if status == "mined"] == [winner]
    again = [one._replace(id=f"{one.id}:unseen:3") for one in told]
    assert messages(await storm.desk.sent(storm.process, again)) == []
    await storm.heads(DEPTH)
    assert {n: status for _, n, _, status in await storm.attempts()} == {winner: "confirmed", 3 - winner: "replaced"}
    await storm.assert_paid([asked])


async def test_an_original_that_is_mined_before_its_speed_up_is_sent_is_paid_once(storm: Storm) -> None:
    (asked,) = await storm.sent(1)
    await storm.wish(asked, "speed_up")
    head = await storm.desk.newest()
    told = await storm.raised(head)
    await storm.heads(1)
    sent = await storm.desk.sent(storm.process, told)
    assert sent.outcomes[("retry", "nonce_too_low")] == 1
    assert await storm.status(asked) == ("confirming", None)
    await storm.heads(DEPTH)
    assert [status for _, _, _, status in await storm.attempts()] == ["confirmed", "replaced"]
    assert messages(await storm.desk.sent(storm.process, told, attempt=2)) == [], "what was replaced is sent no more"
    await storm.assert_paid([asked])


async def test_a_cancel_that_wins_gives_back_what_was_held_once_it_is_final_and_not_before(storm: Storm) -> None:
    (asked,) = await storm.sent(1)
    await storm.wish(asked, "cancel")
    head = await storm.desk.newest()
    await storm.desk.sent(storm.process, await storm.raised(head))
    await storm.heads(DEPTH - 1)
    assert (await storm.status(asked), await storm.money(asked)) == (("confirming", None), (0, USDC))
    await storm.heads(2)
    assert (await storm.status(asked), await storm.money(asked)) == (("cancelled", None), (USDC, 0))
    assert await storm.paid() == []
    assert await storm.attempts() == [(0, 1, "payment", "replaced"), (0, 2, "cancel", "confirmed")]
    wish = await wishes.wish_of(storm.desk.connection, asked.id)
    assert wish is not None
    assert (wish.state, wish.code) == ("done", None)
    assert (await storm.desk.lane())[0] == 1, "the next withdrawal has the next nonce"
    await assert_holds(storm.desk.connection)


async def test_a_cancel_that_loses_completes_the_withdrawal_and_a_stuck_one_is_raised_as_a_cancel(storm: Storm) -> None:
    (asked,) = await storm.sent(1)
    original = await storm.desk.connection.fetchval("SELECT raw FROM attempts")
    await storm.wish(asked, "cancel")
    assert len(await storm.raised(await storm.desk.newest())) == 1
    with pytest.raises(NotRaisable, match="cancelling"):
        await storm.wish(asked, "cancel")
    await storm.lose()
    await storm.wish(asked, "speed_up")
    await storm.heads(1, send=False)
    kinds = [(n, kind) for _, n, kind, _ in await storm.attempts()]
    assert kinds == [(1, "payment"), (2, "cancel"), (3, "cancel")], "the rule does not take a cancel back"
    await storm.desk.anvil.rpc("eth_sendRawTransaction", "0x" + original.hex())
    await storm.heads(DEPTH + 1)
    assert [status for _, _, _, status in await storm.attempts()] == ["confirmed", "replaced", "replaced"]
    await storm.assert_paid([asked])


async def test_heads_that_come_again_and_two_workers_make_one_attempt(storm: Storm) -> None:
    asked = await storm.sent(1)
    await storm.lose()
    await storm.heads(BLOCKS)
    await storm.mine()
    head = await storm.desk.newest()
    assert len(await storm.raised(head)) == 1
    assert await storm.raised(head) == []
    assert await storm.raised(head._replace(id="another-of-the-same-block")) == []
    other = storm.desk.process()
    assert await storm.raised(head._replace(id="by-the-other-worker"), other) == []
    with pytest.raises(Fenced):
        await storm.raised(head._replace(id="by-the-first-again"))
    assert [n for _, n, _, _ in await storm.attempts()] == [1, 2]
    assert await storm.status(asked[0]) == ("broadcasting", None)


async def test_a_worker_that_dies_before_the_commit_has_signed_nothing_that_anybody_has(
    storm: Storm,
) -> None:
    await storm.sent(1)
    await storm.lose()
    await storm.heads(BLOCKS)
    await storm.mine()
    head = await storm.desk.newest()

    class Died(Exception):
        """The process is gone."""

    def die(received: Any, facts: Any) -> Any:
        raise_fees.decide(received, facts)
        raise Died

    dying = storm.desk.process()
    with pytest.raises(Died):
        await storm.raised(head, replace(dying, raising=replace(dying.raising, decide=die)))
    assert [n for _, n, _, _ in await storm.attempts()] == [1]
    assert len(await storm.raised(head, storm.desk.process())) == 1
    assert [n for _, n, _, _ in await storm.attempts()] == [1, 2]


async def test_silence_and_an_endpoint_that_is_behind_are_no_evidence(storm: Storm) -> None:
    await storm.sent(1)
    await storm.lose()
    async with LyingEndpoint(storm.desk.anvil.rpc_url) as liar:
        stale = await storm.desk.anvil.rpc("eth_getBlockByNumber", "latest", False)
        liar.lies["eth_getBlockByNumber"] = lambda _params, _result: stale
        storm.process = storm.desk.process([storm.desk.rpc(storm.desk.anvil.rpc_url), storm.desk.rpc(liar.url)])
        for _ in range(2 * BLOCKS):
            await storm.mine()
            assert await storm.raised(await storm.desk.newest()) == [], "one of two has seen no block"
        storm.process = storm.desk.process([storm.desk.rpc("http://127.0.0.1:9")])
        await storm.mine()
        assert await storm.raised(await storm.desk.newest()) == [], "nobody answers"
    storm.process = storm.desk.process()
    await storm.mine()
    assert len(await storm.raised(await storm.desk.newest())) == 1


async def test_a_count_at_the_end_of_numbers_from_one_endpoint_ends_no_worker(storm: Storm) -> None:
    asked = await storm.sent(1)
    async with LyingEndpoint(storm.desk.anvil.rpc_url) as liar:
        liar.lies["eth_getTransactionCount"] = lambda _params, _result: hex(2**63 - 1)
        storm.process = storm.desk.process([storm.desk.rpc(storm.desk.anvil.rpc_url), storm.desk.rpc(liar.url)])
        await storm.mine()
        assert await storm.raised(await storm.desk.newest()) == []
        await storm.desk.head(storm.process)
    storm.process = storm.desk.process()
    await storm.heads(DEPTH + 1)
    await storm.assert_paid(asked)


async def test_a_head_made_up_far_above_does_not_keep_a_nonce_from_being_raised_for_good(storm: Storm) -> None:
    await storm.sent(1)
    await storm.lose()
    await storm.mine()
    head = await storm.desk.newest()
    assert head.value is not None
    number = orjson.loads(head.value)["number"]
    made_up = head._replace(value=head.value.replace(b'"number":%d' % number, b'"number":%d' % (number + 10**6)))
    assert made_up != head
    assert await storm.raised(made_up) == []
    told = []
    for _ in range(2 * BLOCKS):
        await storm.mine()
        told += await storm.raised(await storm.desk.newest())
    assert len(told) == 1


async def test_thirty_minutes_without_a_block_bring_a_person_and_the_money_follows_the_chain(storm: Storm) -> None:
    asked, in_flight = await storm.sent(2), {("broadcasting", None), ("confirming", None)}
    storm.base_fee = OVER_CAP
    await storm.heads(1)
    storm.desk.now += timedelta(seconds=RULE.stuck_s - 1)
    await storm.heads(1)
    assert {await storm.status(one) for one in asked} <= in_flight
    storm.desk.now += timedelta(seconds=2)
    await storm.heads(2)
    assert await storm.status(asked[0]) == ("manual_review", "stuck")
    assert await storm.status(asked[1]) in in_flight, "behind one that is stuck is not stuck"
    assert [(alert.code, alert.about["nonce"]) for alert in storm.alerts if alert.code == "withdrawal_stuck"] == [
        ("withdrawal_stuck", "0")
    ]
    assert await storm.money(asked[0]) == (0, 2 * USDC)
    storm.base_fee = STORM
    await storm.heads(DEPTH + BLOCKS + 2)
    await storm.assert_paid(asked)


async def test_what_gas_does_not_cover_waits_for_coins(storm: Storm) -> None:
    (asked,) = await storm.sent(1)
    max_fee = int(await storm.desk.connection.fetchval("SELECT max_fee FROM attempts"))
    await storm.desk.fund(coins=100_000 * max_fee)
    await storm.lose()
    assert await storm.heads(BLOCKS + 2) == []
    assert [alert.about["reason"] for alert in storm.alerts] == ["low_gas"]
    await storm.wish(asked, "speed_up")
    await storm.heads(1)
    wish = await wishes.wish_of(storm.desk.connection, asked.id)
    assert wish is not None
    assert (wish.state, wish.code) == ("open", "low_gas")
    await storm.desk.fund(coins=COIN)
    assert len(await storm.heads(1)) == 1
    await storm.heads(DEPTH + 1)
    await storm.assert_paid([asked])


async def test_a_paused_lane_signs_no_speed_up_and_a_wish_waits_until_it_is_opened(storm: Storm) -> None:
    (asked,) = await storm.sent(1)
    await storm.lose()
    key = ("MATIC", storm.desk.signer.address)
    at: Any = storm.desk.connection
    await pause_lane(at, key, "the key moves", storm.desk.now, "ann")
    await storm.wish(asked, "speed_up")
    assert await storm.wish(asked, "speed_up") == await storm.wish(asked, "speed_up"), "asked once"
    assert await storm.heads(BLOCKS + 2) == []
    await open_lane(at, key, storm.desk.now, "ann")
    assert len(await storm.heads(1)) == 1
    await storm.heads(DEPTH + 1)
    await storm.assert_paid([asked])


async def test_what_cannot_be_raised_is_refused_with_the_reason(storm: Storm) -> None:
    (waiting,) = await storm.desk.ask(1)
    with pytest.raises(NotRaisable, match="not_signed"):
        await storm.wish(waiting, "cancel")
    with pytest.raises(UnknownWithdrawal):
        await storm.wish(waiting._replace(id="0" * 32), "cancel")
    with pytest.raises(ValueError, match="reason"):
        await wishes.ask(storm.desk.connection, waiting.id, "cancel", 3, storm.desk.fees, "\n", storm.desk.now, "ann")
    await storm.desk.sent(storm.process, await storm.desk.signed(storm.process, waiting))
    await storm.wish(waiting, "speed_up")
    await storm.mine()
    assert await storm.raised(await storm.desk.newest()) == [], "its nonce is used"
    wish = await wishes.wish_of(storm.desk.connection, waiting.id)
    assert wish is not None
    assert (wish.state, wish.code) == ("refused", "in_a_block")
    await storm.heads(1)
    with pytest.raises(NotRaisable, match="in_a_block"):
        await storm.wish(waiting, "speed_up")
    await storm.heads(DEPTH)
    with pytest.raises(NotRaisable, match="ended"):
        await storm.wish(waiting, "cancel")
    assert [n for _, n, _, _ in await storm.attempts()] == [1]
    await storm.assert_paid([waiting])
