"""Several lanes of a chain on a real PostgreSQL and a real node: who signs what, and how lanes come and go."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path

import asyncpg
import pytest

from agents.withdrawals.errors import LaneInFlight, LaneRetired
from agents.withdrawals.key_ring import KeyRing
from agents.withdrawals.lanes import add_lane, drain_lane, open_lane, pause_lane, retire_lane
from agents.withdrawals.sign_transactions import _locked
from agents.withdrawals.sync_lane import Count, apply, compare, judged
from agents.withdrawals.withdrawal import Lane
from chain.keys import load_key
from chain.signer import KeySigner
from ledger.rows import Connection
from stablerail.dev.anvil import Anvil
from stablerail.dev.keystore import write_keystore
from stablerail.dev.usdc import Usdc
from tests.support import ledger_rig
from tests.support import sending as sending_rig
from tests.support.ledger_rig import AT, assert_holds, connect_to
from tests.support.sending import CHAIN, COIN, DEPTH, USDC, Process, Sending, sending

databases, dsn, connection = ledger_rig.databases, ledger_rig.dsn, ledger_rig.connection
chain, token = sending_rig.chain, sending_rig.token

PASSWORD = "what-opens-them"
LOCK_LANES = "SELECT 1 FROM lanes FOR UPDATE NOWAIT"
MakeDesk = Callable[[int], AbstractAsyncContextManager[Sending]]


@pytest.fixture
def lanes(connection: Connection, dsn: str, chain: Anvil, token: Usdc) -> MakeDesk:
    """So many lanes."""

    @asynccontextmanager
    async def made(number: int) -> AsyncIterator[Sending]:
        others = [KeySigner(secrets.token_bytes(32)) for _ in range(number - 1)]
        async with sending(connection, connect_to(dsn), chain, token, others=others) as desk:
            yield desk

    return made


async def one_block(desk: Sending, process: Process) -> None:
    """Mined, seen, signed anew and sent."""
    await desk.anvil.mine()
    await desk.sent(process, await desk.head(process))


@pytest.mark.parametrize("number", [2, 4])
async def test_withdrawals_are_spread_over_lanes_each_without_a_gap_and_are_paid_once(
    lanes: MakeDesk, number: int
) -> None:
    async with lanes(number) as desk:
        signers = [desk.signer, *desk.others]
        asked, process = await desk.ask(100), desk.process()
        await desk.sent(process, await desk.signed(process, *asked))
        first = [len(await desk.nonces_of(signer)) for signer in signers]
        assert first == [16] * number, "each is full"
        while len(await desk.paid()) < 100:
            await one_block(desk, process)
        for signer in signers:
            nonces = await desk.nonces_of(signer)
            assert nonces == list(range(len(nonces)))
            assert len(nonces) >= 100 // number // 2
        assert Counter(to for to, _ in await desk.paid()) == Counter(one.recipient for one in asked)
        await assert_holds(desk.connection)


async def test_a_lane_is_locked_after_all_that_waits_for_it(lanes: MakeDesk, dsn: str) -> None:
    """One statement locks both; a stage that has the withdrawal and wants the lane never waits for one that has it the other way."""
    async with lanes(1) as desk, AsyncExitStack() as stack:
        process = desk.process()
        await desk.signed(process, *await desk.ask(1))
        asked = await desk.ask(2)
        others = [await connect_to(dsn)() for _ in range(3)]
        for one in others:
            stack.push_async_callback(one.close)
        signing, withdrawing, lane = others
        held = withdrawing.transaction()
        await held.start()
        await withdrawing.fetchval("SELECT 1 FROM withdrawals WHERE id = $1::text::uuid FOR UPDATE", asked[-1].id)
        async with signing.transaction():
            key = (CHAIN.value, desk.signer.address)
            locking = asyncio.create_task(_locked(signing, {CHAIN: 10}, [key]))
            blocked = "SELECT cardinality(pg_blocking_pids($1))"
            async with asyncio.timeout(100):
                while not await lane.fetchval(blocked, signing.get_server_pid()):
                    await asyncio.sleep(0.01)
            assert await lane.fetchval(LOCK_LANES) == 1
            await held.rollback()
            waiting, stored = await locking
            assert (list(waiting[CHAIN]), list(stored)) == ([one.id for one in asked], [key])
            with pytest.raises(asyncpg.LockNotAvailableError):
                await lane.fetchval(LOCK_LANES)


async def test_a_lane_that_cannot_pay_says_why_and_the_others_pay_oldest_first(lanes: MakeDesk) -> None:
    async with lanes(3) as desk:
        poor, dry, rich = sorted((desk.signer, *desk.others), key=lambda one: one.address)
        await desk.fund(coins=0, signer=poor)
        big = await desk.ask(1, 900 * USDC)
        process = desk.process()
        await desk.signed(process, *big)  # by the first that has gas
        asked = [*await desk.ask(1, 500 * USDC), *await desk.ask(4, USDC)]
        await desk.signed(process, *asked)
        assert await desk.lane_of(poor) == ("paused", "low_gas")
        assert await desk.lane_of(dry) == ("open", ""), "the 500 went to the lane with more room"
        assert await desk.nonces_of(poor) == []
        assert len(await desk.nonces_of(dry)) + len(await desk.nonces_of(rich)) == 6
        for one in await desk.ask(1, 800 * USDC), await desk.ask(1, USDC):
            assert await desk.signed(process, *one) == [], "nobody has so much, and the younger one waits behind it"
        assert {await desk.lane_of(dry), await desk.lane_of(rich)} == {("paused", "low_usdc")}
        await desk.fund(usdc=1_000 * USDC, signer=dry)
        assert len(await desk.head(process)) == 2
        assert await desk.lane_of(dry) == ("open", "")
        await assert_holds(desk.connection)


async def test_a_key_is_replaced_while_the_worker_runs(lanes: MakeDesk, tmp_path: Path) -> None:
    async with lanes(1) as desk:
        process, keystore = desk.process(), tmp_path / "new.json"
        ring = KeyRing(
            process.desks, desk.connect, lambda source, address: load_key(source, PASSWORD, address),
            lambda _, signer: desk.desk(signer), [CHAIN],
        )  # fmt: skip
        old, new = desk.signer, load_key(f"file:{keystore}", PASSWORD, write_keystore(keystore, PASSWORD))
        old_key, new_key = (CHAIN.value, old.address), (CHAIN.value, new.address)
        desk.others.append(new)
        await desk.fund(coins=COIN, usdc=100 * USDC, signer=new)
        before = await desk.ask(3)
        told = await desk.signed(process, *before)

        await add_lane(desk.connection, new_key, f"file:{keystore}", desk.now, "ann")
        await ring.look(desk.connection)
        await drain_lane(desk.connection, old_key, desk.now, "ann")
        after = await desk.ask(3)
        told += await desk.signed(process, *after)
        assert (await desk.nonces_of(old), await desk.nonces_of(new)) == ([0, 1, 2], [0, 1, 2])
        with pytest.raises(LaneInFlight, match=r"3 of .* 0 to 2"):
            await retire_lane(desk.connection, old_key, desk.now, "ann")
        await desk.sent(process, told)
        for _ in range(DEPTH + 2):
            await one_block(desk, process)
        await retire_lane(desk.connection, old_key, desk.now, "ann")
        await ring.look(desk.connection)
        assert process.desks.get(old_key) is None, "the key is in this process no more"
        for change in (
            open_lane(desk.connection, old_key, desk.now, "ann"),
            pause_lane(desk.connection, old_key, "too late", desk.now, "ann"),
            add_lane(desk.connection, old_key, f"file:{keystore}", desk.now, "ann"),
        ):
            with pytest.raises(LaneRetired):
                await change
        await desk.sent(process, await desk.signed(process, *await desk.ask(1)))
        await desk.anvil.mine()
        assert await desk.nonces_of(new) == [0, 1, 2, 3]
        assert len(await desk.paid()) == 7
        actions = await desk.connection.fetch("SELECT action FROM audit_logs ORDER BY batch, n")
        assert [row[0] for row in actions] == ["lane.added", "lane.drained", "lane.retired"]
        await assert_holds(desk.connection)


async def test_a_lane_whose_key_moves_elsewhere_goes_on_with_it_and_one_that_cannot_be_loaded_keeps_the_old(
    lanes: MakeDesk, tmp_path: Path
) -> None:
    async with lanes(1) as desk:
        process, asked = desk.process(), []
        loads = 0

        def load(source: str, address: str) -> KeySigner:
            nonlocal loads
            loads += 1
            signer = load_key(source, PASSWORD, address)
            assert isinstance(signer, KeySigner)
            return signer

        ring = KeyRing(process.desks, desk.connect, load, lambda _, signer: desk.desk(signer), [CHAIN])
        key = (CHAIN.value, desk.signer.address)
        write_keystore(tmp_path / "other.json", PASSWORD)
        for source in ("/nowhere.json", str(tmp_path / "other.json")):
            await add_lane(desk.connection, key, source, desk.now, "ann")
            for _ in range(3):
                await ring.look(desk.connection)
            kept = process.desks.get(key)
            assert kept is not None
            assert kept.signer is desk.signer
            asked += await desk.ask(1)
            await desk.signed(process, asked[-1])
        assert loads == 2, "what failed is not stretched again at once"
        assert await desk.nonces() == [0, 1]


LANE = Lane("MATIC", "0x5", 10, 8, "open", "", 3, AT)


@pytest.mark.parametrize(
    ("counts", "nonces", "said", "after"),
    [
        ([(8, 10)], [8, 9], [], None),
        ([(10, 10), (10, 10)], [], ["row counts 8"], (10, "open", "")),
        ([(8, 10), (9, 10)], [8, 9], ["count differently"], None),
        ([(12, 12)], [], ["nonces 10 to 11 were used", "row counts 8"], (12, "paused", "foreign_nonce")),
        ([(8, 13)], [8, 9], ["holds 3 transactions"], None),
        ([(5, 10)], [8, 9], ["nonces 5 to 7 are final here"], None),
        ([None], [8, 9], ["no endpoint answers"], None),
        ([None, (8, 10)], [8, 9], [], None),
    ],
)
def test_what_a_chain_counts_is_compared_with_what_we_gave(
    counts: list[tuple[int, int] | None], nonces: list[int], said: list[str], after: tuple[int, str, str] | None
) -> None:
    heard = [Count("e", failure="away") if count is None else Count("e", *count) for count in counts]
    found = judged(LANE, nonces, heard, AT)
    assert len(found.findings) == len(said), found.findings
    assert all(part in finding for part, finding in zip(said, found.findings, strict=True))
    assert (found.after and (found.after.chain_nonce, found.after.status, found.after.reason)) == after
    assert found.after is None or found.after.next_nonce == 10


async def test_a_sync_is_stored_only_for_the_lane_that_was_compared(lanes: MakeDesk) -> None:
    async with lanes(1) as desk:
        process, key = desk.process(), ("MATIC", desk.signer.address)
        await desk.signed(process, *await desk.ask(2))
        rpcs = [desk.rpc(desk.anvil.rpc_url)]
        assert (await compare(desk.connection, key, rpcs, desk.now)).findings == ()
        await desk.anvil.rpc("anvil_setNonce", desk.signer.address, hex(5))
        found = await compare(desk.connection, key, rpcs, desk.now)
        await pause_lane(desk.connection, key, "meanwhile", desk.now, "bob")
        assert not await apply(desk.connection, found, desk.now, "ann")
        await open_lane(desk.connection, key, desk.now, "bob")
        assert await apply(desk.connection, await compare(desk.connection, key, rpcs, desk.now), desk.now, "ann")
        assert await desk.lane() == (2, "paused", "foreign_nonce")
        await open_lane(desk.connection, key, desk.now, "ann", counted=5)
        assert await desk.lane() == (5, "open", "")
        with pytest.raises(LookupError):
            await compare(desk.connection, ("MATIC", "0x1"), rpcs, desk.now)
        await assert_holds(desk.connection)
