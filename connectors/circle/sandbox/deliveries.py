"""Signs notifications and delivers them until the endpoint answers 2xx: at least once, in no promised order."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import uuid4

import aiohttp
import orjson

from connectors.circle.sandbox.config import SandboxConfig
from connectors.circle.sandbox.state import State, Subscription, Transaction, now

CONNECTIONS_MAX: Final = 32


@dataclass
class Disorder:
    """What happens to the next notifications: each field counts down."""

    drop: int = 0
    """Never delivered."""
    duplicate: int = 0
    """Delivered twice."""
    reorder: int = 0
    """Kept until this many are there, then delivered last first."""


@dataclass
class Delivery:
    """One notification for one subscription."""

    notification_id: str
    notification_type: str
    subscription_id: str
    resource_id: str
    state: str | None
    body: bytes = field(repr=False)
    attempts: list[int | str] = field(default_factory=list)
    """The status, or the name of the error, of each attempt."""
    dropped: bool = False

    @property
    def delivered(self) -> bool:
        return any(isinstance(attempt, int) and 200 <= attempt < 300 for attempt in self.attempts)

    def shown(self) -> dict[str, Any]:
        return {
            "notificationId": self.notification_id,
            "notificationType": self.notification_type,
            "subscriptionId": self.subscription_id,
            "resourceId": self.resource_id,
            "state": self.state,
            "attempts": self.attempts,
            "delivered": self.delivered,
            "dropped": self.dropped,
        }


class Deliveries:
    """Everything sent or to be sent. start and close belong to the server's life cycle."""

    def __init__(self, config: SandboxConfig, state: State) -> None:
        self._config = config
        self._state = state
        self._session: aiohttp.ClientSession | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._held: list[Delivery] = []
        self.disorder = Disorder(duplicate=config.duplicate)
        self.records: list[Delivery] = []

    async def start(self) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=CONNECTIONS_MAX),
            timeout=aiohttp.ClientTimeout(total=self._config.delivery_timeout_s),
        )

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    async def answers_head(self, endpoint: str) -> bool:
        """Whether the endpoint of a new subscription answers HEAD with 2xx."""
        try:
            async with self._started().head(endpoint, allow_redirects=False) as reply:
                return 200 <= reply.status < 300
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False

    def announce(self, transaction: Transaction) -> None:
        """Tells every subscription that wants it of the transaction's present state."""
        self.notify(f"transactions.{transaction.transaction_type.lower()}", transaction.shown())

    def notify(self, notification_type: str, content: dict[str, Any], only: Subscription | None = None) -> None:
        """Queues one notification for each subscription that wants the type (or for `only`)."""
        wanting = [s for s in self._state.subscriptions.values() if s.wants(notification_type)]
        for subscription in wanting if only is None else [only]:
            notification_id = str(uuid4())
            envelope = {
                "subscriptionId": subscription.id,
                "notificationId": notification_id,
                "notificationType": notification_type,
                "notification": content,
                "timestamp": now().isoformat().replace("+00:00", "Z"),
                "version": 2,
            }
            delivery = Delivery(
                notification_id,
                notification_type,
                subscription.id,
                str(content.get("id", "")),
                content.get("state"),
                orjson.dumps(envelope),
            )
            self.records.append(delivery)
            self._route(delivery)

    def release(self) -> None:
        """Sends what is held back for another order."""
        held, self._held = self._held, []
        self.disorder.reorder = 0
        if held:
            self._spawn(self._in_order(held[::-1]))

    def _route(self, delivery: Delivery) -> None:
        disorder = self.disorder
        if disorder.drop > 0:
            disorder.drop -= 1
            delivery.dropped = True
            return
        copies = [delivery]
        if disorder.duplicate > 0:
            disorder.duplicate -= 1
            copies = [delivery, delivery]
        if disorder.reorder > 0:
            disorder.reorder -= 1
            self._held += copies
            if disorder.reorder == 0:
                self.release()
            return
        self._spawn(self._in_order(copies))

    async def _in_order(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            if not await self._attempt(delivery):
                self._spawn(self._retry(delivery))

    async def _retry(self, delivery: Delivery) -> None:
        for delay_s in self._config.retry_delays_s:
            await asyncio.sleep(delay_s)
            if await self._attempt(delivery):
                return

    async def _attempt(self, delivery: Delivery) -> bool:
        subscription = self._state.subscriptions.get(delivery.subscription_id)
        if subscription is None or not subscription.enabled:
            return True
        key = self._state.notification_key
        headers = {
            "Content-Type": "application/json",
            "X-Circle-Key-Id": key.id,
            "X-Circle-Signature": key.sign(delivery.body),
        }
        try:
            async with self._started().post(subscription.endpoint, data=delivery.body, headers=headers) as reply:
                delivery.attempts.append(reply.status)
                return 200 <= reply.status < 300
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            delivery.attempts.append(type(error).__name__)
            return False

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _started(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("Deliveries is not started")
        return self._session
