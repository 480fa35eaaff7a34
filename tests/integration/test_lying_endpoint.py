"""One of three endpoints lies to the watcher and to finality: money that was credited on its word alone is never final."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from agents.chains import watch_chain
from agents.chains.watch_chain import WatchChain, Watched, ask_rescan
from agents.deposits import credit_deposits, finalize_deposits
from agents.deposits.credit_deposits import DepositPolicy
from agents.deposits.finalize_deposits import ChainReader
from chain import endpoints, heads, health
from chain.logs import topic_of
from chain.rpc import Rpc
from chain.scan import ScanSettings
from ledger.verify import verify
from stablerail.dev.anvil import Anvil
from stablerail.dev.fetch import Tools
from stablerail.dev.kafka import Kafka
from stablerail.dev.usdc import Usdc, deploy
from tests.support.in_process import Ground, ground, running, until
from tests.support.patience import PATIENCE_S
from tests.support.rpc_stub import LyingEndpoint, Refusal
from topics.catalog import CHAIN_HEADS, DEPOSITS_CREDITED, DEPOSITS_FINALIZED, DEPOSITS_NOTIFIED
from topics.events import Chain

DEPTH = 3
TRUE, FALSE = 5_000_000, 900_000_000


async def read(at: Ground, block: int) -> bool:
    return block in {json.loads(record.value)["number"] for record in await at.told(CHAIN_HEADS)}


@asynccontextmanager
async def watching(
    at: Ground,
    rpcs: tuple[Rpc, ...],
    token: str,
    chain_id: int,
    *,
    stages: bool = True,
    interval_s: float = 0.05,
    recent_max: int = 128,
) -> AsyncIterator[WatchChain]:
    """The watcher and both stages of deposits."""
    async with AsyncExitStack() as stack:
        services = await stack.enter_async_context(at.process())
        policy = DepositPolicy(minimum=1, chains_read=frozenset({"MATIC"}))
        for stage in (
            credit_deposits.stage(policy),
            finalize_deposits.stage({"MATIC": ChainReader(rpcs, token, DEPTH)}, policy, services.connect),
        ):
            if stages:
                await stack.enter_async_context(running(stage, services, at))
        scan = ScanSettings(token, recent_max=recent_max)
        watched = Watched(Chain.MATIC, chain_id, rpcs, scan, interval_s, start_block=0)
        watcher = WatchChain(watched, services, lambda *_: None)
        task = asyncio.gather(watcher.work(), watcher.listen())
        try:
            yield watcher
            assert services.stop.reason is None, services.stop.reason
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_an_endpoint_of_another_chain_is_refused_at_the_start_and_later(
    kafka: Kafka, database: str, topic_prefix: str, anvil: Anvil, usdc: Usdc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_chain, "WAIT_S_MAX", 0.05)
    async with AsyncExitStack() as stack:
        at = await stack.enter_async_context(ground(database, kafka.bootstrap, topic_prefix, [CHAIN_HEADS]))
        liar = await stack.enter_async_context(LyingEndpoint(anvil.rpc_url))
        rpc = await stack.enter_async_context(Rpc(liar.url, anvil.chain_id))

        def serve(chain_id: int) -> None:
            liar.lies["eth_chainId"] = lambda _params, _honest: hex(chain_id)

        serve(1)
        watcher = await stack.enter_async_context(
            watching(at, (rpc,), usdc.address.lower(), anvil.chain_id, stages=False)
        )
        unready = watcher._services.unready

        async def refused() -> bool:
            return unready == {"watch_chain.MATIC": "wrong_chain_id"}

        async def reads() -> bool:
            return not unready and bool(await at.told(CHAIN_HEADS))

        await until(refused, "refused at the start")
        assert await at.told(CHAIN_HEADS) == []
        serve(anvil.chain_id)
        await until(reads, "it is our chain's after all")
        serve(1)
        await until(refused, "refused later")


@pytest.mark.parametrize("lies", ["beside", "instead", "below"])
async def test_money_that_one_of_three_endpoints_made_up_is_taken_back_and_true_money_is_final(
    kafka: Kafka,
    database: str,
    topic_prefix: str,
    tmp_path: Path,
    tools: Tools,
    monkeypatch: pytest.MonkeyPatch,
    lies: str,
) -> None:
    for module, name in ((heads, "GRACE_S"), (endpoints, "GRACE_S"), (health, "SLOW_S")):
        monkeypatch.setattr(module, name, PATIENCE_S)  # all three are heard, and the liar is read first
    topics = [DEPOSITS_NOTIFIED, DEPOSITS_CREDITED, DEPOSITS_FINALIZED, CHAIN_HEADS]
    async with AsyncExitStack() as stack:
        at = await stack.enter_async_context(ground(database, kafka.bootstrap, topic_prefix, topics))
        anvil = stack.enter_context(Anvil(tmp_path / "anvil", tools))
        usdc = await deploy(anvil, tools.contracts)
        liar = await stack.enter_async_context(LyingEndpoint(anvil.rpc_url))
        urls = (liar.url, anvil.rpc_url, anvil.rpc_url)
        rpcs = tuple([await stack.enter_async_context(Rpc(url, anvil.chain_id)) for url in urls])
        honest, deceived = ("0x" + secrets.token_hex(20) for _ in range(2))
        for wallet in (honest, deceived):
            await at.observer.execute("INSERT INTO wallets VALUES ('MATIC', $1, $1, $1, now())", wallet)

        def made_up(log: dict[str, Any]) -> dict[str, Any]:
            """The same log, to another wallet of ours and for more."""
            topics = [*log["topics"][:2], topic_of(deceived)]
            place = int(log["logIndex"], 16) + (lies != "instead")
            return {**log, "topics": topics, "data": f"0x{FALSE:064x}", "logIndex": hex(place)}

        def below(log: dict[str, Any]) -> dict[str, Any]:
            """The same log, in the block's place the one before."""
            return {**log, "blockNumber": hex(int(log["blockNumber"], 16) - 1)}

        def and_more(logs: list[Any]) -> list[Any]:
            true = [log for log in logs if log["topics"][2:] == [topic_of(honest)]]
            told = {"beside": true, "instead": [], "below": [below(log) for log in true]}[lies]
            return [log for log in logs if log not in true] + told + [made_up(log) for log in true]

        liar.lies["eth_getLogs"] = lambda _params, logs: and_more(logs)
        liar.lies["eth_getTransactionReceipt"] = lambda _params, receipt: (
            receipt and {**receipt, "logs": and_more(receipt["logs"])}
        )

        async def statuses() -> dict[str, str]:
            return dict(await at.observer.fetch("SELECT recipient, status FROM deposits"))

        async def reach(**wanted: str) -> None:
            """Mines until the two deposits are there."""

            async def reached() -> bool:
                found = await statuses()
                assert found.get(deceived) != "finalized", "on one endpoint's word"
                if found == {honest: wanted["true"], deceived: wanted["false"]}:
                    return True
                await anvil.mine(1)
                return False

            await until(reached, str(wanted))

        async with watching(at, rpcs, usdc.address.lower(), anvil.chain_id):
            await anvil.wait_mined(await usdc.transfer(honest, TRUE))

            async def both() -> bool:
                return (await statuses()).keys() == {honest, deceived}

            for _ in rpcs:  # one of the next three passes reads the liar
                top = await anvil.mine(1)
                await until(partial(read, at, top), f"block {top} was read")
            await until(both, "both are credited at once")
            await reach(true="finalized", false="reversed")
            balances = dict(
                await at.observer.fetch("SELECT owner, balance::bigint FROM accounts WHERE owner <> 'system'")
            )
            assert balances == {honest: TRUE, deceived: 0}

            top = max(json.loads(record.value)["number"] for record in await at.told(CHAIN_HEADS))
            liar.lies["eth_getBlockByNumber"] = lambda params, block: (
                {**block, "number": hex(int(block["number"], 16) + 10_000)} if params[0] == "latest" else block
            )
            await anvil.mine(2)

            async def next_heads() -> bool:
                heads = {json.loads(record.value)["number"] for record in await at.told(CHAIN_HEADS)}
                assert max(heads) < top + 10_000, "a head that one endpoint made up"
                return max(heads) >= top + 2

            await until(next_heads, "the chain is read on, without the one that lies about its head")
        assert await at.told(DEPOSITS_NOTIFIED.dlq) == []
        results = await verify(at.observer)
        assert [result for result in results if not result.holds] == []


