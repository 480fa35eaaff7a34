"""The bridge over ASGI with a broker that can be switched off."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from connectors.kyc.sumsub import SumsubSource, sign
from connectors.webhooks.bridge import CIRCLE_PATHS, SUMSUB_PATHS, Limits, Mount, create_bridge, trace_of
from connectors.webhooks.publisher import Unavailable
from connectors.webhooks.source import Ignored, NotUnderstood, Publish, RefusalCode, Refused, Translation
from topics.catalog import DEPOSITS_NOTIFIED, KYC_APPROVED, KYC_REJECTED, WEBHOOKS_DLQ, Topic
from topics.envelope import read
from topics.events import DepositNotified, Evidence, KycApproved
from topics.trace import child, is_sampled, read_traceparent

SECRET = SecretStr("sumsub-demo-secret")
GREEN = json.dumps(
    {
        "type": "applicantReviewed",
        "applicantId": "5cb56e8e0a975a35f333cb83",
        "externalUserId": "usr_42",
        "correlationId": "req-1",
        "createdAtMs": "2026-11-21 02:00:00.704",
        "reviewStatus": "completed",
        "reviewResult": {"reviewAnswer": "GREEN"},
    }
).encode()
RED = GREEN.replace(b"GREEN", b"RED")
CREATED = GREEN.replace(b"applicantReviewed", b"applicantCreated")
NOON = datetime(2026, 11, 21, 12, tzinfo=UTC)
TRACE = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
KYC = SUMSUB_PATHS[0]


class Broker:
    """Keeps what is published; `down` makes it refuse, after `takes` more messages."""

    def __init__(self) -> None:
        self.messages: list[tuple[Topic, bytes, bytes, dict[str, bytes]]] = []
        self.down = False
        self.takes = 0

    @property
    def connected(self) -> bool:
        return not self.down

    async def publish(self, topic: Topic, key: bytes, value: bytes, headers: Sequence[tuple[str, bytes]]) -> None:
        if self.down and self.takes == 0:
            raise Unavailable("switched off")
        self.takes -= 1
        self.messages.append((topic, key, value, dict(headers)))


def deposit(transfer_id: str) -> DepositNotified:
    return DepositNotified(
        source="circle", transfer_id=transfer_id, chain="ETH", tx_hash="0xaa", to="0xbb", asset="USDC", amount=1,
        evidence=Evidence.CONFIRMED,
    )  # fmt: skip


class Scripted:
    """A source that does what the test set."""

    vendor = "circle"

    def __init__(self) -> None:
        self.says: tuple[Translation, ...] = ()
        self.raises: Exception | None = None
        self.refuses: Exception | None = None
        self.hangs = False

    async def verify(self, headers: Mapping[str, str], body: bytes) -> None:
        if self.hangs:
            await asyncio.Event().wait()
        if self.refuses is not None:
            raise self.refuses

    def translate(self, body: bytes) -> tuple[Translation, ...]:
        if self.raises is not None:
            raise self.raises
        return self.says


class Bridge:
    def __init__(self) -> None:
        self.broker = Broker()
        self.circle = Scripted()
        self.registry = CollectorRegistry()
        self.app = create_bridge(
            [Mount(SumsubSource(SECRET), SUMSUB_PATHS), Mount(self.circle, CIRCLE_PATHS, answers_head=True)],
            self.broker,
            self.registry,
            limits=Limits(read_s=0.2, verify_s=0.2),
            now=lambda: NOON,
        )
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://bridge")

    async def kyc(self, body: bytes, **headers: str) -> httpx.Response:
        return await self.http.post(KYC, content=body, headers=sign(body, SECRET) | headers)

    def count(self, vendor: str, outcome: str, code: str) -> float:
        labels = {"vendor": vendor, "outcome": outcome, "code": code}
        return self.registry.get_sample_value("stablerail_webhooks_total", labels) or 0


@pytest.fixture
async def bridge() -> AsyncIterator[Bridge]:
    bridge = Bridge()
    async with bridge.http:
        yield bridge


def assert_problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = answer.json()
    assert {name: problem[name] for name in ("type", "status", "code")} == {
        "type": "about:blank",
        "status": status,
        "code": code,
    }
    assert problem["title"]
    assert problem["detail"]
    return problem


async def test_an_approval_is_published_as_a_cloud_event(bridge: Bridge) -> None:
    answer = await bridge.kyc(GREEN, traceparent=TRACE)
    assert (answer.status_code, answer.content) == (200, b"")
    ((topic, key, value, headers),) = bridge.broker.messages
    assert (topic, key) == (KYC_APPROVED, b"usr_42")
    received = read(topic, value, list(headers.items()))
    assert isinstance(received.event, KycApproved)
    assert received.event.user_id == "usr_42"
    assert (received.source, received.id) == ("sumsub", "req-1:applicantReviewed:2026-11-21 02:00:00.704")
    assert (received.traceparent, headers["ce_time"]) == (TRACE, b"2026-11-21T12:00:00+00:00")
    assert bridge.count("sumsub", "published", "kyc.approved") == 1


async def test_a_redelivered_webhook_is_the_same_event(bridge: Bridge) -> None:
    for _ in range(2):
        assert (await bridge.kyc(GREEN)).status_code == 200
    first, second = (read(topic, value, list(headers.items())) for topic, _, value, headers in bridge.broker.messages)
    assert first.uid == second.uid


async def test_a_refusal_of_the_customer_is_counted_and_answered(bridge: Bridge) -> None:
    assert (await bridge.kyc(RED)).status_code == 200
    assert [message[0] for message in bridge.broker.messages] == [KYC_REJECTED]
    assert bridge.count("sumsub", "published", "kyc.rejected") == 1


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({}, 401, "missing_signature"),
        ({"X-Payload-Digest": "00" * 32}, 401, "bad_signature"),
        ({"X-Payload-Digest": "00" * 20, "X-Payload-Digest-Alg": "HMAC_SHA1_HEX"}, 400, "unsupported_algorithm"),
    ],
)
async def test_a_webhook_that_is_not_signed_is_refused(
    bridge: Bridge, headers: dict[str, str], status: int, code: str
) -> None:
    assert_problem(await bridge.http.post(KYC, content=GREEN, headers=headers), status, code)
    assert bridge.broker.messages == []
    assert bridge.count("sumsub", "refused", code) == 1


async def test_the_signature_covers_the_raw_bytes(bridge: Bridge) -> None:
    same_json = json.dumps(json.loads(GREEN), indent=1).encode()
    assert_problem(await bridge.http.post(KYC, content=same_json, headers=sign(GREEN, SECRET)), 401, "bad_signature")


@pytest.mark.parametrize("body", [b"", b"hello", b"\xff\x00", b"[]"])
async def test_genuine_bytes_that_say_nothing_are_kept(bridge: Bridge, body: bytes) -> None:
    assert (await bridge.kyc(body, traceparent=TRACE)).status_code == 200
    ((topic, key, value, headers),) = bridge.broker.messages
    assert (topic, key, value) == (WEBHOOKS_DLQ, b"sumsub", body)
    assert headers.pop("reason")
    assert headers == {
        "vendor": b"sumsub",
        "path": KYC.encode(),
        "code": b"wrong_schema" if body == b"[]" else b"not_json",
        "traceparent": TRACE.encode(),
        "received_at": b"2026-11-21T12:00:00+00:00",
    }
    assert bridge.count("sumsub", "not_understood", headers["code"].decode()) == 1


async def test_a_broker_that_is_down_makes_the_vendor_repeat(bridge: Bridge) -> None:
    bridge.broker.down = True
    for body in (GREEN, b"not understood"):
        answer = await bridge.kyc(body)
        assert_problem(answer, 503, "broker_unavailable")
        assert answer.headers["retry-after"] == "5"
    assert_problem(await bridge.http.get("/readyz"), 503, "broker_unavailable")
    assert (await bridge.http.get("/healthz")).status_code == 200
    assert (await bridge.kyc(CREATED)).status_code == 200
    bridge.broker.down = False
    assert (await bridge.kyc(GREEN)).status_code == 200
    assert (await bridge.http.get("/readyz")).json() == {"status": "ready"}
    for path in ("/healthz", "/readyz", "/metrics"):
        assert (await bridge.http.head(path)).status_code == 200, path
    assert bridge.count("sumsub", "unavailable", "broker_unavailable") == 2


async def test_a_webhook_of_two_events_is_answered_after_both(bridge: Bridge) -> None:
    bridge.circle.says = tuple(
        Publish(DEPOSITS_NOTIFIED, b"0xbb", deposit(n), f"note-{n}", "circle") for n in ("1", "2")
    )
    bridge.broker.down, bridge.broker.takes = True, 1
    assert_problem(await bridge.http.post("/webhooks/circle", content=b"{}"), 503, "broker_unavailable")
    assert len(bridge.broker.messages) == 1
    bridge.broker.down = False
    assert (await bridge.http.post("/webhooks/circle", content=b"{}")).status_code == 200
    assert [headers["ce_id"] for _, _, _, headers in bridge.broker.messages] == [b"note-1", b"note-1", b"note-2"]


@pytest.mark.parametrize("path", CIRCLE_PATHS)
async def test_circle_is_answered_at_every_alias(bridge: Bridge, path: str) -> None:
    bridge.circle.says = (Ignored("webhooks.test"),)
    assert (await bridge.http.head(path)).status_code == 200
    assert (await bridge.http.post(path, content=b"{}")).status_code == 200
    assert bridge.count("circle", "ignored", "webhooks.test") == 1


async def test_a_key_that_cannot_be_had_now_makes_the_vendor_repeat(bridge: Bridge) -> None:
    bridge.circle.refuses = Refused(RefusalCode.KEY_UNAVAILABLE, "Circle does not answer")
    answer = await bridge.http.post("/webhooks/circle", content=b"{}")
    assert_problem(answer, 503, "key_unavailable")
    assert answer.headers["retry-after"] == "5"


async def test_a_key_look_up_without_end_has_one(bridge: Bridge) -> None:
    bridge.circle.hangs = True
    assert_problem(await bridge.http.post("/webhooks/circle", content=b"{}"), 503, "key_unavailable")


async def test_a_bug_of_a_translator_loses_no_webhook(bridge: Bridge) -> None:
    bridge.circle.raises = KeyError("amount")
    assert (await bridge.http.post("/webhooks/circle", content=b"bytes")).status_code == 200
    ((topic, _, value, headers),) = bridge.broker.messages
    assert (topic, value, headers["code"]) == (WEBHOOKS_DLQ, b"bytes", b"bug")


async def test_a_body_at_the_limit_is_read_and_one_byte_more_is_not(bridge: Bridge) -> None:
    assert (await bridge.kyc(b" " * 1_000_000)).status_code == 200
    assert_problem(await bridge.kyc(b" " * 1_000_001), 413, "body_too_large")


@pytest.mark.parametrize("declared", [True, False])
async def test_five_megabytes_are_not_read(bridge: Bridge, declared: bool) -> None:
    chunk = b"x" * 65_536
    sent = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(80):
            sent += len(chunk)
            yield chunk

    headers = {"content-length": str(80 * len(chunk))} if declared else {}
    assert_problem(await bridge.http.post(KYC, content=body(), headers=headers), 413, "body_too_large")
    assert sent == 0 if declared else 1_000_000 < sent < 1_200_000


async def test_a_body_that_never_ends_is_given_up(bridge: Bridge) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    assert_problem(await bridge.http.post(KYC, content=body()), 408, "body_too_slow")


@pytest.mark.parametrize(
    "path", ["/", "/webhooks", "/webhooks/circle/", "/webhooks/circle/others", "/docs", "/openapi.json"]
)
async def test_another_path_is_not_there(bridge: Bridge, path: str) -> None:
    assert_problem(await bridge.http.post(path), 404, "not_found")


@pytest.mark.parametrize(("method", "path"), [("GET", KYC), ("HEAD", KYC), ("GET", "/webhooks/circle"), ("PUT", KYC)])
async def test_another_method_is_not_taken(bridge: Bridge, method: str, path: str) -> None:
    answer = await bridge.http.request(method, path)
    assert answer.status_code == 405
    assert "POST" in answer.headers["allow"]
    if method != "HEAD":
        assert_problem(answer, 405, "method_not_allowed")


async def test_an_unexpected_error_says_nothing_of_its_cause(bridge: Bridge) -> None:
    bridge.circle.refuses = RuntimeError("password=hunter2")
    problem = assert_problem(await bridge.http.post("/webhooks/circle", content=b"{}"), 500, "internal_error")
    assert "hunter2" not in str(problem)


async def test_metrics_hold_no_word_of_a_request(bridge: Bridge) -> None:
    bridge.circle.says = (NotUnderstood("unknown_type", "evil-reason"),)
    await bridge.http.post("/webhooks/circle", content=b"evil-body", headers={"X-Evil": "evil-header"})
    await bridge.http.post("/webhooks/evil-path")
    await bridge.kyc(GREEN.replace(b"applicantReviewed", b"evil-type"))
    text = (await bridge.http.get("/metrics")).text
    assert 'stablerail_webhooks_total{code="unknown_type",outcome="not_understood",vendor="circle"} 1.0' in text
    assert 'stablerail_webhook_seconds_count{vendor="sumsub"} 1.0' in text
    assert "evil" not in text


def test_a_trace_is_passed_on_only_when_it_is_one() -> None:
    assert trace_of(TRACE) == TRACE
    assert trace_of("01" + TRACE[2:] + "-more") == TRACE, "a later version, read as far as we know it"
    for wrong in (None, "", "x", TRACE.upper(), TRACE + "\n", "ff" + TRACE[2:], f"00-{'0' * 32}-{'1' * 16}-01"):
        made = trace_of(wrong)
        assert made != wrong
        assert trace_of(made) == made


def test_a_span_of_ours_goes_on_with_the_senders_trace_and_only_a_share_of_new_ones_is_exported() -> None:
    ours = trace_of(TRACE, new_span=True)
    assert (ours[:36], ours[-3:]) == (TRACE[:36], TRACE[-3:]), "the same trace, exported as the sender wants it"
    assert ours != TRACE
    assert read_traceparent(ours) == ours
    assert [is_sampled(trace_of(None, ratio)) for ratio in (0.0, 1.0)] == [False, True]


def test_whoever_publishes_a_message_says_the_same_span() -> None:
    assert child(TRACE, "deposits.credited one") == child(TRACE, "deposits.credited one")
    assert child(TRACE, "deposits.credited one") != child(TRACE, "deposits.credited two")
    assert read_traceparent(child(TRACE, "")) == child(TRACE, "")
