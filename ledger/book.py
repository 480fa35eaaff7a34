"""The ledger's own door: a batch of transactions in, a result for each out. For the API, the command line, sweepers, people;
a stage posts within its own commit (agents/stage.py) through the same fold.

| phase | what | why there |
| --- | --- | --- |
| owner row | of the writer, locked | its commits are a sequence: one audit chain |
| lock | holds and reversals, then accounts, each sorted | one lock order everywhere |
| ids | looked up only when one was refused or the first try met one that exists | a look-up of random ids costs more than the rest; the unique key tells |
| fold | each request in order | a refused one leaves no trace for its neighbours |
| seal | rows, audit, commit record | ledger/commit.py |

Few plain transactions are tried without a lock first (`_post_unlocked`): read, fold, and one statement that writes only if what was
read is still so.

A look-up comes after the locks: whoever posted the same id before has ended by then, or its unique key stops us and we run
again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, NamedTuple

import asyncpg

from ledger import store
from ledger.accounts import Account, refusal_of
from ledger.audit_logs import Log
from ledger.commit import OVERTAKEN, Overtaken, Owner, Sealed, Unchanged, check_outside, lock_writer, read_writer, seal
from ledger.errors import AccountInUse, GroupRefused, PostingRefused, TransactionReused, UnknownAccount
from ledger.groups import Refused, post_together
from ledger.holds import expire
from ledger.levels import buffer_levels
from ledger.posting import Fold, Marks, Transaction, accounts_of
from ledger.rows import Connection, Op, block
from ledger.shadow import mirror_of
from ledger.sql import load
from ledger.store import Posted
from ledger.tables import ACCOUNTS

_sql = load("ledger", "sql/store.sql")

UNLOCKED_MAX: Final = 10
"""Transactions. More would meet other writers more often, and gain less."""
TRIES_MAX: Final = 20
"""A batch that met other writers so often is given back with the database's error: something holds the locks."""

_ID_DIGITS: Final = 32
_HEX: Final = b"0123456789abcdef"
_is_id: Final = re.compile("[0-9a-f]{32}").fullmatch
_NO_MARKS: Final = Marks()
_posted_of = partial(tuple.__new__, Posted)
"""Half the price of Posted(…), once for each transaction."""


class Atomic(NamedTuple):
    """Transactions that stand or fall together: the first in order that is refused is the cause for the others."""

    transactions: tuple[Transaction, ...]


Request = Transaction | Atomic
Result = Posted | PostingRefused


@dataclass(frozen=True, slots=True)
class Batch:
    results: list[Result]
    """One for each transaction, in the order of the requests; a group's in its own order."""
    sealed: Sealed | None
    """The commit, for the relay and the emitter; None when nothing was new. Acknowledge when it is journaled. Its messages
    (levels of buffers) are sent by the sweeper where the writer does not."""


async def post(
    connection: Connection,
    writer: str,
    requests: Sequence[Request],
    at: datetime,
    *,
    actor: str = "",
    about: dict[str, Any] | None = None,
) -> Batch:
    """Posts the batch in a transaction of its own. `writer` names the audit chain: writers that run at once have names of
    their own. `actor` (else the writer) and `about` (text and integers) go into the chain.

    An id that exists with the same contents is answered with the first result (`existed`), with other contents with
    TransactionReused; in the same batch too. The id of what was refused is not used up. After an error of the database,
    whatever it was, the same batch may be sent again. ValueError, and nothing is done: an id that is none, a text with a NUL, a
    connection that is in a transaction.
    """
    check_outside(connection)
    _check_texts(_transactions(requests))
    careful = False
    for tries in range(1, TRIES_MAX + 1):
        try:
            if tries == 1:
                batch = await _post_unlocked(connection, writer, requests, at, actor or writer, about or {})
                if batch is not None:
                    return batch
            return await _post(connection, writer, requests, at, careful, actor or writer, about or {})
        except OVERTAKEN as error:
            if tries == TRIES_MAX:
                raise
            careful = careful or isinstance(error, asyncpg.UniqueViolationError)
    raise AssertionError("unreachable")


async def _post(
    connection: Connection,
    writer: str,
    requests: Sequence[Request],
    at: datetime,
    careful: bool,
    actor: str,
    about: dict[str, Any],
) -> Batch:
    try:
        async with connection.transaction():
            owners = await lock_writer(connection, writer)
            results, fold = await settle(connection, requests, at, careful=careful)
            if not fold.transactions:
                raise Unchanged
            sealed = await _sealed(connection, writer, owners, fold, actor, about)
    except Unchanged:
        return Batch(results, None)
    return Batch(results, sealed)


