"""What a legacy table in another server waits for: what is on its way rings nobody, what does not go on does; what it missed."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest

from agents import lone_writer
from agents.treasury import tell_legacy
from ledger import shadow_elsewhere, shadow_phases
from ledger.shadow import Phase
from stablerail.metrics import Metrics
from tests.integration import test_shadow_elsewhere
from tests.integration.test_shadow import AT
from tests.integration.test_shadow_elsewhere import NOWHERE, Apart, telling
from tests.support import ledger_rig
from tests.support.in_process import until
from tests.support.ledger_rig import owner

databases, dsn, apart = ledger_rig.databases, ledger_rig.dsn, test_shadow_elsewhere.apart


def told(metrics: Metrics) -> tuple[float | None, float | None]:
    """How much waits, and for how many seconds some of it."""
    values = (
        metrics.registry.get_sample_value(f"stablerail_shadow_{name}") for name in ("waiting", "oldest_age_seconds")
    )
    waiting, oldest_s = values
    return waiting, oldest_s


async def test_where_something_waits_at_every_look_nothing_waits_for_long(apart: Apart) -> None:
    await shadow_phases.begin(apart.plain, Phase.SHADOW, AT, "tests")
    for n in range(3):
        await apart.credit("ada", 1_000_000, f"d{n}")
        assert await apart.elsewhere.give(apart.plain) == 1
        assert told(apart.metrics) == (1, 0)
    await apart.there.execute("ALTER TABLE public.balances ADD CHECK (user_id <> 'bob')")
    await apart.credit("bob", 1_000_000, "d")
    seen = []
    for n in range(3):
        await apart.credit("ada", 1_000_000, f"e{n}")
        await apart.elsewhere.give(apart.plain)
        seen.append(told(apart.metrics)[1] or 0.0)
    assert 0.0 == seen[0] < seen[1] < seen[2], "the table does not take this one"
    await apart.plain.execute("DELETE FROM shadow_outbox")
    await apart.elsewhere.give(apart.plain)
    assert told(apart.metrics) == (0, 0)


async def test_what_waits_longer_and_longer_is_seen_although_each_of_it_is_given(
    apart: Apart, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three posted one is given: the first is another at every look."""
    monkeypatch.setattr(shadow_elsewhere, "BATCH", 1)
    await shadow_phases.begin(apart.plain, Phase.SHADOW, AT, "tests")
    seen = []
    for n in range(6):
        for user in ("ada", "bob", "cy"):
            await apart.credit(user, 1_000_000, f"{user} {n}")
        assert await apart.elsewhere.give(apart.plain) == 1
        seen.append(told(apart.metrics)[1] or 0.0)
    assert 0.0 == seen[3] < seen[4] < seen[5], "of what waited at the fourth look none is younger than that"


async def test_who_stands_by_tells_of_nothing_that_waits(apart: Apart, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lone_writer, "STANDBY_S", 0.02)
    monkeypatch.setattr(tell_legacy, "AWAY_S", 0.02)
    await shadow_phases.begin(apart.plain, Phase.SHADOW, AT, "tests")
    await apart.credit("ada", 1_000_000, "d1")
    metrics, administrator = Metrics(), await owner(apart.dsn)
    away = apart.another(NOWHERE, metrics)

    async def waits() -> bool:
        return told(metrics)[0] == 1

    async def stands_by() -> bool:
        return told(metrics) == (0, 0)

    async with telling(apart, away):
        await until(waits, "it leads, and cannot give")
        while not await administrator.fetchval(lone_writer._sql.lead, tell_legacy.NAME):  # another leads
            await administrator.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_locks JOIN pg_stat_activity USING (pid)"
                " WHERE locktype = 'advisory' AND datname = current_database() AND pid <> pg_backend_pid()"
            )
        await until(stands_by, "it stands by")
    await away.close()
    await administrator.close()


async def test_what_the_table_missed_is_found_by_one_pass_over_all_accounts(
    apart: Apart, monkeypatch: pytest.MonkeyPatch
) -> None:
    await shadow_phases.begin(apart.plain, Phase.OFF, AT, "tests")
    for n in range(5):
        await apart.credit(f"u{n}", 1_000_000, "d")
    monkeypatch.setattr(shadow_phases, "PAGE", 2)
    passes, fetch = [0], asyncpg.Connection.fetch

    async def counted(self: Any, query: str, *args: Any) -> Any:
        passes[0] += query == shadow_phases._sql.behind
        return await fetch(self, query, *args)

    monkeypatch.setattr(asyncpg.Connection, "fetch", counted)
    told: list[int] = []
    assert await shadow_phases.catch_up(apart.plain, apart.elsewhere, told.append) == 5
    assert (told, passes[0]) == ([2, 2, 1], 2), "and one that finds no more"
    assert await apart.waiting() == 5
