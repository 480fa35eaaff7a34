"""The real ledger against the plain model of its rules: any story one after another, and many at once."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from datetime import timedelta
from itertools import count
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from ledger.accounts import SYSTEM, Account, AccountType, buffer, spendable
from ledger.book import Atomic, post
from ledger.errors import PostingRefused
from ledger.holds import capture, expire, hold, void
from ledger.posting import Transaction, credit, debit
from ledger.reversals import reversal
from ledger.rows import Connection
from ledger.store import Posted
from tests.support import ledger_rig
from tests.support.ledger_model import Model, Wishes
from tests.support.ledger_rig import AT, assert_holds, connect_to

databases, dsn = ledger_rig.databases, ledger_rig.dsn

OPERATIONS_PER_CONNECTION = int(os.environ.get("STABLERAIL_TEST_LEDGER_OPERATIONS", "20"))
"""Of each of the 200 connections: 20 take about fifteen seconds on two cores, 80 a minute."""

users_ = st.integers(0, 2)
amounts = st.integers(1, 9)


async def stored(connection: Connection) -> dict[str, int]:
    rows = await connection.fetch("SELECT replace(id::text, '-', ''), balance::text FROM accounts WHERE version > 0")
    return {id: int(balance) for id, balance in rows}


def modelled(model: Model) -> dict[str, int]:
    touched = {account for moves in model.moves.values() for account, _ in moves} | set(model.balances)
    return {account.id: model.balances[account] for account in touched if model.balances[account]}


def code_of(result: Posted | PostingRefused) -> str:
    return "" if isinstance(result, Posted) else result.code


class Story(RuleBasedStateMachine):
    """Batches of any wishes, posted to the real ledger and to the model. Each story has customers of its own."""

    dsn = ""
    stories = count(1)

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.connection: Connection = self.loop.run_until_complete(connect_to(self.dsn)())
        self.story = next(self.stories)
        self.users = [f"{name}{self.story}" for name in ("ada", "bob", "cyd")]
        self.model, self.at, self.number = Model(), AT, 0
        self.batch: list[Transaction] = []
        self.told: list[Transaction] = []

    def teardown(self) -> None:
        self.loop.run_until_complete(self.connection.close())
        self.loop.close()

    def wish(self, make: Callable[[str], Transaction]) -> None:
        self.number += 1
        self.batch.append(make(f"{self.story:016x}{self.number:016x}"))
        self.told.append(self.batch[-1])  # a later wish of the same batch may be about it

    def pick(self, which: int) -> str:
        """The id of something wished for before, or of nothing."""
        return self.told[which % len(self.told)].id if self.told else "0" * 32

    @rule(user=users_, amount=amounts)
    def deposit(self, user: int, amount: int) -> None:
        legs = (debit(spendable(self.users[user]), amount), credit(buffer(str(self.story)), amount))
        self.wish(lambda id: Transaction(id, "top_up", "", legs))

    @rule(user=users_, amount=amounts)
    def transfer(self, user: int, amount: int) -> None:
        legs = (debit(spendable(self.users[user - 1]), amount), credit(spendable(self.users[user]), amount))
        self.wish(lambda id: Transaction(id, "transfer", "", legs))

    @rule(user=users_, amount=amounts, hours=st.none() | st.integers(-1, 3))
    def hold(self, user: int, amount: int, hours: int | None) -> None:
        until = None if hours is None else self.at + timedelta(hours=hours)
        pending = Account(self.users[user], AccountType.PENDING_WITHDRAWAL)
        source = spendable(self.users[user])
        self.wish(
            lambda id: hold(id, "hold", "", source=source, pending=pending, amount=amount, expires_at=until)
        )  # fmt: skip

    @rule(which=st.integers(0, 20), amount=amounts)
    def capture(self, which: int, amount: int) -> None:
        legs = (debit(buffer(str(self.story)), amount),)
        hold_id = self.pick(which)
        self.wish(lambda id: capture(id, "capture", "", hold_id=hold_id, amount=amount, legs=legs))

    @rule(which=st.integers(0, 20), expires=st.booleans())
    def release(self, which: int, expires: bool) -> None:
        hold_id = self.pick(which)
        self.wish(lambda id: expire(hold_id, "expired", "") if expires else void(id, "void", "", hold_id=hold_id))

    @rule(which=st.integers(0, 20), amount=st.none() | amounts)
    def reverse(self, which: int, amount: int | None) -> None:
        of = self.pick(which)
        self.wish(lambda id: reversal(id, "reversal", "", of=of, amount=amount))

    @precondition(lambda self: self.told)
    @rule(which=st.integers(0, 20), reference=st.sampled_from(["", "", "something else"]))
    def repeat(self, which: int, reference: str) -> None:
        self.batch.append(self.told[which % len(self.told)]._replace(reference=reference))

    @precondition(lambda self: self.batch)
    @rule(grouped=st.integers(0, 3), hours=st.integers(0, 2))
    def post(self, grouped: int, hours: int) -> None:
        """The first of the batch as an atomic group, the others one by one."""
        self.at += timedelta(hours=hours)
        group, rest = self.batch[:grouped], self.batch[grouped:]
        self.batch = []
        expected = self.expect_group(group) + [self.model.post(transaction, self.at) for transaction in rest]
        requests = [*([Atomic(tuple(group))] if group else []), *rest]
        posted = self.loop.run_until_complete(post(self.connection, "test", requests, self.at))
        assert [code_of(result) for result in posted.results] == expected
        balances = self.loop.run_until_complete(stored(self.connection))
        ours = {account.id for account in self.model.balances}
        assert {id: held for id, held in balances.items() if held and id in ours} == modelled(self.model)

    def expect_group(self, group: list[Transaction]) -> list[str]:
        known = [self.model.posted.get(transaction.id) == transaction for transaction in group]
        codes = self.model.post_all(group, self.at)
        if not any(codes):
            return codes
        guilty = group[len(codes) - 1]
        return [
            "" if known[place] else codes[-1] if transaction is guilty else "group_refused"
            for place, transaction in enumerate(group)
        ]


def test_any_story_of_postings_holds_and_reversals_ends_as_the_rules_say(dsn: str) -> None:
    Story.dsn = dsn
    run_state_machine_as_test(Story, settings=settings(max_examples=40, stateful_step_count=30, deadline=None))

    async def check() -> None:
        connection: Connection = await connect_to(dsn)()
        await assert_holds(connection)
        await connection.close()

    asyncio.run(check())


@pytest.mark.timeout(300)
async def test_what_two_hundred_connections_post_at_once_is_what_one_after_another_would_have_posted(dsn: str) -> None:
    users = [f"u{n}" for n in range(8)]
    buffers = [buffer(str(n)) for n in range(4)]
    setup: Connection = await connect_to(dsn)()
    legs = [leg for user in users for leg in (debit(spendable(user), 100), credit(buffers[0], 100))]
    pending = [Account(user, AccountType.PENDING_WITHDRAWAL) for user in users]
    legs += [leg for account in (*pending, *buffers[1:]) for leg in (debit(account, 1), credit(buffers[0], 1))]
    first = Transaction("f" * 32, "opening", "", tuple(legs))
    opened = await post(setup, "opening", [first], AT)
    assert opened.sealed
    acknowledged: list[tuple[int, Transaction, Posted]] = [(opened.sealed.seq, first, _posted(opened.results[0]))]
    refused: list[str] = []
    shared = Wishes(Random(0), users, buffers)

    # the product gives a connection ten seconds, in which a loaded machine makes few
    connecting, all_there = asyncio.Semaphore(10), asyncio.Barrier(200)

    async def work(number: int) -> None:
        async with connecting:
            connection: Connection = await connect_to(dsn)()
        try:
            await all_there.wait()
            await ask(number, connection)
        finally:
            await connection.close()

    async def ask(number: int, connection: Connection) -> None:
        wishes = Wishes(Random(number), users, buffers, name=str(number), holds=shared.holds, posted=shared.posted)
        for _ in range(OPERATIONS_PER_CONNECTION):
            wish = wishes.next()
            batch = await post(connection, f"writer {number}", [wish], AT + timedelta(minutes=len(acknowledged) % 60))
            result = batch.results[0]
            if isinstance(result, PostingRefused):
                refused.append(result.code)
            elif result.existed:
                assert batch.sealed is None
            else:
                assert batch.sealed
                acknowledged.append((batch.sealed.seq, wish, result))
                wishes.learn(wish)

    await asyncio.gather(*(work(number) for number in range(200)))
    assert {"insufficient_funds", "hold_ended", "hold_exceeded", "reversal_exceeded"} <= set(refused)
    model = Model()
    for _, transaction, result in sorted(acknowledged, key=lambda each: each[0]):
        before = dict(model.balances)
        assert model.post(transaction, result.at) == ""
        after = {entry.account_id: entry.balance_after for entry in result.entries}
        changed = {a.id: held for a, held in model.balances.items() if held != before.get(a, 0)}
        assert after.items() >= changed.items(), transaction
    assert {id: held for id, held in (await stored(setup)).items() if held} == modelled(model)
    assert min(held for account, held in model.balances.items() if account.owner != SYSTEM) >= 0
    deadlocks = await setup.fetchval("SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()")
    assert deadlocks == 0
    await assert_holds(setup)
    await setup.close()


def _posted(result: Posted | PostingRefused) -> Posted:
    assert isinstance(result, Posted)
    return result
