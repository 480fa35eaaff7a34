"""The whole product on parts of its own that can be broken: three brokers, PostgreSQL, a chain with a block a second behind two
endpoints, the sandboxes; two workers per movement, bridge and API. Everything ends with this process.

`deposits-1` and its like reach Kafka and PostgreSQL by wires that can be troubled, the second workers reach them directly.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit
from uuid import uuid4

import aiohttp
import asyncpg
from pydantic import SecretStr

from connectors.circle.client import CircleClient, CircleWallet
from connectors.circle.sandbox.config import TEST_API_KEY, TEST_ENTITY_SECRET
from stablerail.dev.anvil import Anvil
from stablerail.dev.errors import PartFailed
from stablerail.dev.fetch import fetch
from stablerail.dev.kafka import Kafka
from stablerail.dev.postgres import Postgres
from stablerail.dev.processes import scratch_directory, tail
from stablerail.dev.stack import Stack
from stablerail.dev.usdc import Usdc, deploy
from stablerail.keys import Scope, create_key
from tests.chaos.wires import KafkaWire, Troubled, Wire
from tests.support.parts import POSTGRES_SETTINGS
from tests.support.rpc_stub import LyingEndpoint

MOVEMENTS: Final = ("onboarding", "deposits", "chains", "withdrawals", "investing", "treasury", "recovery")
ROOT: Final = Path(__file__).parents[2]
DEPTH: Final = 4
"""Blocks until a deposit is final; reorganizations are less deep."""
MINIMUM: Final = 1_000_000
WAIT_S: Final = 300.0
FUSE_RUN: Final = 25
SESSION_S: Final = 6
"""Until a worker that is silent is taken for dead."""
SETTINGS: Final = {
    "STABLERAIL_KAFKA_REPLICATION_FACTOR": "3",
    "STABLERAIL_KAFKA_SESSION_TIMEOUT_S": str(SESSION_S),
    "STABLERAIL_DATABASE_IDLE_TIMEOUT_S": "3",
    "STABLERAIL_DATABASE_LOCK_TIMEOUT_S": "3",
    "STABLERAIL_CALL_TIMEOUT_S": "2",
    "STABLERAIL_CALL_LEASE_S": "4",
    "STABLERAIL_CALL_RETRY_FIRST_S": "200ms",
    "STABLERAIL_CALL_RETRY_MAX_S": "2",
    "STABLERAIL_CALL_ATTEMPTS_MAX": "100",
    "STABLERAIL_BREAKER_OPEN_S": "1",
    "STABLERAIL_RPC_TIMEOUT_S": "3",
    "STABLERAIL_SCAN_INTERVAL_S": "1",
    "STABLERAIL_CIRCLE_POLL_INTERVAL_S": "4",
    "STABLERAIL_CIRCLE_TRANSFER_POLL_S": "2",
    "STABLERAIL_FINALITY_DEPTHS_BLOCKS": json.dumps({"MATIC": DEPTH}),
    "STABLERAIL_WITHDRAWAL_SPEED_UP_BLOCKS": "6",
    "STABLERAIL_WITHDRAWAL_SPEED_UPS_MAX": "15",
    "STABLERAIL_FUSE_RUN_EVENTS_MAX": str(FUSE_RUN),
    "STABLERAIL_FUSE_RATIO_MAX": "1",
    "STABLERAIL_WORKER_SHUTDOWN_TIMEOUT_S": "15",
    "STABLERAIL_WORKER_UNASSIGNED_TIMEOUT_S": "1h",  # of two workers one has nothing of a topic of one partition
    "STABLERAIL_WORKER_RESTART_WAIT_MAX_S": "1",
    "STABLERAIL_CUSTODY_CHECK_INTERVAL_S": "10",
    "OMP_NUM_THREADS": "1",
}


class Rig:
    """`name` -> process in `stack.children`. Those in `down` are left alone by the supervisor until whoever downed them lets go."""

    def __init__(self, directory: Path, clock_offsets_s: dict[str, float], product: Path, workers: int) -> None:
        self.directory = directory
        self.programs = ("bridge", "api", *(f"{name}-{n + 1}" for n in range(workers) for name in MOVEMENTS))
        self.offsets = clock_offsets_s
        self.settings = {**SETTINGS, "PYTHONPATH": f"{product}{os.pathsep}{ROOT}", "PYTHONSAFEPATH": "1"}
        self.down: set[str] = set()
        self.restarts = 0
        self.ended: list[tuple[str, int, str]] = []
        """Of processes that ended by themselves: name, code, the log's end."""
        self.over: dict[str, dict[str, str]] = {}
        """What an operator set for a program, over its other settings."""
        self.kafka: Kafka
        self.postgres: Postgres
        self.anvil: Anvil
        self.usdc: Usdc
        self.stack: Stack
        self.kafka_wires: list[KafkaWire] = []
        self.endpoints: list[LyingEndpoint] = []
        self.postgres_wire: Wire
        self.circle_wire: Wire
        self.wallets: dict[str, CircleWallet] = {}
        """By chain: where withdrawals of the rail `circle` leave from."""
        self.api_key = ""
        self.dsn = ""

    @property
    def wires(self) -> list[Troubled]:
        return [*self.kafka_wires, self.postgres_wire, self.circle_wire]

    @property
    def rpc_url(self) -> str:
        return self.anvil.rpc_url

    # -- life --------------------------------------------------------------------------------------------------------

    async def start(self, stack: AsyncExitStack, said: Callable[[str], None]) -> None:
        tools = await asyncio.to_thread(fetch)
        said("three brokers, PostgreSQL, a chain")
        self.kafka = Kafka(self.directory / "kafka", tools, nodes=3)
        self.postgres = Postgres(self.directory / "postgres", tools, POSTGRES_SETTINGS)
        self.anvil = Anvil(self.directory / "anvil", tools)
        for part in (self.kafka, self.postgres, self.anvil):
            stack.callback(part.stop)
        await asyncio.gather(*(asyncio.to_thread(part.start) for part in (self.kafka, self.postgres, self.anvil)))
        self.usdc = await deploy(self.anvil, tools.contracts)
        await self._wire(stack)
        self.dsn = await asyncio.to_thread(self.postgres.create_database, "chaos")
        self.stack = Stack(self.directory / "stack", self._parts(), settings=self.settings)
        stack.callback(self._stop)
        said("schema, topics, sandboxes")
        await self.stack.prepare()
        self.stack.start_sandboxes()
        await asyncio.to_thread(self.stack.wait_listening, ("circle", "sumsub"), WAIT_S)
        self.circle_wire = stack.enter_context(Wire("127.0.0.1", self.stack.ports["circle"]))
        await self._open_at_circle()
        connection = await asyncpg.connect(self.dsn, server_settings={"search_path": "stablerail"})
        self.api_key = (await create_key(connection, (Scope.ADMIN,), "chaos")).token.get_secret_value()
        await connection.close()
        said(f"{len(self.programs)} programs")
        for name in self.programs:
            self.launch(name)
        stack.push_async_callback(_cancelled, asyncio.create_task(self._supervise()))
        await self.until_ready()
        await self.stack.subscribe()
        said("money for our own wallets")
        await self._fund()
        await self.anvil.mine_every(1)

    async def _wire(self, stack: AsyncExitStack) -> None:
        for broker in self.kafka.bootstrap.split(","):
            host, port = broker.split(":")
            self.kafka_wires.append(stack.enter_context(KafkaWire(host, int(port))))
        for wire in self.kafka_wires:
            wire.peers = self.kafka_wires
        self.postgres_wire = stack.enter_context(Wire("127.0.0.1", self.postgres.port))
        for _ in range(2):
            self.endpoints.append(await stack.enter_async_context(LyingEndpoint(self.anvil.rpc_url)))

    def _parts(self) -> dict[str, str]:
        return {
            "STABLERAIL_KAFKA_BOOTSTRAP": self.kafka.bootstrap,
            "STABLERAIL_RPC_URLS": json.dumps({"MATIC": [self.anvil.rpc_url]}),
            "STABLERAIL_CHAIN_IDS": json.dumps({"MATIC": self.anvil.chain_id}),
            "STABLERAIL_USDC_CONTRACTS": json.dumps({"MATIC": self.usdc.address}),
            "STABLERAIL_DATABASE_URL": self.dsn,
            "STABLERAIL_TOPIC_PREFIX": "chaos.",
        }

    async def _open_at_circle(self) -> None:
        """Our own wallets at Circle: withdrawals of its rail leave from them."""
        key, secret = SecretStr(TEST_API_KEY), SecretStr(TEST_ENTITY_SECRET)
        async with CircleClient(self.stack.url("circle"), key, secret, timeout_s=60) as client:
            within = await client.create_wallet_set(str(uuid4()), "treasury")
            names = {"MATIC": "MATIC-AMOY", "SOL": "SOL-DEVNET"}
            made = await client.create_wallets(str(uuid4()), within, list(names.values()), [("out", "treasury")])
        self.wallets = {chain: next(w for w in made if w.blockchain == name) for chain, name in names.items()}
        ids = json.dumps({chain: wallet.id for chain, wallet in self.wallets.items()})
        self.stack.environment["STABLERAIL_CIRCLE_WITHDRAWAL_WALLETS"] = ids

    async def _fund(self) -> None:
        async def has_lane() -> bool:
            return bool(await self.rows("SELECT 1 FROM lanes WHERE signer = $1", self.stack.hot_wallet.lower()))

        await self.until(has_lane, "the hot wallet has a lane")
        await self.anvil.rpc("anvil_setBalance", self.stack.hot_wallet, hex(10**22))
        for wallet in (self.stack.hot_wallet, self.wallets["MATIC"].address):
            await self.anvil.wait_mined(await self.usdc.transfer(wallet, 1_000_000 * 10**6))
        await self.anvil.wait_mined(await self.usdc.mint(self.usdc.batch, 10**15))
        await self.control("transfers", {"walletId": self.wallets["SOL"].id, "amount": "1000000"})

    def _stop(self) -> None:
        self.down |= set(self.programs)
        for child in list(self.stack.children.values()):
            child.kill() if child.returncode is None else None
        self.stack.children.clear()

    # -- programs ----------------------------------------------------------------------------------------------------

    def launch(self, name: str) -> None:
        environment = {"STABLERAIL_RPC_URLS": json.dumps({"MATIC": [one.url for one in self.endpoints]})}
        environment["STABLERAIL_CIRCLE_API_URL"] = f"http://{self.circle_wire.address}"
        if not name.endswith("-2"):
            server = urlsplit(self.dsn)
            address = f"{server.username}:{server.password}@{self.postgres_wire.address}"
            environment["STABLERAIL_DATABASE_URL"] = server._replace(netloc=address).geturl()
            environment["STABLERAIL_KAFKA_BOOTSTRAP"] = ",".join(wire.address for wire in self.kafka_wires)
        offset = self.offsets.get(name)
        self.stack.program = ("tests.chaos.apart", str(offset)) if offset else ("stablerail.cli",)
        self.stack.start((name,), environment | self.over.get(name, {}))

    async def _supervise(self) -> None:
        """As an orchestrator does: what ended is started again, whyever it ended."""
        while True:
            for name in self.programs:
                child = self.stack.children[name]
                if name not in self.down and child.returncode is not None:
                    self.ended.append((name, child.returncode, tail(child.log, 3)))
                    self.restart(name)
            await asyncio.sleep(0.3)

    def restart(self, name: str) -> None:
        self.down.discard(name)
        self.restarts += 1
        self.launch(name)

    async def until_ready(self) -> None:
        """Until each program's /readyz says so."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as session:
            for name in self.programs:
                try:
                    await self.until(partial(self._is_ready, session, name), f"{name} is ready", pause_s=0.3)
                except AssertionError:
                    raise PartFailed(f"{name} is not ready: {tail(self.stack.children[name].log)}") from None

    async def _is_ready(self, session: aiohttp.ClientSession, name: str) -> bool:
        return (await self.readiness(session, name))[0] == 200

    async def readiness(self, session: aiohttp.ClientSession, name: str) -> tuple[int, str]:
        """The status and the body of /readyz; 0 where nobody answers."""
        try:
            async with session.get(f"{self.stack.url(name)}/readyz") as answer:
                return answer.status, await answer.text()
        except (aiohttp.ClientError, OSError, TimeoutError):
            return 0, ""

    # -- asking ------------------------------------------------------------------------------------------------------

    async def rows(self, query: str, *arguments: Any) -> list[tuple[Any, ...]]:
        """Past the wires. Raises OSError and asyncpg's errors while the server is away."""
        connection = await asyncpg.connect(
            self.dsn, timeout=10, server_settings={"search_path": "stablerail", "jit": "off"}
        )
        try:
            return [tuple(row) for row in await connection.fetch(query, *arguments, timeout=20)]
        finally:
            connection.terminate()

    async def control(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """A call to Circle's sandbox under /_control; without a body it is a question."""
        url = f"{self.stack.url('circle')}/_control/{path}"
        method = "GET" if body is None else "POST"
        async with aiohttp.ClientSession() as session, session.request(method, url, json=body) as answer:
            assert answer.status < 300, f"{path}: {await answer.text()}"
            return await answer.json()

    async def until(
        self, condition: Callable[[], Any], what: str, *, limit_s: float = WAIT_S, pause_s: float = 0.2
    ) -> None:
        deadline = time.monotonic() + limit_s
        while not await condition():
            assert time.monotonic() < deadline, f"waited {limit_s:g} s for {what}"
            await asyncio.sleep(pause_s)


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def running(
    clock_offsets_s: dict[str, float], said: Callable[[str], None], product: Path = ROOT, workers: int = 2
) -> AsyncIterator[Rig]:
    """A rig that is ready; everything of it ends with the block. `product`: the folder that holds the packages; `workers`: of
    each movement."""
    async with AsyncExitStack() as stack:
        rig = Rig(stack.enter_context(scratch_directory("stablerail-chaos-")), clock_offsets_s, product, workers)
        await rig.start(stack, said)
        yield rig
