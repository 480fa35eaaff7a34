"""Baseline: the plainest fold. The same rows as ours without fingerprints, versions, audit chain, owner rows, commit record
and journal; an entry has a number instead of its account's version.

claim ON CONFLICT -> lock sorted -> fold in Python -> one statement of arrays. Array literals, unnested in the SELECT, as ours:
asyncpg's own arrays are slower, and so is unnest in the FROM. Tuned like ours: a generic plan, no JIT, accounts with room on
their pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from ledger.rows import Connection

SCHEMA = """
CREATE SCHEMA plain;
CREATE TABLE plain.accounts (id uuid PRIMARY KEY, system boolean NOT NULL, balance numeric(38, 0) NOT NULL,
    CHECK (system OR balance >= 0)) WITH (fillfactor = 50);
INSERT INTO plain.accounts SELECT id, owner = 'system', 0 FROM accounts;
CREATE TABLE plain.transactions (id uuid PRIMARY KEY, at timestamptz NOT NULL, kind text NOT NULL, reference text NOT NULL);
CREATE INDEX ON plain.transactions USING hash (reference);
CREATE TABLE plain.entries (account_id uuid NOT NULL, transaction_id uuid NOT NULL,
    number bigint GENERATED ALWAYS AS IDENTITY, at timestamptz NOT NULL,
    direction char(1) NOT NULL CHECK (direction IN ('d', 'c')),
    amount numeric(38, 0) NOT NULL CHECK (amount > 0), balance_after numeric(38, 0) NOT NULL,
    PRIMARY KEY (account_id, number));
"""
CLAIM = """INSERT INTO plain.transactions (id, at, kind, reference)
SELECT unnest($1::text::uuid[]), $2, 'deposit', unnest($3::text::text[])
ON CONFLICT DO NOTHING RETURNING id"""
LOCK = """SELECT x.number, a.balance::text FROM unnest($1::text::uuid[]) WITH ORDINALITY AS x(id, number)
JOIN plain.accounts a ON a.id = x.id ORDER BY a.id FOR UPDATE OF a"""
WRITE = """WITH e AS (INSERT INTO plain.entries (account_id, transaction_id, at, direction, amount, balance_after)
    SELECT unnest($1::text::uuid[]), unnest($2::text::uuid[]), $6, unnest($3::text::text[]), unnest($4::text::numeric[]),
        unnest($5::text::numeric[]))
UPDATE plain.accounts a SET balance = x.balance
FROM (SELECT unnest($7::text::uuid[]) AS id, unnest($8::text::numeric[]) AS balance) AS x WHERE a.id = x.id"""

Transfer = tuple[str, str, str, int]
"""Id, reference, account, amount: 32 hex digits each, and base units."""


class Overdrawn(Exception):
    """The plainest refusal: of the whole batch."""


async def post(connection: Connection, hot: str, transfers: Sequence[Transfer], at: datetime) -> None:
    """Posts a batch from the hot account, in a transaction of its own."""
    async with connection.transaction():
        claimed = await connection.fetch(
            CLAIM, _array([t[0] for t in transfers]), at, _array([t[1] for t in transfers])
        )
        if len(claimed) < len(transfers):
            fresh = {row[0].hex for row in claimed}
            transfers = [t for t in transfers if t[0] in fresh]
        wanted = list({hot, *[t[2] for t in transfers]})
        balances = {wanted[row[0] - 1]: int(row[1]) for row in await connection.fetch(LOCK, _array(wanted))}
        accounts, ids, amounts, after = [], [], [], []
        left = balances[hot]
        for id, _, account, amount in transfers:
            balance = balances[account] + amount
            if balance < 0:
                raise Overdrawn(account)
            balances[account] = balance
            left -= amount
            accounts += (account, hot)
            ids += (id, id)
            amounts += (amount, amount)
            after += (balance, left)
        balances[hot] = left
        await connection.execute(
            WRITE, _array(accounts), _array(ids), "{" + ",".join(["d,c"] * len(transfers)) + "}",
            _array(map(str, amounts)), _array(map(str, after)), at,
            _array(balances), _array(map(str, balances.values())),
        )  # fmt: skip


def _array(values: object) -> str:
    return "{" + ",".join(values) + "}"  # type: ignore[arg-type]