async def _post_unlocked(
    connection: Connection,
    writer: str,
    requests: Sequence[Request],
    at: datetime,
    actor: str,
    about: dict[str, Any],
) -> Batch | None:
    """None, and nothing is done: they are too many or do more than move money, one is refused (it may be a repeat, which only a
    look-up tells), the writer is new, another one was first, or there is a table beside the ledger to write."""
    transactions = _transactions(requests)
    plain = all(t.operation is None and not t.counts for t in transactions)
    if not plain or not 0 < len(transactions) <= UNLOCKED_MAX or mirror_of(connection) is not None:
        return None
    wanted = list(accounts_of(transactions))
    owners, rows = await read_writer(connection, writer, [account.id for account in wanted])
    if not owners:
        return None
    balances, at = store.balances_of(wanted, rows, at)
    read = {account.id: held.version for account, held in balances.items() if held.stored}
    fold = Fold(balances, at.astimezone(UTC))
    results = judge(fold, requests, {})
    if any(isinstance(result, PostingRefused) for result in results):
        return None
    try:
        return Batch(results, await _sealed(connection, writer, owners, fold, actor, about, read))
    except Overtaken:
        return None


async def _sealed(
    connection: Connection,
    writer: str,
    owners: Sequence[Owner],
    fold: Fold,
    actor: str,
    about: dict[str, Any],
    unlocked: dict[str, int] | None = None,
) -> Sealed:
    return await seal(
        connection, writer, owners, blocks=store.blocks_of(fold, owners[0].batch), messages=buffer_levels(fold),
        at=fold.at, actor=actor, summary={**about, "posted": len(fold.transactions)}, unlocked=unlocked,
    )  # fmt: skip


async def settle(
    connection: Connection, requests: Sequence[Request], at: datetime, *, careful: bool = False
) -> tuple[list[Result], Fold]:
    """The batch's part inside a transaction: locks, folds, writes nothing. For a commit that has rows of its own; it locks
    its state rows before, seals `store.blocks_of(fold, owners[0].batch)`, and runs again with `careful` after a unique conflict."""
    transactions = _transactions(requests)
    fold = await store.lock(connection, transactions, at)
    known: dict[str, Posted] = {}
    if careful:
        known = await store.read_posted(connection, {t.id for t in transactions})
    results = judge(fold, requests, known)
    if not careful and any(isinstance(result, PostingRefused) for result in results):
        # a repeat may be refused for what its first time did: the money is spent, the hold has ended
        refused = {t.id for t, result in zip(transactions, results, strict=True) if isinstance(result, PostingRefused)}
        if await store.read_posted(connection, refused):
            known = await store.read_posted(connection, {t.id for t in transactions})
            fold = await store.lock(connection, transactions, at)
            results = judge(fold, requests, known)
    return results, fold


def judge(fold: Fold, requests: Iterable[Request], known: dict[str, Posted]) -> list[Result]:
    """Folds the requests in order. `known`: those of their ids that exist. Pure."""
    here: dict[str, tuple[Transaction, Posted]] = {}
    results: list[Result] = []
    for request in requests:
        if isinstance(request, Atomic):
            results += _judge_group(fold, request.transactions, known, here)
        elif request.id in known or request.id in here:
            results += _judge_group(fold, (request,), known, here)
        else:
            results.append(_judge_new(fold, request, here))
    return results


def _judge_new(fold: Fold, transaction: Transaction, here: dict[str, tuple[Transaction, Posted]]) -> Result:
    """What nearly all are: alone, and with an id that was used for nothing."""
    start = len(fold.entries)
    try:
        fold.post(transaction)
    except PostingRefused as refusal:
        return refusal
    id, operation = transaction.id, transaction.operation
    marks = _NO_MARKS if operation is None else operation.marks(id)
    posted = _posted_of((id, fold.at, tuple(fold.entries[start:]), fold.fingerprints[-1], marks, False))
    here[id] = transaction, posted
    return posted


def _judge_group(
    fold: Fold,
    group: tuple[Transaction, ...],
    known: dict[str, Posted],
    here: dict[str, tuple[Transaction, Posted]],
) -> list[Result]:
    results: dict[int, Result] = {}
    fresh: dict[str, Transaction] = {}
    refused: Refused | None = None
    for place, transaction in enumerate(group):
        first = _first(transaction, known, here, fresh)
        if isinstance(first, Posted):
            results[place] = first
        elif refused is not None:
            continue  # the first in order that is refused is the cause
        elif first is None:
            fresh.setdefault(transaction.id, transaction)
        else:
            refused = Refused(transaction, first)
    start = len(fold.entries), len(fold.fingerprints)
    if fresh:
        refused = post_together(fold, list(fresh.values()), refused)
    if refused is not None:
        for place, transaction in enumerate(group):
            itself = transaction is refused.transaction
            results.setdefault(
                place, refused.refusal if itself else GroupRefused(refused.transaction.id, refused.refusal)
            )
        return [results[place] for place in range(len(group))]
    if fresh:
        for posted in _posted(fold, *start, fresh):
            here[posted.transaction_id] = fresh[posted.transaction_id], posted
    for place, transaction in enumerate(group):
        if place not in results:
            posted = here[transaction.id][1]
            again = fresh.pop(transaction.id, None) is None
            results[place] = posted._replace(existed=True) if again else posted
    return [results[place] for place in range(len(group))]


