"""Wallet provisioning by the real worker, against a bare httpx loop that asks the same sandbox for the same wallets.

`burst`: Circle's limits hold and 200 customers go into a call. `rate`: no limits, one customer per call, as many calls at once
on both sides; the sandbox has drawn its keys beforehand, and its share of the CPU is shown.
"""

from __future__ import annotations

import asyncio
import base64
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import aiohttp
import asyncpg
import httpx
from aiokafka import AIOKafkaProducer
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from agents.acting import RATE_MARGIN
from connectors.circle.chains import to_circle
from connectors.circle.sandbox.config import TEST_API_KEY, TEST_ENTITY_SECRET
from stablerail.dev.processes import free_port
from tests.benchmarks.parts import Parts, Place, cpu_seconds, place
from tests.benchmarks.records import Comparison, Record, Spread
from topics.catalog import KYC_APPROVED
from topics.envelope import value_of
from topics.events import Chain, KycApproved

Told = Callable[[str], None]

CHAINS = (Chain.ETH, Chain.SOL, Chain.APTOS, Chain.MATIC)
"""The product's default."""
BATCH = 200
CONCURRENCY = 5
CALLS_PER_S = 10
START_S_MAX = 100
RUN_S_MAX = 120
POLL_S = 0.02
DONE = "SELECT count(*) FROM stablerail.wallet_provisioning_jobs WHERE state = 'completed'"
WALLETS = "SELECT count(*) FROM stablerail.wallets"


@dataclass(frozen=True)
class Run:
    seconds: float
    calls: int
    cpu_side_s: float
    cpu_sandbox_s: float


async def burst(parts: Parts, customers: int, repeats: int, told: Told) -> Record:
    """All customers are approved at once."""
    ours, bare = await _rounds(parts, customers, BATCH, repeats, told, limits=True)
    return Record(
        "provisioning.burst",
        Comparison.of(
            "the fewest possible calls by a bare httpx loop at Circle's limits, over ours from the first approval to the last"
            " customer's wallets",
            "s", [run.seconds for run in ours], [run.seconds for run in bare], 0.5, less_is_better=True,
        ),
        {
            "customers": customers,
            "wallets": customers * len(CHAINS),
            "calls": Spread.of([run.calls for run in ours], 0),
            "calls_bare": Spread.of([run.calls for run in bare], 0),
            **_cpu(ours, bare),
        },
        "the worker is up; approvals are sent as fast as Kafka takes them; the sandbox holds to 10 calls a second",
    )  # fmt: skip


async def rate(parts: Parts, calls: int, repeats: int, told: Told) -> Record:
    """One customer per call, without limits."""
    ours, bare = await _rounds(parts, calls, 1, repeats, told, limits=False)
    return Record(
        "provisioning.rate",
        Comparison.of(
            "wallets for one customer per call, all of our way, against the same number of bare httpx calls, five at a time",
            "calls/s", [run.calls / run.seconds for run in ours], [run.calls / run.seconds for run in bare], 0.5,
        ),
        {"customers": calls, "concurrency": CONCURRENCY, **_cpu(ours, bare)},
        "as provisioning.burst; the sandbox has drawn its keys beforehand and takes any rate",
    )  # fmt: skip


def _cpu(ours: Sequence[Run], bare: Sequence[Run]) -> dict[str, Spread]:
    """Of one core, and the sandbox's part in a run."""
    return {
        "cpu_side_s": Spread.of([run.cpu_side_s for run in ours]),
        "cpu_sandbox_s": Spread.of([run.cpu_sandbox_s for run in ours]),
        "sandbox_share": Spread.of([run.cpu_sandbox_s / run.seconds for run in ours]),
        "cpu_sandbox_bare_s": Spread.of([run.cpu_sandbox_s for run in bare]),
        "sandbox_share_bare": Spread.of([run.cpu_sandbox_s / run.seconds for run in bare]),
    }


async def _rounds(
    parts: Parts, customers: int, batch: int, repeats: int, told: Told, *, limits: bool
) -> tuple[list[Run], list[Run]]:
    await parts.prepare([])
    users = [f"user-{number:05}" for number in range(customers)]
    ours, bare = [], []
    for _ in range(repeats):
        async with place(parts) as here:
            url = await _sandbox(here, customers, limits=limits)
            ours.append(await _worker(here, url, users, batch, limits=limits))
            told(f"worker: {ours[-1].seconds:.2f} s, {ours[-1].calls} calls")
        async with place(parts) as here:
            url = await _sandbox(here, customers, limits=limits)
            bare.append(await _bare(here, url, users, batch, limits=limits))
            told(f"bare httpx: {bare[-1].seconds:.2f} s, {bare[-1].calls} calls")
    return ours, bare


async def _sandbox(here: Place, customers: int, *, limits: bool) -> str:
    """The first child of the place; its URL, once it answers."""
    port = free_port()
    here.start(
        ["-m", "connectors.circle.sandbox", "--port", str(port), "--control", "--keys-beforehand", str(customers)]
        + ([] if limits else ["--no-rate-limits"]),
        {},
    )
    url = f"http://127.0.0.1:{port}"
    await _until(here, lambda session: _answers(session, f"{url}/_control/calls"))
    return url


async def _answers(session: aiohttp.ClientSession, url: str) -> bool:
    async with session.get(url) as answer:
        return answer.status == 200


