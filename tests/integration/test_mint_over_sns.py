"""Circle Mint over Amazon SNS, from the subscription to the topic: the bridge as it is configured, served and signed to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import pytest
import uvicorn
from pydantic import SecretStr

from connectors.circle.sandbox import CircleSandbox, SandboxConfig
from connectors.circle.sandbox.config import TEST_API_KEY, TEST_ENTITY_SECRET
from connectors.circle.sandbox.gate import Fault
from connectors.circle.sandbox.mint import CERTIFICATE, TOPIC_ARNS
from connectors.circle.sandbox.mint import Topic as SnsTopic
from connectors.kyc.onfido import sign as onfido_sign
from connectors.webhooks.bridge import ONFIDO_PATHS, PERSONA_PATHS
from stablerail.config import load_settings
from stablerail.dev.kafka import Kafka
from stablerail.dev.processes import free_port
from stablerail.metrics import Metrics
from stablerail.servers import bridge_app
from stablerail.topics_admin import admin, create_missing
from tests.support.in_process import read_topic, until
from topics.catalog import (
    CIRCLE_WALLETS_UPDATED,
    DEPOSITS_NOTIFIED,
    KYC_APPROVED,
    PAYMENTS_UPDATED,
    WEBHOOKS_DLQ,
    Topic,
)

TO = "0x8381470ed67c3802402dbbfa0058e8871f017a6f"
TRANSFER = {
    "id": "b8627ae8-732b-4d25-b947-1df8f4007a29", "source": {"type": "blockchain", "chain": "ETH"},
    "destination": {"type": "wallet", "id": "12345", "address": TO}, "amount": {"amount": "3.14", "currency": "USD"},
    "transactionHash": "0x" + "4c" * 32, "status": "complete",
}  # fmt: skip


@dataclass
class Setup:
    circle: CircleSandbox
    url: str
    kafka: Kafka
    prefix: str
    http: aiohttp.ClientSession

    async def call(self, path: str, body: dict[str, Any]) -> Any:
        headers = {"Authorization": f"Bearer {TEST_API_KEY}"}
        async with self.http.post(f"{self.circle.base_url}{path}", json=body, headers=headers) as answer:
            assert answer.status == 200, await answer.text()
            return await answer.json()

    async def notify(self, kind: str, resource: dict[str, Any], **options: Any) -> list[Any]:
        body = {"notificationType": kind, "resource": resource, **options}
        statuses: list[Any] = (await self.call("/_control/mint/notify", body))["statuses"]
        return statuses

    async def post(self, path: str, body: bytes, **headers: str) -> tuple[int, Any]:
        async with self.http.post(self.url + path, data=body, headers=headers) as answer:
            return answer.status, (await answer.json(content_type=None) if answer.status != 200 else {})

    async def told(self, topic: Topic) -> list[Any]:
        return await read_topic(self.kafka.bootstrap, topic, self.prefix)


@pytest.fixture
async def setup(kafka: Kafka, topic_prefix: str) -> AsyncIterator[Setup]:
    topics = [DEPOSITS_NOTIFIED, PAYMENTS_UPDATED, CIRCLE_WALLETS_UPDATED, KYC_APPROVED, WEBHOOKS_DLQ]
    async with admin(kafka.bootstrap) as client:
        await create_missing(client, topic_prefix, 1, topics)
    async with CircleSandbox(SandboxConfig(rsa_bits=2048, rate_limits=False, sns_retry_delays_s=(0.05,) * 3)) as circle:
        settings = load_settings(
            env_file=None,
            kafka_bootstrap=kafka.bootstrap,
            topic_prefix=topic_prefix,
            circle_api_url=circle.base_url,
            circle_api_key=TEST_API_KEY,
            circle_entity_secret=TEST_ENTITY_SECRET,
            sumsub_webhook_secret="sumsub-secret",
            onfido_webhook_token="onfido-token",
            circle_webhook_secret="relay-secret",
            circle_mint_topic_arns=TOPIC_ARNS,
            circle_sns_url=circle.base_url,
        )
        async with served(bridge_app(settings, Metrics())) as url, aiohttp.ClientSession() as http:
            yield Setup(circle, url, kafka, topic_prefix, http)


@asynccontextmanager
async def served(app: Any) -> AsyncIterator[str]:
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
    serving = asyncio.create_task(server.serve())

    async def ready() -> bool:
        assert not serving.done()
        if not server.started:
            return False
        async with aiohttp.ClientSession() as http, http.get(f"http://127.0.0.1:{port}/readyz") as answer:
            return answer.status == 200

    try:
        await until(ready, "the bridge is ready")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await serving


async def test_both_regions_are_confirmed_and_what_they_tell_is_one_event(setup: Setup) -> None:
    subscription = await setup.call("/v1/notifications/subscriptions", {"endpoint": setup.url + "/webhooks/circle"})
    assert [each["status"] for each in subscription["data"]["subscriptionDetails"]] == ["pending", "pending"]
    topics = setup.circle.sandbox.mint.subscriptions[subscription["data"]["id"]]

    async def confirmed() -> bool:
        return {topic.status for topic in topics} == {"confirmed"}

    await until(confirmed, "both regions are confirmed")
    for version in ("1", "2"):
        told = await setup.notify("transfers", {"transfer": TRANSFER}, signatureVersion=version, copies=2)
        assert told == [200] * 4
    payment = {"id": "p1", "type": "payment", "status": "paid", "amount": {"amount": "1.00", "currency": "USD"}}
    assert await setup.notify("payments", {"payment": payment}) == [200, 200]
    recipient = {"id": "r1", "chain": "ETH", "address": TO, "status": "active"}
    assert await setup.notify("addressBookRecipients", {"addressBookRecipient": recipient}) == [200, 200]
    assert await setup.notify("unheardOf", {}) == [200, 200]

    deposits = await setup.told(DEPOSITS_NOTIFIED)
    assert {record.key for record in deposits} == {TO.encode()}
    for topic in (DEPOSITS_NOTIFIED, PAYMENTS_UPDATED, CIRCLE_WALLETS_UPDATED):
        records = await setup.told(topic)
        assert records
        assert len({dict(record.headers)["ce_id"] for record in records}) == 1, "one event, however often it is told"
    letters = await setup.told(WEBHOOKS_DLQ)
    assert [(letter.key, dict(letter.headers)["code"]) for letter in letters] == [(b"circle_mint", b"unknown_type")] * 2


@pytest.mark.parametrize("fault", [("status", 403), ("page", 302), ("page", 200)])
async def test_a_deposit_is_told_although_its_certificate_could_not_be_had_at_first(
    setup: Setup, fault: tuple[Any, int]
) -> None:
    """Amazon gives up for good what is answered 4xx, and Mint's list is polled only where its key is set."""
    mint = setup.circle.sandbox.mint
    mint.base_url = setup.circle.base_url
    mint.subscriptions["s"] = [SnsTopic(arn, setup.url + "/webhooks/circle", status="confirmed") for arn in TOPIC_ARNS]
    kind, status = fault
    setup.circle.sandbox.gate.faults.append(Fault(CERTIFICATE, kind, status=status, times=2))
    assert await setup.notify("transfers", {"transfer": TRANSFER}) == [200, 200]
    assert {record.key for record in await setup.told(DEPOSITS_NOTIFIED)} == {TO.encode()}