def _first(
    transaction: Transaction,
    known: dict[str, Posted],
    here: dict[str, tuple[Transaction, Posted]],
    fresh: dict[str, Transaction],
) -> Posted | TransactionReused | None:
    """What an id was used for before: in the database, in this batch, in this group. None: for nothing, or for this very
    transaction in this group."""
    id = transaction.id
    if id in known:
        stored, given = known[id].fingerprint, transaction.fingerprint()
        return known[id] if stored == given else TransactionReused(id, stored, given)
    other = here[id][0] if id in here else fresh.get(id)
    if other is not None and other != transaction:
        return TransactionReused(id, other.fingerprint(), transaction.fingerprint())
    return here[id][1]._replace(existed=True) if id in here else None


def _posted(fold: Fold, entries: int, transactions: int, fresh: dict[str, Transaction]) -> Iterable[Posted]:
    lines: dict[str, list[tuple[Any, ...]]] = {id: [] for id in fresh}
    for row in fold.entries[entries:]:
        lines[row[2]].append(row)
    for (id, transaction), fingerprint in zip(fresh.items(), fold.fingerprints[transactions:], strict=True):
        marks = _NO_MARKS if transaction.operation is None else transaction.operation.marks(id)
        yield Posted(id, fold.at, tuple(lines[id]), fingerprint, marks, existed=False)


def _transactions(requests: Iterable[Request]) -> list[Transaction]:
    found: list[Transaction] = []
    for request in requests:
        if isinstance(request, Atomic):
            found += request.transactions
        else:
            found.append(request)
    return found


def _check_texts(transactions: Sequence[Transaction]) -> None:
    """ValueError for what PostgreSQL could not store: it would end the whole batch. Accounts' names: `refusal_of`."""
    keys = [t.id for t in transactions]
    keys += [t.operation.key(t.id)[1] for t in transactions if t.operation is not None]
    # all of them at once: one by one it takes five times as long
    if not set(map(len, keys)) <= {_ID_DIGITS} or "".join(keys).encode(errors="replace").translate(None, _HEX):
        for key in keys:
            if not _is_id(key):
                raise ValueError(f"{key!r} is no transaction id: 32 hex digits, small letters")
    if "\0" in "".join([t.kind + t.reference for t in transactions]):
        odd = next(t for t in transactions if "\0" in t.kind + t.reference)
        raise ValueError(f"transaction {odd.id}: a text with a NUL")


async def expire_due(connection: Connection, writer: str, at: datetime, *, holds_max: int = 1_000) -> Batch:
    """Gives back what is held by holds whose time has come, the oldest first. A hold that was captured or voided meanwhile is
    refused HoldEnded and left alone. Fewer than `holds_max` results: none is left."""
    rows = await connection.fetch(_sql.holds_due, at, holds_max)
    if not rows:
        return Batch([], None)
    return await post(connection, writer, [expire(id, "hold_expired", reference) for id, reference in rows], at)


async def close_account(
    connection: Connection, writer: str, account: Account, at: datetime, *, actor: str, reason: str
) -> tuple[datetime, Sealed | None]:
    """Closes an account for good: postings to it are refused from then on. When it was closed, and the commit (None: it
    was closed before). Raises UnknownAccount, or AccountInUse while it has a balance or an open hold; ValueError within a transaction."""
    check_outside(connection)
    try:
        async with connection.transaction():
            owners = await lock_writer(connection, writer)
            balances, at = await store.lock_balances(connection, (account,), at)
            held = balances[account]
            if not held.stored:
                raise refusal_of(account) or UnknownAccount(str(account))
            if held.closed_at is not None:
                raise Unchanged
            holds = await connection.fetchval(_sql.count_open_holds, account.id)
            if held.balance or holds:
                raise AccountInUse(str(account), held.balance, holds)
            held.closed_at = at
            sealed = await seal(
                connection, writer, owners,
                blocks=[block(ACCOUNTS, Op.UPSERT, [store.account_row(account, held, at)])], messages=[],
                at=at, actor=actor, summary={"closed": str(account), "reason": reason},
                logs=[Log(actor, "account.closed", "account", str(account), after={"reason": reason})],
            )  # fmt: skip
    except Unchanged:
        assert held.closed_at is not None
        return held.closed_at, None
    return at, sealed