async def _until(here: Place, ready: Callable[[aiohttp.ClientSession], object]) -> None:
    deadline = time.monotonic() + START_S_MAX
    async with aiohttp.ClientSession() as session:
        while True:
            here.check_running()
            try:
                if await ready(session):  # type: ignore[misc]
                    return
            except aiohttp.ClientError:
                pass
            if time.monotonic() > deadline:
                raise TimeoutError(f"not ready within {START_S_MAX} s")
            await asyncio.sleep(0.1)


async def _worker(here: Place, url: str, users: Sequence[str], batch: int, *, limits: bool) -> Run:
    port = free_port()
    settings = {
        "STABLERAIL_CIRCLE_API_URL": url,
        "STABLERAIL_CIRCLE_API_KEY": TEST_API_KEY,
        "STABLERAIL_CIRCLE_ENTITY_SECRET": TEST_ENTITY_SECRET,
        "STABLERAIL_CALL_MEMBERS_MAX": str(batch),
        "STABLERAIL_CALL_CONCURRENCY_MAX": str(CONCURRENCY),
        "STABLERAIL_CALL_RATE_PER_S": str(CALLS_PER_S if limits else 100_000),
    }
    here.start(["-m", "stablerail.cli", "worker", "onboarding", "--port", str(port)], settings)

    async def has_partitions(session: aiohttp.ClientSession) -> bool:
        async with session.get(f"http://127.0.0.1:{port}/flow", headers={"accept": "application/json"}) as answer:
            figures = await answer.json(content_type=None)
            return bool(figures) and all(figure["partitions"] == 4 for figure in figures)

    await _until(here, has_partitions)
    sandbox, worker = (child.pid for child in here.children)
    before = cpu_seconds([worker]), cpu_seconds([sandbox])
    connection = await asyncpg.connect(here.dsn)
    producer = AIOKafkaProducer(bootstrap_servers=here.bootstrap, acks="all")
    await producer.start()
    try:
        started = time.perf_counter()
        for user in users:
            event = KycApproved(
                user_id=user, vendor="sumsub", applicant_id=user, vendor_event_id=user, approved_at="now"
            )
            await producer.send(KYC_APPROVED.named(here.prefix), value_of(event), key=user.encode())
        await producer.flush()
        while await connection.fetchval(DONE) < len(users):
            here.check_running()
            if time.perf_counter() - started > RUN_S_MAX:
                raise TimeoutError(f"{await connection.fetchval(DONE)} of {len(users)} within {RUN_S_MAX} s")
            await asyncio.sleep(POLL_S)
        seconds = time.perf_counter() - started
        if await connection.fetchval(WALLETS) != len(users) * len(CHAINS):
            raise RuntimeError("wallets are missing")
    finally:
        await producer.stop()
        await connection.close()
    return Run(seconds, await _calls(url), cpu_seconds([worker]) - before[0], cpu_seconds([sandbox]) - before[1])


async def _calls(url: str) -> int:
    async with httpx.AsyncClient() as client:
        counted = (await client.get(f"{url}/_control/calls")).json()
        return int(counted["POST /v1/w3s/developer/wallets"])


async def _bare(here: Place, url: str, users: Sequence[str], batch: int, *, limits: bool) -> Run:
    """As many calls at once as the worker makes, as far apart: 429 would be a failure."""
    (sandbox,) = (child.pid for child in here.children)
    before = cpu_seconds([sandbox])
    headers = {"Authorization": f"Bearer {TEST_API_KEY}"}
    waiting = [users[start : start + batch] for start in range(0, len(users), batch)][::-1]
    calls = len(waiting)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60) as client:
        pem = (await client.get("/v1/w3s/config/entity/publicKey")).json()["data"]["publicKey"]
        key = serialization.load_pem_public_key(pem.encode())
        assert isinstance(key, rsa.RSAPublicKey)
        made = await client.post("/v1/w3s/developer/walletSets", json={**_signed(key), "name": "customers"})
        wallet_set = made.json()["data"]["walletSet"]["id"]
        started = time.perf_counter()
        busy = time.process_time()
        slot = started

        async def loop() -> None:
            nonlocal slot
            while waiting:
                some = waiting.pop()
                if limits:
                    wait_s, slot = (
                        slot - time.perf_counter(),
                        max(slot, time.perf_counter()) + RATE_MARGIN / CALLS_PER_S,
                    )
                    await asyncio.sleep(max(wait_s, 0.0))
                body = {
                    **_signed(key),
                    "walletSetId": wallet_set,
                    "blockchains": [to_circle(chain, "testnet") for chain in CHAINS],
                    "accountType": "EOA",
                    "count": len(some),
                    "metadata": [{"name": user, "refId": user} for user in some],
                }
                answer = await client.post("/v1/w3s/developer/wallets", json=body)
                answer.raise_for_status()
                assert len(answer.json()["data"]["wallets"]) == len(some) * len(CHAINS)

        await asyncio.gather(*(loop() for _ in range(CONCURRENCY)))
        seconds = time.perf_counter() - started
    return Run(seconds, calls, time.process_time() - busy, cpu_seconds([sandbox]) - before)


def _signed(key: rsa.RSAPublicKey) -> dict[str, str]:
    oaep = padding.OAEP(mgf=padding.MGF1(hashes.SHA256()), algorithm=hashes.SHA256(), label=None)
    ciphertext = base64.b64encode(key.encrypt(bytes.fromhex(TEST_ENTITY_SECRET), oaep)).decode()
    return {"idempotencyKey": str(uuid.uuid4()), "entitySecretCiphertext": ciphertext}
