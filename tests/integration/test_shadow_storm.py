"""Twenty thousand movements beside a legacy table while phases come and go, who posts is killed, and the table is edited.

Each edit is found, with its value, nothing else is reported, and both have every balance that the movements make.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pytest

from ledger.accounts import AccountType
from ledger.commit import TRANSIENT
from ledger.errors import PhaseRefused
from ledger.shadow import Phase
from stablerail.dev.processes import Child
from tests.integration import test_shadow
from tests.integration.test_shadow import Beside
from tests.support import ledger_rig
from tests.support.shadow_worker import CREDITED, DEALT, MOVEMENTS, customer, movement

databases, dsn, beside = ledger_rig.databases, ledger_rig.dsn, test_shadow.beside

WORKERS = 3
EDITS = 25
KILLS = 12
SEED = 20_260_701


class Posters:
    def __init__(self, dsn: str, directory: Path) -> None:
        self._dsn, self._directory = dsn, directory
        self._started = 0
        self.done = [0] * WORKERS
        """Where each begins again."""
        self.children = [self._start(number) for number in range(WORKERS)]

    def _start(self, number: int) -> Child:
        given = {"dsn": self._dsn, "number": number, "workers": WORKERS, "done": self.done[number]}
        self._started += 1
        log = self._directory / f"poster-{self._started}.log"
        return Child([sys.executable, "-m", "tests.support.shadow_worker", json.dumps(given)], log=log)

    def posted(self) -> int:
        """Movements known to be posted, one worker's chunks more or less."""
        for number, child in enumerate(self.children):
            lines = child.log.read_text().split("\n")[:-1]
            self.done[number] = max(self.done[number], *(int(line) for line in lines if line.isdigit()), 0)
        return min(self.done)

    def kill(self, number: int) -> None:
        self.children[number].kill()
        self.posted()
        self.children[number] = self._start(number)

    def have_ended(self) -> bool:
        for child in self.children:
            assert child.returncode in (None, 0), child.log.read_text()
        return all(child.returncode == 0 for child in self.children)


async def moved(beside: Beside, by: int) -> None:
    """A step to another phase, where there is one and nobody else takes it."""
    try:
        await beside.move(by, force="a storm")
    except (PhaseRefused, *TRANSIENT):
        pass


async def edited(beside: Beside, edits: dict[str, int], rng: random.Random) -> None:
    """Somebody adds to a row that is there."""
    users = [row[0] for row in await beside.admin.fetch("SELECT user_id FROM public.balances ORDER BY user_id")]
    left = [user for user in users if user not in edits]
    if left:
        user, by = rng.choice(left), rng.randrange(1, 10**6)
        await beside.admin.execute(
            "UPDATE public.balances SET usdc = usdc + $2 WHERE user_id = $1", user, Decimal(by).scaleb(-6)
        )
        edits[user] = by


@pytest.mark.timeout(600)
async def test_every_edit_is_found_and_nothing_else_while_phases_move_and_who_posts_is_killed(
    beside: Beside, tmp_path: Path
) -> None:
    rng, edits, phases = random.Random(SEED), dict[str, int](), Counter[Phase]()
    await beside.begin(Phase.SHADOW)
    posters = Posters(beside.dsn, tmp_path)
    kills = steps = 0
    try:
        async with asyncio.timeout(500):
            while not posters.have_ended():
                # each at its own share of the work, however fast it goes
                share = posters.posted() / MOVEMENTS
                if kills < KILLS * share:
                    posters.kill(rng.randrange(WORKERS))
                    kills += 1
                if len(edits) < EDITS * share:
                    await edited(beside, edits, rng)
                if steps < 200 * share:
                    await moved(beside, rng.choice((-1, 1, 1) if steps % 20 < 10 else (-1, -1, 1)))
                    steps += 1
                    phases[Phase(await beside.plain.fetchval("SELECT phase FROM shadow"))] += 1
                await asyncio.sleep(0.005)
    finally:
        for child in posters.children:
            child.kill()
    assert kills >= KILLS - 1
    assert len(edits) >= EDITS - 2
    assert set(phases) == set(Phase), phases
    while not Phase(await beside.plain.fetchval("SELECT phase FROM shadow")).writes:
        await moved(beside, 1 if await beside.plain.fetchval("SELECT phase = 'off' FROM shadow") else -1)

    given = Counter(customer(k) for k in range(0, MOVEMENTS, 2))
    usdc = {user: number * (CREDITED - DEALT) for user, number in given.items()}
    power = {user: number * DEALT for user, number in given.items()}
    found = await beside.admin.fetch(
        "SELECT user_id, (usdc * 1000000)::bigint, (power * 1000000)::bigint FROM public.balances"
    )
    assert {row[0]: row[2] for row in found} == power
    assert {row[0]: row[1] for row in found} == {user: units + edits.get(user, 0) for user, units in usdc.items()}
    held = await beside.plain.fetch("SELECT owner, type, balance FROM accounts WHERE owner LIKE 'user-%'")
    assert {row[0]: row[2] for row in held if row[1] == "usdc_balance"} == usdc
    assert {row[0]: row[2] for row in held if row[1] == "fiat_exposure"} == power
    assert sorted(await beside.differences()) == sorted(
        (user, AccountType.USDC_BALANCE, usdc[user], Decimal(usdc[user] + by)) for user, by in edits.items()
    )
    ids = [movement(k).id for k in range(MOVEMENTS)]
    assert await beside.plain.fetchval("SELECT count(*) FROM transactions WHERE id = ANY($1::text[]::uuid[])", ids) == (
        MOVEMENTS
    )
