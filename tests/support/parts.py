"""Real parts for tests: each started once per run, when a test first asks for it, on free ports in a directory of its own.

Nothing is left behind, also when the run is killed: the parts end with this process and the directory is removed (see
stablerail/dev/processes.py). Isolation is by name: a fresh database, a topic prefix, new addresses.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stablerail.dev.anvil import Anvil
from stablerail.dev.fetch import Tools, fetch
from stablerail.dev.kafka import Kafka
from stablerail.dev.postgres import Postgres
from stablerail.dev.processes import scratch_directory
from stablerail.dev.usdc import Usdc, deploy

# Tests kill processes, never the machine: what PostgreSQL has written survives in the page cache.
POSTGRES_SETTINGS = {"fsync": "off", "max_connections": 300}


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
def kafka(scratch: Path, tools: Tools) -> Iterator[Kafka]:
    with Kafka(scratch / "kafka", tools) as broker:
        yield broker


@pytest.fixture(scope="session")
def postgres(scratch: Path, tools: Tools) -> Iterator[Postgres]:
    with Postgres(scratch / "postgres", tools, POSTGRES_SETTINGS) as server:
        yield server


@pytest.fixture(scope="session")
def anvil(scratch: Path, tools: Tools) -> Iterator[Anvil]:
    """A block per transaction. All tests share the chain: use addresses of your own."""
    with Anvil(scratch / "anvil", tools) as chain:
        yield chain


@pytest.fixture(scope="session")
def usdc(anvil: Anvil, tools: Tools) -> Usdc:
    with ThreadPoolExecutor(1) as pool:  # its event loop is not the tests'
        return pool.submit(asyncio.run, deploy(anvil, tools.contracts)).result()


@pytest.fixture
def database(postgres: Postgres) -> Iterator[str]:
    """The DSN of an empty database of this test."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    yield postgres.create_database(name)
    postgres.drop_database(name)


@pytest.fixture
def topic_prefix() -> str:
    """Before each topic and consumer group of this test."""
    return f"t{uuid.uuid4().hex[:10]}."
