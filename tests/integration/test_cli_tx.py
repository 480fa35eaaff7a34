"""`stablerail tx`: the page of evidence, and what people wish, over the real program, database and node."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from agents.withdrawals.raising import ATTEMPTS_MAX
from agents.withdrawals.top_ups import TopUpPolicy
from chain.signer import KeySigner
from ledger.rows import Connection
from stablerail.dev.anvil import Anvil
from stablerail.dev.kafka import Kafka
from stablerail.dev.usdc import Usdc
from stablerail.topics_admin import admin, create_missing
from tests.integration import test_cli
from tests.integration.test_cli import Result
from tests.integration.test_runbook import day, follow
from tests.support import ledger_rig
from tests.support import sending as sending_rig
from tests.support.in_process import SCHEMA
from tests.support.ledger_rig import assert_holds, connect_to
from tests.support.patience import PATIENCE_S
from tests.support.rebuild import differences, empty_database, rebuild
from tests.support.rpc_stub import LyingEndpoint
from tests.support.sending import COIN, DEPTH, sending, use_nonce
from tests.support.storm import BLOCKS, RULE, Storm
from topics.catalog import JOURNAL

databases, dsn, connection = ledger_rig.databases, ledger_rig.dsn, ledger_rig.connection
chain, token = sending_rig.chain, sending_rig.token
run, clean = test_cli.run, test_cli.clean

SECRET = "k3y-of-a-provider"
NOBODY = f"http://127.0.0.1:9/v2/{SECRET}"

Tx = Callable[..., Awaitable[Result]]


@pytest.fixture
async def storm(connection: Connection, dsn: str, chain: Anvil, token: Usdc) -> AsyncIterator[Storm]:
    async with sending(connection, connect_to(dsn), chain, token) as desk:
        desk.rule = RULE
        made = Storm(desk, desk.process())
        await made.mine()
        yield made


@pytest.fixture
async def tx(
    storm: Storm,
    dsn: str,
    kafka: Kafka,
    topic_prefix: str,
    run: Callable[..., Result],
    clean: None,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Tx]:
    """`stablerail tx …` as ann, on the storm's database and chain, and an endpoint that is away."""
    async with admin(kafka.bootstrap) as client:
        await create_missing(client, topic_prefix, 1, [JOURNAL])
    settings = {
        "DATABASE_URL": dsn,
        "KAFKA_BOOTSTRAP": kafka.bootstrap,
        "TOPIC_PREFIX": topic_prefix,
        "USDC_CONTRACTS": json.dumps({"MATIC": storm.desk.usdc.address}),
        "WITHDRAWAL_SPEED_UP_BLOCKS": str(BLOCKS),
        "WITHDRAWAL_SPEED_UPS_MAX": str(RULE.attempts_max - 1),
        "RPC_TIMEOUT_S": f"{PATIENCE_S:g}",  # the endpoint is served by this process
        "ACTOR": "ann",
    }

    async def invoke(*arguments: str) -> Result:
        result = await asyncio.to_thread(run, "tx", *arguments)
        assert SECRET not in result.output
        return result

    async with LyingEndpoint(storm.desk.anvil.rpc_url) as provider:
        settings["RPC_URLS"] = json.dumps({"MATIC": [f"{provider.url}/v2/{SECRET}", NOBODY]})
        for name, value in settings.items():
            monkeypatch.setenv(f"STABLERAIL_{name}", value)
        yield invoke


