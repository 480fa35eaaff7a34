"""`stablerail ledger …`: what the ledger holds. Tables for people; CSV and JSON, as the API gives them, for programs."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import nullcontext
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Final
from uuid import UUID

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ledger import reading
from ledger.reading import AccountName, Reader, transactions_of
from ledger.statement import Line, Statement, open_statement, pages
from stablerail.answers import (
    LedgerTransactions,
    OwnerBalances,
    csv_text,
    format_time,
    of_balance,
    of_held,
    of_transactions,
    of_trial_balance,
    parse_time,
    statement_csv,
    statement_json,
)
from stablerail.cli_base import EXIT_FOUND, EXIT_USAGE, err, fail, looked_up, out
from topics.money import format_amount

ledger_app = typer.Typer(no_args_is_help=True, help="What the ledger holds and held, and its correction by people.")

PROGRESS_LINES_MIN: Final = 5_000
"""A shorter export is done before a bar is read."""
REFERENCE_PAGE: Final = 200
NUMBERS: Final = frozenset({"balance", "debit", "credit", "amount", "balance_after", "accounts", "version"})
# each page is a table of its own, which knows nothing of the others: least widths keep the columns in line
STATEMENT_WIDTHS: Final = {
    "at": 27, "shard": 6, "transaction": 32, "kind": 18, "reference": 32, "debit": 18, "credit": 18, "balance": 18,
}  # fmt: skip


class Format(StrEnum):
    TABLE = "table"
    CSV = "csv"
    JSON = "json"


def _time(text: str) -> datetime:
    try:
        return parse_time(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


TIME: Final = "RFC 3339 with a zone, or a date"
AccountArgument = Annotated[
    str, typer.Argument(metavar="ACCOUNT", help="owner.type:ASSET or owner.type\\[shard]:ASSET")
]
AtOption = Annotated[datetime | None, typer.Option("--at", parser=_time, metavar="TIME", help=TIME)]
FormatOption = Annotated[Format, typer.Option("--format", help="csv and json are exact and complete")]


@ledger_app.command()
def balance(
    account: Annotated[str | None, typer.Argument(help="owner.type:ASSET or owner.type\\[shard]:ASSET")] = None,
    user: Annotated[str | None, typer.Option(help="instead of an account: all of a customer's")] = None,
    at: AtOption = None,
    transaction: Annotated[UUID | None, typer.Option(help="after this transaction's last line")] = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """An account's balance, now, at a time or at a transaction; or a customer's balances by account type."""
    if (account is None) == (user is None):
        fail("give an account or --user", EXIT_USAGE)
    if (at is not None) + (transaction is not None) + (user is not None) > 1:
        fail("--at, --transaction and --user exclude each other", EXIT_USAGE)

    async def of_account(connection: Reader) -> None:
        name = AccountName.parse(account or "")
        if transaction is not None:
            async with connection.transaction(isolation="repeatable_read", readonly=True):
                found = await reading.balance_after(connection, name, transaction)
        else:
            found = await reading.balance(connection, name, at=at)
        answer = of_balance(found, at=at, transaction_id=transaction)
        rows = [(answer.account, answer.balance)]
        if len(answer.shards) > 1:
            rows += [(str(name._replace(shard=shard)), held) for shard, held in answer.shards.items()]
        _show(("account", "balance"), rows, answer, format)

    async def of_user(connection: Reader) -> None:
        found = await reading.owner_balances(connection, user or "")
        if not found:
            fail(f"unknown_user: no account belongs to {user}")
        answer = OwnerBalances(user_id=user or "", balances=[of_held(held) for held in found.values()])
        rows = [
            (held.asset, what, amount)
            for held in answer.balances
            for what, amount in (
                *held.accounts.items(),
                *(("available", held.available), ("pending", held.pending), ("total", held.total)),
            )
        ]
        _show(("asset", "what", "balance"), rows, answer, format)

    looked_up(of_account if user is None else of_user)


@ledger_app.command()
def statement(
    account: AccountArgument,
    since: Annotated[
        datetime | None, typer.Option("--from", parser=_time, metavar="TIME", help=f"{TIME}; included")
    ] = None,
    until: Annotated[
        datetime | None, typer.Option("--to", parser=_time, metavar="TIME", help=f"{TIME}; excluded")
    ] = None,
    format: FormatOption = Format.TABLE,
) -> None:
    """Opening balance, lines, closing balance. It is written while it is read, however long it is."""

    async def action(connection: Reader) -> None:
        found = await open_statement(connection, AccountName.parse(account), since, until)
        read = _with_progress(found, pages(lambda: nullcontext(connection), found))
        if format is Format.TABLE:
            await _print_statement(found, read)
            return
        async for text in (statement_csv if format is Format.CSV else statement_json)(found, read):
            sys.stdout.write(text)

    looked_up(action)


@ledger_app.command("trial-balance")
def trial_balance(at: AtOption = None, format: FormatOption = Format.TABLE) -> None:
    """Per asset and account type; exit code 1 when an asset does not sum to zero."""

    async def action(connection: Reader) -> bool:
        found = await reading.trial_balance(connection, at)
        answer = of_trial_balance(found)
        rows = [(x.asset, x.type, x.accounts, x.debit, x.credit, x.balance) for x in answer.lines]
        _show(("asset", "type", "accounts", "debit", "credit", "balance"), rows, answer, format)
        wrong = {asset: text for asset, text in answer.differences.items() if found.differences()[asset]}
        for asset, difference in wrong.items():
            err.print(f"{asset}: debits − credits is {difference}, not zero; see stablerail verify", style="red")
        return not wrong

    if not looked_up(action):
        raise typer.Exit(EXIT_FOUND)


@ledger_app.command()
def entries(
    reference: Annotated[str, typer.Argument(help="what the transactions are about, such as a deposit's id")],
    format: FormatOption = Format.TABLE,
) -> None:
    """The lines of all transactions with a reference, oldest first."""

    async def action(connection: Reader) -> None:
        found, after = await transactions_of(connection, reference, REFERENCE_PAGE)
        while after is not None:
            more, after = await transactions_of(connection, reference, REFERENCE_PAGE, after)
            found += more
        if not found:
            fail(f"unknown_reference: no transaction has the reference {reference}")
        _show_transactions(of_transactions(found, None), format)

    looked_up(action)


@ledger_app.command()
def transaction(
    transaction_id: Annotated[UUID, typer.Argument(metavar="ID", help="as entries and statements show it")],
    format: FormatOption = Format.TABLE,
) -> None:
    """A transaction with its lines, in their order."""

    async def action(connection: Reader) -> None:
        _show_transactions(of_transactions([await reading.transaction(connection, transaction_id)], None), format)

    looked_up(action)


def _show(heads: Sequence[str], rows: Iterable[Sequence[Any]], answer: Any, format: Format) -> None:
    """`answer` is what JSON shows."""
    if format is Format.CSV:
        sys.stdout.write(csv_text([heads, *rows]))
    elif format is Format.JSON:
        sys.stdout.write(answer.model_dump_json(indent=2) + "\n")
    else:
        table = Table(header_style="bold", pad_edge=False, box=None)
        for head in heads:
            table.add_column(head, justify="right" if head in NUMBERS else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(str, row))
        out.print(table)


def _show_transactions(answer: LedgerTransactions, format: Format) -> None:
    heads = ("at", "transaction_id", "kind", "reference", "account", "direction", "amount", "balance_after", "version")
    rows = [
        (
            *(format_time(one.at), one.id, one.kind, one.reference),
            *(entry.account, entry.direction, entry.amount, entry.balance_after, entry.version),
        )
        for one in answer.transactions
        for entry in one.entries
    ]
    _show(heads, rows, answer, format)


async def _with_progress(statement: Statement, pages: AsyncIterator[list[Line]]) -> AsyncIterator[list[Line]]:
    """The same pages; a bar on stderr while a long export goes elsewhere."""
    watched = err.is_terminal and not out.is_terminal and statement.lines >= PROGRESS_LINES_MIN
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # rich would take stdout over and print the export on stderr, above the bar
    with Progress(*columns, console=err, transient=True, redirect_stdout=False, disable=not watched) as progress:
        task = progress.add_task(str(statement.account), total=statement.lines)
        async for lines in pages:
            yield lines
            progress.advance(task, len(lines))


async def _print_statement(statement: Statement, pages: AsyncIterator[list[Line]]) -> None:
    """A table per page, the columns of all in line."""
    out.print(f"{statement.account}\nopening balance  {format_amount(statement.opening)}")
    first = True
    async for lines in pages:
        table = Table(header_style="bold", pad_edge=False, box=None, show_header=first)
        for head, width in STATEMENT_WIDTHS.items():
            table.add_column(head, justify="right" if head in NUMBERS else "left", min_width=width, overflow="fold")
        for line in lines:
            amount = format_amount(line.amount)
            sides = (amount, "") if line.direction == "d" else ("", amount)
            cells = (format_time(line.at), line.shard, line.transaction_id.hex, line.kind, line.reference, *sides)
            table.add_row(*cells, format_amount(line.balance))
        out.print(table)
        first = False
    out.print(f"closing balance  {format_amount(statement.closing)}   {statement.lines} lines")
