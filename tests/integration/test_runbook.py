"""The runbook: every alert has its line, and the days that have a database of their own are followed."""

from __future__ import annotations

import asyncio
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
from typer.testing import CliRunner

from agents.recovery.redrive_dead_letters import Filter, page
from ledger.migrate import upgrade
from stablerail.cli import app
from stablerail.dev.kafka import Kafka
from tests.integration.test_dead_letters import at, credited, deposit, provision, stored_all, tell, worker
from tests.support.in_process import SCHEMA, Ground, until
from tests.support.invariants import may_break
from tests.support.rebuild import empty_database

__all__ = ["at"]
ROOT: Final = Path(__file__).parents[2]
TEXT: Final = (ROOT / "docs" / "runbook.md").read_text()


@dataclass(frozen=True)
class Step:
    variables: dict[str, str]
    arguments: list[str]
    printed: list[str]


def day(title: str) -> list[Step]:
    """The commands of a section with what they print."""
    section = re.split(r"^## ", TEXT, flags=re.MULTILINE)
    (text,) = [one for one in section if one.startswith(f"{title}\n")]
    steps: list[Step] = []
    for block in re.findall(r"```console\n(.*?)```", text, re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                words = shlex.split(line[2:])
                given = dict(word.split("=", 1) for word in words[: words.index("stablerail")])
                steps.append(Step(given, words[words.index("stablerail") + 1 :], []))
            else:
                steps[-1].printed.append(line)
    return steps


async def follow(steps: list[Step], names: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs them; what stands in the runbook is printed, in its order. `names`: what a word of the runbook is here."""
    for step in steps:
        with monkeypatch.context() as here:
            for name, value in step.variables.items():
                here.setenv(name, names[value])
            arguments = [names.get(word, word) for word in step.arguments]
            done = await asyncio.to_thread(CliRunner().invoke, app, arguments)
        lines = iter([" ".join(line.split()) for line in done.output.splitlines()])
        for wanted in step.printed:
            if wanted == "…":
                continue
            pattern = ".*".join(re.escape(" ".join(part.split())) for part in wanted.split("…"))
            assert any(re.search(pattern, line) for line in lines), f"{arguments}: {wanted!r} is not in\n{done.output}"


def test_every_alert_has_its_line() -> None:
    alerts = set()
    for rules in (ROOT / "deploy" / "prometheus").glob("*.rules.yml"):
        alerts |= set(re.findall(r"alert: (\w+)", rules.read_text()))
    section = re.split(r"^## ", TEXT, flags=re.MULTILINE)[1]
    assert alerts - set(re.findall(r"`(\w+)`", section)) == set()


@pytest.fixture
def settings(at: Ground, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("STABLERAIL_DATABASE_URL", at.dsn)
    monkeypatch.setenv("STABLERAIL_KAFKA_BOOTSTRAP", at.bootstrap)
    monkeypatch.setenv("STABLERAIL_TOPIC_PREFIX", at.prefix)
    return monkeypatch


async def test_dead_letters_are_read_redriven_and_discarded(at: Ground, settings: pytest.MonkeyPatch) -> None:
    async with worker(at):
        await tell(at, deposit("t1"), "event 1")
        await stored_all(at, 1)
        await tell(at, deposit("t9", to="0x12"), "event 9")
        await stored_all(at, 2)
        found = {one.code: one.id for one in await page(at.observer, Filter(), 10)}
        names = {"LETTER": found["unknown_wallet"], "OTHER": found["bad_address"]}
        await follow(day("Dead letters"), names, settings)


async def test_a_broken_invariant_is_shown_and_corrected_by_two(at: Ground, settings: pytest.MonkeyPatch) -> None:
    may_break(at.dsn, "a balance is edited")
    async with worker(at):
        await provision(at)
        await tell(at, deposit("t1"))
        await until(lambda: credited(at), "the deposit is credited")
    await at.observer.execute("UPDATE accounts SET balance = balance + 5 WHERE owner = 'ada'")
    settings.setenv("LIVE", at.dsn)
    await follow(day("An invariant is broken"), {}, settings)
    await follow(day("A buffer is low"), {}, settings)


async def test_a_copy_is_compared_and_a_lost_database_comes_back_closed(
    at: Ground, kafka: Kafka, settings: pytest.MonkeyPatch
) -> None:
    async with worker(at):
        await provision(at)
        await tell(at, deposit("t1"))
        await until(lambda: credited(at), "the deposit is credited")
    async with empty_database(at.dsn) as copy, empty_database(at.dsn) as new:
        settings.setenv("LIVE", at.dsn)
        settings.setenv("COPY", copy)
        await follow(day("A copy to compare with"), {"COPY": copy}, settings)
        await upgrade(new, SCHEMA)
        await follow(day("The database is lost"), {"NEW": new}, settings)
