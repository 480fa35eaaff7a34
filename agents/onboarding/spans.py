"""What a trace shows of wallet provisioning. One call serves many jobs: each job has a span of its own in its own trace, with
one for each chain; the requests to Circle are linked to them. Without an OpenTelemetry SDK in the process nothing is recorded.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from agents.intents import StoredCall

JOB: Final = "ProcessWalletProvisioningJob"
CHAIN: Final = "CreateWalletForChain"
CIRCLE: Final = "CircleAPI:"

_propagator = TraceContextTextMapPropagator()


@contextmanager
def performing(call: StoredCall) -> Iterator[list[trace.Link]]:
    """Around one attempt of a call; gives the links for the requests made meanwhile."""
    tracer = trace.get_tracer("stablerail")
    spans: list[trace.Span] = []
    links: list[trace.Link] = []
    for member in call.members:
        user_id: str = member.request["user_id"]
        about: dict[str, AttributeValue] = {
            "job.id": user_id,
            "user.id": user_id,
            "call.id": call.id,
            "attempt": call.attempts + 1,
        }
        job = tracer.start_span(JOB, _context(member.traceparent), attributes=about)
        links.append(trace.Link(job.get_span_context()))
        within = trace.set_span_in_context(job)
        spans += [
            tracer.start_span(CHAIN, within, attributes={"user.id": user_id, "chain": chain})
            for chain in member.request["chains"]
        ]
        spans.append(job)
    started = time.perf_counter()
    status, failure = "success", None
    try:
        yield links
    except Exception as error:
        status, failure = "failed", str(getattr(error, "code", type(error).__name__))
        raise
    finally:
        for span in spans:
            span.set_attribute("status", status)
            span.set_attribute("duration", time.perf_counter() - started)
            if failure is not None:
                span.set_attribute("error.type", failure)
                span.set_status(trace.StatusCode.ERROR)
            span.end()


@contextmanager
def request(operation: str, links: list[trace.Link]) -> Iterator[None]:
    """Around one request to Circle."""
    tracer = trace.get_tracer("stablerail")
    with tracer.start_as_current_span(f"{CIRCLE}{operation}", Context(), links=links, record_exception=False) as span:
        try:
            yield
        except Exception as error:
            span.set_attribute("error.type", str(getattr(error, "code", type(error).__name__)))
            raise


def _context(traceparent: str | None) -> Context:
    return _propagator.extract({"traceparent": traceparent} if traceparent else {}, Context())
