"""Spans to an OpenTelemetry collector over OTLP/HTTP, when a deployment names one.

The SDK draws ids; ours are given (topics/trace.py), so that a span is the same whoever tells it. Its own environment
variables (OTEL_BSP_…, OTEL_EXPORTER_OTLP_HEADERS, OTEL_RESOURCE_ATTRIBUTES) hold. It exports from a thread of its own; what a
killed process had not exported is lost, the trace goes on.
"""

from __future__ import annotations

from typing import Final

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    TraceFlags,
    set_span_in_context,
)

from topics.trace import Span, is_sampled

_KINDS: Final = {"server": SpanKind.SERVER, "producer": SpanKind.PRODUCER}


class _Given(IdGenerator):
    """The ids of the span that is made next."""

    trace_id = span_id = 0

    def generate_trace_id(self) -> int:
        return self.trace_id

    def generate_span_id(self) -> int:
        return self.span_id


class Exported:
    """Call it with each span that is over, from one thread; `close` sends what is left."""

    def __init__(self, url: str, service: str) -> None:
        self._ids = _Given()
        self._provider = TracerProvider(
            id_generator=self._ids, resource=Resource.create({SERVICE_NAME: service}), shutdown_on_exit=False
        )
        processor = BatchSpanProcessor(OTLPSpanExporter(endpoint=url))
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("stablerail")
        self.others = TracerProvider(resource=self._provider.resource, shutdown_on_exit=False)
        """For spans of parts that make them themselves (agents/onboarding/spans.py), with ids that are drawn; the same exporter."""
        self.others.add_span_processor(processor)

    def __call__(self, span: Span) -> None:
        if not is_sampled(span.traceparent):
            return
        own = _context(span.traceparent)
        self._ids.trace_id, self._ids.span_id = own.trace_id, own.span_id
        parent = None if span.parent is None else set_span_in_context(NonRecordingSpan(_context(span.parent)))
        made = self._tracer.start_span(
            span.name, parent, _KINDS[span.kind], dict(span.attributes), start_time=span.started_ns
        )
        made.end(span.ended_ns)

    def close(self) -> None:
        """Blocks for as long as the collector takes, within the SDK's limit."""
        self._provider.shutdown()


def _context(traceparent: str) -> SpanContext:
    _, trace_id, span_id, flags = traceparent.split("-")
    return SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=TraceFlags(int(flags, 16)))