async def test_a_person_sees_why_a_payment_is_stuck_speeds_it_up_and_cancels_it(storm: Storm, tx: Tx) -> None:
    (asked,) = await storm.sent(1)
    await storm.lose()
    await storm.heads(2)
    shown = await tx("show", asked.id)
    assert shown.exit_code == 0, shown.output
    for said in (
        f"withdrawal {asked.id}: confirming, 1.000000 USDC of {asked.user_id} to {asked.recipient} on MATIC",
        "hold open, 1.000000 of 1.000000 held",
        f"lane MATIC:{storm.desk.signer.address} open, next nonce 1",
        "http://127.0.0.1:9: rpc_unavailable",
        "nonce 0 mined, 0 with its pool",
        " unknown\n",
        f"next: rule waits, blocks_left {BLOCKS - 1}, kind payment, max_fee ",
    ):
        assert said in shown.output, said
    faster = await tx("speed-up", asked.id, "--reason", "the customer calls")
    assert (faster.exit_code, "signs it at the next head" in faster.output) == (0, True), faster.output
    told = await storm.heads(1)
    assert len(told) == 1
    page = json.loads((await tx("show", told[0].id, "--format", "json")).output)
    assert page["wish"]["state"] == "done"
    assert page["wish"]["n"] == 2
    assert [one["where"] for one in page["endpoints"][0]["attempts"]] == ["unknown", "in the pool"]
    assert [(one["n"], one["status"]) for one in page["attempts"]] == [(1, "broadcast"), (2, "broadcast")]
    assert (page["next"]["rule"], page["next"]["blocks_left"]) == ("waits", BLOCKS)
    cancelled = await tx("cancel", asked.id, "--reason", "the customer changed their mind")
    assert cancelled.exit_code == 0, cancelled.output
    await storm.lose()
    await storm.heads(1)
    await storm.heads(DEPTH + 1)
    assert await storm.status(asked) == ("cancelled", None)
    page = json.loads((await tx("show", asked.id, "--format", "json")).output)
    assert [one["status"] for one in page["attempts"]] == ["replaced", "replaced", "confirmed"]
    assert page["next"] == {"rule": "nothing", "why": "ended"}
    assert [line["status"] for line in page["history"]][-1] == "cancelled"
    logs = await storm.desk.connection.fetch("SELECT action, actor FROM audit_logs ORDER BY at, action")
    assert {tuple(row) for row in logs} == {
        ("withdrawal.speed_up_asked", "ann"),
        ("withdrawal.sped_up", "ann"),
        ("withdrawal.cancel_asked", "ann"),
        ("withdrawal.cancel_signed", "ann"),
    }


async def test_the_runbooks_day_of_a_withdrawal_that_does_not_end(
    storm: Storm, tx: Tx, monkeypatch: pytest.MonkeyPatch
) -> None:
    (asked,) = await storm.sent(1)
    await storm.lose()
    await storm.heads(1)
    await follow(day("A withdrawal does not end"), {"ID": asked.id}, monkeypatch)
    await storm.heads(1)
    await storm.heads(DEPTH + 1)
    assert await storm.status(asked) == ("cancelled", None)


async def test_wrong_commands_say_what_is_wrong_and_the_journal_has_what_the_right_ones_stored(
    storm: Storm, tx: Tx, dsn: str, kafka: Kafka, topic_prefix: str
) -> None:
    (waiting,) = await storm.desk.ask(1)
    why = ("--reason", "why")

    async def refused(code: int, said: str, *arguments: str) -> None:
        result = await tx(*arguments)
        assert result.exit_code == code, result.output
        assert said in result.output, result.output

    await refused(2, "--reason", "speed-up", waiting.id)
    await refused(2, "an id is a UUID", "speed-up", "payout-7", *why)
    await refused(2, "bad_reason", "cancel", waiting.id, "--reason", "two\nlines")
    await refused(1, "unknown_withdrawal", "cancel", "0" * 32, *why)
    await refused(1, "unknown_withdrawal", "show", "0" * 32)
    await refused(1, "unknown_withdrawal", "show", "0x" + "1" * 64)
    await refused(1, "unknown_withdrawal", "show", "payout-7")
    await refused(1, "not_signed: nothing of it is signed; POST /v1/withdrawals/ID/cancel", "cancel", waiting.id, *why)
    shown = await tx("show", waiting.id)
    assert (shown.exit_code, ": signing, 1.000000 USDC" in shown.output) == (0, True), shown.output
    await storm.desk.sent(storm.process, await storm.desk.signed(storm.process, waiting))
    for _ in range(RULE.attempts_max - 1):
        await storm.lose()
        assert (await tx("speed-up", waiting.id, *why)).exit_code == 0
        await storm.heads(1)
    await refused(1, f"attempts_max: as many attempts as the rule allows; --force goes to {ATTEMPTS_MAX}",
                  "speed-up", waiting.id, *why)  # fmt: skip
    assert (await tx("cancel", waiting.id, "--force", *why)).exit_code == 0
    assert await storm.desk.connection.fetchval("SELECT count(*) FROM attempt_wishes") == 1
    async with empty_database(dsn) as empty:
        await rebuild(kafka.bootstrap, topic_prefix, empty, SCHEMA)
        assert await differences(dsn, empty) == {}


