"""The RPC client against a real node, and against one that lies: a checked value or a typed error, nothing else."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chain import line
from chain.errors import (
    RpcError,
    RpcGarbled,
    RpcRateLimited,
    RpcRefused,
    RpcTimeout,
    RpcTooLarge,
    RpcUnavailable,
    WrongChainId,
)
from chain.rpc import Rpc
from stablerail.dev.anvil import Anvil
from stablerail.dev.processes import free_port
from stablerail.dev.usdc import Usdc
from tests.support.rpc_stub import LyingEndpoint, Refusal

KEY = "0123456789abcdef0123456789abcdef"


def new_address() -> str:
    return "0x" + secrets.token_hex(20)


@pytest.fixture
async def endpoint(anvil: Anvil, usdc: Usdc) -> AsyncIterator[LyingEndpoint]:
    async with LyingEndpoint(anvil.rpc_url) as server:
        yield server


@pytest.fixture
async def rpc(endpoint: LyingEndpoint, anvil: Anvil) -> AsyncIterator[Rpc]:
    async with Rpc(f"{endpoint.url}/v3/{KEY}", anvil.chain_id, timeout_s=100) as client:
        yield client


async def test_a_transfer_is_read_alike_by_log_by_receipt_and_by_balance(rpc: Rpc, usdc: Usdc, anvil: Anvil) -> None:
    to, token = new_address(), usdc.address.lower()
    tx_hash = await usdc.transfer(to, 25_000_000)
    raw = await anvil.wait_mined(tx_hash)
    await rpc.verify_chain_id()
    receipt, head = await rpc.receipt_and_head(tx_hash)
    assert receipt is not None
    assert receipt.succeeded
    [log] = await rpc.logs(token, {to}, receipt.block_number, receipt.block_number)
    assert (log.amount, log.to, log.tx_hash, log.block_hash) == (25_000_000, to, tx_hash, raw["blockHash"])
    assert log in await rpc.logs(token, None, 0, receipt.block_number)
    assert await rpc.balance_of(token, to) == 25_000_000
    assert await rpc.balance_of(token, to, receipt.block_number - 1) == 0
    by_hash = await rpc.block_by_hash(receipt.block_hash)
    by_number = await rpc.block_by_number(receipt.block_number)
    assert by_hash == by_number
    assert by_hash is not None
    assert by_hash.tx_hashes == (tx_hash,)
    assert await rpc.block_both_ways(receipt.block_hash, receipt.block_number) == (by_hash, by_number)
    assert head == await rpc.head()


async def test_what_does_not_exist_is_none(rpc: Rpc) -> None:
    nothing = "0x" + secrets.token_hex(32)
    assert (await rpc.receipt_and_head(nothing))[0] is None
    assert await rpc.block_by_hash(nothing) is None
    assert await rpc.block_by_number(2**40) is None


async def test_logs_of_more_addresses_than_a_filter_takes_are_filtered_here(
    rpc: Rpc, usdc: Usdc, anvil: Anvil, endpoint: LyingEndpoint
) -> None:
    to, token = new_address(), usdc.address.lower()
    number = int((await anvil.wait_mined(await usdc.transfer(to, 7)))["blockNumber"], 16)
    few = {to, *(new_address() for _ in range(999))}
    many = few | {new_address()}
    assert await rpc.logs(token, few, number - 3, number) == await rpc.logs(token, many, number - 3, number)
    filters = [params[0]["topics"] for method, params in endpoint.calls if method == "eth_getLogs"]
    assert [len(topics) for topics in filters] == [3, 1]
    assert await rpc.logs(token, set(), 0, number) == []


async def test_calls_keep_one_connection_and_a_batch_may_be_answered_in_any_order(
    rpc: Rpc, endpoint: LyingEndpoint
) -> None:
    endpoint.shuffles = True
    head = await rpc.head()
    for _ in range(5):
        assert await rpc.block_both_ways(head.hash, head.number) == (head, head)
    assert len(endpoint.connections) == 1


async def test_an_endpoint_of_another_chain_is_found_out(rpc: Rpc, endpoint: LyingEndpoint) -> None:
    endpoint.lies["eth_chainId"] = lambda _params, _honest: "0x1"
    with pytest.raises(WrongChainId) as wrong:
        await rpc.verify_chain_id()
    assert (wrong.value.code, wrong.value.actual) == ("wrong_chain_id", 1)


@pytest.mark.parametrize(
    ("status", "raw", "kind"),
    [
        (429, b"", RpcRateLimited),
        (500, b'{"jsonrpc":"2.0","id":1,"error":{"code":-32000,"message":"x"}}', RpcUnavailable),
        (302, b"", RpcUnavailable),
        (401, b"no", RpcUnavailable),
        (413, b"", RpcTooLarge),
        (400, b'{"jsonrpc":"2.0","id":1,"error":{"code":-32602,"message":"range"}}', RpcRefused),
        (200, b"", RpcGarbled),
        (200, b"<html>", RpcGarbled),
        (200, b"\xff\xfe", RpcGarbled),
        (200, b"[" * 100_000, RpcGarbled),
        (200, b"null", RpcGarbled),
        (200, b"[]", RpcGarbled),
        (200, b"[1]", RpcGarbled),
        (200, b'{"jsonrpc":"2.0","id":1}', RpcGarbled),
        (200, b'{"jsonrpc":"2.0","id":999,"result":"0x1"}', RpcGarbled),
        (200, b'{"jsonrpc":"2.0","id":1,"error":"no"}', RpcGarbled),
        (200, b'{"jsonrpc":"2.0","id":1,"error":{"code":-32005,"message":"limit"}}', RpcRefused),
    ],
)
async def test_every_bad_answer_has_its_type(
    rpc: Rpc, endpoint: LyingEndpoint, status: int, raw: bytes, kind: type[RpcError]
) -> None:
    await rpc.verify_chain_id()
    endpoint.whole = (status, raw)
    for call in (rpc.head, lambda: rpc.block_both_ways("0x" + "0" * 64, 1)):
        with pytest.raises(RpcError) as failed:
            await call()
        assert type(failed.value) is kind


async def test_no_answer_in_time_is_a_timeout_and_no_connection_is_unavailable(
    endpoint: LyingEndpoint, anvil: Anvil
) -> None:
    endpoint.hangs = True
    async with Rpc(endpoint.url, anvil.chain_id, timeout_s=0.1) as client:
        with pytest.raises(RpcTimeout):
            await client.head()
    async with Rpc(f"http://127.0.0.1:{free_port()}/{KEY}", anvil.chain_id) as client:
        with pytest.raises(RpcUnavailable):
            await client.head()
    async with Rpc(f"nonsense:{KEY}", anvil.chain_id) as client:
        with pytest.raises(RpcUnavailable) as failed:
            await client.head()
    assert KEY not in f"{failed.value} {client!r}"


async def test_an_answer_over_the_limit_is_not_read_to_its_end(
    rpc: Rpc, endpoint: LyingEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line, "ANSWER_BYTES_MAX", 1_000)
    endpoint.whole = (200, b" " * 100_000)
    with pytest.raises(RpcTooLarge):
        await rpc.head()


async def test_the_key_in_the_url_is_never_shown(rpc: Rpc, endpoint: LyingEndpoint) -> None:
    def refuse(_params: list[Any], _honest: Any) -> Any:
        raise Refusal(-32000, f"key {KEY} is over its quota")

    endpoint.lies["eth_chainId"] = refuse
    with pytest.raises(RpcRefused) as refused:
        await rpc.verify_chain_id()
    shown = f"{refused.value} {refused.value!r} {rpc!r} {rpc.endpoint}"
    assert KEY not in shown
    assert "127.0.0.1" in shown
    assert (refused.value.method, refused.value.rpc_code) == ("eth_chainId", -32000)
    user_info = Rpc(f"https://user:{KEY}@node.example:8545/x?apikey={KEY}", 1)
    assert user_info.endpoint == "https://node.example:8545"
    assert KEY not in repr(user_info)


@pytest.mark.parametrize("before", [0, 60])
async def test_nor_where_the_answer_is_a_text_that_quotes_it(rpc: Rpc, endpoint: LyingEndpoint, before: int) -> None:
    await rpc.head()
    text = "." * before + f"project {KEY} was not found"
    endpoint.lies["eth_getBlockByNumber"] = lambda _params, _honest: text
    for whole in (None, (200, json.dumps(text).encode())):
        endpoint.whole = whole
        for ask in (rpc.head, rpc.head_of_chain):
            with pytest.raises(RpcGarbled) as garbled:
                await ask()
            assert KEY[:8] not in str(garbled.value)


async def test_an_answer_to_another_question_is_garbled(rpc: Rpc, usdc: Usdc, endpoint: LyingEndpoint) -> None:
    token = usdc.address.lower()
    other_hash = "0x" + "5" * 64
    endpoint.lies["eth_getBlockByNumber"] = lambda _params, honest: {**honest, "number": "0x0"}
    with pytest.raises(RpcGarbled):
        await rpc.block_by_number(1)
    endpoint.lies["eth_getBlockByHash"] = lambda _params, _honest: None
    endpoint.lies["eth_getBlockByNumber"] = lambda _params, _honest: None
    with pytest.raises(RpcGarbled):
        await rpc.head()
    [first, *_] = await rpc.logs(token, None, 0, 1_000)
    lies: list[dict[str, Any]] = [
        {"address": "0x" + "6" * 40},
        {"blockNumber": "0xfffff"},
        {"data": "0x"},
        {"blockHash": None},
    ]
    for change in lies:
        endpoint.lies["eth_getLogs"] = lambda _params, honest, change=change: [{**honest[0], **change}]
        with pytest.raises(RpcGarbled):
            await rpc.logs(token, None, 0, 1_000)
    endpoint.lies["eth_getLogs"] = lambda _params, honest: [honest[0], {**honest[0], "transactionHash": other_hash}]
    with pytest.raises(RpcGarbled):
        await rpc.logs(token, None, 0, 1_000)
    endpoint.lies["eth_getLogs"] = lambda _params, honest: [honest[0], honest[0], {**honest[0], "removed": True}]
    assert await rpc.logs(token, None, 0, 1_000) == [first]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.text(max_size=5) | st.just("0x1"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["hash", "logs", "id"]), inner),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(value=json_values, field=st.sampled_from(["", "hash", "number", "timestamp", "transactions", "logs", "status"]))
async def test_no_result_makes_a_read_raise_anything_but_an_rpc_error(
    anvil: Anvil, usdc: Usdc, value: Any, field: str
) -> None:
    def lie(_params: list[Any], honest: Any) -> Any:
        return {**honest, field: value} if field and isinstance(honest, dict) else value

    async with LyingEndpoint(anvil.rpc_url) as server, Rpc(server.url, anvil.chain_id) as client:
        head = await client.head()
        receipts = ("eth_getTransactionReceipt", "eth_getLogs", "eth_call", "eth_chainId")
        server.lies = dict.fromkeys((*receipts, "eth_getBlockByHash", "eth_getBlockByNumber"), lie)
        token = usdc.address.lower()
        for call in (
            client.verify_chain_id,
            client.head,
            lambda: client.block_both_ways(head.hash, head.number),
            lambda: client.receipt_and_head(head.tx_hashes[0] if head.tx_hashes else head.hash),
            lambda: client.logs(token, None, 0, head.number),
            lambda: client.balance_of(token, token),
        ):
            with suppress(RpcError):
                await call()
