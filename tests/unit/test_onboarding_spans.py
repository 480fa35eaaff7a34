"""The spans of wallet provisioning, on a tracer that remembers them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from opentelemetry import trace
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

from agents.intents import Member, StoredCall
from agents.onboarding import spans
from connectors.errors import Unavailable

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
NOW = datetime(2026, 7, 1, tzinfo=UTC)


class Remembered(NonRecordingSpan):
    def __init__(self, name: str, parent: SpanContext, number: int, links: Any, attributes: Any) -> None:
        super().__init__(SpanContext(parent.trace_id or 99, number, False, TraceFlags(1)))
        self.name, self.parent, self.links, self.ended = name, parent, list(links), False
        self.attributes: dict[str, Any] = dict(attributes or {})

    def set_attribute(self, key: str, value: Any) -> None:
        self.attributes[key] = value

    def end(self, end_time: int | None = None) -> None:
        self.ended = True


class Tracer:
    def __init__(self) -> None:
        self.spans: list[Remembered] = []

    def start_span(self, name: str, context: Any = None, *, attributes: Any = None, links: Any = (), **_: Any) -> Any:
        parent = trace.get_current_span(context).get_span_context()
        self.spans.append(Remembered(name, parent, len(self.spans) + 1, links, attributes))
        return self.spans[-1]

    @contextmanager
    def start_as_current_span(self, name: str, context: Any = None, **given: Any) -> Iterator[Any]:
        span = self.start_span(name, context, **given)
        yield span
        span.end()


def call() -> StoredCall:
    def member(user: str, traceparent: str | None) -> Member:
        return Member("1" * 32, "ETH,SOL", {"user_id": user, "chains": ["ETH", "SOL"]}, {}, {}, traceparent, NOW)

    members = (member("kim", f"00-{TRACE}-00f067aa0ba902b7-01"), member("lee", None))
    return StoredCall("c" * 32, UUID(int=1), {"user_ids": ["kim", "lee"], "chains": ["ETH", "SOL"]}, members, NOW)


def test_each_job_is_a_span_of_its_own_trace_with_one_for_each_chain_and_the_request_is_linked_to_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tracer = Tracer()
    monkeypatch.setattr(trace, "get_tracer", lambda *_: tracer)
    with spans.performing(call()) as links, spans.request("CreateWallets", links):
        pass
    jobs = [span for span in tracer.spans if span.name == "ProcessWalletProvisioningJob"]
    assert [span.attributes["user.id"] for span in jobs] == ["kim", "lee"]
    assert f"{jobs[0].get_span_context().trace_id:032x}" == TRACE
    chains = [span for span in tracer.spans if span.name == "CreateWalletForChain"]
    assert [(span.attributes["user.id"], span.attributes["chain"]) for span in chains] == [
        ("kim", "ETH"), ("kim", "SOL"), ("lee", "ETH"), ("lee", "SOL"),
    ]  # fmt: skip
    assert [span.parent.span_id for span in chains[:2]] == [jobs[0].get_span_context().span_id] * 2
    (request,) = [span for span in tracer.spans if span.name == "CircleAPI:CreateWallets"]
    assert [link.context for link in request.links] == [job.get_span_context() for job in jobs]
    assert all(span.ended for span in tracer.spans)
    assert {span.attributes["status"] for span in jobs + chains} == {"success"}
    assert all(span.attributes["duration"] >= 0 for span in jobs)


def test_a_failed_attempt_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    tracer = Tracer()
    monkeypatch.setattr(trace, "get_tracer", lambda *_: tracer)
    with pytest.raises(Unavailable), spans.performing(call()) as links, spans.request("CreateWallets", links):
        raise Unavailable("503", sent=True)
    for span in tracer.spans:
        assert span.attributes["error.type"] == "partner_unavailable", span.name
    assert all(span.ended for span in tracer.spans if span.name != "CircleAPI:CreateWallets")