async def test_a_person_ends_what_a_stranger_with_our_key_made_impossible_and_sees_every_top_up(
    storm: Storm, tx: Tx, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    desk, million = storm.desk, 10**6
    desk.gas, desk.top_ups = KeySigner(secrets.token_bytes(32)), TopUpPolicy(million, 5 * million, 50 * million, 0)
    await desk.fund(coins=100 * COIN, signer=desk.gas)
    process = desk.process()
    (asked,) = await desk.ask(1)
    await desk.signed(process, asked)
    await desk.fund(coins=COIN // 2)
    assert process.topping is not None
    for signer in (desk.signer, desk.gas):
        await storm.mine()
        await desk.run(process, process.topping, await desk.newest())  # neither is sent
        await use_nonce(desk, signer, 0)
    for _ in range(DEPTH + 2):
        await storm.mine()
        await desk.head(process)

    async def lanes(*arguments: str) -> Result:
        return await asyncio.to_thread(run, "lanes", *arguments)

    lane, account, why = f"MATIC:{desk.signer.address}", f"MATIC:{desk.gas.address}", ("--reason", "an old key")
    alone = await lanes("release", lane, "0", *why)
    assert (alone.exit_code, "nonce_not_taken" in alone.output) == (1, True), "one endpoint answers"
    async with LyingEndpoint(desk.anvil.rpc_url) as other:
        depth = json.dumps({"MATIC": DEPTH})
        monkeypatch.setenv("STABLERAIL_RPC_URLS", json.dumps({"MATIC": [desk.anvil.rpc_url, other.url]}))
        monkeypatch.setenv("STABLERAIL_FINALITY_DEPTHS_BLOCKS", depth)
        unknown = await lanes("release", lane, "7", *why)
        assert (unknown.exit_code, "unknown_nonce" in unknown.output) == (1, True)
        paid = await lanes("release", lane, "0", *why)
        assert paid.output == f"withdrawal {asked.id} has failed, its hold is given back\n", paid.output
        given = await lanes("release", account, "0", *why)
        assert given.output == f"top_up {account}:0 has failed, nothing of it was booked\n", given.output
        again = await lanes("release", account, "0", *why)
        assert (again.exit_code, "its attempts are replaced; nothing was changed" in again.output) == (1, True)
        other.lies["eth_getTransactionCount"] = lambda _params, _honest: "0x63"
        await desk.connection.execute("UPDATE lanes SET chain_nonce = 99")
        opened = await lanes("resume", lane)
        assert opened.output == f"{lane} is open\n", opened.output
        assert (
            await desk.connection.fetchval("SELECT next_nonce FROM lanes WHERE signer = $1", desk.signer.address)
        ) == 1
    assert await storm.status(asked) == ("failed", "nonce_taken")
    listed = (await lanes("top-ups")).output
    for said in (account, desk.signer.address, "4.500000", "failed", "nonce_taken"):
        assert said in listed, (said, listed)
    row = json.loads((await lanes("top-ups", "--state", "failed", "--format", "json")).output)
    assert (row["nonce"], row["amount"], row["attempts"]) == (0, "4.500000", 1)
    assert (await lanes("top-ups", "--chain", "ETH", "--format", "json")).output == ""
    assert (await tx("show", asked.id)).exit_code == 0
    logs = await desk.connection.fetch("SELECT action, actor FROM audit_logs ORDER BY action")
    assert [tuple(row) for row in logs] == [
        ("lane.opened", "ann"),
        ("top_up.released", "ann"),
        ("withdrawal.released", "ann"),
    ]
    await assert_holds(desk.connection)
