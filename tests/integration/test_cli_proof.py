"""`verify ledger`, `audit`, `ledger correct` and `suspense assign` on a real database: what they print and end with."""

from __future__ import annotations

import asyncio
import csv
import json
from pathlib import Path

import pytest

from ledger.record import unpack
from ledger.rows import Connection, Op, block, write
from ledger.tables import WALLETS
from stablerail.dev.kafka import Kafka
from stablerail.topics_admin import admin, create_missing
from tests.integration import test_cli
from tests.integration.test_cli import Callable, Result
from tests.support import ledger_rig
from tests.support.in_process import read_topic
from tests.support.invariants import may_break
from tests.support.ledger_rig import AT, connect_to, owner, unguard
from tests.support.rebuild import assemble
from topics.catalog import JOURNAL

databases, dsn, run, clean = ledger_rig.databases, ledger_rig.dsn, test_cli.run, test_cli.clean

ID = "c" * 32


@pytest.fixture
def books(dsn: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Ada is a customer."""

    async def fill() -> None:
        connection: Connection = await connect_to(dsn)()
        await write(connection, [block(WALLETS, Op.INSERT, [("ETH", "0x1", "ada", "w", AT)])])
        await connection.close()

    asyncio.run(fill())
    monkeypatch.setenv("STABLERAIL_DATABASE_URL", dsn)
    return dsn


def by_hand(dsn: str, statement: str) -> None:
    async def edit() -> None:
        connection = await owner(dsn)
        await unguard(connection)
        await connection.execute(statement)
        await connection.close()

    asyncio.run(edit())


def ask(run: Callable[..., Result], *more: str) -> Result:
    return run(
        "ledger", "correct", "request", "--debit", "ada.usdc_balance:USDC=12.5", "--credit", "system.suspense_usdc:USDC=12.50",
        "--reason", "mail of 1 July", "--id", ID, *more,
    )  # fmt: skip


def test_a_correction_is_asked_for_approved_by_another_and_audited(run: Callable[..., Result], books: str) -> None:
    asked = ask(run, "--actor", "ann")
    assert asked.exit_code == 0, asked.output
    assert ID in asked.output
    assert "12.500000" in asked.output
    same = run("ledger", "correct", "approve", ID, "--actor", "ann")
    assert same.exit_code == 1
    assert same.output.startswith("same_actor: ")
    done = run("ledger", "correct", "approve", ID, actor="bob")
    assert done.exit_code == 0
    assert "approved" in done.output
    assert run("ledger", "correct", "approve", ID).exit_code == 0, "twice is harmless"
    assert ID in run("ledger", "correct", "list", "--state", "approved").output
    assert "mail of 1 July" in run("ledger", "correct", "show", ID).output

    listed = run("audit", "list", "--resource", f"correction/{ID}")
    assert listed.exit_code == 0
    assert [line.split()[2:4] for line in listed.output.splitlines()[1:]] == [
        ["ann", "correction.requested"], ["ann", "correction.approved"], ["bob", "correction.approved"],
    ]  # fmt: skip
    assert "refused: same_actor" in listed.output
    page = run("audit", "list", "--limit", "2").output
    cursor = page.splitlines()[-1].removeprefix("more: --after ")
    assert "bob" in run("audit", "list", "--after", cursor).output
    assert run("audit", "list", "--after", "x").exit_code == 2
    assert run("audit", "list", "--since", "yesterday").exit_code == 2
    assert run("audit", "verify").exit_code == 0


def test_logs_are_exported_for_spreadsheets_and_programs(run: Callable[..., Result], books: str) -> None:
    ask(run, "--actor", "=HYPERLINK()")
    rows = list(csv.DictReader(run("audit", "export").output.splitlines()))
    assert [(row["actor"], row["action"]) for row in rows] == [("'=HYPERLINK()", "correction.requested")]
    assert json.loads(rows[0]["after"])["reason"] == "mail of 1 July"
    line = json.loads(run("audit", "export", "--format", "json", "--action", "correction.requested").output)
    assert (line["actor"], line["after"]["legs"][0]["amount"]) == ("=HYPERLINK()", "12500000")
    assert run("audit", "export", "--actor", "nobody", "--format", "json").output == ""


def test_making_and_ending_a_key_is_audited_without_its_secret(run: Callable[..., Result], books: str) -> None:
    token = run("keys", "create", "--scope", "read", "--name", "console", "--actor", "ann").stdout.strip()
    _, key_id, secret = token.split("_")
    assert run("keys", "revoke", key_id).exit_code == 0
    assert run("keys", "revoke", key_id).exit_code == 1
    exported = run("audit", "export", "--resource", "api_key", "--format", "json").output
    made, ended = map(json.loads, exported.splitlines())
    assert (made["actor"], made["resource_id"], made["after"]) == (
        "ann",
        key_id,
        {"name": "console", "scopes": ["read"]},
    )
    assert (ended["action"], ended["before"]["revoked"], ended["after"]["revoked"]) == ("api_key.revoked", False, True)
    assert ended["actor"].startswith("os:")
    assert secret not in exported


def test_suspense_is_assigned_to_a_customer_we_know(run: Callable[..., Result], books: str) -> None:
    asked = run("suspense", "assign", "ada", "3", "--reason", "hers", "--id", ID, "--actor", "ann")
    assert asked.exit_code == 0, asked.output
    early = run("ledger", "correct", "approve", ID, "--actor", "bob")
    assert (early.exit_code, "insufficient_funds" in early.output) == (1, True), "nothing is in suspense"
    legs = ("--debit", "system.suspense_usdc:USDC=3", "--credit", "system.treasury_capital_usdc:USDC=3")
    assert (
        run("ledger", "correct", "request", *legs, "--reason", "found", "--id", "2" * 32, "--actor", "ann").exit_code
        == 0
    )
    for one in ("2" * 32, ID):
        assert run("ledger", "correct", "approve", one, "--actor", "bob").exit_code == 0
    unknown = run("suspense", "assign", "adda", "3", "--reason", "hers", "--actor", "ann")
    assert (unknown.exit_code, unknown.output.split(":")[0]) == (1, "unknown_user")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["suspense", "assign", "ada", "3", "--reason", "r"], "--actor"),
        (["suspense", "assign", "ada", "1e3", "--reason", "r", "--actor", "ann"], "decimal"),
        (["ledger", "correct", "approve", "7", "--actor", "ann"], "UUID"),
        (["ledger", "correct", "request", "--debit", "ada=1", "--credit", "x", "--reason", "r"], "owner.type:ASSET"),
        (["ledger", "correct", "request", "--debit", "a.b:C=1e3", "--credit", "x", "--reason", "r"], "decimal"),
        (["verify", "ledger", "--since", "missing"], "missing"),
    ],
)
def test_what_was_typed_wrong_is_said_and_ends_with_2(
    arguments: list[str], told: str, run: Callable[..., Result]
) -> None:
    result = run(*arguments, database_url="postgresql://u:p@127.0.0.1:1/d")
    assert (result.exit_code, told in result.output) == (2, True), result.output


def test_verify_ledger_writes_a_checkpoint_and_later_looks_only_at_what_came_after(
    run: Callable[..., Result], books: str, tmp_path: Path
) -> None:
    may_break(books, "a balance is edited")
    ask(run, "--actor", "ann")
    kept = tmp_path / "checkpoint.json"
    good = run("verify", "ledger", "--checkpoint", str(kept))
    assert (good.exit_code, good.output.count("holds")) == (0, 4)
    run("ledger", "correct", "approve", ID, "--actor", "bob")
    since = run("verify", "ledger", "--since", str(kept), "--format", "json")
    assert since.exit_code == 0
    assert {i["number"]: i["checked"] for i in json.loads(since.output)["invariants"]}[11] == 1

    by_hand(books, "UPDATE audit_logs SET actor = 'eve'; UPDATE entries SET amount = amount + 1")
    before = kept.read_bytes()
    bad = run("verify", "ledger", "--since", str(kept), "--checkpoint", str(kept), "--format", "json")
    assert bad.exit_code == 1
    broken = {i["number"]: i["offending"] for i in json.loads(bad.output)["invariants"] if not i["holds"]}
    assert set(broken) == {3, 11}
    assert "audit_logs; transactions, entries are not the rows that were sealed" in broken[11][0]
    assert kept.read_bytes() == before, "no checkpoint of books that are broken"
    assert run("verify", "ledger").output.count("BROKEN") == 2
    assert run("audit", "verify").exit_code == 1
    assert run("verify").exit_code == 1


def test_a_checkpoint_that_cannot_be_written_is_said_in_a_line_before_the_books_are_read(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    for path in (tmp_path, tmp_path / "nowhere" / "kept"):
        bad = run("verify", "ledger", "--checkpoint", str(path), database_url="postgresql://u:p@127.0.0.1:1/d")
        assert (bad.exit_code, "no file can be written there" in bad.output) == (2, True), bad.output


def test_a_person_is_answered_when_the_journal_has_the_commit_or_told_who_will_see_to_it(
    run: Callable[..., Result], books: str, kafka: Kafka, topic_prefix: str
) -> None:
    async def make() -> None:
        async with admin(kafka.bootstrap) as client:
            await create_missing(client, topic_prefix, 1, [JOURNAL])

    async def actors() -> list[str]:
        records = assemble(await read_topic(kafka.bootstrap, JOURNAL, topic_prefix))
        return [unpack(record).proof[0].columns[5] for _, record in records]

    away = ask(run, "--actor", "ann", "--reason", "first")
    assert (away.exit_code, away.stderr.count("\n")) == (0, 1)
    assert "the next worker journals what was committed" in away.stderr
    asyncio.run(make())
    there = run(
        "ledger", "correct", "approve", ID, "--actor", "bob",
        kafka_bootstrap=kafka.bootstrap, topic_prefix=topic_prefix,
    )  # fmt: skip
    assert (there.exit_code, there.stderr) == (0, "")
    told = asyncio.run(actors())
    assert ["ann" in told[0], "bob" in told[1], len(told)] == [True, True, 2], "with what waited before it"


def test_an_empty_account_is_closed_and_audited(run: Callable[..., Result], books: str) -> None:
    ask(run, "--actor", "ann")
    assert run("ledger", "close", "ada.usdc_balance:USDC", "--reason", "left", "--actor", "bob").exit_code == 1
    run("ledger", "correct", "approve", ID, "--actor", "bob")
    used = run("ledger", "close", "ada.usdc_balance:USDC", "--reason", "left", "--actor", "bob")
    assert (used.exit_code, "account_in_use" in used.output) == (1, True)
    back = ("--debit", "system.suspense_usdc:USDC=12.5", "--credit", "ada.usdc_balance:USDC=12.5", "--reason", "r")
    run("ledger", "correct", "request", *back, "--id", "d" * 32, "--actor", "ann")
    run("ledger", "correct", "approve", "d" * 32, "--actor", "bob")
    done = run("ledger", "close", "ada.usdc_balance:USDC", "--reason", "left", "--actor", "bob")
    assert (done.exit_code, "is closed since" in done.output) == (0, True)
    listed = run("audit", "export", "--action", "account.closed", "--format", "json").stdout
    assert json.loads(listed)["after"] == {"reason": "left"}
    assert run("ledger", "close", "ada", "--reason", "left", "--actor", "bob").exit_code == 2
