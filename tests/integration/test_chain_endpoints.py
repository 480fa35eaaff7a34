"""Three endpoints of one chain, one of which is down, slow, behind, on another chain, or lies: two must agree."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from chain import endpoints, heads
from chain.endpoints import GRACE_S
from chain.errors import RpcUnavailable, WrongChainId
from chain.evidence import Canonical, Doubt, Finding, Missing, Undecided, find_transfer
from chain.heads import readable
from chain.logs import TransferLog
from chain.rpc import Rpc
from chain.scan import ScanSettings, begin
from chain.scanner import scan_once
from stablerail.dev.anvil import Anvil
from stablerail.dev.fetch import Tools
from stablerail.dev.usdc import Usdc, deploy
from tests.support.rpc_stub import LyingEndpoint

DEPTH = 4
FIVE = 5_000_000
PATIENT_S = 3_600.0
"""Whoever waits for an endpoint that hangs is ended by the test's own time-out."""


@dataclass
class Three:
    """A chain, two honest endpoints of it and one that can be made to lie."""

    anvil: Anvil
    usdc: Usdc
    one: Rpc
    other: Rpc
    third: Rpc
    endpoint: LyingEndpoint

    @property
    def all(self) -> tuple[Rpc, ...]:
        """The liar first: whoever answers first has no advantage."""
        return self.third, self.one, self.other

    async def paid(self, amount: int = FIVE) -> TransferLog:
        to = "0x" + secrets.token_hex(20)
        number = int((await self.anvil.wait_mined(await self.usdc.transfer(to, amount)))["blockNumber"], 16)
        [log] = await self.one.logs(self.usdc.address.lower(), {to}, number, number)
        return log

    async def find(self, log: TransferLog, *rpcs: Rpc, amount: int | None = None, head: int = 0) -> Finding:
        return await find_transfer(
            rpcs or self.all, log.tx_hash, log.block_hash, log.token, log.to, amount or log.amount,
            head or (await self.one.head()).number, DEPTH,
        )  # fmt: skip

    def claim_head(self, above: int) -> None:
        """The third endpoint's newest block is so many above (below) the chain's own."""

        async def lie(params: list[Any], honest: Any) -> Any:
            if params[0] != "latest":
                return honest or {**await self.anvil.rpc("eth_getBlockByNumber", "latest", False), "number": params[0]}
            number = int(honest["number"], 16) + above
            known = await self.anvil.rpc("eth_getBlockByNumber", hex(number), False) if above < 0 else None
            return known or {**honest, "number": hex(number)}

        self.endpoint.lies["eth_getBlockByNumber"] = lie


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is well is not left out as slow because the machine is busy for half a second."""
    for module in (heads, endpoints):
        monkeypatch.setattr(module, "GRACE_S", PATIENT_S)


@pytest.fixture
async def three(tmp_path: Path, tools: Tools) -> AsyncIterator[Three]:
    with Anvil(tmp_path, tools) as anvil:
        usdc = await deploy(anvil, tools.contracts)
        async with (
            LyingEndpoint(anvil.rpc_url) as endpoint,
            Rpc(anvil.rpc_url, anvil.chain_id) as one,
            Rpc(anvil.rpc_url, anvil.chain_id) as other,
            Rpc(endpoint.url, anvil.chain_id, PATIENT_S) as third,
        ):
            yield Three(anvil, usdc, one, other, third, endpoint)


def assert_place(found: Finding, log: TransferLog) -> None:
    assert found == Canonical(log.block_hash, log.block_number, (log.log_index,))


async def test_a_log_that_one_of_three_made_up_is_never_final_and_two_take_it_back(three: Three) -> None:
    log = await three.paid()
    await three.anvil.mine(DEPTH)
    made_up = FIVE * 100

    def more(_params: list[Any], honest: Any) -> Any:
        return {**honest, "logs": [{**raw, "data": f"0x{made_up:064x}"} for raw in honest["logs"]]}

    three.endpoint.lies["eth_getTransactionReceipt"] = more
    assert await three.find(log, three.third, three.one, amount=made_up) == Undecided(Doubt.DISAGREEMENT)
    assert await three.find(log, amount=made_up) == Missing()
    assert_place(await three.find(log), log)  # what the two say stands, whatever the third makes of it
    # the exception that the settings state: a chain with one endpoint
    assert isinstance(await three.find(log, three.third, amount=made_up), Canonical)


async def test_a_transfer_that_one_of_three_denies_is_final_and_stays(three: Three) -> None:
    log = await three.paid()
    await three.anvil.mine(DEPTH)
    three.endpoint.lies["eth_getTransactionReceipt"] = lambda _params, _honest: None
    three.endpoint.lies["eth_getBlockByHash"] = lambda _params, _honest: None
    assert_place(await three.find(log), log)
    assert await three.find(log, three.third, three.one) == Undecided(Doubt.DISAGREEMENT)


async def test_a_head_that_one_of_three_made_up_makes_nothing_final(three: Three) -> None:
    log = await three.paid()
    three.claim_head(1_000)
    top = (await three.third.head()).number
    found = await three.find(log, head=top)
    assert isinstance(found, Undecided)
    assert found.reason is Doubt.BEHIND
    assert await three.find(log) == Undecided(Doubt.NOT_FINAL)


async def test_a_chain_is_read_as_far_as_two_endpoints_have_it(three: Three) -> None:
    three.claim_head(1_000)
    source = await readable(three.all, three.third)
    assert source.rpc is not three.third
    assert (source.head, source.agreed, source.left_out) == (await three.one.head(), True, ())
    three.claim_head(-2)
    assert (await readable(three.all)).head == await three.one.head()
    assert (await readable((three.third, three.one))).head.number == (await three.one.head()).number - 2


async def test_a_scan_that_followed_a_false_head_comes_back_and_misses_nothing(three: Three) -> None:
    settings = ScanSettings(three.usdc.address.lower(), span_max_blocks=400, overlap_blocks=2)
    first = await three.paid()
    honest = await scan_once(three.one, begin(0, settings), {first.to}, settings)
    assert honest.transfers == (first,)
    three.claim_head(1_000)
    alone = await readable((three.third,))
    assert not alone.agreed
    led_on = await scan_once(three.third, honest.state, {first.to}, settings, alone.head)
    assert led_on.state.cursor is not None
    second = await three.paid()
    source = await readable(three.all)
    assert led_on.state.cursor.number > source.head.number
    watched = {first.to, second.to}
    stuck = await scan_once(source.rpc, led_on.state, watched, settings, source.head)
    assert stuck.transfers == ()  # one endpoint alone might just be behind
    back = await scan_once(source.rpc, led_on.state, watched, settings, source.head, agreed=True)
    assert second in back.transfers
    assert back.rewound_from == led_on.state.cursor


async def test_two_that_agree_do_not_wait_for_one_that_hangs(three: Three, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (heads, endpoints):
        monkeypatch.setattr(module, "GRACE_S", GRACE_S)
    log = await three.paid()
    await three.anvil.mine(DEPTH)
    three.endpoint.hangs = True
    assert_place(await three.find(log), log)
    source = await readable(three.all)
    assert (source.agreed, source.left_out) == (True, ((three.third.endpoint, "slow"),))


async def test_two_that_agree_do_without_one_that_is_down(three: Three) -> None:
    log = await three.paid()
    await three.anvil.mine(DEPTH)
    three.endpoint.whole = (503, b"")
    assert_place(await three.find(log), log)
    assert (await readable(three.all)).left_out == ((three.third.endpoint, RpcUnavailable.code),)
    found = await three.find(log, three.third, three.one)
    assert isinstance(found, Undecided)
    assert found.reason is Doubt.FAILED
    source = await readable((three.third, three.one))
    assert (source.rpc, source.agreed) == (three.one, False)
    with pytest.raises(RpcUnavailable):
        await readable((three.third,))


async def test_one_that_answers_from_an_old_block_has_no_say(three: Three) -> None:
    log = await three.paid()
    await three.anvil.mine(DEPTH)
    three.claim_head(-2)
    assert_place(await three.find(log), log)
    found = await three.find(log, three.third, three.one)
    assert isinstance(found, Undecided)
    assert found.reason is Doubt.BEHIND


async def test_one_of_another_chain_is_refused_whenever_it_turns_out_to_be_one(three: Three) -> None:
    log = await three.paid()
    await three.anvil.mine(DEPTH)
    assert (await readable(three.all)).left_out == ()
    three.endpoint.lies["eth_chainId"] = lambda _params, _honest: hex(1)
    three.endpoint.lies["eth_getTransactionReceipt"] = lambda _params, _honest: None
    assert (await readable(three.all)).left_out == ((three.third.endpoint, WrongChainId.code),)
    found = await three.find(log, three.third)
    assert isinstance(found, Undecided)
    assert found.reason is Doubt.FAILED
    assert_place(await three.find(log), log)
    with pytest.raises(WrongChainId):
        await readable((three.third,))
