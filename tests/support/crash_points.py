"""Where crash tests hold a worker, and the rig that the tests of a module share.

A module takes the fixtures by name, and sets what its workers are started with:
`SETTINGS = {...}; rigs, rig = crash_points.rigs, crash_points.rig`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
import pytest_asyncio

from stablerail.dev.kafka import Kafka
from stablerail.dev.postgres import Postgres
from tests.support.crash_rig import CrashRig, Found, Rigs, crash_rig
from tests.support.proxies import Hold, Match, Where, commit_after, produce


@dataclass(frozen=True)
class Point:
    """The request or reply that is held, and what a worker that stops there has done."""

    name: str
    proxy: Literal["postgres", "kafka"]
    where: Where
    match: Callable[[CrashRig], Match]
    leaves: Found

    def __str__(self) -> str:
        return self.name

    def hold(self, rig: CrashRig) -> Hold:
        hold = (rig.postgres if self.proxy == "postgres" else rig.kafka).hold(self.match(rig), self.where)
        rig.holds.append(hold)
        return hold


def commit(_rig: CrashRig) -> Match:
    """The commit of a batch."""
    return commit_after("INSERT INTO inbox", "INSERT INTO outbox")


def journal(rig: CrashRig) -> Match:
    """A commit record on its way to the journal."""
    return produce(rig.topic("journal"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rigs(
    request: pytest.FixtureRequest, scratch: Path, postgres: Postgres, kafka: Kafka
) -> AsyncIterator[Rigs[CrashRig]]:
    rigs = Rigs(partial(crash_rig, scratch, postgres, kafka, request.module.SETTINGS))
    yield rigs
    await rigs.close()


@pytest_asyncio.fixture(loop_scope="module")
async def rig(rigs: Rigs[CrashRig]) -> CrashRig:
    """One worker, idle, that owns every partition."""
    return await rigs.quiet()
