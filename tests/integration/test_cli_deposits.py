"""`stablerail deny` and `stablerail shortfall` on a real database: what they print, what they end with, what they move."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from agents.deposits.deposit import Deposit, deposit_id, group_of
from ledger.accounts import SHORTFALL, buffer, spendable
from ledger.posting import Transaction, credit, debit
from ledger.rows import Changes, Connection
from ledger.tables import DEPOSITS, WALLETS
from tests.integration import test_cli
from tests.integration.test_cli import Result
from tests.support import ledger_rig
from tests.support.deposit_rig import USDC, Till, now
from tests.support.ledger_rig import assert_holds, connect_to

databases, dsn, run, clean = ledger_rig.databases, ledger_rig.dsn, test_cli.run, test_cli.clean

ADDRESS = "0x5B38Da6a701c568545dCfcB03FcB875f56beddC4"
ID = "c" * 32
DEPOSIT = deposit_id(group_of("MATIC", "0x1", "0x2", "USDC", 25 * USDC), 0)


@pytest.fixture
def act(dsn: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Till], Awaitable[Any]]], Any]:
    """Runs something on the database beside the commands."""
    monkeypatch.setenv("STABLERAIL_DATABASE_URL", dsn)
    monkeypatch.setenv("STABLERAIL_KAFKA_BOOTSTRAP", "127.0.0.1:1")

    def run(action: Callable[[Till], Awaitable[Any]]) -> Any:
        async def connected() -> Any:
            connection: Connection = await connect_to(dsn)()
            try:
                return await action(Till(connection))
            finally:
                await connection.close()

        return asyncio.run(connected())

    return run


def test_an_address_is_denied_once_under_its_canonical_name_and_every_change_is_in_the_audit(
    run: Callable[..., Result], act: Any
) -> None:
    add = ("deny", "add", "MATIC", ADDRESS, "--reason", "sanctioned", "--actor", "ann")
    assert run(*add).stdout == f"{ADDRESS} on MATIC is denied\n"
    assert run(*add).stdout == f"{ADDRESS} on MATIC is denied already\n"
    listed = run("deny", "list").stdout
    assert listed.count(ADDRESS.lower()) == 1
    assert "sanctioned" in listed
    assert run("deny", "list", "--chain", "ETH").stdout.count("0x") == 0
    assert run("deny", "remove", "matic", ADDRESS.lower(), "--reason", "appeal", "--actor", "bob").exit_code == 0
    gone = run("deny", "remove", "MATIC", ADDRESS, "--reason", "appeal", "--actor", "bob")
    assert (gone.exit_code, gone.stderr.splitlines()[-1]) == (1, f"{ADDRESS} on MATIC is not denied")
    logs = act(lambda till: till.rows("SELECT actor, action, resource_id, after::text FROM audit_logs ORDER BY at"))
    assert [(actor, action, id, json.loads(after)) for actor, action, id, after in logs] == [
        ("ann", "address.denied", f"MATIC:{ADDRESS.lower()}", {"reason": "sanctioned"}),
        ("bob", "address.allowed", f"MATIC:{ADDRESS.lower()}", {"reason": "appeal"}),
    ]
    act(lambda till: assert_holds(till.connection))


def test_a_rescan_is_asked_for_and_in_the_audit(run: Callable[..., Result], act: Any) -> None:
    asked = run("chains", "rescan", "matic", "12345", "--reason", "invariant 4", "--actor", "ann")
    assert asked.stdout == "the worker of chains reads MATIC again, from block 12345 on\n"
    assert run("chains", "rescan", "MATIC", "12345", "--reason", "invariant 4", "--actor", "ann").exit_code == 0
    assert run("chains", "rescan", "MATIC", "-1", "--reason", "x", "--actor", "ann").exit_code == 2
    assert act(lambda till: till.rows("SELECT chain FROM chain_cursors")) == [("rescan:MATIC:12345",)]
    logs = act(lambda till: till.rows("SELECT actor, action, resource_id, after::text FROM audit_logs"))
    assert [(*log[:3], json.loads(log[3])) for log in logs] == [
        ("ann", "chain.rescan", "MATIC", {"from_block": 12345, "reason": "invariant 4"})
    ] * 2
    act(lambda till: assert_holds(till.connection))


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("MATIC", "0x12", "--reason", "r", "--actor", "ann"), 2, "an EVM address is 0x and 40 hexadecimal digits"),
        (("DOGE", ADDRESS, "--reason", "r", "--actor", "ann"), 2, "DOGE"),
        (("MATIC", ADDRESS, "--reason", " ", "--actor", "ann"), 2, "say why"),
    ],
)
def test_a_denial_that_cannot_be_meant_changes_nothing(
    run: Callable[..., Result], act: Any, arguments: tuple[str, ...], code: int, said: str
) -> None:
    refused = run("deny", "add", *arguments)
    assert refused.exit_code == code
    assert said in refused.stderr
    assert act(lambda till: till.rows("SELECT 1 FROM denied_addresses")) == []


async def _owes(till: Till) -> None:
    """Ada owes 10 of a deposit of 25 that was reversed."""
    at = now()
    deposit = Deposit(
        DEPOSIT, 0, "MATIC", "0x1", "0x2", "USDC", 25 * USDC, "ada", "reversed", 1, "", None, 7, None, at, at, at
    )
    changes = Changes()
    changes.insert(DEPOSITS, deposit)
    changes.insert(WALLETS, ("MATIC", "0x2", "ada", "w", at))
    await till.commit(changes)
    legs = (debit(spendable("ada"), 25 * USDC), credit(buffer(), 25 * USDC))
    await till.post(Transaction("1" * 32, "deposit", DEPOSIT, legs))
    await till.spend("ada", 10 * USDC)
    legs = (debit(buffer(), 25 * USDC), credit(spendable("ada"), 25 * USDC)._replace(remainder=SHORTFALL))
    await till.post(Transaction("2" * 32, "deposit_reversed", DEPOSIT, legs))


async def _comes(till: Till, amount: int) -> None:
    legs = (debit(spendable("ada"), amount), credit(buffer(), amount))
    await till.post(Transaction(f"{amount:032x}", "test", "later", legs))


def _settle(run: Callable[..., Result], *more: str) -> Result:
    return run("shortfall", "settle", DEPOSIT, *more, "--actor", "ann")


def test_what_is_owed_is_taken_from_what_comes_later_and_never_twice(run: Callable[..., Result], act: Any) -> None:
    act(_owes)
    listed = run("shortfall", "list").stdout
    assert (DEPOSIT in listed, "ada" in listed, "10.000000" in listed) == (True, True, True)
    empty = _settle(run)
    assert (empty.exit_code, empty.stderr.strip()) == (
        1, "nothing_owed: ada has nothing that could be taken; 10.000000 is owed",
    )  # fmt: skip
    act(lambda till: _comes(till, 4 * USDC))
    assert _settle(run).stdout == "took 4.000000; 6.000000 is still owed\n"
    assert _settle(run).exit_code == 1
    act(lambda till: _comes(till, 9 * USDC))
    assert _settle(run).stdout == "took 6.000000; 0.000000 is still owed\n"
    over = _settle(run)
    assert (over.exit_code, over.stderr.strip()) == (1, f"nothing_owed: nothing is owed of deposit {DEPOSIT}")
    assert DEPOSIT not in run("shortfall", "list").stdout

    async def left(till: Till) -> tuple[int, int]:
        await assert_holds(till.connection)
        return await till.balance(spendable("ada")), await till.balance(SHORTFALL)

    assert act(left) == (3 * USDC, 0)
    logs = act(lambda till: till.rows("SELECT actor, action, resource_id FROM audit_logs"))
    assert logs == [("ann", "shortfall.settled", DEPOSIT)] * 2


def test_what_is_owed_is_written_off_by_two_people_and_nothing_is_taken_meanwhile(
    run: Callable[..., Result], act: Any
) -> None:
    act(_owes)
    for _ in range(2):  # the same id asks once
        asked = _settle(run, "--write-off", "--reason", "lost", "--id", ID)
        assert (asked.exit_code, "requested" in asked.stdout) == (0, True)
    twice = _settle(run, "--write-off", "--reason", "lost")
    assert (twice.exit_code, "nothing_left" in twice.stderr) == (1, True), "another id, the same loss"
    act(lambda till: _comes(till, 4 * USDC))
    meanwhile = _settle(run)
    assert (meanwhile.exit_code, "waits for approval" in meanwhile.stderr) == (1, True)
    assert run("ledger", "correct", "approve", ID, "--actor", "ann").exit_code == 1
    assert run("ledger", "correct", "approve", ID, "--actor", "bob").exit_code == 0
    assert DEPOSIT not in run("shortfall", "list").stdout
    assert _settle(run).exit_code == 1
    assert _settle(run, "--write-off", "--reason", "again").exit_code == 1

    async def left(till: Till) -> tuple[int, int]:
        await assert_holds(till.connection)
        return await till.balance(spendable("ada")), await till.balance(SHORTFALL)

    assert act(left) == (4 * USDC, 0)
