"""Scanning and evidence on a real node that reorganises, and on endpoints that are behind or lie."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from chain.errors import ChainMoved
from chain.evidence import Canonical, Doubt, Finding, Missing, Moved, Undecided, find_transfer
from chain.logs import TransferLog
from chain.rpc import Rpc
from chain.scan import ScanSettings, ScanState, begin
from chain.scanner import Pass, scan_once
from stablerail.dev.anvil import Anvil
from stablerail.dev.fetch import Tools
from stablerail.dev.usdc import Usdc, deploy
from tests.support.rpc_stub import LyingEndpoint, Refusal

DEPTH = 4


def new_address() -> str:
    return "0x" + secrets.token_hex(20)


@dataclass
class Net:
    """A chain of this test, an honest client and one through an endpoint that can be made to lie."""

    anvil: Anvil
    usdc: Usdc
    rpc: Rpc
    liar: Rpc
    endpoint: LyingEndpoint

    @property
    def settings(self) -> ScanSettings:
        return ScanSettings(self.usdc.address.lower(), span_max_blocks=100, overlap_blocks=2)

    async def scan(self, state: ScanState, *ours: str, rpc: Rpc | None = None) -> Pass:
        return await scan_once(rpc or self.rpc, state, set(ours), self.settings)

    async def paid(self, to: str, amount: int) -> TransferLog:
        """One transfer in a block of its own."""
        return (await self.paid_many([(to, amount)]))[0]

    async def paid_many(self, transfers: list[tuple[str, int]]) -> list[TransferLog]:
        single = len(transfers) == 1
        tx_hash = await (self.usdc.transfer(*transfers[0]) if single else self.usdc.transfer_many(transfers))
        number = int((await self.anvil.wait_mined(tx_hash))["blockNumber"], 16)
        logs = await self.rpc.logs(self.settings.token, {to for to, _ in transfers}, number, number)
        return [log for log in logs if log.tx_hash == tx_hash]

    async def find(self, log: TransferLog, *rpcs: Rpc, block_hash: str | None = "") -> Finding:
        """Asked at the head, of both clients unless told."""
        return await find_transfer(
            rpcs or (self.rpc, self.liar),
            log.tx_hash,
            log.block_hash if block_hash == "" else block_hash,
            log.token,
            log.to,
            log.amount,
            (await self.rpc.head()).number,
            DEPTH,
        )

    async def reorg(self, depth: int, *again: tuple[TransferLog, int]) -> None:
        """Replace the last blocks; each of `again` is mined in the n-th new one, the others' transactions are gone."""
        raws = [[await self.anvil.rpc("eth_getRawTransactionByHash", log.tx_hash), place] for log, place in again]
        await self.anvil.rpc("anvil_reorg", depth, raws)


@pytest.fixture
async def net(tmp_path: Path, tools: Tools) -> AsyncIterator[Net]:
    with Anvil(tmp_path, tools) as anvil:
        usdc = await deploy(anvil, tools.contracts)
        async with (
            LyingEndpoint(anvil.rpc_url) as endpoint,
            Rpc(anvil.rpc_url, anvil.chain_id) as rpc,
            Rpc(endpoint.url, anvil.chain_id) as liar,
        ):
            yield Net(anvil, usdc, rpc, liar, endpoint)


async def test_a_pass_reads_our_transfers_and_only_ours(net: Net) -> None:
    ours, theirs = new_address(), new_address()
    first = await net.paid(ours, 5_000_000)
    await net.paid(theirs, 6_000_000)
    await net.anvil.wait_mined(await net.usdc.transfer(ours, 0))
    done = await net.scan(begin(0, net.settings), ours)
    assert done.transfers == (first,)
    assert done.heads == (await net.rpc.head(),)
    idle = await net.scan(done.state, ours)
    assert (idle.state, idle.transfers, idle.heads) == (done.state, (), ())
    await net.anvil.mine(20)
    second = await net.paid(ours, 7_000_000)
    assert (await net.scan(done.state, ours)).transfers == (second,)


async def test_transfers_of_one_transaction_keep_their_order(net: Net) -> None:
    ours = new_address()
    await net.paid_many([(ours, 5), (ours, 9), (ours, 5)])
    done = await net.scan(begin(0, net.settings), ours)
    assert [log.amount for log in done.transfers] == [5, 9, 5]
    assert [log.log_index for log in done.transfers] == sorted(log.log_index for log in done.transfers)