@pytest.mark.parametrize("lie", ["no_block", "another_block", "refuses_logs", "withholds_logs"])
async def test_one_of_three_that_has_the_head_and_cannot_be_read_keeps_no_head_and_no_deposit_waiting(
    kafka: Kafka,
    database: str,
    topic_prefix: str,
    tmp_path: Path,
    tools: Tools,
    monkeypatch: pytest.MonkeyPatch,
    lie: str,
) -> None:
    monkeypatch.setattr(watch_chain, "WAIT_S_MAX", 0.05)
    for module, name in ((heads, "GRACE_S"), (health, "SLOW_S")):
        monkeypatch.setattr(module, name, PATIENCE_S)  # the liar is read first
    async with AsyncExitStack() as stack:
        topics = [CHAIN_HEADS, DEPOSITS_NOTIFIED]
        at = await stack.enter_async_context(ground(database, kafka.bootstrap, topic_prefix, topics))
        anvil = stack.enter_context(Anvil(tmp_path / "anvil", tools))
        usdc = await deploy(anvil, tools.contracts)
        liar = await stack.enter_async_context(LyingEndpoint(anvil.rpc_url))
        urls = (liar.url, anvil.rpc_url, anvil.rpc_url)
        rpcs = tuple([await stack.enter_async_context(Rpc(url, anvil.chain_id)) for url in urls])

        async def seen() -> None:
            top = await anvil.mine(1)
            await until(partial(read, at, top), f"block {top} was read")

        token, wallet = usdc.address.lower(), "0x" + secrets.token_hex(20)
        await at.observer.execute("INSERT INTO wallets VALUES ('MATIC', $1, $1, $1, now())", wallet)
        await stack.enter_async_context(watching(at, rpcs, token, anvil.chain_id, stages=False, recent_max=2))
        for _ in range(4):
            await seen()

        def older(params: list[Any], block: Any) -> Any:
            another = {**block, "hash": "0x" + "ab" * 32} if lie == "another_block" else None
            return block if params[0] == "latest" else another

        def refuse(_params: list[Any], _logs: Any) -> Any:
            raise Refusal(-32601, "not in your plan")

        logs = {"refuses_logs": refuse, "withholds_logs": lambda _params, _logs: []}
        liar.lies = {"eth_getLogs": logs[lie]} if lie in logs else {"eth_getBlockByNumber": older}
        for amount in (1, 2, 3):
            await anvil.wait_mined(await usdc.transfer(wallet, amount))
        for _ in range(3):
            await seen()

        async def all_told() -> bool:
            return len({record.value for record in await at.told(DEPOSITS_NOTIFIED)}) == 3

        await until(all_told, "the deposits")


