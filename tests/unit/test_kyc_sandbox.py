"""The Sumsub sandbox against the bridge, over HTTP on loopback."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator

import httpx
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from pydantic import SecretStr

from connectors.kyc.onfido import OnfidoSource
from connectors.kyc.persona import PersonaSource
from connectors.kyc.sandbox import VENDORS, SumsubSandbox, create_control
from connectors.kyc.sandbox import server as sandbox_server
from connectors.kyc.sumsub import Approved, OtherVerdict, Verdict, translate, verify
from connectors.webhooks.source import Publish, Translation, WebhookSource

SECRET = SecretStr("sandbox-secret")


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that comes late is none to the sandbox, and it sends again."""
    monkeypatch.setattr(sandbox_server, "ANSWER_TIMEOUT_S", 100.0)


class Receiver:
    """Verifies each webhook with our own verifier and answers with the next of `answers`, then 200."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.answers: list[int] = []

    async def receive(self, request: web.Request) -> web.Response:
        body = await request.read()
        verify(request.headers, body, SECRET)
        self.bodies.append(body)
        return web.Response(status=self.answers.pop(0) if self.answers else 200)


@pytest.fixture
def receiver() -> Receiver:
    return Receiver()


@pytest.fixture
async def sumsub(receiver: Receiver) -> AsyncIterator[SumsubSandbox]:
    app = web.Application()
    app.router.add_post("/hook", receiver.receive)
    async with (
        TestServer(app) as server,
        SumsubSandbox(str(server.make_url("/hook")), SECRET, schedule_s=(0.01,) * 3) as sandbox,
    ):
        yield sandbox


async def test_an_approval_arrives_signed(sumsub: SumsubSandbox, receiver: Receiver) -> None:
    delivery = await sumsub.review("user_42")
    await sumsub.settle()
    said = translate(receiver.bodies[0])
    assert isinstance(said, Approved)
    assert said.event.user_id == "user_42"
    assert said.event_id.startswith(f"{delivery.correlation_id}:applicantReviewed:20")
    assert delivery.statuses == [200]


async def test_refusals_say_whether_the_customer_may_try_again(sumsub: SumsubSandbox, receiver: Receiver) -> None:
    for reject_type in ("FINAL", "RETRY"):
        await sumsub.review("user_42", "RED", reject_type=reject_type)
        await sumsub.settle()
    verdicts = [said.verdict for said in map(translate, receiver.bodies) if isinstance(said, OtherVerdict)]
    assert verdicts == [Verdict.REFUSED_FINAL, Verdict.REFUSED_RETRY]


async def test_a_webhook_is_sent_again_until_it_is_taken(sumsub: SumsubSandbox, receiver: Receiver) -> None:
    receiver.answers = [503, 302, 202]
    delivery = await sumsub.review("user_42")
    await sumsub.settle()
    assert delivery.statuses == [503, 302, 202]
    assert delivery.delivered
    assert len(set(receiver.bodies)) == 1


async def test_a_webhook_is_given_up_at_the_end_of_the_schedule(sumsub: SumsubSandbox, receiver: Receiver) -> None:
    receiver.answers = [500] * 10
    delivery = await sumsub.review("user_42")
    await sumsub.settle()
    assert delivery.statuses == [500] * 4
    assert not delivery.delivered


async def test_nobody_listening_is_an_attempt_without_answer() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody else's: what is bound and does not listen refuses
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/hook"
        async with SumsubSandbox(url, SECRET, schedule_s=(0.01,)) as sandbox:
            delivery = await sandbox.review("user_42")
            await sandbox.settle()
            assert delivery.statuses == [None, None]


async def test_the_control_endpoint_sends_reviews_with_duplicates(sumsub: SumsubSandbox, receiver: Receiver) -> None:
    transport = httpx.ASGITransport(create_control(sumsub))
    async with httpx.AsyncClient(transport=transport, base_url="http://sumsub") as http:
        order = {"externalUserId": "user_9", "answer": "GREEN", "copies": 3}
        answer = await http.post("/_control/review", json=order)
        wrong = await http.post("/_control/review", json={"externalUserId": "user_9", "answer": "BLUE"})
    await sumsub.settle()
    assert answer.status_code == 202
    assert len(receiver.bodies) == 3
    assert len({said.event_id for said in map(translate, receiver.bodies) if isinstance(said, Approved)}) == 1
    assert wrong.status_code == 422


@pytest.mark.parametrize("vendor", ["persona", "onfido"])
async def test_the_other_vendors_say_and_sign_as_their_sources_read(vendor: str) -> None:
    source: WebhookSource = PersonaSource(SECRET) if vendor == "persona" else OnfidoSource(SECRET)
    said: list[Translation] = []

    async def receive(request: web.Request) -> web.Response:
        body = await request.read()
        await source.verify(request.headers, body)
        said.extend(source.translate(body))
        return web.Response()

    app = web.Application()
    app.router.add_post("/hook", receive)
    async with TestServer(app) as server, VENDORS[vendor](str(server.make_url("/hook")), SECRET) as sandbox:
        await sandbox.review("user_42", copies=2)
        await sandbox.review("user_43", "RED")
        await sandbox.settle()
        assert [delivery.statuses for delivery in sandbox.deliveries] == [[200, 200], [200]]
    published = [one for one in said if isinstance(one, Publish)]
    assert [(one.topic.name, one.key) for one in published if one.key == b"user_43"] == [("kyc.rejected", b"user_43")]
    approvals = [one for one in published if one.topic.name == "kyc.approved"]
    assert [one.key for one in approvals] == [b"user_42", b"user_42"]
    assert len({one.event_id for one in approvals}) == 1
