"""ledger.floor: from the least that PostgreSQL takes for the rows to what a posting of ours takes, one step at a time.

| step | what is new in it |
| --- | --- |
| rows | COPY of transactions and entries, text made before, into tables without keys; COMMIT. The floor |
| keys | into our tables: keys, checks, the index of references |
| claim | by one statement of arrays, made before, instead of COPY: it stops at an id that exists and takes more tables |
| lock | owner row and accounts locked in order before, the accounts' new balances written |
| fold | transactions checked and folded, results, fingerprints, the arrays: what was made before is made in it |
| chain | the content's digest, the audit row, the owner row with its new head |
| journal | the commit record, its row of `outbox`, the relay: `ledger.book.post`, as in ledger.hot_batch |

Each step is a way to post the same batches; a step's price is its time less that of the one before.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final

from ledger import book, store
from ledger.accounts import Account
from ledger.commit import NO_TOPIC, Owner, link, lock_writer
from ledger.posting import Balance, Fold
from ledger.proof import ledger_digest
from ledger.record import pack_content
from ledger.rows import Block, Connection, Op, block, write
from ledger.tables import AUDIT, OWNERS
from tests.benchmarks.ledger_fill import ENTRY_COLUMNS, TRANSACTION_COLUMNS
from tests.benchmarks.ledger_load import HOT, START, Transfer, connect, copy, seconds, transaction_of, users
from tests.benchmarks.ledger_sides import WARM, Batches, run_ours

STEPS: Final = ("rows", "keys", "claim", "lock", "fold", "chain", "journal")
WRITER: Final = "benchmark"
BARE: Final = """CREATE SCHEMA bare;
CREATE TABLE bare.transactions (LIKE transactions); CREATE TABLE bare.entries (LIKE entries)"""


@dataclass(frozen=True)
class Made:
    """A batch as the early steps take it: made before their clock runs."""

    blocks: list[Block]
    transactions: str
    entries: str
    accounts: set[Account]


@dataclass
class _Steps:
    connection: Connection
    users: list[Account]
    made: list[Made]
    """Of the batches to come, in order."""
    schema: str = "stablerail"
    turn: int = field(default=0)

    def _next(self) -> Made:
        self.turn += 1
        return self.made[self.turn - 1]

    async def copied(self, _: list[Transfer]) -> None:
        made = self._next()
        async with self.connection.transaction():
            await copy(self.connection, "transactions", TRANSACTION_COLUMNS, made.transactions, self.schema)
            await copy(self.connection, "entries", ENTRY_COLUMNS, made.entries, self.schema)

    async def claim(self, _: list[Transfer]) -> None:
        made = self._next()
        async with self.connection.transaction():
            await write(self.connection, made.blocks[:2])

    async def lock(self, _: list[Transfer]) -> None:
        made = self._next()
        async with self.connection.transaction():
            await lock_writer(self.connection, WRITER)
            await store.lock_balances(self.connection, made.accounts, START)
            await write(self.connection, made.blocks)

    async def fold(self, transfers: list[Transfer]) -> None:
        await self._fold(transfers, chained=False)

    async def chain(self, transfers: list[Transfer]) -> None:
        await self._fold(transfers, chained=True)

    async def _fold(self, transfers: list[Transfer], *, chained: bool) -> None:
        requests = [transaction_of(transfer, self.users) for transfer in transfers]
        async with self.connection.transaction():
            owners = await lock_writer(self.connection, WRITER)
            _, fold = await book.settle(self.connection, requests, datetime.now(UTC))
            blocks = list(store.blocks_of(fold, owners[0].batch))
            await write(self.connection, [*blocks, *_proof(owners[0], blocks, fold.at)] if chained else blocks)


def _proof(owner: Owner, blocks: Sequence[Block], at: datetime) -> list[Block]:
    _, digest = pack_content(blocks, [])
    seals = owner.batch, ledger_digest(blocks), None
    head = link(owner.head, digest, at, WRITER, {}, seals)
    row = (WRITER, NO_TOPIC, 0, owner.position + 1, at, WRITER, {}, digest, head, *seals)
    return [
        block(AUDIT, Op.INSERT, [row]),
        block(OWNERS, Op.UPSERT, [(WRITER, NO_TOPIC, 0, owner.epoch, owner.position + 1, head)]),
    ]


async def run(dsn: str, step: str, count: int, work: Batches) -> float:
    """Microseconds per transfer."""
    if step == STEPS[-1]:
        return 1e6 / (await run_ours(dsn, count, work)).rate
    connection = await connect(dsn)
    try:
        steps = _Steps(connection, users(count), _made(work, users(count)))
        if step == "rows":
            await connection.execute(BARE)
            steps.schema = "bare"
        posts: dict[str, Callable[[list[Transfer]], Awaitable[None]]] = {
            "rows": steps.copied, "keys": steps.copied, "claim": steps.claim, "lock": steps.lock,
            "fold": steps.fold, "chain": steps.chain,
        }  # fmt: skip
        await seconds(posts[step], work[:WARM])
        spent = await seconds(posts[step], work[WARM:])
        found = await connection.fetchval(f"SELECT count(*) FROM {steps.schema}.entries")
        if found != 2 * sum(map(len, work)):
            raise RuntimeError(f"{found} entries after step {step}")
        return 1e6 * spent / sum(map(len, work[WARM:]))
    finally:
        await connection.close()


def _made(work: Batches, among: list[Account]) -> list[Made]:
    """The batches folded over accounts at zero."""
    balances = {account: Balance(stored=True) for account in (HOT, *among)}
    made = []
    for number, transfers in enumerate(work):
        fold = Fold(balances, START + timedelta(milliseconds=number))
        for transfer in transfers:
            fold.post(transaction_of(transfer, among))
        at = fold.at.isoformat()
        transactions = [
            f"{t.id}\t{t.kind}\t{t.reference}\t{fingerprint}\t{at}\n"
            for t, fingerprint in zip(fold.transactions, fold.fingerprints, strict=True)
        ]
        entries = ["\t".join(map(str, (*line[:-1], at))) + "\n" for line in fold.entries]
        made.append(Made([*store.blocks_of(fold, number)], "".join(transactions), "".join(entries), set(fold.touched)))
    return made
