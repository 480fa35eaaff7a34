"""Real parts for tests, on free ports in a directory of their own. Isolation is by name: a fresh database, a topic prefix,
new addresses.

The processes of a run (`pytest -n`) share one broker and one server, which the process that hands out the tests starts
before them: a broker that is warm serves a request at a fraction of the cost, and starting one is the dearest of all. A
run of one process starts each part when a test first asks for it. The chain is never shared: tests reorganize it.

STABLERAIL_TEST_PARTS=containers: the parts of a run are containers (tests/support/containers.py).

Nothing is left behind, also when the run is killed: the parts end with the process that started them and the directory
is removed (see stablerail/dev/processes.py). Containers do not end with it: of a run that was killed, Testcontainers' Ryuk
removes them.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from stablerail.dev.anvil import Anvil
from stablerail.dev.fetch import Tools, fetch
from stablerail.dev.kafka import Kafka
from stablerail.dev.postgres import Postgres
from stablerail.dev.processes import scratch_directory
from stablerail.dev.usdc import Usdc, deploy
from tests.support import containers
from tests.support.containers import AnvilContainer, KafkaContainer, PostgresContainer
from tests.support.invariants import end_database

# Tests kill processes, never the machine: what PostgreSQL has written survives in the page cache.
POSTGRES_SETTINGS = {"fsync": "off", "max_connections": 500}


def start_shared(run: ExitStack) -> Path:
    """Starts the parts of a run of several processes, in the one that hands out the tests; the directory they are in."""
    tools = fetch()
    directory = run.enter_context(scratch_directory("stablerail-shared-"))
    shared = (_kafka(directory, tools), _postgres(directory, tools))
    for part in shared:
        run.callback(part.stop)  # before any starts: where one fails, the other may run
    with ThreadPoolExecutor(2) as pool:
        starting = [pool.submit(part.start) for part in shared]
    for started in starting:
        started.result()
    return directory


def _kafka(directory: Path, tools: Tools) -> Kafka | KafkaContainer:
    if containers.wanted():
        return KafkaContainer(directory)
    # A quarter of it is full after all tests' topics: 23 kB a partition, and nobody deletes them.
    return Kafka(directory / "kafka", tools, heap="1g")


def _postgres(directory: Path, tools: Tools) -> Postgres | PostgresContainer:
    if containers.wanted():
        return PostgresContainer(directory, POSTGRES_SETTINGS)
    return Postgres(directory / "postgres", tools, POSTGRES_SETTINGS)


def _anvil(directory: Path, tools: Tools) -> Anvil | AnvilContainer:
    return AnvilContainer(directory) if containers.wanted() else Anvil(directory / "anvil", tools)


@pytest.fixture(scope="session")
def shared_parts(request: pytest.FixtureRequest) -> Path | None:
    """Where the shared parts are; None in a run of one process."""
    given = getattr(request.config, "workerinput", {}).get("shared_parts")
    return given and Path(given)


@pytest.fixture(scope="session")
def scratch() -> Iterator[Path]:
    """The directory of this run's parts."""
    with scratch_directory("stablerail-test-") as directory:
        yield directory


@pytest.fixture(scope="session")
def tools() -> Tools:
    """For tests that start a part of their own: `Kafka(tmp_path, tools, nodes=3)`."""
    return fetch()


@pytest.fixture(scope="session")
def kafka(scratch: Path, shared_parts: Path | None, tools: Tools) -> Iterator[Kafka | KafkaContainer]:
    """To talk to, not to kill: it may be shared."""
    broker = _kafka(shared_parts or scratch, tools)
    if shared_parts:
        yield broker
    else:
        with broker:
            yield broker


@pytest.fixture(scope="session")
def postgres(scratch: Path, shared_parts: Path | None, tools: Tools) -> Iterator[Postgres | PostgresContainer]:
    """To talk to, not to kill: it may be shared."""
    server = _postgres(shared_parts or scratch, tools)
    if shared_parts:
        yield server
    else:
        with server:
            yield server


@pytest.fixture(scope="session")
def anvil(scratch: Path, tools: Tools) -> Iterator[Anvil | AnvilContainer]:
    """A block per transaction. All tests share the chain: use addresses of your own."""
    with _anvil(scratch, tools) as chain:
        yield chain


@pytest.fixture(scope="session")
def usdc(anvil: Anvil | AnvilContainer, tools: Tools) -> Usdc:
    with ThreadPoolExecutor(1) as pool:  # its event loop is not the tests'
        return pool.submit(asyncio.run, deploy(anvil, tools.contracts)).result()


@pytest.fixture
def database(postgres: Postgres | PostgresContainer) -> Iterator[str]:
    """The DSN of an empty database of this test."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    yield postgres.create_database(name)
    end_database(postgres, name)


@pytest.fixture
def topic_prefix() -> str:
    """Before each topic and consumer group of this test."""
    return f"t{uuid.uuid4().hex[:10]}."
