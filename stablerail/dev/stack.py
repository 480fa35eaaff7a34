"""The whole product as child processes on one machine, against given parts: migrated, topics made, sandboxes, bridge,
API and one worker per movement. The demo shows it; end-to-end tests crash it.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from uuid import uuid4

import aiohttp
from pydantic import SecretStr

from connectors.circle.chains import to_circle
from connectors.circle.client import CircleClient
from connectors.circle.sandbox.config import TEST_API_KEY, TEST_ENTITY_SECRET
from connectors.circle.sandbox.tokens import usdc_token_id
from ledger.migrate import upgrade
from stablerail.dev.errors import PartFailed
from stablerail.dev.keystore import write_keystore
from stablerail.dev.processes import Child, free_port, port_answers, tail, wait_ready
from stablerail.topics_admin import admin, create_missing
from topics.events import Chain

PROGRAMS = ("bridge", "api", "onboarding", "deposits", "chains", "withdrawals", "investing", "treasury", "recovery")


class Stack:
    """`parts`: the environment of the parts (`Parts.environment()`). Children end with this process.

    `start(names, environment)` may give a program other settings, so that a test puts a proxy before what it talks to.
    """

    def __init__(
        self,
        directory: Path,
        parts: Mapping[str, str],
        *,
        settings: Mapping[str, str] | None = None,
        confirmations: int = 3,
    ) -> None:
        self.directory = directory.absolute()
        self.confirmations = confirmations
        self.ports = {name: free_port() for name in (*PROGRAMS, "circle", "sumsub")}
        self._sumsub_secret = secrets.token_hex(16)
        tokens = {chain.value: usdc_token_id(to_circle(chain, "testnet")) for chain in Chain}
        self.environment: dict[str, str] = {
            **parts,
            "STABLERAIL_CIRCLE_API_URL": f"http://127.0.0.1:{self.ports['circle']}",
            "STABLERAIL_CIRCLE_API_KEY": TEST_API_KEY,
            "STABLERAIL_CIRCLE_ENTITY_SECRET": TEST_ENTITY_SECRET,
            "STABLERAIL_CIRCLE_USDC_TOKEN_IDS": json.dumps(tokens),
            # what is told twice is for the tests of it: a look at the list comes once, when nothing has come in yet
            "STABLERAIL_CIRCLE_POLL_INTERVAL_S": "1h",
            "STABLERAIL_SUMSUB_WEBHOOK_SECRET": self._sumsub_secret,
            "STABLERAIL_BRIDGE_PORT": str(self.ports["bridge"]),
            "STABLERAIL_API_PORT": str(self.ports["api"]),
            "STABLERAIL_SCAN_INTERVAL_S": "0.5",
            "STABLERAIL_FINALITY_DEPTHS_BLOCKS": json.dumps({"MATIC": 3}),
            # without a chain nothing leaves
            "STABLERAIL_WITHDRAWAL_CHAINS": ",".join(json.loads(parts.get("STABLERAIL_RPC_URLS", "{}"))),
            "STABLERAIL_WITHDRAWAL_KEYSTORE": str(self.directory / "hot-wallet.json"),
            "STABLERAIL_WITHDRAWAL_KEYSTORE_PASSWORD": secrets.token_hex(16),
            "STABLERAIL_KAFKA_SESSION_TIMEOUT_S": "3",
            "STABLERAIL_DATADIR": str(self.directory / "data"),
            "STABLERAIL_LOG_FORMAT": "json",
            **(settings or {}),
        }
        self.children: dict[str, Child] = {}
        self.program: Sequence[str] = ("stablerail.cli",)
        """What a worker is run by: a module, and what stands before the command."""
        self.hot_wallet = ""
        """Its address, once prepared."""
        self.treasury = ""
        """The address of the wallet at Circle that withdrawals leave from, once it is up."""

    # -- addresses ---------------------------------------------------------------------------------------------------

    def url(self, name: str) -> str:
        """The base URL of a program or sandbox."""
        return f"http://127.0.0.1:{self.ports[name]}"

    # -- starting and stopping ---------------------------------------------------------------------------------------

    async def prepare(self) -> None:
        """Schema, topics, and a hot wallet of its own, which has nothing yet."""
        self.directory.mkdir(parents=True, exist_ok=True)
        keystore = Path(self.environment["STABLERAIL_WITHDRAWAL_KEYSTORE"])
        password = self.environment["STABLERAIL_WITHDRAWAL_KEYSTORE_PASSWORD"]
        self.hot_wallet = await asyncio.to_thread(write_keystore, keystore, password)
        schema = self.environment.get("STABLERAIL_DATABASE_SCHEMA", "stablerail")
        await upgrade(self.environment["STABLERAIL_DATABASE_URL"], schema)
        async with admin(self.environment["STABLERAIL_KAFKA_BOOTSTRAP"]) as client:
            copies = int(self.environment.get("STABLERAIL_KAFKA_REPLICATION_FACTOR", "1"))
            await create_missing(client, self.environment.get("STABLERAIL_TOPIC_PREFIX", ""), copies)

    def start_sandboxes(self) -> None:
        """Circle on the chain of the parts, and Sumsub; both send to the bridge."""
        rpc_url = json.loads(self.environment["STABLERAIL_RPC_URLS"])["MATIC"][0]
        usdc = json.loads(self.environment["STABLERAIL_USDC_CONTRACTS"])["MATIC"]
        circle = [
            "-m", "connectors.circle.sandbox", "--port", self.ports["circle"], "--rpc-url", rpc_url, "--usdc", usdc,
            "--confirmations", self.confirmations, "--retry-delays-s", "0.5,1,2,5,10,10,10,30,30", "--control",
        ]  # fmt: skip
        target = f"{self.url('bridge')}/webhooks/kyc/sumsub"
        sumsub = ["-m", "connectors.kyc.sandbox", "--target", target, "--port", self.ports["sumsub"]]
        self._spawn("circle", [str(part) for part in circle])
        self._spawn("sumsub", [str(part) for part in sumsub], {"SUMSUB_WEBHOOK_SECRET": self._sumsub_secret})

    def start(self, names: Iterable[str] = PROGRAMS, environment: Mapping[str, str] | None = None) -> None:
        """Starts programs; does not wait. `environment` goes over the stack's own. `deposits-2`: one more worker of deposits."""
        for name in names:
            if name in ("bridge", "api"):
                self._spawn(name, ["-m", "stablerail.cli", name], environment)
            else:
                port = self.ports.setdefault(name, free_port())
                command = ["-m", *self.program, "worker", name.partition("-")[0], "--port", str(port)]
                self._spawn(name, command, environment)

    def _spawn(self, name: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        log = self.directory / f"{name}.log"
        env = {**os.environ, **self.environment, **(environment or {})}
        self.children[name] = Child([sys.executable, *arguments], log=log, env=env)

    def wait_listening(self, names: Iterable[str], timeout_s: float = 120) -> None:
        """Until each port answers. Raises PartFailed with the log's end."""
        for name in names:
            wait_ready(self.children[name], name, partial(port_answers, self.ports[name]), timeout_s)

    async def wait_ready(self, names: Iterable[str] = PROGRAMS, timeout_s: float = 120) -> None:
        """Until each program's /readyz says so, with partitions where it has stages."""
        await asyncio.to_thread(self.wait_listening, names, timeout_s)
        deadline = time.monotonic() + timeout_s
        async with aiohttp.ClientSession() as session:
            for name in names:
                while not await self._is_ready(session, name):
                    child = self.children[name]
                    if child.returncode is not None or time.monotonic() > deadline:
                        raise PartFailed(f"{name} is not ready: {tail(child.log)}", f"log: {child.log}")
                    await asyncio.sleep(0.1)

    async def _is_ready(self, session: aiohttp.ClientSession, name: str) -> bool:
        try:
            async with session.get(f"{self.url(name)}/readyz") as answer:
                if answer.status != 200:
                    return False
            if name in ("bridge", "api", "chains"):
                return True
            async with session.get(f"{self.url(name)}/flow", headers={"accept": "application/json"}) as answer:
                return all(figures["partitions"] for figures in await answer.json(content_type=None))
        except (aiohttp.ClientError, OSError):
            return False

    async def subscribe(self) -> None:
        """Tells Circle's sandbox where the bridge is."""
        body = {"endpoint": f"{self.url('bridge')}/webhooks/circle", "notificationTypes": ["transactions.*"]}
        headers = {"Authorization": f"Bearer {TEST_API_KEY}"}
        url = f"{self.url('circle')}/v2/notifications/subscriptions"
        async with aiohttp.ClientSession(headers=headers) as session, session.post(url, json=body) as answer:
            if answer.status >= 300:
                raise PartFailed(f"Circle's sandbox refused the subscription: {await answer.text()}")

    async def open_treasury(self) -> str:
        """A wallet at Circle's sandbox that withdrawals of the rail `circle` leave from on MATIC, for workers that start after this;
        its address. It has nothing yet."""
        await asyncio.to_thread(self.wait_listening, ("circle",))
        key, secret = SecretStr(TEST_API_KEY), SecretStr(TEST_ENTITY_SECRET)
        async with CircleClient(self.url("circle"), key, secret) as client:
            within = await client.create_wallet_set(str(uuid4()), "treasury")
            (wallet,) = await client.create_wallets(
                str(uuid4()), within, [to_circle(Chain.MATIC, "testnet")], [("withdrawals", "treasury")]
            )
        self.environment["STABLERAIL_CIRCLE_WITHDRAWAL_WALLETS"] = json.dumps({"MATIC": wallet.id})
        return wallet.address

    async def up(self) -> None:
        """Everything, ready."""
        await self.prepare()
        self.start_sandboxes()
        self.start([name for name in PROGRAMS if name != "withdrawals"])
        self.treasury = await self.open_treasury()
        self.start(("withdrawals",))
        await self.wait_ready()
        await asyncio.to_thread(self.wait_listening, ("circle", "sumsub"))
        await self.subscribe()

    def stop(self) -> None:
        """Ends all children, workers first."""
        for name in reversed(list(self.children)):
            self.children[name].stop(timeout_s=15)
        self.children.clear()

    # -- driving it --------------------------------------------------------------------------------------------------

    async def approve(self, user_id: str) -> None:
        """Sumsub approves a customer."""
        async with aiohttp.ClientSession() as session:
            body = {"externalUserId": user_id, "answer": "GREEN"}
            async with session.post(f"{self.url('sumsub')}/_control/review", json=body) as answer:
                if answer.status >= 300:
                    raise PartFailed(f"the Sumsub sandbox refused the review: {await answer.text()}")