async def test_a_transfer_that_moved_is_reported_again_in_its_new_block(net: Net) -> None:
    ours = new_address()
    log = await net.paid(ours, 5_000_000)
    await net.anvil.mine(2)
    before = await net.scan(begin(0, net.settings), ours)
    await net.reorg(3, (log, 1))
    after = await net.scan(before.state, ours)
    assert after.rewound_from == before.state.cursor
    [moved] = after.transfers
    assert (moved.tx_hash, moved.amount) == (log.tx_hash, log.amount)
    assert moved.block_hash != log.block_hash
    assert after.state.cursor is not None
    assert after.state.cursor.block_hash == (await net.rpc.head()).hash


async def test_a_transfer_that_was_dropped_is_not_reported_again(net: Net) -> None:
    ours = new_address()
    await net.paid(ours, 5_000_000)
    before = await net.scan(begin(0, net.settings), ours)
    await net.reorg(1)
    after = await net.scan(before.state, ours)
    assert after.rewound_from == before.state.cursor
    assert after.transfers == ()


async def test_a_reorg_in_the_middle_of_a_pass_ends_it_without_a_cursor(net: Net) -> None:
    ours = new_address()
    log = await net.paid(ours, 5_000_000)
    await net.anvil.mine(1)

    async def reorg_after_the_logs(_params: list[Any], honest: Any) -> Any:
        net.endpoint.lies.clear()
        await net.reorg(2, (log, 1))
        return honest

    net.endpoint.lies["eth_getLogs"] = reorg_after_the_logs
    state = begin(0, net.settings)
    with pytest.raises(ChainMoved):
        await net.scan(state, ours, rpc=net.liar)
    [moved] = (await net.scan(state, ours, rpc=net.liar)).transfers
    assert moved.block_hash != log.block_hash


async def test_logs_of_another_fork_than_the_blocks_are_not_taken(net: Net) -> None:
    ours = new_address()
    await net.paid(ours, 5_000_000)
    net.endpoint.lies["eth_getLogs"] = lambda _params, honest: [{**raw, "blockHash": "0x" + "7" * 64} for raw in honest]
    with pytest.raises(ChainMoved):
        await net.scan(begin(0, net.settings), ours, rpc=net.liar)


async def test_a_provider_with_a_range_limit_is_read_in_small_steps(net: Net) -> None:
    ours = new_address()
    logs = [await net.paid(ours, amount) for amount in (1, 2, 3)]

    def at_most_three_blocks(params: list[Any], honest: Any) -> Any:
        if int(params[0]["toBlock"], 16) - int(params[0]["fromBlock"], 16) >= 3:
            raise Refusal(-32005, "block range is too wide")
        return honest

    net.endpoint.lies["eth_getLogs"] = at_most_three_blocks
    state, seen, caught_up = begin(0, net.settings), set[TransferLog](), False
    for _ in range(60):
        if caught_up:
            break
        done = await net.scan(state, ours, rpc=net.liar)
        state, caught_up = done.state, done.caught_up
        seen.update(done.transfers)
    assert caught_up
    assert seen == set(logs)


async def test_a_final_transfer_is_canonical_with_all_its_equals(net: Net) -> None:
    ours = new_address()
    first, other, second = await net.paid_many([(ours, 5), (ours, 9), (ours, 5)])
    assert await net.find(first) == Undecided(Doubt.NOT_FINAL)
    await net.anvil.mine(DEPTH)
    place = (first.block_hash, first.block_number)
    assert await net.find(first) == Canonical(*place, (first.log_index, second.log_index))
    assert await net.find(other) == Canonical(*place, (other.log_index,))
    assert await net.find(first, block_hash=None) == Canonical(*place, (first.log_index, second.log_index))


async def test_a_dropped_transfer_is_missing(net: Net) -> None:
    log = await net.paid(new_address(), 5)
    await net.reorg(1)
    await net.anvil.mine(DEPTH)
    assert await net.find(log) == Missing()


async def test_a_transfer_in_another_block_has_moved_and_is_canonical_there_once_final(net: Net) -> None:
    log = await net.paid(new_address(), 5)
    await net.anvil.mine(1)
    await net.reorg(2, (log, 1))
    moved = await net.find(log)
    assert isinstance(moved, Moved)
    assert moved.block_number == log.block_number + 1
    assert await net.find(log, block_hash=moved.block_hash) == Undecided(Doubt.NOT_FINAL)
    await net.anvil.mine(DEPTH)
    assert await net.find(log, block_hash=moved.block_hash) == Canonical(
        moved.block_hash, moved.block_number, moved.log_indexes
    )


async def test_a_transfer_whose_place_among_the_logs_changed_has_moved_with_its_new_index(net: Net) -> None:
    ours = new_address()
    await net.anvil.rpc("evm_setAutomine", False)
    await net.usdc.mint(net.usdc.batch, 100)
    pay = await net.usdc.transfer(ours, 5)
    await net.anvil.mine(1)
    await net.anvil.rpc("evm_setAutomine", True)
    number = (await net.rpc.head()).number
    [log] = await net.rpc.logs(net.settings.token, {ours}, number, number)
    assert (log.tx_hash, log.log_index > 0) == (pay, True)
    await net.reorg(1, (log, 0))
    await net.anvil.mine(DEPTH)
    moved = await net.find(log)
    assert isinstance(moved, Moved)
    assert (moved.block_number, moved.log_indexes) == (log.block_number, (0,))
    assert moved.block_hash != log.block_hash


