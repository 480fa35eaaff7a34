"""The rules of the oracle, and that it shares no code with the product."""

from __future__ import annotations

import ast
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import defects
from tests.chaos.inputs import Input
from tests.chaos.oracle import Told, Transfer, World, judge

HERE = Path(__file__).parent
HOT, WALLET, OUT, GONE = "0xhot", "0xada", "0xout", "0xgone"
PRODUCT = {"agents", "ledger", "chain", "connectors", "topics", "stablerail"}


def told(**other: Any) -> Told:
    """Ada deposited 100, one of them twice over, paid 30, and invested 20 of 25."""
    said = Told(
        balances={"ada": {"available": 50_000_000, "held": 0, "exposure": 20_000_000}},
        deposits=[
            *[("0x1", WALLET, amount, "finalized") for amount in (60_000_000, 20_000_000, 20_000_000)],
            ("0x2", WALLET, 5, "parked"),
            ("0x3", WALLET, 9_000_000, "reversed"),
        ],
        withdrawals=[("w1", "ada", "k1", "completed", 30_000_000, OUT), ("w2", "ada", "k2", "failed", 10**15, GONE)],
        orders={"o1": ("filled", 20_000_000)},
        nonces=[(0, "w1"), (1, None)],
        custody=70_000_005,
        books=[],
        credits={("t1", 60_000_000)},
        said_credits={("t1", 60_000_000)},
        said_ends={"w1": {"completed"}, "w2": {"failed"}},
        said_orders={"o1": {"filled"}},
        letters=Counter({("orders.placed", 2, 7, b"{"): 1}),
        journal=[(5, "s", "t", 0, 1, 1), (7, "s", "t", 0, 2, 2), (7, "s", "t", 1, 1, 1), (8, "s", "t", 0, 2, 3)],
        left={"holds are open": 0},
    )
    return replace(said, **other)


INPUTS = [
    Input("deposit", "ada", "0x1"),
    Input("withdraw", "ada", "k1", {"to": OUT, "amount": 30_000_000, "expect": "paid"}),
    Input("withdraw", "ada", "k2", {"to": GONE, "amount": 10**15, "expect": "refused"}),
    Input("order", "ada", "o1", {"amount": 25_000_000, "fills": [5_000_000, 15_000_000], "end": "filled"}),
    Input("malformed", "", b"{".hex(), {"topic": "orders.placed", "partition": 2, "offset": 7}),
]
WORLD = World(
    inbound=[
        Transfer("MATIC", "0x1", "0xx", WALLET, 60_000_000), Transfer("MATIC", "0x1", "0xx", WALLET, 20_000_000),
        Transfer("MATIC", "0x1", "0xx", WALLET, 20_000_000), Transfer("MATIC", "0x2", "0xx", WALLET, 5),
    ],
    outbound=[Transfer("MATIC", "0x9", HOT, OUT, 30_000_000)],
    owners={WALLET: "ada"},
    holdings=70_000_005,
    signer_nonce=2,
)  # fmt: skip


def test_what_is_as_it_must_be_makes_no_difference() -> None:
    assert judge(INPUTS, WORLD, told()) == []


PAID_TWICE = replace(WORLD, outbound=[*WORLD.outbound, Transfer("MATIC", "0xa", HOT, OUT, 30_000_000)])
UNASKED = replace(WORLD, outbound=[*WORLD.outbound, Transfer("MATIC", "0xa", HOT, "0xelse", 1)])


