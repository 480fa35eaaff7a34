"""Mistakes made on purpose in a copy of the product: chaos must find each within three minutes, or it proves nothing about the product.

A defect is a few replaced lines. An anchor that is gone, or is there twice, stops it: the defect has to be written anew then.
`make chaos DEFECTS=1` runs them all, `DEFECTS="release_on_timeout"` one. `make chaos CONTROL=1` is the same hunts in a copy without a
mistake: they must find nothing, or what they find with one says little.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from rich.console import Console

from tests.chaos.rig import ROOT
from tests.chaos.run import FIRST_MONEY, Plan, Result, View, run

PACKAGES: Final = ("agents", "chain", "connectors", "ledger", "stablerail", "topics")
FOUND_WITHIN_S: Final = 180.0


class AnchorGone(Exception):
    """The product was changed: the defect no longer fits it."""


@dataclass(frozen=True)
class Change:
    file: str
    before: str
    after: str


@dataclass(frozen=True)
class Defect:
    """`kinds`: faults that bring it to light, where chance would take longer; empty: all."""

    name: str
    means: str
    changes: tuple[Change, ...]
    kinds: tuple[str, ...] = ()
    seconds: float = 45.0
    workers: int = 1
    """Of each movement: one shows most of them, and two take longer to start."""
    weights: dict[str, int] = field(default_factory=dict)
    """Of the load: more of what it is about."""


DEFECTS: Final = (
    Defect(
        "ack_before_commit",
        "the offset is acknowledged when the event is read",
        (
            Change(
                "stablerail/worker.py",
                "            await delivery.offer(Delivered(event.value, partial(ack, app, event)))\n",
                "            ack(app, event)\n            await delivery.offer(Delivered(event.value, lambda: None))\n",
            ),
        ),
        ("kill",),
    ),
    Defect(
        "credit_without_identity",
        "whoever reports a transfer reports another deposit",
        (
            Change(
                "agents/deposits/facts.py",
                "group_of(chain, canonical, address, asset, amount)",
                'group_of(chain, f"{canonical} {source}", address, asset, amount)',
            ),
        ),
        seconds=12,
    ),
    Defect(
        "no_fence",
        "a worker that lost a partition commits in the epoch that it once had",
        (
            Change(
                "ledger/commit.py",
                "    if lost:\n        raise Fenced(stage, lost)\n    return owners\n",
                "    if len(found) < len(epochs):\n        raise Fenced(stage, lost)\n"
                '    return [__import__("dataclasses").replace(o, epoch=epochs[(o.topic, o.partition)]) for o in owners]\n',
            ),
            Change(
                "ledger/sql/inbox.sql",
                "    WHERE (SELECT count(*) FROM owned WHERE epoch = expected) = cardinality($2)\n",
                "    WHERE (SELECT count(*) FROM owned WHERE epoch <> 0 OR expected <> 0) = cardinality($2)\n",
            ),
        ),
        ("freeze",),
        workers=2,
    ),
    Defect(
        "new_nonce_on_retry",
        "a payment whose sending was not answered is signed anew",
        (
            Change(
                "agents/withdrawals/broadcast_transactions.py",
                "    return Retry(answer.code, min(RETRY_S * 2 ** min(received.attempt - 1, 20), RETRY_S_MAX))\n",
                '    withdrawal = facts.withdrawals.get(attempt.withdrawal_id or "")\n'
                "    if withdrawal is None or withdrawal.status != Status.BROADCASTING:\n"
                "        return Done()\n"
                "    _moved, (row, line) = moved(withdrawal, Status.SIGNING, facts.now, NAME)\n"
                "    return Done(inserts=(line,), updates=(row,))\n",
            ),
            Change(
                "agents/withdrawals/withdrawal.py",
                "    Status.BROADCASTING: frozenset({Status.CONFIRMING, *ENDED, Status.MANUAL_REVIEW}),\n",
                "    Status.BROADCASTING: frozenset({Status.SIGNING, Status.CONFIRMING, *ENDED, Status.MANUAL_REVIEW}),\n",
            ),
        ),
        ("lost_send",),
        seconds=25,
        weights={"withdraw": 20},
    ),
    Defect(
        "release_on_timeout",
        "a payment whose sending was not answered has failed, and its money is given back",
        (
            Change(
                "agents/withdrawals/broadcast_transactions.py",
                "    return Retry(answer.code, min(RETRY_S * 2 ** min(received.attempt - 1, 20), RETRY_S_MAX))\n",
                "    from agents.withdrawals.withdrawal import released, settled\n\n"
                '    withdrawal = facts.withdrawals.get(attempt.withdrawal_id or "")\n'
                "    if withdrawal is None or withdrawal.status != Status.BROADCASTING:\n"
                "        return Done()\n"
                '    after, (row, line) = moved(withdrawal, Status.FAILED, facts.now, NAME, "no_answer")\n'
                "    return Done((released(withdrawal),), inserts=(line,), updates=(row,), emits=(settled(after),))\n",
            ),
            Change(
                "agents/withdrawals/broadcast_transactions.py",
                "        emits=(TRANSACTIONS_BROADCAST,),\n",
                '        emits=(TRANSACTIONS_BROADCAST, __import__("topics.catalog").catalog.WITHDRAWALS_SETTLED),\n',
            ),
        ),
        ("lost_send",),
        seconds=25,
        weights={"withdraw": 20},
    ),
    Defect(
        "hold_not_released",
        "what an order did not need is not given back",
        (
            Change(
                "ledger/orders.py",
                "    return Step(ended, (back,), released=remains)\n",
                "    return Step(ended, (), released=remains if back else 0)\n",
            ),
        ),
        seconds=12,
    ),
    Defect(
        "emit_lost_after_commit",
        "now and then a committed batch is not told",
        (
            Change(
                "agents/delivery.py",
                "                for sealed in batch.sealed:\n"
                "                    await emitter.emit(sealed.messages, sealed.stage, sealed.at)\n",
                "                for sealed in batch.sealed:\n"
                "                    if sealed.seq % 7:\n"
                "                        await emitter.emit(sealed.messages, sealed.stage, sealed.at)\n",
            ),
        ),
        seconds=12,
    ),
    Defect(
        "key_per_attempt",
        "each attempt of a call to the custodian has an idempotency key of its own",
        (
            Change(
                "agents/withdrawals/transfer_calls.py",
                "                str(call.idempotency_key),\n",
                '                str(__import__("uuid").uuid4()),\n',
            ),
        ),
        ("partner", "lost_reply"),
        weights={"by_circle": 20},
    ),
    Defect(
        "reversal_forgotten",
        "a credited deposit that the chain does not have stays credited",
        (
            Change(
                "agents/deposits/finalize_deposits.py",
                "    return _reverse(deposit, facts, purses)\n",
                "    return _finalize(deposit, facts) if purses is not None else _reverse(deposit, facts, purses)\n",
            ),
        ),
        seconds=12,
        weights={"ghost": 4},
    ),
    Defect(
        "api_key_ignored",
        "the same request twice is two withdrawals",
        (
            Change(
                "stablerail/api/withdrawal_routes.py",
                "event = WithdrawalRequested(idempotency_key=idempotency_key, **wish",
                'event = WithdrawalRequested(idempotency_key=idempotency_key + __import__("secrets").token_hex(2), **wish',
            ),
        ),
        seconds=12,
    ),
    Defect(
        "mirror_forgotten",
        "a payment leaves the wallet and stays in the mirror",
        (
            Change(
                "agents/withdrawals/withdrawal.py",
                "            debit(WORLD, withdrawal.amount),\n            credit(custody(withdrawal.chain), withdrawal.amount),\n",
                "",
            ),
        ),
        seconds=12,
    ),
    Defect(
        "refusals_dropped",
        "what cannot be read is acknowledged, and nobody keeps it",
        (
            Change(
                "agents/stage.py",
                "        elif isinstance(outcome, Rejected) and stage.reads is None:\n",
                "        elif isinstance(outcome, Rejected) and stage.reads is not None:\n",
            ),
        ),
        seconds=12,
    ),
)


def patched(defect: Defect, into: Path) -> Path:
    """A copy of the product's packages with the defect. Raises AnchorGone."""
    for name in PACKAGES:
        shutil.copytree(ROOT / name, into / name, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    for change in defect.changes:
        path = into / change.file
        text = path.read_text()
        if text.count(change.before) != 1:
            raise AnchorGone(f"{defect.name}: {change.file} has {text.count(change.before)} times: {change.before!r}")
        path.write_text(text.replace(change.before, change.after))
    return into


def run_all(names: Sequence[str], console: Console) -> int:
    """0 when each of them was found in time."""
    known = {defect.name: defect for defect in DEFECTS}
    if unknown := [name for name in names if name not in known]:
        console.print(f"no defect {', '.join(unknown)}; there are {', '.join(known)}")
        return 2
    missed = [defect.name for defect in [known[name] for name in names or known] if not _is_found(defect, console)]
    told = f"not found: {', '.join(missed)}" if missed else f"all {len(names or known)} defects were found"
    console.print(told, style="red" if missed else "green")
    return 1 if missed else 0


def run_controls(console: Console) -> int:
    """0 when no hunt finds anything in a copy without a mistake. Hunts that are alike are run once."""
    hunts: dict[str, list[Defect]] = {}
    for defect in DEFECTS:
        alike = replace(defect, name="", means="", changes=())
        hunts.setdefault(repr(alike), []).append(defect)
    wrong = 0
    for alike in hunts.values():
        result, took_s = _hunt(replace(alike[0], changes=()))
        wrong += bool(result.differences)
        told = f"the hunt for {', '.join(defect.name for defect in alike)}, {took_s:.0f} s"
        console.print(f"{_mark(not result.differences)} {told}:", end=" ", highlight=False, soft_wrap=True)
        console.print(_what(result), markup=False, highlight=False, soft_wrap=True)
    told = f"{wrong} of {len(hunts)} hunts found what is not there" if wrong else f"{len(hunts)} hunts found nothing"
    console.print(told, style="red" if wrong else "green")
    return 1 if wrong else 0


def _is_found(defect: Defect, console: Console) -> bool:
    result, took_s = _hunt(defect)
    is_found = bool(result.differences) and took_s <= FOUND_WITHIN_S
    told = f"{_mark(is_found)} {defect.name} ({defect.means}) {took_s:.0f} s:"
    console.print(told, end=" ", highlight=False, soft_wrap=True)
    console.print(_what(result), markup=False, highlight=False, soft_wrap=True)
    return is_found


def _hunt(defect: Defect) -> tuple[Result, float]:
    """What a run finds, and the seconds that it took from when everything was ready."""
    with tempfile.TemporaryDirectory(prefix="stablerail-defect-") as directory:
        product = patched(defect, Path(directory))
        plan = Plan(
            1, defect.seconds, workers=defect.workers, fund_s=110, drain_s=30, product=product, kinds=defect.kinds, weights=defect.weights,
            pause_s=(0.5, 2),
        )  # fmt: skip
        started: list[float] = []

        def said(phase: str) -> None:
            if phase == FIRST_MONEY:  # everything is ready: the seconds count from here
                started.append(time.monotonic())

        result = asyncio.run(run(plan, View(said=said)))
    return result, time.monotonic() - (started[0] if started else time.monotonic())


def _mark(right: bool) -> str:
    return "[green]✓[/]" if right else "[red]✗[/]"


def _what(result: Result) -> str:
    if not result.differences:
        return f"nothing was found; {len(result.history.faults)} faults hit"
    rules = Counter(difference.rule for difference in result.differences)
    return f"{result.differences[0].text} {dict(rules)}"
