"""What a collector hears of wallet provisioning, over OTLP: the job in its event's own trace, its chains, the requests to Circle."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from opentelemetry import trace

from stablerail.dev.kafka import Kafka
from stablerail.tracing import Exported
from tests.support.collector import collector
from tests.support.in_process import until
from tests.support.wallet_rig import CHAINS, wallet_rig
from topics.catalog import KYC_APPROVED, WALLETS_PROVISIONED
from topics.envelope import headers_of, value_of
from topics.events import KycApproved

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


async def test_a_job_is_exported_in_the_trace_of_its_approval_with_its_chains_and_what_circle_was_asked(
    database: str, kafka: Kafka, topic_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with collector() as heard, wallet_rig(database, kafka.bootstrap, topic_prefix) as rig:
        exported = Exported(heard.url, "stablerail-onboarding")
        # as the worker sets it; of a whole process it can be set once
        monkeypatch.setattr(trace, "get_tracer", lambda name: exported.others.get_tracer(name))
        event = KycApproved(user_id="kim", vendor="sumsub", applicant_id="a", vendor_event_id="v", approved_at="now")
        headers = headers_of(
            event.ce_type(),
            event_id="e",
            source="test",
            time=rig.at.clock(),
            traceparent=f"00-{TRACE}-00f067aa0ba902b7-01",
        )
        await rig.at.send(KYC_APPROVED, b"kim", value_of(event), headers)
        async with rig.worker():
            await rig.ended(Counter(completed=1), "kim has wallets")
            await until(lambda: rig.at.told(WALLETS_PROVISIONED), "it is told: the span ended before")
        await asyncio.to_thread(exported.close)
    spans = heard.of(TRACE)
    (job,) = [span for span in spans if span.name == "ProcessWalletProvisioningJob"]
    assert job.attributes["user.id"] == "kim"
    assert job.attributes["status"] == "success"
    chains = [span for span in spans if span.name == "CreateWalletForChain"]
    assert {span.attributes["chain"] for span in chains} == {chain.value for chain in CHAINS}
    assert {span.parent_id for span in chains} == {job.span_id}
    asked = {span.name for span in heard.spans if span.name.startswith("CircleAPI:")}
    assert {"CircleAPI:CreateWalletSet", "CircleAPI:CreateWallets"} <= asked
    assert {span.service for span in heard.spans} == {"stablerail-onboarding"}
