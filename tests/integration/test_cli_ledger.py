"""`stablerail ledger …`: tables for people, CSV and JSON that read back, and exit codes."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from rich.console import Console
from typer.testing import CliRunner

from stablerail import cli_ledger
from stablerail.answers import format_time
from stablerail.cli import app
from tests.support import ledger_rig
from tests.support.books import BUFFER, CUSTODY, Books, some_books, spendable
from tests.support.ledger_rig import connect_to
from tests.support.patience import ENVIRONMENT
from topics.money import format_amount

databases, dsn = ledger_rig.databases, ledger_rig.dsn
ROWS_ARE_MADE_UP = "a history of postings that speak of deposits which are nowhere"

Run = Callable[..., Result]


@pytest.fixture
def books(dsn: str) -> Books:
    made = some_books(31, 120)

    async def store() -> None:
        connection = await connect_to(dsn)()
        await made.store(connection)
        await connection.close()

    asyncio.run(store())
    return made


@pytest.fixture
def run(dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    for name in os.environ.keys() - ENVIRONMENT.keys():
        if name.startswith("STABLERAIL_") and not name.startswith("STABLERAIL_TEST_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("STABLERAIL_DATABASE_URL", dsn)
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, ["ledger", *map(str, arguments)])


def rows_of(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text, newline="")))


def test_a_balance_is_told_now_at_a_time_at_a_transaction_and_per_shard(books: Books, run: Run) -> None:
    at, row = books.times()[11], books.of(spendable("ada"))[5]
    now = run("balance", CUSTODY, "--format", "csv")
    assert (now.exit_code, rows_of(now.output)) == (
        0,
        [["account", "balance"]]
        + [[str(name), format_amount(books.balance(name))]
           for name in (CUSTODY, CUSTODY._replace(shard="ETH"), CUSTODY._replace(shard="MATIC"))],
    )  # fmt: skip
    then = json.loads(run("balance", BUFFER, "--at", format_time(at), "--format", "json").output)
    assert (then["at"], then["balance"]) == (format_time(at), format_amount(books.balance(BUFFER, at)))
    after = json.loads(run("balance", row.account, "--transaction", row.transaction_id, "--format", "json").output)
    assert (after["transaction_id"], after["balance"]) == (row.transaction_id.hex, format_amount(row.after))
    table = run("balance", CUSTODY)
    assert "system.custody_usdc[MATIC]:USDC" in table.output
    assert format_amount(books.balance(CUSTODY)) in table.output


def test_a_customers_balances_are_told_by_account_type(books: Books, run: Run) -> None:
    answer = json.loads(run("balance", "--user", "bob", "--format", "json").output)
    held = {one["asset"]: one for one in answer["balances"]}
    assert held["USDC"]["available"] == held["USDC"]["total"] == format_amount(books.balance(spendable("bob")))
    assert set(held["USD"]["accounts"]) == {"fiat_exposure"}
    assert ["USDC", "pending", "0.000000"] in rows_of(run("balance", "--user", "bob", "--format", "csv").output)
    assert "available" in run("balance", "--user", "bob").output


def test_an_exported_statement_reads_back_as_csv_and_as_json(books: Books, run: Run) -> None:
    times = books.times()
    since, until = times[2], times[-2]
    period = ("--from", format_time(since), "--to", format_time(until))
    rows = [row for row in books.of(BUFFER) if since <= row.at < until]
    as_csv = run("statement", BUFFER, *period, "--format", "csv")
    assert as_csv.exit_code == 0
    _, opening, *lines, closing = rows_of(as_csv.stdout)
    document = json.loads(run("statement", BUFFER, *period, "--format", "json").stdout)
    assert document["next"] is None
    assert document["line_count"] == len(rows) == len(lines) == len(document["lines"])
    before = sum(row.change for row in books.of(BUFFER) if row.at < since)
    after = before + sum(row.change for row in rows)
    assert (opening[8], closing[8]) == (format_amount(before), format_amount(after))
    assert (document["opening_balance"], document["closing_balance"]) == (opening[8], closing[8])
    for row, line, one in zip(rows, lines, document["lines"], strict=True):
        assert line == [str(value) for value in one.values()]
        assert uuid.UUID(one["transaction_id"]) == row.transaction_id
        assert (one["amount"], one["shard"], one["version"]) == (
            format_amount(row.amount), row.account.shard, row.version,
        )  # fmt: skip


def test_a_long_export_shows_its_progress_on_stderr_alone(
    books: Books, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_ledger, "PROGRESS_LINES_MIN", 10)
    monkeypatch.setattr(cli_ledger, "err", Console(file=(bar := io.StringIO()), force_terminal=True, width=120))
    exported = run("statement", BUFFER, "--format", "csv")
    lines = len(books.of(BUFFER))
    assert len(rows_of(exported.stdout)) == lines + 3
    assert f"{lines}/{lines}" in bar.getvalue()
    assert "\x1b" not in exported.stdout


def test_a_statement_without_lines_is_an_export_too(books: Books, run: Run) -> None:
    period = ("--from", "2001-01-01", "--to", "2001-02-01")
    assert len(rows_of(run("statement", BUFFER, *period, "--format", "csv").stdout)) == 3
    assert json.loads(run("statement", BUFFER, *period, "--format", "json").stdout)["lines"] == []
    table = run("statement", BUFFER, *period)
    assert "opening balance  0.000000" in table.output
    assert "0 lines" in table.output


def test_a_statement_is_shown_with_debit_and_credit_between_its_balances(books: Books, run: Run) -> None:
    shown = run("statement", BUFFER)
    rows = books.of(BUFFER)
    assert shown.exit_code == 0
    assert shown.output.count(rows[0].reference) >= 1
    assert f"closing balance  {format_amount(books.balance(BUFFER))}   {len(rows)} lines" in shown.output
    assert rows[-1].transaction_id.hex in shown.output


def test_the_trial_balance_tells_by_its_exit_code_that_books_are_wrong(books: Books, run: Run, dsn: str) -> None:
    good = run("trial-balance")
    assert good.exit_code == 0
    assert "system_buffer_usdc" in good.output
    then = json.loads(run("trial-balance", "--at", format_time(books.times()[7]), "--format", "json").output)
    assert set(then["differences"].values()) == {"0.000000"}

    async def damage() -> None:
        connection = await connect_to(dsn)()
        await connection.execute("UPDATE accounts SET balance = balance + 3 WHERE owner = 'ada' AND asset = 'USDC'")
        await connection.close()

    asyncio.run(damage())
    bad = run("trial-balance", "--format", "csv")
    assert bad.exit_code == 1
    assert "USDC: debits − credits is 0.000003" in bad.stderr
    assert len(rows_of(bad.stdout)) == len(rows_of(run("trial-balance", "--format", "csv").stdout))


def test_entries_are_told_by_reference_and_by_transaction(books: Books, run: Run) -> None:
    row = books.rows[30]
    by_reference = rows_of(run("entries", row.reference, "--format", "csv").output)[1:]
    assert len(by_reference) == sum(each.reference == row.reference for each in books.rows)
    by_id = rows_of(run("transaction", row.transaction_id, "--format", "csv").output)[1:]
    assert len(by_id) == sum(each.transaction_id == row.transaction_id for each in books.rows)
    assert all(line in by_reference for line in by_id)
    document = json.loads(run("transaction", row.transaction_id, "--format", "json").output)
    assert [one["id"] for one in document["transactions"]] == [row.transaction_id.hex]
    assert row.transaction_id.hex in run("entries", row.reference).output


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["balance"], 2, "give an account or --user"),
        (["balance", "x.y:USDC", "--user", "ada"], 2, "give an account or --user"),
        (["balance", "--user", "ada", "--at", "2026-01-01"], 2, "exclude each other"),
        (["balance", "ada"], 2, "bad_account"),
        (["balance", "nobody.usdc_balance:USDC"], 1, "account_not_found"),
        (["balance", "--user", "nobody"], 1, "unknown_user"),
        (["balance", "ada.usdc_balance:USDC", "--at", "2026-11-25T14:00"], 2, "RFC 3339 with a zone"),
        (["balance", "ada.usdc_balance:USDC", "--transaction", str(uuid.UUID(int=1))], 1, "transaction_not_found"),
        (["statement", "ada.usdc_balance:USDC", "--from", "2026-02-01", "--to", "2026-01-01"], 2, "bad_period"),
        (["statement", "ada.usdc_balance:USDC", "--format", "xml"], 2, "'table', 'csv', 'json'"),
        (["entries", "never"], 1, "unknown_reference"),
        (["transaction", "7"], 2, "valid UUID"),
        (["transaction", str(uuid.UUID(int=1))], 1, "transaction_not_found"),
    ],
)
def test_what_cannot_be_answered_is_said_in_one_line(
    books: Books, run: Run, arguments: list[str], code: int, told: str
) -> None:
    result = run(*arguments)
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit), "no traceback"
    assert told in result.output
    if code == 1:
        assert len(result.output.strip().splitlines()) == 1
