"""shadow.reads and shadow.writes: what a company's own table of balances beside the ledger costs.

Ten thousand customers have a row there and three accounts here, the table's amounts brought in by the backfill. Reads: customers'
balances by HTTP from the ledger, each compared with the table, against the same API when it reads the table alone; and both
again without HTTP, over one connection. Writes: one posting at a time to a customer drawn at random, committed and on disk,
with and without the table. The sides take turns.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from statistics import median
from typing import Any, Final, cast

import aiohttp

from ledger import funds, shadow_phases
from ledger.accounts import AccountType
from ledger.legacy import Legacy
from ledger.reading import owner_balances
from ledger.rows import Connection
from ledger.shadow import Mirror, Phase
from ledger.shadow_backfill import backfill
from stablerail.config import load_settings
from stablerail.connections import opener
from stablerail.dev.processes import free_port
from stablerail.keys import Scope, create_key
from stablerail.metrics import Metrics
from tests.benchmarks.baselines.legacy_balances import SELECT
from tests.benchmarks.ledger_reads import Side, rates
from tests.benchmarks.parts import SCHEMA, Parts, Place, place
from tests.benchmarks.records import Comparison, Record, Spread

CUSTOMERS: Final = 10_000
TURN: Final = 20
LEGACY: Final = Legacy(
    table="public.balances",
    user_column="user_id",
    user_type="text",
    columns={
        AccountType.USDC_BALANCE: "usdc",
        AccountType.PENDING_INVESTMENT: "reserved",
        AccountType.FIAT_EXPOSURE: "power",
    },
    integer=False,
    digits=6,
)
FILL: Final = """
CREATE TABLE public.balances (user_id text PRIMARY KEY, usdc numeric NOT NULL, reserved numeric NOT NULL, power numeric NOT NULL);
INSERT INTO public.balances SELECT 'user_' || n, n % 997 + 1, n % 13 + 1, n % 101 + 1 FROM generate_series(0, {0}) n;
GRANT SELECT, INSERT, UPDATE ON public.balances TO stablerail_app
"""
GOAL_READS: Final = 0.9
GOAL_WRITES: Final = 2.0
CONNECTIONS: Final = 8
SERVERS: Final = {
    "comparing": ("-m", "stablerail.cli", "api"),
    "legacy": ("-m", "tests.benchmarks.baselines.legacy_balances"),
}

Get = Callable[[str], Awaitable[int]]
"""A path's status."""


@dataclass(frozen=True)
class Beside:
    """A connection that has the table beside its ledger, and one that has not."""

    place: Place
    mirrored: Connection
    alone: Connection
    mirror: Mirror


@asynccontextmanager
async def beside(parts: Parts, customers: int) -> AsyncIterator[Beside]:
    """In a place of its own, the phase `ledger`."""
    await parts.prepare([])
    async with place(parts) as here:
        settings = load_settings(env_file=None, database_url=here.dsn, database_schema=SCHEMA)
        mirror = Mirror(LEGACY, Metrics())
        mirrored, alone = [await opener(settings, one, role="none")() for one in (mirror, None)]
        try:
            at = datetime.now(UTC)
            await alone.execute(FILL.format(customers - 1))
            await backfill(alone, mirror, at, actor="benchmark")
            await shadow_phases.begin(alone, Phase.LEDGER, at, "benchmark")
            await alone.execute("VACUUM ANALYZE")
            await alone.execute("CHECKPOINT")
            yield Beside(here, mirrored, alone, mirror)
        finally:
            for one in (mirrored, alone):
                await one.close()


async def reads(parts: Parts, number: int, repeats: int, told: Callable[[str], None]) -> Record:
    draw = random.Random(1)
    async with beside(parts, CUSTOMERS) as here:

        def some(draw: random.Random) -> str:
            return f"user_{draw.randrange(CUSTOMERS)}"

        async def compare(user: str) -> None:
            _, _, differences = await here.mirror.balances(here.mirrored, user)
            assert not differences

        sides = {
            "comparing": Side(some, compare),
            "legacy": Side(some, lambda user: here.alone.fetchrow(SELECT, user)),
            "ledger": Side(some, lambda user: owner_balances(here.alone, user)),
        }
        found: dict[str, list[float]] = {name: [] for name in sides}
        by_http: dict[str, list[float]] = {name: [] for name in SERVERS}
        async with AsyncExitStack() as stack:
            key = await create_key(cast(Any, here.alone), [Scope.READ], "benchmark")
            servers = {
                name: await stack.enter_async_context(_server(here.place, arguments, key.token.get_secret_value()))
                for name, arguments in SERVERS.items()
            }
            for _ in range(repeats):
                for (name, runs), rate in zip(
                    by_http.items(), await _served(list(servers.values()), draw, number), strict=True
                ):
                    runs.append(rate)
                    told(f"by HTTP, {name}: {rate:,.0f} requests/s")
        for _ in range(repeats):
            for (name, runs), rate in zip(found.items(), await rates(list(sides.values()), draw, number), strict=True):
                runs.append(rate)
                told(f"{name}: {rate:,.0f} reads/s")
    return Record(
        "shadow.reads",
        Comparison.of(
            "balances by HTTP, from the ledger and compared with the legacy table, against those of the table alone",
            *("requests/s", by_http["comparing"], by_http["legacy"], GOAL_READS),
        ),
        {
            "statement": Comparison.of(
                "the same without HTTP: our comparing read against a bare select of the legacy row",
                *("reads/s", found["comparing"], found["legacy"], GOAL_READS),
            ),
            "comparing": Comparison.of(
                "a comparing read against one from the ledger that is compared with nothing, both without HTTP",
                *("reads/s", found["comparing"], found["ledger"], GOAL_READS),
            ),
            "customers": CUSTOMERS,
            "connections": CONNECTIONS,
        },
        "customers drawn at random; every fiftieth comparing read asks each alone, too",
    )


