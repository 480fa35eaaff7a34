"""What one endpoint's bad days cost: which is asked, how long it is left alone, and how heads are heard of, on a real node."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from chain import head_news, heads, health
from chain.endpoints import Hedged, hedged, ranked
from chain.errors import RpcRateLimited, RpcTimeout, RpcUnavailable, WrongChainId
from chain.fees import FeeHistory, FeePolicy, Fees, fees
from chain.head_news import APART_S, HeadNews
from chain.heads import readable
from chain.health import APART, BEHIND, FORGET_S, OK, OUTVOTED, OUTVOTED_S, RATE_LIMITED, SLOW, SLOW_S, Health
from chain.hot_wallet import Look, _merged
from chain.line import REST_S, REST_S_MAX, _rest_s
from chain.rpc import Rpc
from chain.window import latest
from stablerail.dev.anvil import Anvil
from stablerail.dev.fetch import Tools
from tests.support.in_process import until
from tests.support.rpc_stub import LyingEndpoint

ANSWERS = (OK, SLOW)
"""What is well on a machine of any speed."""
PATIENT_S = 3_600.0
"""Whoever waits for so long is ended by the test's own time-out."""


@pytest.fixture
async def liar(anvil: Anvil) -> AsyncIterator[LyingEndpoint]:
    async with LyingEndpoint(anvil.rpc_url) as endpoint:
        yield endpoint


@pytest.fixture
async def third(liar: LyingEndpoint, anvil: Anvil) -> AsyncIterator[Rpc]:
    async with Rpc(liar.url, anvil.chain_id, PATIENT_S) as rpc:
        yield rpc


@pytest.fixture
async def honest(anvil: Anvil) -> AsyncIterator[Rpc]:
    async with Rpc(anvil.rpc_url, anvil.chain_id) as rpc:
        yield rpc


async def test_nothing_is_sent_to_an_endpoint_while_it_wants_us_to_wait(liar: LyingEndpoint, third: Rpc) -> None:
    now = 0.0
    third.health = Health(lambda: now)
    await third.head()
    liar.whole, liar.headers = (429, b""), {"Retry-After": "30"}
    with pytest.raises(RpcRateLimited):
        await third.head()
    liar.whole = None
    asked = len(liar.calls)
    now = 29.9
    with pytest.raises(RpcRateLimited):
        await third.head()
    assert (len(liar.calls), third.health.state) == (asked, RATE_LIMITED)
    now = 30.0
    await third.head()
    assert third.health.state in ANSWERS


def test_how_long_an_endpoint_wants_us_to_wait_is_bounded() -> None:
    assert [_rest_s(told) for told in (None, "", "0", "7", "86400", "inf", "soon", "-5")] == [
        REST_S, REST_S, REST_S, 7.0, REST_S_MAX, REST_S_MAX, REST_S, REST_S,
    ]  # fmt: skip
    assert _rest_s(formatdate(2**31, usegmt=True)) == REST_S_MAX
    assert _rest_s(formatdate(0, usegmt=True)) == REST_S
    odd = ("Mon, 01 Jan 99999999999999999999 00:00:00 GMT", "Mon, 01 Jan 2027 00:00:00 +99999999999999999999")
    assert [_rest_s(told) for told in odd] == [REST_S, REST_S]


async def test_which_chain_it_serves_is_asked_at_first_and_again_after_a_connection_failed(
    liar: LyingEndpoint, third: Rpc
) -> None:
    await third.head()
    await third.head()
    assert [method for method, _ in liar.calls] == ["eth_chainId", "eth_getBlockByNumber", "eth_getBlockByNumber"]
    liar.whole = (502, b"")
    with pytest.raises(RpcUnavailable):
        await third.head()
    liar.whole = None
    liar.lies["eth_chainId"] = lambda _params, _honest: "0x1"  # behind the name there is another node now
    with pytest.raises(WrongChainId):
        await third.head()
    assert third.health.state == WrongChainId.code
    del liar.lies["eth_chainId"]
    await third.head()
    assert third.health.state in ANSWERS


