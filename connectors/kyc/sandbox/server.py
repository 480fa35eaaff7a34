"""Sends the end of a review as the vendors do: signed, at least once, again until the answer is 2xx."""

from __future__ import annotations

import asyncio
import json
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, Self

import aiohttp
import structlog
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, SecretStr
from pydantic.alias_generators import to_camel

from connectors.webhooks import problems

log = structlog.get_logger()

Answer = Literal["GREEN", "RED"]
RejectType = Literal["FINAL", "RETRY"]

SCHEDULE_S = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
"""Pauses before each repeat. Sumsub's own are 5 min, 1 h, 5 h and 18 h: too long to watch."""
ANSWER_TIMEOUT_S = 5.0
"""As long as Sumsub waits."""
DELIVERIES_MAX = 10_000


@dataclass(slots=True)
class Delivery:
    """One webhook on its way; `statuses` grows with every attempt."""

    correlation_id: str
    body: bytes
    statuses: list[int | None] = field(default_factory=list)
    """None: no answer."""

    @property
    def delivered(self) -> bool:
        return any(status is not None and 200 <= status < 300 for status in self.statuses)


def _utc_now() -> datetime:
    return datetime.now(UTC)


class KycSandbox(ABC):
    """`async with SumsubSandbox(url, secret) as sumsub: await sumsub.review("user_42")`; the vendors are in `vendors`."""

    def __init__(
        self,
        target_url: str,
        secret: SecretStr,
        *,
        schedule_s: Sequence[float] = SCHEDULE_S,
        now: Callable[[], datetime] = _utc_now,
    ) -> None:
        self._target_url = target_url
        self.secret = secret
        self._schedule_s = tuple(schedule_s)
        self.now = now
        self._session: aiohttp.ClientSession | None = None
        self._sending: set[asyncio.Task[None]] = set()
        self.deliveries: list[Delivery] = []

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=ANSWER_TIMEOUT_S))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._sending:
            task.cancel()
        await asyncio.gather(*self._sending, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    async def review(
        self, external_user_id: str, answer: Answer = "GREEN", *, reject_type: RejectType = "FINAL", copies: int = 1
    ) -> Delivery:
        """Ends a review and starts to send its webhook, `copies` times at once. Returns before it has arrived.

        Raises RuntimeError when as many webhooks as we keep are still on their way.
        """
        if len(self._sending) + copies > DELIVERIES_MAX:
            raise RuntimeError(f"{len(self._sending)} webhooks are on their way already")
        delivery = self._delivery(external_user_id, answer, reject_type)
        self.deliveries = [*self.deliveries[-DELIVERIES_MAX:], delivery]
        for _ in range(copies):
            task = asyncio.create_task(self._send(delivery))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)
        return delivery

    async def settle(self) -> None:
        """Returns when nothing is on its way any more: delivered, or the schedule is at its end."""
        while self._sending:
            await asyncio.wait(set(self._sending))

    @abstractmethod
    def body(self, correlation_id: str, user_id: str, answer: Answer, reject_type: RejectType) -> dict[str, Any]:
        """The webhook of a review that has ended."""

    @abstractmethod
    def signed(self, body: bytes) -> dict[str, str]:
        """The vendor's headers, for one attempt."""

    def _delivery(self, user_id: str, answer: Answer, reject_type: RejectType) -> Delivery:
        correlation_id = f"req-{uuid.uuid4()}"
        return Delivery(correlation_id, json.dumps(self.body(correlation_id, user_id, answer, reject_type)).encode())

    async def _send(self, delivery: Delivery) -> None:
        for pause_s in (0.0, *self._schedule_s):
            await asyncio.sleep(pause_s)
            status = await self._attempt(delivery.body)
            delivery.statuses.append(status)
            if status is not None and 200 <= status < 300:
                return
        log.warning("webhook_given_up", correlation_id=delivery.correlation_id, attempts=len(delivery.statuses))

    async def _attempt(self, body: bytes) -> int | None:
        assert self._session is not None, "use it as `async with`"
        headers = {"Content-Type": "application/json", **self.signed(body)}
        try:
            async with self._session.post(
                self._target_url, data=body, headers=headers, allow_redirects=False
            ) as answer:
                return answer.status
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            log.info("webhook_unanswered", error=type(error).__name__)
            return None


class ReviewOrder(BaseModel):
    """`{"externalUserId": "user_42", "answer": "GREEN"}`"""

    model_config = ConfigDict(alias_generator=to_camel, extra="forbid")
    external_user_id: str = Field(min_length=1, max_length=200)
    answer: Answer = "GREEN"
    reject_type: RejectType = "FINAL"
    copies: int = Field(1, ge=1, le=100)


def create_control(sandbox: KycSandbox) -> FastAPI:
    """The sandbox's own HTTP interface: `POST /_control/review`. The caller enters and leaves `sandbox`."""
    app = FastAPI(title="KYC sandbox", docs_url=None, redoc_url=None, openapi_url=None)
    problems.install(app)

    @app.post("/_control/review", status_code=202)
    async def review(order: ReviewOrder) -> dict[str, str]:
        delivery = await sandbox.review(
            order.external_user_id, order.answer, reject_type=order.reject_type, copies=order.copies
        )
        return {"correlationId": delivery.correlation_id}

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    return app
