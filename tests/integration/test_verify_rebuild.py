"""Invariant 12: `stablerail verify --rebuild` compares a database that goes on working with what the journal makes of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from unittest.mock import ANY

import orjson
import pytest

from stablerail import verify_rebuild
from stablerail.config import Settings, load_settings
from stablerail.dev.kafka import Kafka
from stablerail.invariants import Invariants
from stablerail.metrics import Metrics
from stablerail.rebuild import JournalReader
from stablerail.verify_rebuild import scratch_names
from tests.integration import test_cli
from tests.integration.test_cli import Result
from tests.integration.test_rebuild import live
from tests.support.in_process import Ground, ground
from tests.support.invariants import may_break
from topics.catalog import JOURNAL

run, clean = test_cli.run, test_cli.clean


@pytest.fixture
async def at(database: str, kafka: Kafka, topic_prefix: str) -> AsyncIterator[Ground]:
    async with ground(database, kafka.bootstrap, topic_prefix, []) as it:
        yield it


def settings_of(at: Ground) -> Settings:
    return load_settings(env_file=None, database_url=at.dsn, kafka_bootstrap=at.bootstrap, topic_prefix=at.prefix)


async def told(at: Ground, run: Callable[..., Result]) -> dict[str, Any]:
    """What the command says of 12."""
    done = await asyncio.to_thread(
        run, "verify", "--rebuild", "env:STABLERAIL_DATABASE_URL", "--format", "json", database_url=at.dsn,
        kafka_bootstrap=at.bootstrap, topic_prefix=at.prefix,
    )  # fmt: skip
    (result,) = [one for one in orjson.loads(done.stdout)["invariants"] if one["number"] == 12]
    assert not await at.observer.fetch(
        "SELECT FROM pg_database WHERE starts_with(datname, $1)", scratch_names(settings_of(at))
    )
    return dict(result)


async def test_a_database_that_works_on_while_it_is_compared_equals_its_journal(
    at: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of it is journaled before the moment, some after it; and what is committed later is not compared."""
    to_end, compared = JournalReader.to_end, verify_rebuild._compared
    async with at.process() as services:
        connection = await services.connect()
        await live(connection, 0, 2)
        await services.relay.journal()
        await live(connection, 2, 1)
        there: list[int] = []

        async def locked(reader: JournalReader) -> None:
            await to_end(reader)
            await live(connection, 3, 1)  # who commits now cannot journal it yet
            there.append(await at.observer.fetchval("SELECT count(*) FROM outbox"))

        async def later(*given: Any) -> Any:
            await services.relay.journal()
            await live(connection, 4, 1)
            await services.relay.journal()
            return await compared(*given)

        monkeypatch.setattr(JournalReader, "to_end", locked)
        monkeypatch.setattr(verify_rebuild, "_compared", later)
        result = await verify_rebuild.verify_rebuild(settings_of(at), at.dsn)
        assert await verify_rebuild.stored(at.observer) == [replace(result, at=ANY)]
    assert (result.offending, result.checked) == ((), there[0])


async def test_a_row_written_beside_the_journal_is_found_told_as_a_metric_and_mended(
    at: Ground, run: Callable[..., Result]
) -> None:
    may_break(at.dsn, "a row is edited")
    async with at.process() as services:
        connection = await services.connect()
        await live(connection, 0, 1)
        await services.relay.journal()
        metrics = Metrics()
        looks = Invariants(settings_of(at), services, metrics.invariants)
        labels = {"number": "12", "name": verify_rebuild.NAME}

        async def metric() -> tuple[float | None, float | None]:
            metrics.invariants(await looks.look(connection))
            found = metrics.registry.get_sample_value
            return (
                found("stablerail_invariant_offending", labels),
                found("stablerail_invariant_checked_timestamp_seconds", {"number": "12"}),
            )

        assert await metric() == (None, None)
        names = {"database_url": at.dsn, "kafka_bootstrap": at.bootstrap, "topic_prefix": at.prefix}
        nothing = await asyncio.to_thread(run, "keys", "revoke", "none", **names)
        assert nothing.exit_code == 1, "who finds nothing to change writes no commit, and leaves no difference"
        await at.observer.execute("UPDATE wallets SET user_id = 'eve'")
        before = datetime.now(UTC).timestamp()
        result = await told(at, run)
        assert not result["holds"]
        assert result["offending"][0] == "wallets: 0 rows only in the database, 0 only in the journal, 1 differ"
        assert "eve" in result["offending"][1]
        offending, looked_at = await metric()
        assert offending == 3
        assert looked_at is not None
        assert looked_at >= before
        await at.observer.execute("UPDATE wallets SET user_id = 'odd \"user\",\\'")
        assert (await told(at, run))["holds"]
        assert (await metric())[0] == 0
        await at.send(JOURNAL, b"what?", b"is this")
        assert (await told(at, run))["holds"], "that is none of ours, and nothing is missing"
        await at.send(JOURNAL, (1_000).to_bytes(8, "big"), b"is this")
        result = await told(at, run)
        assert result["offending"][0].startswith("the journal is broken: ")