async def test_a_read_that_hangs_is_asked_of_the_next_which_is_then_asked_first(
    liar: LyingEndpoint, third: Rpc, honest: Rpc
) -> None:
    await third.head()
    liar.hangs = True
    (head,) = await Hedged((third, honest)).ask([latest()])
    assert head == await honest.head()
    assert third.health.state == SLOW
    honest.health.answered(0.1)
    assert ranked((third, honest)) == [honest, third]


async def test_a_read_that_fails_is_asked_of_the_next_at_once_and_fails_when_all_do(
    liar: LyingEndpoint, third: Rpc, honest: Rpc, anvil: Anvil
) -> None:
    liar.whole = (503, b"")
    assert await hedged((third, honest), lambda rpc: rpc.head()) == await honest.head()
    async with Rpc("http://127.0.0.1:1", anvil.chain_id) as nobody:
        with pytest.raises(RpcUnavailable) as failed:
            await hedged((third, nobody), lambda rpc: rpc.head())
        assert failed.value.endpoint == third.endpoint


async def test_a_head_that_stands_still_is_behind_and_one_that_runs_away_is_apart(
    liar: LyingEndpoint, third: Rpc, honest: Rpc, anvil: Anvil, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "GRACE_S", PATIENT_S)  # all three are waited for
    monkeypatch.setattr(health, "SLOW_S", PATIENT_S)  # of two that are right, the one that is not slow is read
    other = Rpc(anvil.rpc_url, anvil.chain_id)
    stale = await anvil.rpc("eth_getBlockByNumber", "latest", False)
    liar.lies["eth_getBlockByNumber"] = lambda _params, _honest: stale
    await anvil.mine(10)
    async with other:
        source = await readable((third, honest, other), third)
        assert (source.rpc, source.head, third.health.state) == (honest, await honest.head(), BEHIND)
        liar.lies["eth_getBlockByNumber"] = lambda _params, honest: {**honest, "number": "0xffffff"}
        assert (await readable((third, honest, other), third)).rpc is honest
        assert third.health.state == APART
        # the same height, another block: two have the one, so that it is the one that is read
        liar.lies["eth_getBlockByNumber"] = lambda _params, honest: {**honest, "hash": "0x" + "f" * 64}
        assert (await readable((third, honest, other), third)).rpc is honest
        liar.lies.clear()
        await readable((third, honest, other))
        assert third.health.state in ANSWERS


def test_how_an_endpoint_does_is_what_was_seen_last_and_what_was_outvoted_stays_so_for_a_while() -> None:
    now = 0.0
    health = Health(lambda: now)
    health.answered(SLOW_S + 1)
    assert health.state == SLOW
    health.failed(RpcTimeout.code)
    assert health.state == RpcTimeout.code
    health.failed("rpc_refused")  # says nothing of the endpoint
    assert health.state == RpcTimeout.code
    health.answered(0.1)
    assert health.state == OK
    health.failed(RpcTimeout.code)
    now += FORGET_S
    assert health.state == OK, "nobody has asked since"
    health.outvoted()
    health.answered(0.1)
    assert health.state == OUTVOTED
    now += OUTVOTED_S
    assert health.state == OK