async def test_a_transaction_that_never_paid_that_is_missing(net: Net) -> None:
    log = await net.paid(new_address(), 5)
    await net.anvil.mine(DEPTH)
    head = (await net.rpc.head()).number
    lies = [(new_address(), 5), (log.to, 6)]
    for to, amount in lies:
        found = await find_transfer([net.rpc], log.tx_hash, log.block_hash, log.token, to, amount, head, DEPTH)
        assert found == Missing()
    nowhere = await find_transfer(
        [net.rpc], "0x" + secrets.token_hex(32), log.block_hash, log.token, log.to, 5, head, DEPTH
    )
    assert nowhere == Missing()


async def test_a_transaction_that_reverts_after_a_reorg_is_missing_only_when_final(net: Net) -> None:
    ours = new_address()
    log = await net.paid(ours, 5)
    raw = await net.anvil.rpc("eth_getRawTransactionByHash", log.tx_hash)
    await net.reorg(1)
    await net.anvil.wait_mined(await net.usdc.blacklist(ours))
    await net.anvil.wait_mined(await net.anvil.rpc("eth_sendRawTransaction", raw))
    undecided = await net.find(log)
    assert isinstance(undecided, Undecided)
    assert undecided.reason is Doubt.NOT_FINAL
    await net.anvil.mine(DEPTH)
    assert await net.find(log) == Missing()


async def test_one_endpoint_without_the_receipt_decides_nothing(net: Net) -> None:
    log = await net.paid(new_address(), 5)
    await net.anvil.mine(DEPTH)
    net.endpoint.lies["eth_getTransactionReceipt"] = lambda _params, _honest: None
    alone = await net.find(log, net.liar)
    assert isinstance(alone, Undecided)
    assert alone.reason is Doubt.CONTRADICTION  # it still has the block with the transaction
    net.endpoint.lies["eth_getBlockByHash"] = lambda _params, _honest: None
    assert await net.find(log, net.liar) == Missing()
    for order in ((net.rpc, net.liar), (net.liar, net.rpc)):
        assert await net.find(log, *order) == Undecided(Doubt.DISAGREEMENT)


async def test_an_endpoint_that_is_behind_decides_nothing(net: Net) -> None:
    log = await net.paid(new_address(), 5)
    stale = await net.anvil.rpc("eth_getBlockByNumber", "latest", False)
    await net.reorg(1)
    await net.anvil.mine(DEPTH)
    net.endpoint.lies["eth_getBlockByNumber"] = lambda params, honest: stale if params[0] == "latest" else honest
    found = await net.find(log)
    assert isinstance(found, Undecided)
    assert found.reason is Doubt.BEHIND
    net.endpoint.lies.clear()
    assert await net.find(log) == Missing()


async def test_an_endpoint_that_fails_or_talks_garbage_decides_nothing(net: Net) -> None:
    log = await net.paid(new_address(), 5)
    await net.anvil.mine(DEPTH)
    for whole in ((429, b""), (500, b""), (200, b"garbage"), (200, b"[]")):
        net.endpoint.whole = whole
        found = await net.find(log)
        assert isinstance(found, Undecided)
        assert found.reason is Doubt.FAILED
    net.endpoint.whole = None
    net.endpoint.lies["eth_getTransactionReceipt"] = lambda _params, honest: {
        **honest,
        "logs": [{**raw, "data": "0x"} for raw in honest["logs"]],
    }
    garbled = await net.find(log)
    assert isinstance(garbled, Undecided)
    assert garbled.reason is Doubt.FAILED


async def test_a_receipt_of_a_block_that_is_not_canonical_decides_nothing(net: Net) -> None:
    log = await net.paid(new_address(), 5)
    receipt = await net.anvil.rpc("eth_getTransactionReceipt", log.tx_hash)
    block = await net.anvil.rpc("eth_getBlockByHash", log.block_hash, False)
    await net.reorg(1)
    await net.anvil.mine(DEPTH)
    net.endpoint.lies["eth_getTransactionReceipt"] = lambda _params, _honest: receipt
    net.endpoint.lies["eth_getBlockByHash"] = lambda _params, _honest: block  # geth still knows orphaned blocks by hash
    found = await net.find(log, net.liar)
    assert isinstance(found, Undecided)
    assert found.reason is Doubt.CONTRADICTION
