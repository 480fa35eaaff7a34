"""State rows and balances under lock, what is known of a transaction id, and the rows of what a fold made of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from itertools import repeat
from operator import attrgetter
from typing import Any, Final, NamedTuple

from ledger.accounts import Account
from ledger.beside import beside
from ledger.counters import COUNTERS, Counter, StateKey
from ledger.errors import TransactionReused
from ledger.holds import HOLDS, Hold
from ledger.posting import Balance, Draft, Entry, Fold, Marks, Transaction, accounts_of
from ledger.proof import entries_block, transactions_block
from ledger.reversals import REVERSALS, Line, Original, captured_from
from ledger.rows import Block, Connection, Op, Row, block, shared, uuids
from ledger.sql import load
from ledger.tables import ACCOUNTS
from ledger.tables import COUNTERS as COUNTERS_TABLE
from ledger.tables import HOLDS as HOLDS_TABLE
from ledger.tables import REVERSALS as REVERSALS_TABLE

_sql = load("ledger", "sql/store.sql")

BESIDE_MIN: Final = 50
"""Transactions whose draft takes longer than the turns of the loop that are needed to make it beside a statement."""

_id = attrgetter("id")


async def lock(connection: Connection, transactions: Sequence[Transaction], at: datetime) -> Fold:
    """Locks what the transactions need, state rows before accounts, each sorted; a fold over it. Its time is not before
    the last entry of any of the accounts.

    An account that another writer makes at the same moment is not seen: its first entry's key then conflicts, and the
    transaction runs again. So it is for the first reversals of one transaction.
    """
    states = await _lock_states(connection, transactions)
    accounts = accounts_of(transactions)
    for state in states.values():
        accounts.update(state.accounts())
    locking = lock_balances(connection, accounts, at)
    if len(transactions) < BESIDE_MIN:
        balances, at = await locking
        return Fold(balances, at.astimezone(UTC), states)  # hashed as text
    (balances, at), draft = await beside(locking, partial(_drafted, transactions, at))
    return Fold(balances, at.astimezone(UTC), states, draft=draft)


def _drafted(transactions: Sequence[Transaction], at: datetime) -> Draft:
    fingerprints = [transaction.fingerprint() for transaction in transactions]
    return Draft(
        transactions,
        {t.id: (t, fingerprint) for t, fingerprint in zip(transactions, fingerprints, strict=True)},
        transactions_block(map(_transaction_row, transactions, fingerprints, repeat(at), repeat(0))),
    )


async def lock_balances(
    connection: Connection, accounts: Iterable[Account], at: datetime
) -> tuple[dict[Account, Balance], datetime]:
    """Locks the accounts, sorted; missing ones are empty. Also a time not before any of their last entries."""
    wanted = list(accounts)
    return balances_of(
        wanted, await connection.fetch(_sql.lock_accounts, uuids([account.id for account in wanted])), at
    )


def balances_of(
    wanted: Sequence[Account], rows: Iterable[Iterable[Any]], at: datetime
) -> tuple[dict[Account, Balance], datetime]:
    """Of rows of accounts: number in `wanted` from 1, balance, version, updated_at, closed_at."""
    balances: dict[Account, Balance] = {}
    for number, balance, version, updated_at, closed_at in rows:
        balances[wanted[number - 1]] = Balance(int(balance), version, True, closed_at)
        if updated_at > at:
            at = updated_at
    if len(balances) < len(wanted):
        for account in wanted:
            balances.setdefault(account, Balance())
    return balances, at


async def _lock_states(connection: Connection, transactions: Sequence[Transaction]) -> dict[StateKey, Any]:
    """A hold that is only now opened has no row, and needs none: its opening's id is unique. A counter that another writer
    makes at the same moment is not seen: its key conflicts, and the transaction runs again."""
    keys = {t.operation.key(t.id) for t in transactions if t.operation is not None}
    states: dict[StateKey, Any] = {}
    holds = [id for table, id in keys if table == HOLDS]
    if holds:
        for id, *row in await connection.fetch(_sql.lock_holds, uuids(holds)):
            amount, remaining, captured, state, expires_at, created_at, ended_at, version = row[8:]
            states[HOLDS, id] = Hold(
                id, Account(*row[:4]), Account(*row[4:8]), int(amount), int(remaining), int(captured),
                state, expires_at, created_at, ended_at, version, stored=True,
            )  # fmt: skip
    originals = {id for table, id in keys if table == REVERSALS}
    if originals:
        lines: dict[str, list[Line]] = {}
        for id, seq, owner, type, asset, shard, direction, amount, undone in await connection.fetch(
            _sql.lock_reversals, uuids(originals)
        ):
            account = Account(owner, type, asset, shard)
            lines.setdefault(id, []).append(Line(seq, account, direction, int(amount), int(undone)))
        found = [Original(id, tuple(some), Marks(), stored=True) for id, some in lines.items()]
        found += await _read_originals(connection, originals - lines.keys())
        states.update({(REVERSALS, original.id): original for original in found})
    counters = {count.counter for t in transactions for count in t.counts}
    if counters:
        for counter in await _lock_counters(connection, counters):
            states[counter.key] = counter
    return states


async def lock_counters(connection: Connection, names: Iterable[str]) -> dict[str, int]:
    """Name -> value of those that are there, locked: for who must know them before deciding. After every other state row,
    before any account."""
    return {counter.name: counter.value for counter in await _lock_counters(connection, names)}


async def _lock_counters(connection: Connection, names: Iterable[str]) -> list[Counter]:
    rows = await connection.fetch(_sql.lock_counters, list(names))
    return [Counter(name, int(value), version, stored=True) for name, value, version in rows]


async def _read_originals(connection: Connection, ids: set[str]) -> list[Original]:
    """Transactions of which nothing was reversed before."""
    posted = await read_posted(connection, ids) if ids else {}
    if not posted:
        return []
    names = {entry.account_id for each in posted.values() for entry in each.entries}
    captured = {each.marks.hold_id for each in posted.values() if each.marks.hold_step == "capture"}
    sources: dict[str, str] = {}
    if captured:
        rows = await connection.fetch(_sql.sources_of, uuids(id for id in captured if id))
        sources = {hold_id: source_id for hold_id, source_id in rows}  # noqa: C416  (records are no tuples)
    rows = await connection.fetch(_sql.accounts_named, uuids(names | set(sources.values())))
    accounts = {id: Account(*name) for id, *name in rows}
    originals = []
    for id, each in posted.items():
        lines = tuple(Line(e.seq, accounts[e.account_id], e.direction, e.amount) for e in each.entries)
        if each.marks.hold_step == "capture":
            lines = captured_from(lines, accounts[sources[each.marks.hold_id or ""]])
        originals.append(Original(id, lines, each.marks, stored=False))
    return originals


class Posted(NamedTuple):
    """A transaction as it was posted first. `existed`: before this call, or before this place in its batch."""

    transaction_id: str
    at: datetime
    lines: tuple[tuple[Any, ...], ...]
    """What `entries` are made of: most callers look at none."""
    fingerprint: str
    marks: Marks
    existed: bool

    @property
    def entries(self) -> tuple[Entry, ...]:
        return tuple(map(Entry._make, self.lines))


async def read_posted(connection: Connection, ids: Iterable[str]) -> dict[str, Posted]:
    """Those of the transactions that exist."""
    rows = await connection.fetch(_sql.known, uuids(ids))
    if not rows:
        return {}
    times = list({row[2] for row in rows})
    entries: dict[str, list[Entry]] = {}
    for id, seq, account_id, version, direction, amount, balance, at in await connection.fetch(
        _sql.entries_of, times, uuids([row[0] for row in rows])
    ):
        entry = Entry(account_id, version, id, seq, direction, int(amount), int(balance), at)
        entries.setdefault(id, []).append(entry)
    return {
        id: Posted(id, at, tuple(entries[id]), fingerprint, Marks(*marks), existed=True)
        for id, fingerprint, at, *marks in rows
    }


async def already_posted(
    connection: Connection, transactions: Iterable[Transaction]
) -> dict[str, TransactionReused | None]:
    """Of these transactions, those whose id exists: None when its contents are the same, else the refusal."""
    wanted = {transaction.id: transaction.fingerprint() for transaction in transactions}
    rows = await connection.fetch(_sql.known, uuids(wanted))
    return {
        id: None if fingerprint == wanted[id] else TransactionReused(id, fingerprint, wanted[id])
        for id, fingerprint, *_ in rows
    }


def blocks_of(fold: Fold, batch: int) -> Iterator[Block]:
    """The rows of a fold, made as they are taken: transactions, entries, the accounts and the state rows as they are after
    it. `batch`: the locked owners'."""
    if not fold.transactions:
        return
    at, balances = fold.at, fold.balances
    if fold.draft is not None and fold.draft.transactions == fold.transactions:
        yield shared(fold.draft.rows, at=at, batch=batch)
    else:
        yield transactions_block(map(_transaction_row, fold.transactions, fold.fingerprints, repeat(at), repeat(batch)))
    if fold.entries:
        yield entries_block(fold.entries)
    known, fresh = [], []
    for account in sorted(fold.touched, key=_id):
        held = balances[account]
        if held.stored:
            known.append((account.id, held.balance, held.version, at, held.closed_at))
        else:
            fresh.append(account_row(account, held, at))
    for op, some in ((Op.UPDATE, known), (Op.INSERT, fresh)):
        if some:
            yield block(ACCOUNTS, op, some)
    rows: dict[tuple[str, Op], list[Row]] = {}
    for key in sorted(fold.changed):
        state = fold.states[key]
        op = Op.UPSERT if state.stored else Op.INSERT
        rows.setdefault((key[0], op), []).extend(_state_rows(state, at))
    tables = {HOLDS: HOLDS_TABLE, REVERSALS: REVERSALS_TABLE, COUNTERS: COUNTERS_TABLE}
    for (table, op), states in rows.items():
        yield block(tables[table], op, states)


_NO_MARKS = Marks()


def _transaction_row(transaction: Transaction, fingerprint: str, at: datetime, batch: int) -> Row:
    id, kind, reference, _, operation, _ = transaction
    marks = _NO_MARKS if operation is None else operation.marks(id)
    return (id, kind, reference, fingerprint, at, *marks, batch)


def account_row(account: Account, held: Balance, at: datetime) -> Row:
    return (
        account.id, account.owner, account.type, account.asset, account.shard,
        held.balance, held.version, at, held.closed_at,
    )  # fmt: skip


def _state_rows(state: Any, at: datetime) -> list[Row]:
    if isinstance(state, Counter):
        return [(state.name, state.value, state.version, at)]
    if isinstance(state, Hold):
        id, source, pending, *rest, _ = state
        return [(id, source.id, pending.id, *rest)]
    assert isinstance(state, Original)
    return [(state.id, line.seq, line.account.id, *line[2:]) for line in state.lines]
