"""Coins for gas that lanes are given, on a real PostgreSQL and a real node: each top-up once, within its limits, and in the ledger."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta

import pytest

from agents.recovery import restoring
from agents.recovery.comparing import compare_lane
from agents.withdrawals.errors import NonceNotTaken
from agents.withdrawals.foreign import Released, release
from agents.withdrawals.key_ring import KeyRing
from agents.withdrawals.lanes import add_lane, drain_lane, open_lane, pause_lane
from agents.withdrawals.look import RESEND_S
from agents.withdrawals.top_ups import WEI, TopUpPolicy
from chain.fees import GWEI
from chain.rpc import Rpc
from chain.signer import KeySigner, Signer
from ledger.accounts import gas_coins
from ledger.errors import Fenced
from ledger.record import Message
from ledger.rows import Connection
from stablerail.dev.anvil import Anvil
from stablerail.dev.usdc import Usdc
from tests.support import ledger_rig
from tests.support import sending as sending_rig
from tests.support.ledger_rig import assert_holds, balance, connect_to
from tests.support.rpc_stub import LyingEndpoint
from tests.support.sending import CHAIN, COIN, DEPTH, USDC, Process, Sending, messages, sending, use_nonce
from tests.support.storm import BLOCKS, RULE

databases, dsn, connection = ledger_rig.databases, ledger_rig.dsn, ledger_rig.connection
chain, token = sending_rig.chain, sending_rig.token

MILLION = 10**6
"""Millionths of a coin."""
POLICY = TopUpPolicy(below=MILLION, upto=5 * MILLION, day_max=50 * MILLION, low=20 * MILLION)
MakeDesk = Callable[..., AbstractAsyncContextManager[Sending]]


@pytest.fixture
def lanes(connection: Connection, dsn: str, chain: Anvil, token: Usdc) -> MakeDesk:
    """So many lanes, the given ones poor, and a gas account with a hundred coins."""

    @asynccontextmanager
    async def made(number: int, poor: int, policy: TopUpPolicy = POLICY) -> AsyncIterator[Sending]:
        others = [KeySigner(secrets.token_bytes(32)) for _ in range(number - 1)]
        async with sending(connection, connect_to(dsn), chain, token, others=others) as desk:
            desk.gas, desk.top_ups = KeySigner(secrets.token_bytes(32)), policy
            await desk.fund(coins=100 * COIN, signer=desk.gas)
            for signer in signers(desk)[:poor]:
                await desk.fund(coins=COIN // 2, signer=signer)
            await desk.anvil.mine()
            await desk.head(desk.process())  # the lanes are made
            yield desk

    return made


def signers(desk: Sending) -> list[Signer]:
    return sorted((desk.signer, *desk.others), key=lambda one: one.address)


async def block(desk: Sending, process: Process, *, send: bool = True) -> list[Message]:
    """Mined, and what follows from it; what was told."""
    await desk.anvil.mine()
    told = await desk.head(process)
    told += await topped(desk, process)
    if send:
        await desk.sent(process, told)
    return told


async def topped(desk: Sending, process: Process) -> list[Message]:
    assert process.topping is not None
    return messages(await desk.run(process, process.topping, await desk.newest()))


async def blocks(desk: Sending, process: Process, number: int = DEPTH + 2) -> None:
    for _ in range(number):
        await block(desk, process)


async def coins(desk: Sending, signer: Signer | None) -> int:
    assert signer is not None
    return int(await desk.anvil.rpc("eth_getBalance", signer.address, "latest"), 16)


async def rows(desk: Sending) -> list[tuple[int, str, str]]:
    """(nonce, lane, state) of every top-up."""
    found = await desk.connection.fetch("SELECT nonce, lane, state FROM gas_top_ups ORDER BY nonce")
    return [(nonce, lane, state) for nonce, lane, state in found]


async def booked(desk: Sending, signer: Signer | None) -> int:
    assert signer is not None
    return await balance(desk.connection, gas_coins(f"MATIC:{signer.address}")) or 0


async def test_a_lane_that_has_too_little_is_given_what_it_lacks_once_and_the_ledger_has_it_when_it_is_final(
    lanes: MakeDesk,
) -> None:
    async with lanes(3, poor=2) as desk:
        first, second, rich = signers(desk)
        process = desk.process()
        await block(desk, process)
        assert await rows(desk) == [(0, first.address, "open"), (1, second.address, "open")]
        assert await booked(desk, first) == 0
        await blocks(desk, process)
        assert await rows(desk) == [(0, first.address, "done"), (1, second.address, "done")]
        for signer in (first, second):
            assert await coins(desk, signer) == 5 * COIN
            assert await booked(desk, signer) == 4_500_000
        assert await booked(desk, desk.gas) == -9_000_000
        assert await booked(desk, rich) == 0
        await blocks(desk, process)
        assert len(await rows(desk)) == 2
        assert desk.is_low[-1] is False
        await assert_holds(desk.connection)


async def test_a_lane_without_gas_is_topped_up_and_pays_what_waited_for_it(lanes: MakeDesk) -> None:
    async with lanes(1, poor=0) as desk:
        await desk.fund(coins=0)
        process = desk.process()
        asked = await desk.ask(3)
        assert await desk.signed(process, *asked) == []
        assert await desk.lane_of(desk.signer) == ("paused", "low_gas")
        await blocks(desk, process)
        assert await desk.lane_of(desk.signer) == ("open", "")
        assert sorted(await desk.paid()) == sorted((one.recipient, USDC) for one in asked)
        assert len(await rows(desk)) == 1
        await assert_holds(desk.connection)


async def test_a_top_up_whose_process_dies_before_it_is_sent_is_sent_by_the_next_and_given_once(
    lanes: MakeDesk,
) -> None:
    async with lanes(1, poor=1) as desk:
        await block(desk, desk.process(), send=False)
        (before,) = await rows(desk)
        process = desk.process()  # the event was lost with its process
        await blocks(desk, process, 2)
        assert (await rows(desk), await coins(desk, desk.signer)) == ([before], COIN // 2)
        desk.now += timedelta(seconds=RESEND_S + 1)
        await blocks(desk, process)
        assert await coins(desk, desk.signer) == 5 * COIN
        assert [state for _, _, state in await rows(desk)] == ["done"]
        assert await booked(desk, desk.signer) == 4_500_000
        await assert_holds(desk.connection)


async def test_a_head_that_comes_again_and_a_worker_that_lost_its_chain_give_nothing_more(lanes: MakeDesk) -> None:
    async with lanes(1, poor=1) as desk:
        old = desk.process()
        told = await block(desk, old)
        assert len(told) == 1
        assert await topped(desk, old) == []
        new = desk.process()
        assert await topped(desk, new) == [], "signed already, and in no block yet"
        with pytest.raises(Fenced):
            await topped(desk, old)
        await desk.sent(new, told)  # the event comes again
        await blocks(desk, new)
        assert await coins(desk, desk.signer) == 5 * COIN
        assert len(await rows(desk)) == 1


async def test_a_top_up_that_a_reorg_took_back_is_sent_again_and_given_once(lanes: MakeDesk) -> None:
    async with lanes(1, poor=1) as desk:
        process = desk.process()
        await block(desk, process)
        snapshot = await desk.anvil.rpc("evm_snapshot")
        await block(desk, process)
        assert await coins(desk, desk.signer) == 5 * COIN
        await desk.anvil.rpc("evm_revert", snapshot)
        await desk.anvil.rpc("anvil_dropAllTransactions")
        await desk.anvil.mine()
        await desk.anvil.mine()
        await blocks(desk, process, DEPTH + 3)
        assert await coins(desk, desk.signer) == 5 * COIN
        assert [state for _, _, state in await rows(desk)] == ["done"]
        assert await booked(desk, desk.signer) == 4_500_000


async def test_an_endpoint_that_is_behind_the_last_top_up_gives_no_reason_for_another(lanes: MakeDesk) -> None:
    async with lanes(1, poor=1) as desk:
        process = desk.process()
        await block(desk, process)
        behind = hex((await desk.rpc(desk.anvil.rpc_url).head()).number)
        poor = hex(await coins(desk, desk.signer))
        await blocks(desk, process)
        assert len(await rows(desk)) == 1
        async with LyingEndpoint(desk.anvil.rpc_url) as endpoint:
            lane = desk.signer.address
            endpoint.lies = {
                "eth_getBalance": lambda params, honest: poor if params[0].lower() == lane else honest,
                "eth_getBlockByNumber": lambda params, honest: (
                    {**honest, "number": behind} if params[0] == "latest" else honest
                ),
            }
            process = desk.process([desk.rpc(desk.anvil.rpc_url), desk.rpc(endpoint.url)])
            assert await topped(desk, process) == []
            del endpoint.lies["eth_getBlockByNumber"]
            assert len(await topped(desk, desk.process([desk.rpc(endpoint.url)]))) == 1, "its block is not behind"


async def test_no_more_is_given_on_a_day_than_its_limit_whoever_gives_it_and_the_account_is_told_of(
    lanes: MakeDesk,
) -> None:
    async with lanes(3, poor=3, policy=TopUpPolicy(MILLION, 5 * MILLION, 10 * MILLION, 0)) as desk:
        process = desk.process()
        await blocks(desk, process)
        assert [state for _, _, state in await rows(desk)] == ["done", "done"]
        assert desk.is_low[-1] is True
        desk.gas = KeySigner(secrets.token_bytes(32))  # another account, the same day
        await desk.fund(coins=100 * COIN, signer=desk.gas)
        process = desk.process()
        await blocks(desk, process)
        assert len(await rows(desk)) == 2
        desk.now += timedelta(days=1)
        await blocks(desk, process)
        assert len(await rows(desk)) == 3
        assert desk.is_low[-1] is False
        assert [await coins(desk, one) for one in signers(desk)] == [5 * COIN] * 3
        await assert_holds(desk.connection)


async def test_a_gas_account_without_coins_is_low_signs_nothing_and_goes_on_when_it_has_some(lanes: MakeDesk) -> None:
    async with lanes(2, poor=2) as desk:
        assert desk.gas is not None
        await desk.fund(coins=5 * COIN, signer=desk.gas)
        process = desk.process()
        await block(desk, process)
        assert len(await rows(desk)) == 1, "for the first it has enough"
        assert await desk.lane_of(desk.gas) == ("paused", "low_gas")
        assert desk.is_low[-1] is True
        await desk.fund(coins=50 * COIN, signer=desk.gas)
        await blocks(desk, process)
        assert [state for _, _, state in await rows(desk)] == ["done", "done"]
        assert await desk.lane_of(desk.gas) == ("open", "")
        assert desk.is_low[-1] is False


async def test_a_lane_that_a_person_or_a_restore_closed_or_that_drains_is_given_nothing(lanes: MakeDesk) -> None:
    async with lanes(3, poor=3) as desk:
        keys = [("MATIC", one.address) for one in signers(desk)]
        await pause_lane(desk.connection, keys[0], "the key moves", desk.now, "ann")
        await drain_lane(desk.connection, keys[1], desk.now, "ann")
        await pause_lane(desk.connection, keys[2], "nonce_taken", desk.now, "ann")
        process = desk.process()
        await blocks(desk, process, 2)
        assert await rows(desk) == []
        await open_lane(desk.connection, keys[0], desk.now, "ann")
        await restoring.close(desk.connection, desk.now, "ann", first_seq=1_000_000, records=9)
        await blocks(desk, process, 2)
        assert await rows(desk) == [], "neither is the gas account used before it was compared"


async def test_the_account_s_key_signs_no_withdrawals_though_a_person_adds_it_as_a_lane(lanes: MakeDesk) -> None:
    async with lanes(1, poor=0) as desk:
        gas = desk.gas
        assert gas is not None
        process, key = desk.process(), ("MATIC", gas.address)
        await add_lane(desk.connection, key, "kms:gas", desk.now, "ann")
        await desk.fund(usdc=100 * USDC, signer=gas)
        ring = KeyRing(
            process.desks,
            desk.connect,
            lambda _source, _address: gas,
            lambda _chain, signer: desk.desk(signer),
            [CHAIN],
        )
        await ring.look(desk.connection)
        held = process.desks.get(key)
        assert held is not None
        assert held.gives_gas
        await desk.signed(process, *await desk.ask(3))
        assert (await desk.nonces_of(desk.signer), await desk.nonces_of(gas)) == ([0, 1, 2], [])


async def test_a_top_up_whose_nonce_a_stranger_used_is_ended_by_a_person_once_that_is_proven_and_given_anew(
    lanes: MakeDesk,
) -> None:
    async with lanes(1, poor=1) as desk:
        assert desk.gas is not None
        gas, rpcs = ("MATIC", desk.gas.address), [desk.rpc(desk.anvil.rpc_url), desk.rpc(desk.anvil.rpc_url)]
        process = desk.process(rpcs)
        told = await block(desk, process, send=False)
        await use_nonce(desk, desk.gas, 0)
        await blocks(desk, process, DEPTH)

        async def released(*others: Rpc) -> Released:
            some = [rpcs[0], *others]
            return await release(desk.connection, gas, 0, some, DEPTH, "who had the key", desk.now, "ann")

        for others in ((rpcs[1],), ()):
            with pytest.raises(NonceNotTaken):
                await released(*others)  # not final yet; one endpoint is not enough
        await blocks(desk, process, 2)
        assert await desk.lane_of(desk.gas) == ("paused", "nonce_taken")
        assert await rows(desk) == [(0, desk.signer.address, "open")]
        async with LyingEndpoint(desk.anvil.rpc_url) as endpoint:
            endpoint.lies["eth_getTransactionCount"] = lambda _params, _honest: "0x0"
            with pytest.raises(NonceNotTaken):
                await released(desk.rpc(endpoint.url))
        assert (await released(rpcs[1])).about == "top_up"
        with pytest.raises(NonceNotTaken):
            await released(rpcs[1])
        await desk.sent(process, told)  # the event comes again
        await open_lane(desk.connection, gas, desk.now, "ann")
        await blocks(desk, process, DEPTH + 3)
        assert await rows(desk) == [(0, desk.signer.address, "failed"), (1, desk.signer.address, "done")]
        assert await coins(desk, desk.signer) == 5 * COIN
        assert await booked(desk, desk.signer) == 4_500_000
        assert await desk.lane_of(desk.gas) == ("open", "")
        assert await desk.connection.fetchval("SELECT count(*) FROM audit_logs WHERE action = 'top_up.released'") == 1
        await assert_holds(desk.connection)


async def test_after_a_restore_the_gas_account_s_lane_stays_closed_while_a_stranger_has_a_nonce_of_a_top_up(
    lanes: MakeDesk,
) -> None:
    async with lanes(1, poor=1) as desk:
        assert desk.gas is not None
        gas, rpcs = ("MATIC", desk.gas.address), [desk.rpc(desk.anvil.rpc_url), desk.rpc(desk.anvil.rpc_url)]
        process = desk.process(rpcs)
        await block(desk, process, send=False)
        await use_nonce(desk, desk.gas, 0)
        await desk.anvil.mine(DEPTH + 2)
        await restoring.close(desk.connection, desk.now, "ann", first_seq=1_000_000, records=7)
        (lane,) = [one for one in await restoring.closed_lanes(desk.connection) if one.signer == desk.gas.address]
        assert (await compare_lane(desk.connection, lane, rpcs)).unknown == ("nonce 0",)
        await release(desk.connection, gas, 0, rpcs, DEPTH, "who had the key", desk.now, "ann")
        assert (await compare_lane(desk.connection, lane, rpcs)).code == ""


async def test_a_top_up_that_no_block_takes_is_sped_up_and_given_once(lanes: MakeDesk) -> None:
    async with lanes(1, poor=1) as desk:
        desk.rule = RULE
        process = desk.process()
        await block(desk, process)
        for _ in range(BLOCKS + 2):
            await desk.anvil.rpc("anvil_setNextBlockBaseFeePerGas", hex(270 * GWEI))
            await desk.anvil.mine()
            await desk.head(process)
            raised = messages(await desk.run(process, process.raising, await desk.newest()))
            await desk.sent(process, [*raised, *await topped(desk, process)])
        await blocks(desk, process)
        found = await desk.connection.fetch("SELECT n, kind, status FROM attempts ORDER BY n")
        assert [tuple(one) for one in found] == [(1, "top_up", "replaced"), (2, "top_up", "confirmed")]
        assert await coins(desk, desk.signer) == 5 * COIN
        assert [state for _, _, state in await rows(desk)] == ["done"]
        assert await booked(desk, desk.signer) == 4_500_000
        assert (await desk.connection.fetchval("SELECT amount FROM gas_top_ups")) * WEI == 4 * COIN + COIN // 2
        await assert_holds(desk.connection)