@pytest.mark.parametrize(
    ("rule", "world", "said"),
    [
        ("paid once or not at all", PAID_TWICE, told()),
        ("paid once or not at all", replace(WORLD, outbound=[]), told()),
        ("a payment was asked for", UNASKED, told()),
        ("a withdrawal ends", WORLD, told(withdrawals=[("w1", "ada", "k1", "failed", 1, OUT), told().withdrawals[1]])),
        ("a withdrawal is one", WORLD, told(withdrawals=told().withdrawals[1:])),
        ("a withdrawal was asked for", WORLD, told(withdrawals=[*told().withdrawals, ("w3", "ada", "k3", "failed", 1, "x")])),
        ("credited once", WORLD, told(deposits=[*told().deposits, ("0x1", WALLET, 20_000_000, "finalized")])),
        ("credited once", WORLD, told(deposits=told().deposits[1:])),
        ("credited once", WORLD, told(deposits=[*told().deposits, ("0x4", WALLET, 9, "credited")])),
        ("an order ends", WORLD, told(orders={"o1": ("reserved", 20_000_000)}, said_orders={"o1": {"reserved"}})),
        ("an order ends", WORLD, told(orders={"o1": ("filled", 5_000_000)})),
        ("a balance", WORLD, told(balances={"ada": {"available": 50_000_001, "held": 0, "exposure": 20_000_000}})),
        ("a balance", WORLD, told(balances={"ada": {"available": 50_000_000, "held": 5, "exposure": 20_000_000}})),
        ("a balance", WORLD, told(balances={})),
        ("nonces", WORLD, told(nonces=[(0, "w1"), (2, None)])),
        ("one nonce for life", WORLD, told(nonces=[(0, "w1"), (1, "w1")])),
        ("one nonce for life", WORLD, told(nonces=[(0, "w1"), (1, "w2"), (1, None)])),
        ("told", WORLD, told(said_credits=set())),
        ("told", WORLD, told(said_credits={("t1", 60_000_000), ("t2", 1)})),
        ("told", WORLD, told(said_ends={"w2": {"failed"}})),
        ("told", WORLD, told(said_ends={"w1": {"completed", "failed"}, "w2": {"failed"}})),
        ("told", WORLD, told(said_orders={})),
        ("nothing is dropped", WORLD, told(letters=Counter({("orders.placed", 2, 7, b"other"): 1}))),
        ("who was replaced does nothing more", WORLD, told(journal=[*told().journal, (9, "s", "t", 0, 1, 4)])),
        ("the journal is whole", WORLD, told(journal=[*told().journal, (9, "s", "t", 0, 2, 5)])),
        ("the books", WORLD, told(books=["an asset does not sum to zero: USD"])),
        ("the mirror", replace(WORLD, holdings=1), told()),
        ("everything ends", WORLD, told(left={"holds are open": 1})),
    ],
)  # fmt: skip
def test_what_differs_is_said_by_its_rule(rule: str, world: World, said: Told) -> None:
    assert rule in {difference.rule for difference in judge(INPUTS, world, said)}


def test_a_cancelled_withdrawal_may_end_both_ways_and_is_paid_only_when_it_completed() -> None:
    asked = [Input("withdraw", "ada", "k1", {"to": OUT, "amount": 30_000_000, "expect": "either"}), *INPUTS[2:]]
    cancelled = told(
        withdrawals=[("w1", "ada", "k1", "cancelled", 30_000_000, OUT), told().withdrawals[1]],
        said_ends={"w1": {"cancelled"}, "w2": {"failed"}},
        balances={"ada": {"available": 80_000_000, "held": 0, "exposure": 20_000_000}},
    )
    assert judge(asked, WORLD, told()) == []
    assert judge(asked, replace(WORLD, outbound=[]), cancelled) == []
    assert {one.rule for one in judge(asked, WORLD, cancelled)} == {"paid once or not at all", "a balance"}


def test_it_shares_no_code_with_the_product() -> None:
    todo, seen = ["oracle", "witness"], set()
    while todo:
        name = todo.pop()
        seen.add(name)
        for node in ast.walk(ast.parse((HERE / f"{name}.py").read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for module in modules:
                assert module.partition(".")[0] not in PRODUCT, f"{name} imports {module}"
                assert not module.startswith("tests.support"), f"{name} imports {module}"
                if module.startswith("tests.chaos."):
                    todo += [module.rpartition(".")[2]]
    assert seen == {"oracle", "witness", "inputs"}


@pytest.mark.parametrize("defect", defects.DEFECTS, ids=lambda one: one.name)
def test_every_defect_still_fits_the_product(defect: defects.Defect) -> None:
    for change in defect.changes:
        source = (defects.ROOT / change.file).read_text()
        assert source.count(change.before) == 1, f"write {defect.name} anew: {change.file} has changed"
        if change.file.endswith(".py"):
            compile(source.replace(change.before, change.after), change.file, "exec")