async def test_a_subscription_that_cannot_be_confirmed_now_is_asked_for_again(setup: Setup) -> None:
    mint = setup.circle.sandbox.mint
    mint.base_url = setup.circle.base_url

    def asks(token: str, url: str) -> bytes:
        return mint.message("SubscriptionConfirmation", TOPIC_ARNS[0], "…", SubscribeURL=url, Token=token)

    header = {"x-amz-sns-message-type": "SubscriptionConfirmation"}
    nowhere = asks("t", f"{mint.base_url}/_sns/?Action=ConfirmSubscription&Token=unknown")
    status, problem = await setup.post("/webhooks/circle", nowhere, **header)
    assert (status, problem["code"]) == (503, "not_done")
    for url in ("http://169.254.169.254/latest/meta-data", setup.url + "/healthz"):
        assert await setup.post("/webhooks/circle", asks("t", url), **header) == (200, {})
    letters = await setup.told(WEBHOOKS_DLQ)
    assert [dict(letter.headers)["code"] for letter in letters] == [b"bad_subscribe_url"] * 2


@pytest.mark.parametrize("path", ["/webhooks/circle", "/webhooks/circle/payments"])
async def test_a_scheme_is_chosen_by_its_header_and_no_other_is_tried(setup: Setup, path: str) -> None:
    mint = setup.circle.sandbox.mint
    mint.base_url = setup.circle.base_url
    message = mint.message("Notification", TOPIC_ARNS[0], json.dumps({"notificationType": "transfers"}))
    sns = {"x-amz-sns-message-type": "Notification"}

    async def code(body: bytes, **headers: str) -> tuple[int, str]:
        status, problem = await setup.post(path, body, **headers)
        return status, problem["code"]

    assert await code(message) == (401, "missing_signature")
    assert await code(message, **{"X-Signature": "00"}) == (401, "missing_signature")
    assert await code(message, **{"X-Signature": "00", "X-Timestamp": "1780000000"}) == (401, "bad_signature")
    assert await code(message.replace(b"transfers", b"transferz"), **sns) == (401, "bad_signature")
    assert await code(b"{}", **sns) == (401, "missing_signature")
    foreign = mint.message("Notification", TOPIC_ARNS[0].replace("9089", "1234"), "{}")
    assert await code(foreign, **sns) == (401, "unknown_topic")
    assert await setup.told(DEPOSITS_NOTIFIED) == []


async def test_vendors_that_are_configured_are_listened_to_and_others_are_not(setup: Setup) -> None:
    body = json.dumps(
        {
            "payload": {
                "action": "workflow_run.completed", "object": {"id": "1d2f", "status": "approved"},
                "resource": {"applicant_id": "7c0a", "customer_user_id": "user_42"},
            }
        }
    ).encode()  # fmt: skip
    signed = onfido_sign(body, SecretStr("onfido-token"))
    assert (await setup.post(ONFIDO_PATHS[0], body, **signed))[0] == 200
    assert (await setup.post(ONFIDO_PATHS[0], body + b" ", **signed))[0] == 401
    assert (await setup.post(PERSONA_PATHS[0], body))[0] == 404
    (approval,) = await setup.told(KYC_APPROVED)
    assert approval.key == b"user_42"