async def test_one_that_failed_once_is_read_again_before_another_can_keep_a_deposit_to_itself(
    kafka: Kafka, database: str, topic_prefix: str, tmp_path: Path, tools: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third is a block behind, as some always are: it has no head that two have, and is not read."""
    monkeypatch.setattr(watch_chain, "WAIT_S_MAX", 0.05)
    for module, name in ((heads, "GRACE_S"), (health, "SLOW_S")):
        monkeypatch.setattr(module, name, PATIENCE_S)
    async with AsyncExitStack() as stack:
        topics = [CHAIN_HEADS, DEPOSITS_NOTIFIED]
        at = await stack.enter_async_context(ground(database, kafka.bootstrap, topic_prefix, topics))
        anvil = stack.enter_context(Anvil(tmp_path / "anvil", tools))
        usdc = await deploy(anvil, tools.contracts)
        liar, fails, lags = [await stack.enter_async_context(LyingEndpoint(anvil.rpc_url)) for _ in range(3)]
        urls = (liar.url, fails.url, lags.url)
        rpcs = tuple([await stack.enter_async_context(Rpc(url, anvil.chain_id)) for url in urls])

        async def one_less(params: list[Any], block: Any) -> Any:
            before = hex(max(int(block["number"], 16) - 1, 0))
            return await anvil.rpc("eth_getBlockByNumber", before, False) if params[0] == "latest" else block

        def asked() -> int:
            return [method for method, _ in [*liar.calls, *fails.calls]].count("eth_getLogs")

        async def failed(passes: int) -> bool:
            return asked() >= passes

        def garble(_params: list[Any], _logs: Any) -> str:
            del fails.lies["eth_getLogs"]
            return "once"

        async def seen() -> None:
            top = await anvil.mine(1)
            await until(partial(read, at, top), f"block {top} was read")

        lags.lies["eth_getBlockByNumber"] = one_less
        token, wallet = usdc.address.lower(), "0x" + secrets.token_hex(20)
        await at.observer.execute("INSERT INTO wallets VALUES ('MATIC', $1, $1, $1, now())", wallet)
        watcher = await stack.enter_async_context(watching(at, rpcs, token, anvil.chain_id, stages=False))
        await seen()
        for one in (liar, fails, lags):  # for a while nothing can be read
            one.lies["eth_getLogs"] = lambda _params, _logs: "nothing"
        await anvil.mine(1)
        await until(partial(failed, asked() + 8), "many passes have failed")
        for one in (liar, fails, lags):
            del one.lies["eth_getLogs"]
        await seen()
        assert all(turns <= len(rpcs) for _, turns in watcher._rests.values()), "none of them alone"
        fails.lies["eth_getLogs"] = garble
        while fails.lies:
            await seen()
        liar.lies["eth_getLogs"] = lambda _params, _logs: []
        await anvil.wait_mined(await usdc.transfer(wallet, TRUE))
        for _ in rpcs * 2:
            await seen()
        assert await at.told(DEPOSITS_NOTIFIED)


async def test_from_where_a_person_says_a_chain_is_read_again(
    kafka: Kafka, database: str, topic_prefix: str, tmp_path: Path, tools: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an endpoint kept silent about, and a chain that moved further back than what is stored."""
    monkeypatch.setattr(watch_chain, "WAIT_S_MAX", 0.05)
    async with AsyncExitStack() as stack:
        topics = [DEPOSITS_NOTIFIED, CHAIN_HEADS]
        at = await stack.enter_async_context(ground(database, kafka.bootstrap, topic_prefix, topics))
        anvil = stack.enter_context(Anvil(tmp_path / "anvil", tools))
        usdc = await deploy(anvil, tools.contracts)
        liar = await stack.enter_async_context(LyingEndpoint(anvil.rpc_url))
        rpc = await stack.enter_async_context(Rpc(liar.url, anvil.chain_id))
        wallet = "0x" + secrets.token_hex(20)
        await at.observer.execute("INSERT INTO wallets VALUES ('MATIC', $1, $1, $1, now())", wallet)

        async def seen() -> None:
            top = (await rpc.head()).number
            await until(partial(read, at, top), f"block {top} was read")

        async def pay(amount: int) -> None:
            await anvil.wait_mined(await usdc.transfer(wallet, amount))

        async def told(*amounts: str) -> None:
            async def all_told() -> bool:
                return {json.loads(record.value)["amount"] for record in await at.told(DEPOSITS_NOTIFIED)} == {*amounts}

            await until(all_told, f"{amounts} are told")

        async def again(block: int) -> None:
            connection = await at.connect()
            await ask_rescan(connection, Chain.MATIC, block, "a test", "ann", at.clock())
            await connection.close()

        watch = watching(at, (rpc,), usdc.address.lower(), anvil.chain_id, stages=False, recent_max=2)
        watcher = await stack.enter_async_context(watch)
        liar.lies["eth_getLogs"] = lambda _params, _logs: []
        await pay(1)
        paid_in = (await rpc.head()).number
        await seen()
        for _ in range(2):
            await anvil.mine(5)
            await seen()
        del liar.lies["eth_getLogs"]
        await pay(2)
        await told("0.000002")  # and not what is below the overlap
        liar.lies["eth_getBlockByNumber"] = lambda params, block: block if params[0] != hex(paid_in - 1) else None
        await again(paid_in)
        await anvil.mine(1)
        await seen()  # where the endpoint does not keep what is so old, the chain is read on
        del liar.lies["eth_getBlockByNumber"]
        await anvil.mine(1)
        await told("0.000001", "0.000002")

        for _ in range(3):
            await anvil.mine(1)
            await seen()
        await anvil.rpc("anvil_reorg", 8, [])
        await pay(3)
        await anvil.mine(10)

        async def stands() -> bool:
            return watcher._services.unready == {"watch_chain.MATIC": "reorg_too_deep"}

        await until(stands, "nothing that is stored is canonical any more")
        await again(paid_in + 2)
        await told("0.000001", "0.000002", "0.000003")
        assert watcher._services.unready == {}
        assert [row[0] for row in await at.observer.fetch("SELECT chain FROM chain_cursors")] == ["MATIC"]
        stored = json.loads(await at.observer.fetchval("SELECT state FROM chain_cursors"))
        assert stored["start_block"] == 0
        results = await verify(at.observer)
        assert [result for result in results if not result.holds] == []


async def test_of_more_wallets_than_an_endpoint_is_given_only_what_arrives_is_looked_up(
    kafka: Kafka, database: str, topic_prefix: str, anvil: Anvil, usdc: Usdc, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_chain, "FILTER_ADDRESSES_MAX", 2)
    wallets, other = sorted("0x" + secrets.token_hex(20) for _ in range(4)), "0x" + secrets.token_hex(20)
    async with AsyncExitStack() as stack:
        at = await stack.enter_async_context(
            ground(database, kafka.bootstrap, topic_prefix, [CHAIN_HEADS, DEPOSITS_NOTIFIED])
        )
        rpc = await stack.enter_async_context(Rpc(anvil.rpc_url, anvil.chain_id))
        for wallet in wallets:
            await at.observer.execute("INSERT INTO wallets VALUES ('MATIC', $1, $1, $1, now())", wallet)
        for to in (*wallets, other):
            await anvil.wait_mined(await usdc.transfer(to, TRUE))
        token = usdc.address.lower()
        watcher = await stack.enter_async_context(watching(at, (rpc,), token, anvil.chain_id, stages=False))
        assert await watcher._addresses(at.observer) is None

        async def told() -> bool:
            top = max((json.loads(record.value)["number"] for record in await at.told(CHAIN_HEADS)), default=0)
            return top >= (await rpc.head()).number

        await until(told, "everything was read")
        arrived = {json.loads(record.value)["to"] for record in await at.told(DEPOSITS_NOTIFIED)}
        assert sorted(arrived) == wallets


async def test_a_head_that_an_endpoint_tells_of_is_read_at_once_however_long_the_interval(
    kafka: Kafka, database: str, topic_prefix: str, anvil: Anvil, usdc: Usdc
) -> None:
    async with AsyncExitStack() as stack:
        at = await stack.enter_async_context(ground(database, kafka.bootstrap, topic_prefix, [CHAIN_HEADS]))
        rpc = await stack.enter_async_context(Rpc(anvil.rpc_url, anvil.chain_id))
        token = usdc.address.lower()
        watch = watching(at, (rpc,), token, anvil.chain_id, stages=False, interval_s=3_600)
        await stack.enter_async_context(watch)
        before = await anvil.mine(1)

        async def told() -> bool:
            top = await anvil.mine(1)
            heads = [json.loads(record.value)["number"] for record in await at.told(CHAIN_HEADS)]
            return top > before + 1 and max(heads, default=0) > before + 1

        await until(told, "a block that was mined after the first look")
