"""The KYC vendor's last word on a customer, where approval and rejection are heard at the same moment by their two stages."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import asyncpg
import pytest

from agents.item import read_item
from agents.onboarding import freeze_wallets, request_wallets
from agents.outcome import Stage
from agents.stage import Settled, settle
from ledger.commit import claim_owners
from ledger.rows import Connection
from tests.support import ledger_rig
from tests.support.ledger_rig import AT, connect_to
from topics.envelope import headers_of, value_of
from topics.events import Chain, Event, KycApproved, KycRejected

databases, dsn = ledger_rig.databases, ledger_rig.dsn

WORD = {"user_id": "ada", "vendor": "sumsub", "applicant_id": "a"}
APPROVED = KycApproved.model_validate(WORD | {"vendor_event_id": "1", "approved_at": "2026-07-01T10:00:00Z"})
REJECTED = KycRejected.model_validate(
    WORD | {"vendor_event_id": "2", "rejected_at": "2026-07-01T11:00:00Z", "final": True}
)


def record(topic: str, event: Event) -> Any:
    headers = headers_of(event.ce_type(), event_id=event.identity(), source="test", time=AT)
    return SimpleNamespace(
        topic=topic, partition=0, offset=0, timestamp=0, key=b"ada", value=value_of(event), headers=headers
    )


async def hear(dsn: str, stage: Stage[Any], event: Event, loaded: Callable[[], Any]) -> None:
    """The stage settles the event, tried again as a worker does; `loaded` is waited for after its facts are there."""
    connection: Connection = await connect_to(dsn)()

    async def load(*args: Any) -> Any:
        facts = await stage.load(*args)
        await loaded()
        return facts

    slow = replace(stage, load=load)
    topic = stage.source.name
    async with connection.transaction():
        epochs, _ = await claim_owners(connection, stage.name, [(topic, 0)], AT)

    async def once() -> Settled:
        return await settle(connection, slow, [read_item(slow, record(topic, event))], epochs, AT, None)

    try:
        await once()
    except asyncpg.UniqueViolationError:
        await once()
    await connection.close()


@pytest.mark.parametrize("first", ["approved", "rejected"])
async def test_the_later_word_stands_although_both_are_the_first_that_is_heard(first: str, dsn: str) -> None:
    stages = {"approved": request_wallets.stage((Chain.ETH,)), "rejected": freeze_wallets.stage()}
    events: dict[str, Event] = {"approved": APPROVED, "rejected": REJECTED}
    both, done = asyncio.Barrier(2), asyncio.Event()
    met: set[str] = set()

    def meet(name: str) -> Callable[[], Any]:
        async def wait() -> None:
            if name not in met:
                met.add(name)
                await both.wait()
                if name != first:
                    await done.wait()

        return wait

    async def hears(name: str) -> None:
        await hear(dsn, stages[name], events[name], meet(name))
        done.set()

    async with asyncio.timeout(100):
        await asyncio.gather(*(hears(name) for name in stages))
    connection: Connection = await connect_to(dsn)()
    assert await connection.fetchval("SELECT standing FROM kyc_standings WHERE user_id = 'ada'") == "rejected"
    await connection.close()