@asynccontextmanager
async def _server(here: Place, arguments: Sequence[str], token: str) -> AsyncIterator[Get]:
    """Asks a process of its own for a customer's balances."""
    port = free_port()
    here.start(
        arguments,
        {
            "STABLERAIL_API_PORT": str(port),
            "STABLERAIL_LEGACY_TABLE": LEGACY.table,
            "STABLERAIL_LEGACY_COLUMNS": json.dumps(dict(LEGACY.columns)),
            "STABLERAIL_LEDGER_SHADOW_MODE": "true",
            "STABLERAIL_BALANCE_SOURCE": "ledger",
        },
    )
    base = f"http://127.0.0.1:{port}"
    connector = aiohttp.TCPConnector(limit=CONNECTIONS)
    async with aiohttp.ClientSession(
        base, connector=connector, headers={"Authorization": f"Bearer {token}"}
    ) as session:

        async def get(path: str) -> int:
            async with session.get(path) as answer:
                await answer.read()
                return answer.status

        await _until_ready(here, get)
        yield get


async def _until_ready(here: Place, get: Get) -> None:
    async with asyncio.timeout(100):
        while True:
            here.check_running()
            with suppress(aiohttp.ClientError):
                if await get("/readyz") == 200:
                    return
            await asyncio.sleep(0.1)


async def _served(servers: Sequence[Get], draw: random.Random, number: int) -> list[float]:
    """Requests a second of each, in turns."""
    seconds = [0.0] * len(servers)

    async def ask(get: Get) -> None:
        for _ in range(TURN):
            status = await get(f"/v1/users/user_{draw.randrange(CUSTOMERS)}/balances")
            if status != 200:
                raise RuntimeError(f"answered {status}")

    turns = max(1, number // (TURN * CONNECTIONS))
    for turn in range(-1, turns):
        for which, get in enumerate(servers):
            started = time.perf_counter()
            await asyncio.gather(*(ask(get) for _ in range(CONNECTIONS)))
            seconds[which] += time.perf_counter() - started if turn >= 0 else 0.0
    return [turns * TURN * CONNECTIONS / spent for spent in seconds]


async def writes(parts: Parts, number: int, repeats: int, told: Callable[[str], None]) -> Record:
    draw, reference = random.Random(1), count()
    added: list[float] = []
    own: list[float] = []
    async with beside(parts, CUSTOMERS) as here:

        async def post(connection: Connection) -> float:
            """Milliseconds of one."""
            user = f"user_{draw.randrange(CUSTOMERS)}"
            started = time.perf_counter()
            await funds.credit_usdc(
                connection, "benchmark", user, 1_000_000, datetime.now(UTC), reference=str(next(reference))
            )
            return (time.perf_counter() - started) * 1_000

        for _ in range(repeats):
            took: dict[Connection, list[float]] = {here.mirrored: [], here.alone: []}
            for turn in range(-1, number // TURN):
                for connection, found in took.items():
                    some = [await post(connection) for _ in range(TURN)]
                    found += some if turn >= 0 else []
            own.append(median(took[here.alone]))
            added.append(median(took[here.mirrored]) - own[-1])
            told(f"dual write: {own[-1]:.2f} ms, and {added[-1]:.2f} ms for the table")
    return Record(
        "shadow.writes",
        Comparison.of(
            "what the dual write adds to a commit against the ledger's own commit, both in time",
            *("ms", added, own, GOAL_WRITES),
            less_is_better=True,
        ),
        {"added_share": Spread.of([a / b for a, b in zip(added, own, strict=True)]), "customers": CUSTOMERS},
        "one posting after the other, each committed, over one connection, written and not written in turns; medians",
    )
