"""The list of metrics, and that each method of `Metrics` moves the series it says."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client import CollectorRegistry, Histogram

from stablerail import metric_list, metrics
from stablerail.metrics import Metrics


def value(subject: Metrics, name: str, **labels: str) -> float | None:
    return subject.registry.get_sample_value(name, labels)


def test_every_metric_is_named_and_explained() -> None:
    assert len({metric.name for metric in metric_list.ALL}) == len(metric_list.ALL)
    named_elsewhere = (
        metric_list.SHADOW_DISCREPANCIES, metric_list.BALANCE_QUERY_MS, metric_list.WRITE_SUCCESS, metric_list.SHADOW_WRITE_MS,
    )  # fmt: skip
    for metric in metric_list.ALL:
        assert re.fullmatch(r"(stablerail|wallet_provisioning)_[a-z0-9_]+", metric.name) or metric in named_elsewhere
        assert metric.help
        assert not metric.name.endswith("_total")


def test_a_settled_batch_is_counted_by_outcome_and_phase() -> None:
    subject = Metrics()
    subject.event_settled("credit_deposits", "done", 499)
    subject.event_settled("credit_deposits", "rejected")
    subject.refused("credit_deposits", "below_minimum")
    subject.batch("credit_deposits", 500, commit_s=0.01, journal_s=0.002, emit_s=0.003, ack_s=0.0)
    stage = {"stage": "credit_deposits"}
    assert value(subject, "stablerail_stage_events_total", outcome="done", **stage) == 499
    assert value(subject, "stablerail_stage_events_total", outcome="rejected", **stage) == 1
    assert value(subject, "stablerail_stage_refusals_total", code="below_minimum", **stage) == 1
    assert value(subject, "stablerail_stage_batch_events_sum", **stage) == 500
    assert value(subject, "stablerail_stage_batch_seconds_sum", phase="commit", **stage) == 0.01
    assert value(subject, "stablerail_stage_batch_seconds_count", phase="ack", **stage) == 1


def test_a_partition_that_went_away_reports_no_lag() -> None:
    subject = Metrics()
    subject.lag("credit_deposits", 2, 40)
    assert value(subject, "stablerail_stage_lag_events", stage="credit_deposits", partition="2") == 40
    subject.partition_gone("credit_deposits", 2)
    subject.partition_gone("credit_deposits", 3)
    assert value(subject, "stablerail_stage_lag_events", stage="credit_deposits", partition="2") is None


def test_everything_else_reaches_its_series() -> None:
    subject = Metrics()
    subject.oldest_event_age("s", 1.5)
    subject.fuse("s", blown=True)
    subject.dead_letter("deposits.notified", "unknown_wallet")
    subject.outbox_rows(3)
    subject.relayed(2, 1_000)
    subject.call("circle", "unknown", 0.2)
    subject.chain_head("MATIC", 41_100_000)
    subject.scanner_lag("MATIC", 4)
    subject.rpc_endpoints("MATIC", 2)
    subject.custody_discrepancy("MATIC", -1_500_000)
    subject.buffers([("system_buffer_fiat", 5, None)])
    subject.buffers([("system_buffer_usdc", -2_500_000, 1_000_000)])
    subject.worker_ready("deposits", ready=True)
    subject.http_request("api", "GET", "/v1/deposits/{deposit_id}", 200, 0.01)
    assert value(subject, "stablerail_stage_oldest_event_age_seconds", stage="s") == 1.5
    assert value(subject, "stablerail_fuse_blown", stage="s") == 1
    assert value(subject, "stablerail_dead_letters_total", topic="deposits.notified", code="unknown_wallet") == 1
    assert value(subject, "stablerail_outbox_rows") == 3
    assert value(subject, "stablerail_relay_records_sum") == 2
    assert value(subject, "stablerail_journal_bytes_total") == 1_000
    assert value(subject, "stablerail_calls_total", partner="circle", outcome="unknown") == 1
    assert value(subject, "stablerail_chain_head_number", chain="MATIC") == 41_100_000
    assert value(subject, "stablerail_scanner_lag_blocks", chain="MATIC") == 4
    assert value(subject, "stablerail_rpc_endpoints", chain="MATIC") == 2
    assert value(subject, "stablerail_custody_discrepancy", chain="MATIC") == -1.5
    assert value(subject, "stablerail_buffer_level", account="system_buffer_usdc") == -2.5
    assert value(subject, "stablerail_buffer_threshold", account="system_buffer_usdc") == 1
    assert value(subject, "stablerail_buffer_level", account="system_buffer_fiat") is None, "another has it now"
    assert value(subject, "stablerail_worker_ready", movement="deposits") == 1
    assert (
        value(
            subject,
            "stablerail_http_requests_total",
            app="api",
            method="GET",
            route="/v1/deposits/{deposit_id}",
            status="200",
        )
        == 1
    )
    text = subject.render().decode()
    assert all(f"# HELP {metric.name}" in text for metric in metric_list.ALL)


def test_a_lane_that_is_open_again_or_gone_is_not_shown_paused() -> None:
    subject, lane = Metrics(), {"chain": "MATIC", "signer": "0xa"}
    subject.lanes([("MATIC", "0xa", "low_gas", 3), ("MATIC", "0xb", "foreign_nonce: 7", 0)])
    assert value(subject, "stablerail_lane_paused", reason="low_gas", **lane) == 1
    assert value(subject, "stablerail_lane_in_flight", **lane) == 3
    subject.lanes([("MATIC", "0xa", "", 0)])
    assert value(subject, "stablerail_lane_paused", reason="low_gas", **lane) == 0
    assert value(subject, "stablerail_lane_paused", reason="foreign_nonce", chain="MATIC", signer="0xb") is None


def test_two_processes_in_one_test_do_not_share_series() -> None:
    one, two = Metrics(), Metrics()
    one.dead_letter("t", "c")
    assert value(two, "stablerail_dead_letters_total", topic="t", code="c") is None


def test_every_metric_is_fed_by_somebody() -> None:
    methods = [name for name, member in vars(Metrics).items() if callable(member) and not name.startswith("_")]
    root = Path(metrics.__file__).parents[1]
    sources = [
        path.read_text()
        for package in ("agents", "ledger", "stablerail")
        for path in (root / package).rglob("*.py")
        if path != Path(metrics.__file__)
    ]
    unfed = [name for name in methods if not any(re.search(rf"\.{name}\b", text) for text in sources)]
    assert unfed == []


def test_a_histogram_that_takes_a_batch_at_once_is_what_one_by_one_would_be() -> None:
    values = [0.0, 0.001, 0.0011, 0.3, 31.0]
    subject, registry = Metrics(), CollectorRegistry()
    plain = Histogram("plain", "p", registry=registry, buckets=metric_list.SECONDS)
    subject.webhooks_in_ledger(dict.fromkeys(values[:2], 1))
    subject.webhooks_in_ledger(dict.fromkeys(values[2:], 2))
    for each in (*values, *values[2:]):
        plain.observe(each)
    name = "stablerail_webhook_to_ledger_seconds"
    for bound in (*map(str, metric_list.SECONDS), "+Inf"):
        assert value(subject, f"{name}_bucket", le=bound) == registry.get_sample_value("plain_bucket", {"le": bound})
    for part in ("count", "sum"):
        assert value(subject, f"{name}_{part}") == registry.get_sample_value(f"plain_{part}")
