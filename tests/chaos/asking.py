"""How things are asked and told in a world that breaks: again and again, until it is taken."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Final, Self

import aiohttp
import asyncpg
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError

from stablerail.dev.anvil import RpcRefused
from tests.chaos.inputs import History, Input
from tests.chaos.rig import Rig

ERRORS: Final = (
    aiohttp.ClientError,
    OSError,
    TimeoutError,
    KafkaError,
    RpcRefused,
    AssertionError,
    asyncpg.PostgresError,
)


class Asking:
    """By the API and by Kafka, past the wires: customers and producers are not what is broken. `failure`: an answer that must not be."""

    def __init__(self, rig: Rig, history: History) -> None:
        self.rig, self.history = rig, history
        self.tasks: set[asyncio.Task[None]] = set()
        self.failure: BaseException | None = None
        self._producer: AIOKafkaProducer
        self._http: aiohttp.ClientSession

    async def __aenter__(self) -> Self:
        self._http = aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {self.rig.api_key}"}, timeout=aiohttp.ClientTimeout(total=15)
        )
        self._producer = AIOKafkaProducer(
            bootstrap_servers=self.rig.kafka.bootstrap, acks="all", enable_idempotence=True, request_timeout_ms=15_000
        )
        await self._producer.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self._http.close()
        await self._producer.stop()

    def _later(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.failure = task.exception()

    async def _ask(self, made: Input, body: dict[str, Any], times: int, *, cancel: bool) -> None:
        """By the API, again and again until it answers; then as often as is asked for."""
        url = f"{self.rig.stack.url('api')}/v1/withdrawals"
        done, withdrawal = 0, ""
        while done < times:
            try:
                headers = {"Idempotency-Key": made.key}
                async with self._http.post(url, json=body, headers=headers) as answer:
                    found = await answer.json(content_type=None)
                    if answer.status == 202:
                        done, withdrawal = done + 1, found["id"]
                        continue
                    if answer.status == 422 and made.about["expect"] == "refused":
                        made.about["expect"], made.is_done = "unasked", True
                        return
                    assert answer.status >= 500, f"{made.key}: {answer.status} {found}"
            except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
                pass
            await asyncio.sleep(0.5)
        while cancel:
            try:
                async with self._http.post(f"{url}/{withdrawal}/cancel", json={}) as answer:
                    if answer.status < 500:
                        made.about["cancelled"] = answer.status
                        return
            except (aiohttp.ClientError, OSError, TimeoutError):
                pass
            await asyncio.sleep(0.5)

    def _say(self, topic: str, key: str, content: Any) -> None:
        self._later(self._produce(topic, key.encode(), json.dumps(content).encode()))

    async def _produce(self, topic: str, key: bytes, value: bytes) -> Any:
        """Until a broker has it."""
        while True:
            try:
                return await self._producer.send_and_wait(f"chaos.{topic}", value, key=key)
            except KafkaError:
                await asyncio.sleep(0.5)
