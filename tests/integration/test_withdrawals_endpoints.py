"""Withdrawals over three endpoints of which one has a bad day, on real Kafka, PostgreSQL and a chain: each is paid once, and none
waits for that endpoint. Then all have: nothing fails, and all is paid when they are back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, Final

import pytest
from eth_utils.crypto import keccak

from chain.health import OUTVOTED, Health
from stablerail.dev.fetch import Tools
from stablerail.dev.kafka import Kafka
from tests.integration.test_withdrawals_path import Payer, paying
from tests.support.rpc_stub import LyingEndpoint
from tests.support.withdrawals import assert_whole, settled


@pytest.fixture
async def path(database: str, kafka: Kafka, topic_prefix: str, tmp_path: Path, tools: Tools) -> AsyncIterator[Payer]:
    async with paying(database, kafka, topic_prefix, tmp_path, tools, endpoints=3) as payer:
        yield payer


def says_reverted(endpoint: LyingEndpoint) -> None:
    """A false receipt: the money would be given back to the customer, and paid."""
    endpoint.lies["eth_getTransactionReceipt"] = lambda _params, honest: honest and {**honest, "status": "0x0"}
    endpoint.lies["eth_getBlockReceipts"] = lambda _params, honest: (
        honest and [{**one, "status": "0x0"} for one in honest]
    )


def says_paid(endpoint: LyingEndpoint) -> None:
    """A false receipt: of a block that there is not, whatever it is asked for."""
    nowhere = {"blockHash": "0x" + "e" * 64, "blockNumber": "0x1", "status": "0x1", "logs": []}
    endpoint.lies["eth_getTransactionReceipt"] = lambda params, _honest: {**nowhere, "transactionHash": params[0]}
    endpoint.lies["eth_getBlockReceipts"] = lambda _params, _honest: []


def knows_of_nothing(endpoint: LyingEndpoint) -> None:
    """A false absence: no receipt, and blocks without transactions."""
    endpoint.lies["eth_getTransactionReceipt"] = lambda _params, _honest: None
    endpoint.lies["eth_getTransactionByHash"] = lambda _params, _honest: None
    endpoint.lies["eth_getBlockReceipts"] = lambda _params, _honest: []
    endpoint.lies["eth_getBlockByNumber"] = lambda _params, honest: honest and {**honest, "transactions": []}


def counts(nonce: int) -> Callable[[LyingEndpoint], None]:
    def lie(endpoint: LyingEndpoint) -> None:
        endpoint.lies["eth_getTransactionCount"] = lambda _params, _honest: hex(nonce)

    return lie


def has_no_money(endpoint: LyingEndpoint) -> None:
    endpoint.lies["eth_getBalance"] = lambda _params, _honest: "0x0"
    endpoint.lies["eth_call"] = lambda _params, _honest: "0x" + "0" * 64


def runs_ahead(endpoint: LyingEndpoint) -> None:
    """A false head: everything would be final at once."""
    endpoint.lies["eth_getBlockByNumber"] = lambda params, honest: (
        {**honest, "number": hex(int(honest["number"], 16) + 1_000)} if params[0] == "latest" else honest
    )


def stands_still(endpoint: LyingEndpoint) -> None:
    first: list[Any] = []

    def lie(params: list[Any], honest: Any) -> Any:
        if params[0] != "latest":
            return honest
        first.append(honest)
        return first[0]

    endpoint.lies["eth_getBlockByNumber"] = lie
    endpoint.lies["eth_getTransactionReceipt"] = lambda _params, _honest: None


def hangs(endpoint: LyingEndpoint) -> None:
    endpoint.hangs = True


def limits(endpoint: LyingEndpoint) -> None:
    endpoint.whole, endpoint.headers = (429, b""), {"Retry-After": "60"}


def serves_another_chain(endpoint: LyingEndpoint) -> None:
    endpoint.lies["eth_chainId"] = lambda _params, _honest: "0x1"


def is_down(endpoint: LyingEndpoint) -> None:
    endpoint.whole = (502, b"")


def talks_nonsense(endpoint: LyingEndpoint) -> None:
    endpoint.whole = (200, b"<html>")


def keeps_what_is_sent(endpoint: LyingEndpoint) -> None:
    """It takes every transaction and passes it to nobody."""
    endpoint.swallows = {"eth_sendRawTransaction"}
    endpoint.lies["eth_sendRawTransaction"] = lambda params, _honest: "0x" + keccak(hexstr=params[0]).hex()
    endpoint.lies["eth_getTransactionByHash"] = lambda params, honest: honest or {"hash": params[0]}


BAD_DAYS: Final = (
    says_reverted, says_paid, knows_of_nothing, counts(1_000_000), counts(0), has_no_money, runs_ahead, stands_still, hangs, limits,
    serves_another_chain, is_down, talks_nonsense, keeps_what_is_sent,
)  # fmt: skip


def honest_again(path: Payer) -> None:
    for endpoint, rpc in zip(path.endpoints, path.rpcs, strict=True):
        endpoint.lies.clear()
        endpoint.whole, endpoint.headers, endpoint.swallows = None, {}, set()
        endpoint.release()
        rpc.health = Health()


@pytest.mark.timeout(300)
async def test_a_bad_day_of_one_endpoint_holds_no_payment_up_and_of_all_fails_none(path: Payer) -> None:
    paid: dict[str, int] = {}
    async with path.worker():
        for number, bad in enumerate(BAD_DAYS):
            bad(path.endpoints[0])  # the one that is asked first
            _, to = await path.ask(f"user-{number}")
            await path.until_ended(number + 1)
            paid[to] = 1
            assert await path.paid() == paid, bad
            assert OUTVOTED not in {rpc.health.state for rpc in path.rpcs[1:]}, bad
            honest_again(path)
        _, to = await path.ask("under way")
        paid[to] = 1
        await path.until_rows("SELECT count(*) FROM attempts WHERE status = 'broadcast'", [(1,)])
        for bad, endpoint in zip((is_down, limits, hangs), path.endpoints, strict=True):
            bad(endpoint)
        for number in range(3):
            _, to = await path.ask(f"late-{number}")
            paid[to] = 1
        waiting = "SELECT count(*) FROM withdrawals WHERE settled_at IS NULL AND code IS NULL"
        await path.until_rows(waiting, [(4,)])
        await path.head(10)
        assert await path.rows(waiting) == [(4,)]
        honest_again(path)
        await path.until_ended(len(paid))
        assert await path.paid() == paid
        ends = await settled(path.at, len(paid))
    await assert_whole(path.at)
    assert {(end.outcome, end.code) for end in ends.values()} == {("completed", None)}
    assert await path.rows("SELECT count(*), max(nonce), max(n) FROM attempts") == [(len(paid), len(paid) - 1, 1)]
