"""`stablerail tx show` of withdrawals that Circle sends, over the real program, database, node and Circle's sandbox."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from agents.withdrawals import settle_transfers
from connectors.circle.sandbox.config import TEST_API_KEY, TEST_ENTITY_SECRET
from connectors.circle.sandbox.gate import Fault
from connectors.circle.sandbox.state import Plan
from stablerail.dev.anvil import Node
from stablerail.dev.kafka import Kafka
from stablerail.dev.usdc import Usdc
from tests.integration import test_cli
from tests.integration.test_cli import Result
from tests.support.custodian_rig import PATH, POLICY, Rig, custodian_rig, new_address
from tests.support.in_process import until

run, clean = test_cli.run, test_cli.clean

Show = Callable[..., Awaitable[str]]


@pytest.fixture
async def rig(database: str, kafka: Kafka, topic_prefix: str, anvil: Node, usdc: Usdc) -> AsyncIterator[Rig]:
    async with custodian_rig(database, kafka.bootstrap, topic_prefix, anvil, usdc) as it:
        yield it


@pytest.fixture
def show(rig: Rig, run: Callable[..., Result], clean: None, monkeypatch: pytest.MonkeyPatch) -> Show:
    settings = {
        "DATABASE_URL": rig.at.dsn,
        "RPC_URLS": json.dumps({"MATIC": [rig.anvil.rpc_url]}),
        "CHAIN_IDS": json.dumps({"MATIC": rig.anvil.chain_id}),
        "USDC_CONTRACTS": json.dumps({"MATIC": rig.usdc.address}),
        "CIRCLE_API_URL": rig.circle.base_url,
        "CIRCLE_API_KEY": TEST_API_KEY,
        "CIRCLE_ENTITY_SECRET": TEST_ENTITY_SECRET,
    }
    for name, value in settings.items():
        monkeypatch.setenv(f"STABLERAIL_{name}", value)

    async def show(*arguments: str, code: int = 0) -> str:
        result = await asyncio.to_thread(run, "tx", "show", *arguments)
        assert result.exit_code == code, result.output
        assert TEST_API_KEY not in result.output
        return result.output

    return show


async def test_a_person_sees_what_circle_was_asked_told_and_says_now_and_what_comes_next(
    rig: Rig, show: Show, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NOT_FINAL_S", "NOT_FINAL_S_MAX"):  # the next look comes after the last page that shows this one
        monkeypatch.setattr(settle_transfers, name, 3_600.0)
    to = {name: new_address() for name in ("paid", "denied", "silent", "nowhere")}
    rig.circle.sandbox.gate.faults.append(Fault(PATH, "status", status=503, times=1))
    async with rig.worker(replace(POLICY, retry_first_s=3_600, retry_max_s=3_600)):
        silent = await rig.ask("silent", to=to["silent"])
        await until(lambda: _calls(rig, "attempts > 0"), "the call met a 503")
        paid = await rig.ask("paid", to=to["paid"])
        denied = await rig.ask("denied", Plan("QUEUED", "DENIED", "COMPLIANCE"), to=to["denied"])
        await rig.became({"paid": ("completed", None), "denied": ("failed", "custodian_denied")})
        nowhere = await rig.ask("nowhere", Plan("SENT", "FAILED", "OUT_OF_GAS", broadcast=False), to=to["nowhere"])
        await until(lambda: _waits(rig), "it is looked for again")

        said = await show(silent)
        call = await rig.at.observer.fetchrow("SELECT id::text, idempotency_key::text FROM calls WHERE state = 'open'")
        assert call is not None
        for part in (
            f"withdrawal {silent}: broadcasting, 25.000000 USDC of silent to {to['silent']} on MATIC",
            f"call {call[0].replace('-', '')} open, partner_unavailable, 1 without an answer",
            f"idempotency key {call[1]}",
            "transfer at circle no id told yet: ASKED",
            f"from wallet {rig.wallets['MATIC'].id}, {rig.wallets['MATIC'].address}",
            "next: rule asks_custodian, attempt 2, due_at ",
        ):
            assert part in said, (part, said)

        (transfer,) = rig.at_circle()[nowhere]
        said = await show(transfer.id)
        for part in (
            f"withdrawal {nowhere}: broadcasting",
            f"transfer at circle {transfer.id}: SENT",
            ": FAILED, not_final, attempt 2",
            f"circle says now: state FAILED, txHash {transfer.tx_hash}, errorReason OUT_OF_GAS",
            f"  {transfer.tx_hash} unknown\n",
            "next: rule looks_again, why not_final, attempt 2, due_at ",
        ):
            assert part in said, (part, said)
        away = Fault("/v1/w3s/transactions/*", "status", status=500, times=10**6)  # the worker's poller asks as well
        rig.circle.sandbox.gate.faults.append(away)
        assert "circle says now: error partner_unavailable" in await show(nowhere)
        away.times = 0

    (transfer,) = rig.at_circle()[paid]
    assert transfer.tx_hash is not None
    page = json.loads(await show(transfer.tx_hash, "--format", "json"))
    assert (page["withdrawal"]["id"], page["transfer"]["transfer_id"]) == (paid, transfer.id)
    assert (page["call"]["state"], page["call"]["request"]["to"]) == ("concluded", to["paid"])
    steps = [step["state"] for step in page["transfer_history"]]
    assert (steps[0], steps[-1]) == ("ASKED", "COMPLETE")
    times = [step["at"] for step in page["transfer_history"]]
    assert times == sorted(times)
    (endpoint,) = page["endpoints"]
    assert [(one["tx_hash"], one["where"]) for one in endpoint["attempts"]] == [(transfer.tx_hash, "mined")]
    assert page["next"] == {"rule": "nothing", "why": "ended"}

    (transfer,) = rig.at_circle()[denied]
    page = json.loads(await show(transfer.id.upper(), "--format", "json"))
    assert page["withdrawal"]["id"] == denied
    last: dict[str, Any] = page["transfer_history"][-1]
    assert (last["state"], last["reason"]) == ("DENIED", "COMPLIANCE")
    assert "unknown_withdrawal" in await show("0x" + "1" * 64, code=1)


async def _calls(rig: Rig, condition: str) -> bool:
    return bool(await rig.at.observer.fetchval(f"SELECT count(*) FROM calls WHERE {condition}"))


async def _waits(rig: Rig) -> bool:
    return bool(await rig.at.observer.fetchval("SELECT count(*) FROM schedule WHERE code = 'not_final'"))
