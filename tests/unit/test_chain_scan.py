"""The scan misses nothing, whatever the chain does between and during passes: reorgs, refusals, stale endpoints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chain.errors import ChainMoved, ReorgTooDeep, RpcRefused
from chain.logs import TransferLog
from chain.rpc import Block
from chain.scan import Cursor, Range, ScanSettings, ScanState, advance, begin, narrow, plan, rewind
from chain.scanner import scan_once

TOKEN = "0x" + "1" * 40
OURS = "0x" + "2" * 40
THEIRS = "0x" + "3" * 40
SETTINGS = ScanSettings(TOKEN, span_max_blocks=16, overlap_blocks=2, recent_max=64)


@dataclass
class FakeChain:
    """A chain in memory. `before_call[n]` reorganises it just before its n-th answer; `logs_max_blocks` refuses wide ranges."""

    blocks: list[tuple[Block, list[TransferLog]]] = field(default_factory=list)
    logs_max_blocks: int = 1_000
    head_lag_blocks: int = 0
    before_call: dict[int, tuple[int, int]] = field(default_factory=dict)
    calls: int = 0
    made: int = 0

    def mine(self, count: int = 1) -> None:
        for _ in range(count):
            self.made += 1
            number, parent = len(self.blocks), self.blocks[-1][0].hash if self.blocks else "0x" + "0" * 64
            name = "0x" + hashlib.sha256(f"{parent}{self.made}".encode()).hexdigest()
            logs = [
                TransferLog(name, number, f"0x{self.made:062x}{i:02x}", i, TOKEN, THEIRS, to, amount)
                for i, (to, amount) in enumerate(
                    # some blocks have none of ours
                    [(OURS if self.made % 3 else THEIRS, self.made), (THEIRS, 5), (OURS, 0)]
                )
            ]
            self.blocks.append((Block(number, name, parent, number), logs))

    def reorg(self, depth: int, new: int) -> None:
        del self.blocks[max(1, len(self.blocks) - depth) :]
        self.mine(new)

    def _tick(self) -> None:
        self.calls += 1
        if (change := self.before_call.pop(self.calls, None)) is not None:
            self.reorg(*change)

    async def head(self) -> Block:
        self._tick()
        return self.blocks[max(0, len(self.blocks) - 1 - self.head_lag_blocks)][0]

    async def block_by_number(self, number: int) -> Block | None:
        self._tick()
        return self.blocks[number][0] if number < len(self.blocks) else None

    async def logs(self, token: str, addresses: AbstractSet[str] | None, first: int, last: int) -> list[TransferLog]:
        self._tick()
        if last - first + 1 > self.logs_max_blocks:
            raise RpcRefused("fake", "eth_getLogs", -32005, "too many blocks")
        return [
            log for _, logs in self.blocks[first : last + 1] for log in logs if addresses is None or log.to in addresses
        ]

    def to_us(self) -> set[TransferLog]:
        return {log for _, logs in self.blocks for log in logs if log.to == OURS and log.amount > 0}


def chain_of(blocks: int) -> FakeChain:
    chain = FakeChain()
    chain.mine(blocks)
    return chain


async def run(chain: FakeChain, state: ScanState, seen: set[TransferLog], passes: int = 500) -> ScanState:
    """Passes until nothing is new; each starts from the stored state, as after a restart."""
    for _ in range(passes):
        try:
            done = await scan_once(chain, ScanState.of_json(json.loads(json.dumps(state.as_json()))), {OURS}, SETTINGS)
        except ChainMoved:
            continue
        seen.update(done.transfers)
        if done.state == state and done.caught_up:
            return state
        state = done.state
    raise AssertionError("the scan does not come to rest")


mines = st.tuples(st.just("mine"), st.integers(1, 40), st.just(0))
reorgs = st.tuples(st.just("reorg"), st.integers(1, 20), st.integers(0, 25))
during = st.tuples(st.integers(1, 6), st.tuples(st.integers(1, 50), st.integers(1, 50)))
steps = st.tuples(mines | reorgs, st.none() | during, st.integers(1, 30), st.integers(0, 3), st.booleans())


@settings(max_examples=150, deadline=None)
@given(st.lists(steps, max_size=12))
async def test_every_canonical_transfer_is_reported_whatever_the_chain_does(
    script: list[tuple[tuple[str, int, int], tuple[int, tuple[int, int]] | None, int, int, bool]],
) -> None:
    chain, state, seen = chain_of(3), begin(0, SETTINGS), set[TransferLog]()
    for (what, depth_or_count, new), change, logs_max, lag, finish in script:
        if what == "mine":
            chain.mine(depth_or_count)
        else:
            chain.reorg(depth_or_count, new)
        chain.logs_max_blocks, chain.head_lag_blocks = logs_max, lag
        if change is not None:
            chain.before_call[chain.calls + change[0]] = change[1]
        for _ in range(3):
            try:
                done = await scan_once(chain, state, {OURS}, SETTINGS)
            except ChainMoved:
                continue
            state = done.state
            seen.update(done.transfers)
            assert all(transfer.to == OURS and transfer.amount > 0 for transfer in done.transfers)
            assert list(done.transfers) == sorted(done.transfers, key=lambda log: (log.block_number, log.log_index))
        if finish:
            state = await run(chain, state, seen)
    chain.before_call.clear()
    chain.head_lag_blocks = 0
    chain.mine(60)  # longer than whatever a reorg made shorter
    state = await run(chain, state, seen)
    assert chain.to_us() <= seen
    assert state.cursor == Cursor(len(chain.blocks) - 1, chain.blocks[-1][0].hash)
    canonical = [chain.blocks[cursor.number][0].hash for cursor in state.recent]
    assert [cursor.block_hash for cursor in state.recent] == canonical


async def test_a_reorg_while_the_logs_are_read_yields_no_cursor() -> None:
    chain = chain_of(5)
    chain.before_call = {2: (2, 3)}  # head, then logs
    with pytest.raises(ChainMoved) as moved:
        await scan_once(chain, begin(0, SETTINGS), {OURS}, SETTINGS)
    assert moved.value.code == "chain_moved"


async def test_a_reorg_below_the_cursor_while_the_scan_is_far_behind_ends_the_pass() -> None:
    chain = chain_of(6)
    state = (await scan_once(chain, begin(0, SETTINGS), {OURS}, SETTINGS)).state
    chain.mine(40)
    chain.before_call = {chain.calls + 3: (44, 44)}  # head, the cursor's block, then logs
    with pytest.raises(ChainMoved):
        await scan_once(chain, state, {OURS}, SETTINGS)


async def test_a_reorg_is_told_and_its_blocks_are_read_again() -> None:
    chain = chain_of(5)
    first = await scan_once(chain, begin(0, SETTINGS), {OURS}, SETTINGS)
    chain.mine()
    second = await scan_once(chain, first.state, {OURS}, SETTINGS)
    chain.reorg(1, 2)
    third = await scan_once(chain, second.state, {OURS}, SETTINGS)
    assert third.rewound_from == second.state.cursor
    assert {log.block_hash for log in third.transfers} >= {chain.blocks[5][0].hash, chain.blocks[6][0].hash}
    assert third.heads == (chain.blocks[-1][0],)


async def test_an_endpoint_that_is_behind_changes_nothing() -> None:
    chain = chain_of(5)
    state = (await scan_once(chain, begin(0, SETTINGS), {OURS}, SETTINGS)).state
    chain.mine(3)
    state = (await scan_once(chain, state, {OURS}, SETTINGS)).state
    for lag in (2, 5):
        chain.head_lag_blocks = lag
        done = await scan_once(chain, state, {OURS}, SETTINGS)
        assert (done.state, done.transfers, done.heads, done.rewound_from) == (state, (), (), None)


async def test_a_reorg_past_every_stored_block_stops_the_scan() -> None:
    short = ScanSettings(TOKEN, span_max_blocks=2, overlap_blocks=0, recent_max=3)
    chain, state = chain_of(20), begin(0, short)
    for _ in range(10):
        state = (await scan_once(chain, state, {OURS}, short)).state
    assert len(state.recent) == 3
    assert state.pruned
    chain.reorg(15, 20)
    with pytest.raises(ReorgTooDeep) as stopped:
        await scan_once(chain, state, {OURS}, short)
    assert stopped.value.code == "reorg_too_deep"


async def test_on_one_endpoints_word_the_older_half_of_what_is_stored_stays() -> None:
    short = ScanSettings(TOKEN, span_max_blocks=2, overlap_blocks=0, recent_max=4)
    chain, state = chain_of(40), begin(0, short)
    for doubtful in [False] * 3 + [True] * 9:
        state = (await scan_once(chain, state, {OURS}, short, doubtful=doubtful)).state
    assert [cursor.number for cursor in state.recent] == [1, 3, 21, 23]
    for _ in range(2):
        state = (await scan_once(chain, state, {OURS}, short)).state
    assert [cursor.number for cursor in state.recent] == [21, 23, 25, 27]


async def test_a_made_up_chain_is_left_however_long_it_was_followed() -> None:
    short = ScanSettings(TOKEN, span_max_blocks=2, overlap_blocks=0, recent_max=4)
    chain = chain_of(8)
    state, seen = begin(0, short), set[TransferLog]()
    for _ in range(4):
        done = await scan_once(chain, state, {OURS}, short, agreed=True)
        state, seen = done.state, seen | set(done.transfers)
    liar = FakeChain(list(chain.blocks), made=1_000)
    liar.mine(40)
    for _ in range(12):
        state = (await scan_once(liar, state, {OURS}, short, doubtful=True)).state
    chain.mine(6)
    for _ in range(10):
        done = await scan_once(chain, state, {OURS}, short, agreed=True)
        state, seen = done.state, seen | set(done.transfers)
    assert seen == chain.to_us()


async def test_a_refusal_halves_the_range_until_it_is_one_block_then_it_is_an_error() -> None:
    chain, state, spans = chain_of(40), begin(0, SETTINGS), []
    chain.logs_max_blocks = 0
    for _ in range(4):
        done = await scan_once(chain, state, {OURS}, SETTINGS)
        assert (done.transfers, done.caught_up) == ((), False)
        state = done.state
        spans.append(state.span_blocks)
    assert spans == [8, 4, 2, 1]
    with pytest.raises(RpcRefused):
        await scan_once(chain, state, {OURS}, SETTINGS)


async def test_nothing_below_the_start_is_read() -> None:
    chain = chain_of(10)
    done = await scan_once(chain, begin(7, SETTINGS), {OURS}, SETTINGS)
    assert min(log.block_number for log in done.transfers) == 7
    later = await scan_once(chain, begin(10, SETTINGS), {OURS}, SETTINGS)
    assert later.transfers == ()
    assert later.state.cursor is None
    assert later.heads == (chain.blocks[-1][0],)


@given(
    st.none() | st.integers(0, 1000), st.integers(0, 1000), st.integers(1, 50), st.integers(0, 20), st.integers(0, 1000)
)
def test_a_planned_range_is_bounded_gapless_and_makes_progress(
    done: int | None, head: int, span: int, overlap: int, start: int
) -> None:
    cursor = None if done is None or done < start else Cursor(done, "0x")
    wanted = plan(cursor, head, span, overlap, start)
    after = start if cursor is None else cursor.number + 1
    if wanted is None:
        assert head < after
        return
    assert start <= wanted.first <= after <= wanted.last <= head
    assert wanted.blocks <= span
    assert after - wanted.first <= overlap


def test_the_span_grows_slowly_after_reads_that_used_it() -> None:
    state, spans = begin(0, SETTINGS), []
    state = narrow(state, Range(0, 15)) or state
    for _ in range(6):
        cursor = state.cursor
        wanted = plan(cursor, 1_000, state.span_blocks, 2, 0)
        assert wanted is not None
        state = advance(state, wanted, "0x", SETTINGS)
        spans.append(state.span_blocks)
    assert spans == [9, 10, 11, 12, 13, 14]


def test_a_rewind_keeps_what_is_canonical() -> None:
    recent = (Cursor(1, "a"), Cursor(2, "b"), Cursor(3, "c"))
    state = ScanState(0, 8, recent)
    assert rewind(state, recent[1]).recent == recent[:2]
    assert rewind(state, None).recent == ()


@pytest.mark.parametrize("wrong", [{"span_max_blocks": 0}, {"overlap_blocks": -1}, {"recent_max": 0}])
def test_impossible_settings_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        ScanSettings(TOKEN, **wrong)