def test_one_of_three_endpoints_that_lies_of_a_signer_pauses_no_lane_and_makes_none_overspend() -> None:
    market = FeeHistory(30, (2,))
    true = Look(100, 7, 9, 10**18, 5_000_000, market)
    lies: list[dict[str, Any]] = [
        {"nonce": 1_000, "pending_nonce": 1_000}, {"nonce": 0, "pending_nonce": 0}, {"native": 0, "tokens": 0},
        {"native": 10**24, "tokens": 10**18}, {"block_number": 10**9}, {"block_number": 1, "tokens": 0},
        {"history": FeeHistory(10**15, ())}, {"history": FeeHistory(0, ())}, {"history": FeeHistory(30, (10**12,))},
        {"history": FeeHistory(30, (0,))}, {"history": FeeHistory(1, (10**12,))},
    ]  # fmt: skip
    for lie in (replace(true, **lie) for lie in lies):
        for looks in ([lie, true, true], [true, lie, true], [true, true, lie]):
            assert _merged(looks, 3) == true
    behind = Look(99, 6, 7, 10**18 - 5, 4_000_000, market)
    assert _merged([true, behind], 2) == Look(99, 7, 9, 10**18 - 5, 4_000_000, market, disputed=True)
    assert _merged([true, replace(behind, nonce=7, pending_nonce=9)], 3) == Look(
        99, 7, 9, 10**18 - 5, 4_000_000, market
    )
    assert _merged([true], 1) == true
    for configured in (2, 3):
        assert _merged([true], configured) == replace(true, disputed=True)
    assert _merged([], 1) is None


@pytest.mark.parametrize(
    "lie", [FeeHistory(1, (10**12,) * 10), FeeHistory(30, (10**12,)), FeeHistory(10**12, (10**12,))]
)
def test_one_of_two_endpoints_that_lies_of_the_market_makes_no_payment_offer_more(lie: FeeHistory) -> None:
    policy = FeePolicy(priority_floor=1, max_fee_cap=10**13)
    true = Look(100, 7, 9, 10**18, 5_000_000, FeeHistory(30, (9, 2, 4)))
    honest = fees(true.history, policy)
    assert honest is not None
    for looks in ([true, replace(true, history=lie)], [replace(true, history=lie), true]):
        merged = _merged(looks, 2)
        assert merged is not None
        offer = fees(merged.history, policy)
        assert offer is not None
        assert (offer.max_fee <= honest.max_fee, offer.priority_fee <= honest.priority_fee) == (True, True)
    quiet = _merged([true, replace(true, history=FeeHistory(30, ()))], 2)  # its last blocks were empty
    assert quiet is not None
    assert fees(quiet.history, policy) == Fees(61, 1)


async def test_a_head_is_heard_of_at_once_and_again_after_the_node_was_away(tmp_path: Path, tools: Tools) -> None:
    with Anvil(tmp_path, tools) as anvil:
        async with LyingEndpoint(anvil.rpc_url) as offers_none:
            rpcs = [Rpc(url, anvil.chain_id) for url in (offers_none.url, anvil.rpc_url)]
            news = HeadNews(rpcs)
            listening = asyncio.create_task(news.work())

            async def told() -> bool:
                await anvil.mine(1)
                await news.wait(0.05)
                return bool(news.subscribed)

            try:
                await until(told, "the node tells of its heads")
                assert news.subscribed == {anvil.rpc_url}
                await anvil.mine(1)
                await news.wait(PATIENT_S)
                anvil.stop()

                async def lost() -> bool:
                    return not news.subscribed

                await until(lost, "the connection has ended")
                anvil.start()
                await until(told, "the node tells of its heads again")
            finally:
                listening.cancel()
                await asyncio.gather(listening, return_exceptions=True)
                for rpc in rpcs:
                    await rpc.close()


async def test_an_endpoint_that_floods_us_with_heads_has_us_look_no_more_often(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Floods(Rpc):
        async def watch_heads(self, told: Callable[[], None]) -> None:
            while True:
                told()
                await asyncio.sleep(0)

    rpc = Floods("http://127.0.0.1:1", 1)
    news = HeadNews([rpc])
    listening = asyncio.create_task(news.work())
    loop = asyncio.get_running_loop()
    try:
        await news.wait(PATIENT_S)
        begun = loop.time()
        for _ in range(3):
            await news.wait(PATIENT_S)
        assert loop.time() - begun >= 3 * APART_S
        monkeypatch.setattr(head_news, "APART_S", PATIENT_S)
        await news.wait(0.0)  # more is to be read already
    finally:
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
        await rpc.close()
