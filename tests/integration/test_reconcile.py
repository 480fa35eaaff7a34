"""Everything that has two sides is compared, and each kind of difference is named with what both sides say."""

from __future__ import annotations

import asyncio
import csv
import json
import uuid
from collections.abc import AsyncIterator, Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from connectors.circle.client import CircleClient, WalletHolding
from connectors.circle.sandbox.gate import Fault
from connectors.circle.sandbox.rpc import Rpc as SandboxRpc
from ledger.reconciling import Compared, Comparison, Found, GapCode
from stablerail import custody, reconcile_circle
from stablerail import reconcile as reconciling
from stablerail.dev.fetch import Tools
from stablerail.dev.kafka import Kafka
from stablerail.topics_admin import admin, create_missing
from tests.integration import test_cli
from tests.integration.test_cli import Result
from tests.support import ledger_rig
from tests.support.deposit_rig import DEPTH
from tests.support.invariants import may_break
from tests.support.reconcile_rig import Books, books_of, happened
from topics.catalog import JOURNAL

databases, dsn = ledger_rig.databases, ledger_rig.dsn
run, clean = test_cli.run, test_cli.clean

USDC = 10**6


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second look need not wait for reports that nobody makes here."""
    for module in (reconciling, reconcile_circle):
        monkeypatch.setattr(module, "LOOK_PAUSE_S", 0.01)
    monkeypatch.setattr(reconcile_circle, "TRY_PAUSE_S", 0.01)
    for module in (custody, reconcile_circle):  # pages, of a few customers
        monkeypatch.setattr(module, "ADDRESSES_MAX", 1)


@pytest.fixture
async def books(dsn: str, tmp_path: Path, tools: Tools) -> AsyncIterator[Books]:
    async with books_of(dsn, tmp_path, tools) as made:
        await happened(made)
        yield made


def told(found: Found) -> list[tuple[Any, ...]]:
    return [(*one, one.difference) for one in found.kept]


async def test_what_is_right_has_no_difference_though_some_of_it_is_in_flight(books: Books) -> None:
    found = await books.compare()
    assert (told(found), found.gaps) == ([], [])
    assert found.results() == {
        Comparison.MIRROR: Compared(3, 0, 0),  # two chains, and all of them
        Comparison.CHAIN: Compared(3, 0, 0),
        Comparison.CIRCLE: Compared(6, 0, 0),  # three wallets on one chain, one on the other, and each chain's sum
    }


async def test_each_kind_of_difference_is_named_with_what_both_sides_say(
    books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_break(books.shore.dsn, "rows are edited")
    mirror, chain, circle = Comparison.MIRROR, Comparison.CHAIN, Comparison.CIRCLE
    on_matic, on_all = "system.custody_usdc[MATIC]:USDC", "system.custody_usdc:USDC"
    held = 640 * USDC + 7 - 15 * USDC
    owed = 640 * USDC + 7 + 30_500_000 + 9 * USDC + (3 + 1 - 12 - 2 - 15) * USDC

    gift = "UPDATE accounts SET balance = balance + $1 WHERE owner = 'ada' AND type = 'usdc_balance'"
    await books.edit(gift, Decimal(5))
    assert told(await books.compare()) == [(mirror, "", on_all, owed + 5, owed, -5)]
    await books.edit(gift, Decimal(-5))

    edited = "UPDATE accounts SET balance = balance + $1 WHERE type = 'custody_usdc' AND shard = 'MATIC'"
    await books.edit(edited, Decimal(6))
    assert told(await books.compare()) == [
        (mirror, "", on_matic, held + 6, held, -6),
        (mirror, "", on_all, owed, owed + 6, 6),
        (chain, "", on_matic, held + 6, held, -6),
    ]
    await books.edit(edited, Decimal(-6))

    # on our wallets, and nobody told the ledger: the deposit of nine is final by now
    await books.shore.pay((books.address("bob"), 8))
    await books.shore.anvil.mine(DEPTH)
    held += 9 * USDC
    assert told(await books.compare()) == [(chain, "", on_matic, held, held + 8, 8)]
    await books.shore.final()
    assert told(await books.compare()) == []
    held += 8

    # a wallet of ours that we do not know
    (sets,) = books.circle.sandbox.state.wallet_sets
    (lost,) = await books.client.create_wallets(str(uuid.uuid4()), sets, ["MATIC-AMOY"], [("eve", "eve")])
    await books.shore.pay((lost.address, 4))
    stray = (circle, "", f"MATIC:{lost.address}", None, 4, 4)
    assert told(await books.compare()) == [stray]

    # Circle's own word: of a customer's wallet, of one that it does not list, of a chain that we do not read
    said = {books.address("bob"): 1}
    real = SandboxRpc.usdc_balance

    async def lies(self: SandboxRpc, address: str) -> int:
        nonlocal late
        if address in said and late >= 0:
            late -= 1
        return said.get(address, 0) * (late != -1) + await real(self, address) if address != gone else 0

    gone, late = "", -2  # after so many questions it says the truth; never
    monkeypatch.setattr(SandboxRpc, "usdc_balance", lies)
    await books.shore.anvil.mine(DEPTH)
    bob = 49 * USDC + 8
    assert told(await books.compare()) == [stray, (circle, "bob", f"MATIC:{books.address('bob')}", bob, bob + 1, 1)]
    with monkeypatch.context() as here:
        here.setattr(reconcile_circle, "SECOND_LOOKS_MAX", 0)
        assert len(told(await books.compare())) == 2, "not looked at as often, and told all the same"
    late = 1
    assert told(await books.compare()) == [stray], "Circle was late"
    said, gone = {}, books.address("ada")
    ada = 100 * USDC + 7
    assert told(await books.compare()) == [stray, (circle, "", on_matic, held, held - ada, -ada)]
    gone = ""
    books.receive_on_sol("bob", "1")
    on_sol = "system.custody_usdc[SOL]:USDC"
    assert told(await books.compare()) == [(circle, "", on_sol, 30_500_000, 31_500_000, USDC), stray]


async def test_who_does_not_answer_leaves_a_gap_that_is_named_and_the_rest_is_compared(books: Books) -> None:
    gate = books.circle.sandbox.gate
    gate.faults.append(Fault("/v1/w3s/*", "status", status=503, times=10**6))
    found = await books.compare()
    assert told(found) == []
    assert found.results().keys() == {Comparison.MIRROR, Comparison.CHAIN}
    assert [gap[:3] for gap in found.gaps] == [(Comparison.CIRCLE, chain, GapCode.AWAY) for chain in ("SOL", "MATIC")]
    assert "partner_unavailable" in found.gaps[0].reason
    gate.faults[:] = [Fault("/v1/w3s/developer/*", "status", status=status) for status in (429, 500)]
    assert (await books.compare()).gaps == [], "what is only read is asked again"
    gate.faults[:] = [Fault("/v1/w3s/tokens/*", "status", status=401)]
    assert [gap.about for gap in (await books.compare()).gaps] == ["SOL"], "a refusal is not"
    found = await books.compare(rpc_urls='{"MATIC": ["http://127.0.0.1:1"]}')
    assert [gap[:3] for gap in found.gaps] == [
        (comparison, "MATIC", GapCode.AWAY) for comparison in (Comparison.CHAIN, Comparison.CIRCLE)
    ]
    found = await books.compare(circle_usdc_token_ids="{}")
    assert [str(gap) for gap in found.gaps] == [
        f"circle {chain}: needs STABLERAIL_CIRCLE_USDC_TOKEN_IDS" for chain in ("SOL", "MATIC")
    ]
    found = await books.compare(circle_api_key=None)
    assert found.gaps[0].reason == "needs STABLERAIL_CIRCLE_API_KEY and STABLERAIL_CIRCLE_ENTITY_SECRET"
    assert {gap.code for gap in found.gaps} == {GapCode.NOT_CONFIGURED}
    may_break(books.shore.dsn, "wallets vanish")
    await books.edit("DELETE FROM wallets WHERE chain = 'SOL'")
    found = await books.compare()
    assert [str(gap) for gap in found.gaps] == ["chain SOL: needs STABLERAIL_RPC_URLS"]


# -- the command ----------------------------------------------------------------------------------------------------------


async def test_the_command_prints_what_differs_stores_the_run_and_says_by_its_exit_code_how_it_went(
    books: Books,
    run: Callable[..., Result],
    kafka: Kafka,
    topic_prefix: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    async with admin(kafka.bootstrap) as client:
        await create_missing(client, topic_prefix, 1, [JOURNAL])
    given = {**books.given, "kafka_bootstrap": kafka.bootstrap, "topic_prefix": topic_prefix}
    head = "user,account,ledger,other,difference,comparison"

    async def command(*arguments: str, **changes: str) -> Result:
        return await asyncio.to_thread(run, "reconcile", *arguments, **{**given, **changes})

    clean = await command("--actor", "ann")
    assert (clean.exit_code, clean.stdout.split()) == (0, [head]), clean.output
    assert "chain: 3 compared, equal" in clean.stderr

    file = tmp_path / "differences.csv"
    file.write_text("of yesterday")
    gap = await command("--output", str(file), "--actor", "ann", circle_usdc_token_ids='{"SOL": "no such token"}')
    assert (gap.exit_code, gap.stdout, file.read_text().split()) == (69, "", [head]), gap.output
    assert "not compared: circle MATIC: needs STABLERAIL_CIRCLE_USDC_TOKEN_IDS" in gap.stderr
    assert "not compared: circle SOL: partner_refused: 404" in gap.stderr
    given["circle_usdc_token_ids"] = books.given["circle_usdc_token_ids"]

    await books.shore.pay((books.address("bob"), 8))
    await books.shore.anvil.mine(DEPTH)
    differs = await command("--output", str(file))
    rows = list(csv.reader(file.read_text().splitlines()))
    on_matic = "system.custody_usdc[MATIC]:USDC"
    assert (differs.exit_code, rows[1:]) == (
        1,
        [["", on_matic, "634.000007", "634.000015", "0.000008", "chain"]],
    ), differs.output
    assert [one.name for one in tmp_path.iterdir() if "differences" in one.name] == [file.name]
    assert "chain: 3 compared, 1 differ, by 0.000008" in differs.stderr

    listed = await command("--history", "--limit", "2")
    lines = listed.stdout.splitlines()
    assert (listed.exit_code, len(lines)) == (0, 3), listed.output
    assert "circle MATIC: needs" in lines[2]
    run_id = lines[1].split()[2]
    shown = await command("--run", run_id)
    assert shown.exit_code == 1
    assert list(csv.reader(shown.stdout.splitlines())) == rows
    may_break(books.shore.dsn, "a difference is made up and one is lost")
    await books.edit("DELETE FROM reconciliation_differences")
    assert "0 of 1 are kept" in (await command("--run", run_id)).stderr
    unjournaled = "SELECT count(*) FROM outbox WHERE NOT journaled"
    assert await books.shore.till.connection.fetchval(unjournaled) == 0

    nowhere = tmp_path / "nowhere" / "x.csv"
    for arguments, said in (
        (("--output", str(nowhere)), f"--output: {nowhere}: No such file or directory"),
        (("--history", "--run", run_id), "exclude each other"),
        (("--history", "--output", str(file)), "exclude each other"),
        (("--run", run_id, "--actor", "ann"), "exclude each other"),
        (("--format", "json"), "--format is of --history"),
        (("--run", "x"), "--run"),
        (("--output", str(tmp_path)), "--output"),
        (("--limit", "0", "--history"), "--limit"),
    ):
        wrong = await command(*arguments)
        assert (wrong.exit_code, said in wrong.stderr) == (2, True), (arguments, wrong.output)
    gone = await command("--run", "0" * 32)
    assert (gone.exit_code, f"unknown_run: there is no run {'0' * 32}" in gone.stderr) == (1, True)
    told = [json.loads(line) for line in (await command("--history", "--format", "json")).stdout.splitlines()]
    assert (told[0]["id"], told[0]["differences"], told[-1]["actor"]) == (run_id, 1, "ann")
    with monkeypatch.context() as here:
        here.setattr(reconciling, "compare_mirror", interrupted)
        assert (await command("--output", str(file))).exit_code == 130
    dead = {"database_url": "postgresql://x@127.0.0.1:1/x"}
    away = await command("--output", str(file), **dead)
    assert (away.exit_code, "ConnectionRefusedError" in away.stderr) == (69, True), away.output
    assert list(csv.reader(file.read_text().splitlines())) == rows, "what was there stays"
    assert [one.name for one in tmp_path.iterdir() if "differences" in one.name] == [file.name]
    unset = await command(discrepancy_alert_threshold="lots")
    assert (unset.exit_code, "STABLERAIL_DISCREPANCY_ALERT_THRESHOLD" in unset.stderr) == (78, True)


async def test_a_circle_that_repeats_a_page_or_writes_no_amounts_is_not_believed(
    books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def again(*_: Any, after: str | None = None) -> tuple[list[WalletHolding], str | None]:
        return [], "the same"

    async def garbled(*_: Any, after: str | None = None) -> tuple[list[WalletHolding], str | None]:
        return [WalletHolding("w", books.address("bob"), "s", "1e9")], None

    for page, said in ((again, "do not go on"), (garbled, "cannot be read")):
        monkeypatch.setattr(CircleClient, "holdings_page", page)
        found = await books.compare()
        assert told(found) == []
        assert [(gap.about, said in gap.reason) for gap in found.gaps] == [("SOL", True), ("MATIC", True)]
