"""What a process feeds its metrics (metric_list.py) with: a registry of its own, served at `/metrics`."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Final, Literal

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)

from agents.deposits.figures import SOURCES
from chain.health import STATES
from ledger.accounts import AccountType
from ledger.reconciling import Run
from ledger.verify import Result
from stablerail.bulk import BulkHistogram
from stablerail.metric_list import (
    ACTIVE_JOBS,
    ALL,
    BALANCE_QUERY_MS,
    BREAKER_STATE,
    BUFFER_LEVEL,
    BUFFER_THRESHOLD,
    CALL_SECONDS,
    CALLS,
    CHAIN_HEAD,
    CIRCLE_POLLED,
    CUSTODY_DISCREPANCY,
    DEAD_LETTERS,
    DEAD_LETTERS_OPEN,
    DEAD_LETTERS_STORED,
    DEPOSITS,
    DISCREPANCY_THRESHOLD,
    FUSE_BLOWN,
    GAS_ACCOUNT_LOW,
    HTTP_REQUESTS,
    HTTP_SECONDS,
    INVARIANT_CHECKED,
    INVARIANT_OFFENDING,
    JOB_ERRORS,
    JOB_RETRIES,
    JOB_SECONDS,
    JOBS_PROCESSED,
    JOBS_STUCK,
    JOURNAL_BYTES,
    LANE_IN_FLIGHT,
    LANE_PAUSED,
    MAINTAINED,
    MAINTAINED_ROWS,
    ORDERS_AGE_LIMIT,
    ORDERS_OLDEST,
    ORDERS_OPEN,
    OUTBOX_ROWS,
    REASONS,
    RECONCILE_DIFFERENCES,
    RECONCILE_DISCREPANCY,
    RECONCILED,
    RELAY_RECORDS,
    RPC_ENDPOINT_STATE,
    RPC_ENDPOINTS,
    SCANNER_LAG,
    SCHEDULER_RUNNING,
    SHADOW_DISCREPANCIES,
    SHADOW_OLDEST,
    SHADOW_WAITING,
    SHADOW_WRITE_MS,
    STAGE_ALERTS,
    STAGE_BATCH_EVENTS,
    STAGE_BATCH_SECONDS,
    STAGE_EVENTS,
    STAGE_LAG,
    STAGE_OLDEST,
    STAGE_REFUSALS,
    WALLETS_CREATED,
    WEBHOOK_TO_LEDGER,
    WITHDRAWAL_OLDEST,
    WITHDRAWAL_SECONDS,
    WITHDRAWALS_ENDED,
    WITHDRAWALS_OPEN,
    WORKER_READY,
    WRITE_SUCCESS,
    Metric,
)
from topics.codes import Whose
from topics.money import SCALE

Outcome = Literal["done", "rejected", "retry", "repeat", "reused", "skipped"]
ALARMED: Final = (
    ("credit_deposits", "deposit_contradicted"),
    ("credit_deposits", "deposit_not_listed"),
    ("provision_wallets", "partner_refuses_us"),
    ("settle_transfers", "custodian_contradicted"),
    ("settle_transfers", "custodian_short"),
    ("settle_transfers", "second_transfer"),
    ("transfer_by_custodian", "partner_refuses_us"),
    ("transfer_by_custodian", "second_transfer"),
)
"""(stage, code) of alerts for which a rule of deploy/prometheus waits."""


class Metrics:
    """The metrics of one process. Plain methods, so that agents can be given it through a protocol of their own."""

    content_type: Final = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self._counters: dict[Metric, Counter] = {}
        self._gauges: dict[Metric, Gauge] = {}
        self._histograms: dict[Metric, Histogram] = {}
        self._bulk: dict[Metric, BulkHistogram] = {}
        self._taken: deque[bool] = deque(maxlen=1_000)
        """Of the last commits: whether the legacy table took them."""
        self.settled: dict[tuple[str, Outcome], int] = defaultdict(int)
        """(stage, outcome) -> events so far: STAGE_EVENTS for the pages, which else collect the whole registry for each."""
        for metric in ALL:
            if metric.kind == "counter":
                self._counters[metric] = Counter(metric.name, metric.help, metric.labels, registry=self.registry)
            elif metric.kind == "gauge":
                self._gauges[metric] = Gauge(metric.name, metric.help, metric.labels, registry=self.registry)
            elif metric.kind == "bulk histogram":
                self._bulk[metric] = BulkHistogram(metric.name, metric.help, metric.buckets, self.registry)
            else:
                self._histograms[metric] = Histogram(
                    metric.name, metric.help, metric.labels, registry=self.registry, buckets=metric.buckets
                )

        for source in SOURCES:  # a series that begins at its first rise has, to Prometheus, not risen
            self._counters[DEPOSITS].labels(source, "rejected")
        for outcome in ("completed", "failed", "cancelled", "refused"):
            self._counters[WITHDRAWALS_ENDED].labels(outcome)
        for whose in Whose:
            self._counters[DEAD_LETTERS_STORED].labels(whose.value)
        for stage, code in ALARMED:
            self._counters[STAGE_ALERTS].labels(stage, code)
        for status in ("success", "failed"):
            self._counters[JOBS_PROCESSED].labels(status)
        for type in AccountType:
            self._counters[SHADOW_DISCREPANCIES].labels(type.value)
        self._set(WRITE_SUCCESS, 1)  # nothing was refused

    def render(self) -> bytes:
        """The registry in Prometheus' text format; serve it as `content_type`."""
        return generate_latest(self.registry)

    def event_settled(self, stage: str, outcome: Outcome, events: int = 1) -> None:
        self.settled[stage, outcome] += events
        self._add(STAGE_EVENTS, events, stage, outcome)

    def refused(self, stage: str, code: str, events: int = 1) -> None:
        self._add(STAGE_REFUSALS, events, stage, code)

    def batch(self, stage: str, events: int, *, commit_s: float, journal_s: float, emit_s: float, ack_s: float) -> None:
        """A batch is through; times of its four phases."""
        self._see(STAGE_BATCH_EVENTS, events, stage)
        for phase, seconds in (("commit", commit_s), ("journal", journal_s), ("emit", emit_s), ("ack", ack_s)):
            self._see(STAGE_BATCH_SECONDS, seconds, stage, phase)

    def lag(self, stage: str, partition: int, events: int) -> None:
        self._set(STAGE_LAG, events, stage, str(partition))

    def partition_gone(self, stage: str, partition: int) -> None:
        """The partition went to another worker, which reports its lag from now on."""
        self._gauges[STAGE_LAG].remove_by_labels({"stage": stage, "partition": str(partition)})

    def oldest_event_age(self, stage: str, age_s: float) -> None:
        self._set(STAGE_OLDEST, age_s, stage)

    def fuse(self, stage: str, *, blown: bool) -> None:
        self._set(FUSE_BLOWN, int(blown), stage)

    def alert(self, stage: str, code: str) -> None:
        self._add(STAGE_ALERTS, 1, stage, code)

    def dead_letter(self, topic: str, code: str, events: int = 1) -> None:
        self._add(DEAD_LETTERS, events, topic, code)

    def letter(self, whose: str) -> None:
        self._add(DEAD_LETTERS_STORED, 1, whose)

    def letters_open(self, letters: Mapping[str, int] | None) -> None:
        """None: another worker counts them."""
        if letters is None:
            self._gauges[DEAD_LETTERS_OPEN].clear()
            return
        for whose, count in letters.items():
            self._set(DEAD_LETTERS_OPEN, count, whose)

    def outbox_rows(self, rows: int) -> None:
        self._set(OUTBOX_ROWS, rows)

    def maintained(self, table: str, rows: int) -> None:
        self._add(MAINTAINED_ROWS, rows, table)

    def maintained_at(self, at: datetime) -> None:
        self._set(MAINTAINED, at.timestamp())

    def relayed(self, records: int, journal_bytes: int) -> None:
        """One relay transaction journaled so many records; 0 = another had done ours."""
        self._see(RELAY_RECORDS, records)
        self._add(JOURNAL_BYTES, journal_bytes)

    def call(self, partner: str, outcome: Literal["ok", "refused", "retry", "unknown"], seconds: float) -> None:
        self._add(CALLS, 1, partner, outcome)
        self._see(CALL_SECONDS, seconds, partner)

    def breaker(self, partner: str, state: int) -> None:
        self._set(BREAKER_STATE, state, partner)

    def job_ended(self, status: Literal["success", "failed"], seconds: float) -> None:
        self._add(JOBS_PROCESSED, 1, status)
        self._see(JOB_SECONDS, seconds, status)

    def job_attempt_failed(self, error_type: str, *, again: bool) -> None:
        self._add(JOB_ERRORS, 1, error_type)
        self._add(JOB_RETRIES, int(again))

    def wallet_created(self, chain: str) -> None:
        self._add(WALLETS_CREATED, 1, chain)

    def jobs_stuck(self, jobs: int) -> None:
        self._set(JOBS_STUCK, jobs)

    def jobs_active(self, jobs: int, *, running: bool) -> None:
        self._set(ACTIVE_JOBS, jobs)
        self._set(SCHEDULER_RUNNING, int(running))

    def deposits(self, source: str, outcome: str, events: int = 1) -> None:
        self._add(DEPOSITS, events, source, outcome)

    def webhooks_in_ledger(self, waits_s: Mapping[float, int]) -> None:
        """How long the credited webhooks of a batch took: seconds -> how many."""
        self._bulk[WEBHOOK_TO_LEDGER].observe(waits_s)

    def custody_discrepancy(self, chain: str, base_units: int | None) -> None:
        """None: another worker compares."""
        if base_units is None:
            self._gauges[CUSTODY_DISCREPANCY].remove_by_labels({"chain": chain})
        else:
            self._set(CUSTODY_DISCREPANCY, base_units / SCALE, chain)

    def discrepancy_threshold(self, base_units: int) -> None:
        self._set(DISCREPANCY_THRESHOLD, base_units / SCALE)

    def reconciled(self, run: Run | None, whole_at: datetime | None) -> None:
        """The last run, and when nothing was last left out; None: another worker leads."""
        for metric in (RECONCILE_DIFFERENCES, RECONCILE_DISCREPANCY):
            self._gauges[metric].clear()
        if run is not None:
            for comparison, result in run.compared.items():
                self._set(RECONCILE_DIFFERENCES, result.differences, comparison.value)
                self._set(RECONCILE_DISCREPANCY, result.base_units / SCALE, comparison.value)
        if whole_at is not None:
            self._set(RECONCILED, whole_at.timestamp())

    def buffers(self, found: Iterable[tuple[str, int, int | None]]) -> None:
        """(account type, base units, threshold) of every buffer that this process knows; it forgets the others."""
        self._gauges[BUFFER_LEVEL].clear()
        self._gauges[BUFFER_THRESHOLD].clear()
        for account, balance, threshold in found:
            self._set(BUFFER_LEVEL, balance / SCALE, account)
            if threshold is not None:
                self._set(BUFFER_THRESHOLD, threshold / SCALE, account)

    def shadow_written(self, lag_ms: float, *, ok: bool) -> None:
        self._taken.append(ok)
        self._set(WRITE_SUCCESS, sum(self._taken) / len(self._taken))
        self._see(SHADOW_WRITE_MS, lag_ms)

    def shadow_read(self, source: str, took_ms: float) -> None:
        self._see(BALANCE_QUERY_MS, took_ms, source)

    def shadow_differs(self, type: str) -> None:
        self._add(SHADOW_DISCREPANCIES, 1, type)

    def shadow_waiting(self, count: int, oldest_s: float) -> None:
        self._set(SHADOW_WAITING, count)
        self._set(SHADOW_OLDEST, oldest_s)

    def chain_head(self, chain: str, number: int) -> None:
        self._set(CHAIN_HEAD, number, chain)

    def scanner_lag(self, chain: str, blocks: int) -> None:
        self._set(SCANNER_LAG, blocks, chain)

    def rpc_endpoints(self, chain: str, answering: int) -> None:
        self._set(RPC_ENDPOINTS, answering, chain)

    def rpc_endpoint(self, chain: str, endpoint: str, state: str) -> None:
        """`endpoint`: its place in the settings and its host, never its path."""
        for one in STATES:
            self._set(RPC_ENDPOINT_STATE, one == state, chain, endpoint, one)

    def lanes(self, found: Iterable[tuple[str, str, str, int]]) -> None:
        """(chain, signer, reason, in no block) of every lane that there is; `reason` is empty while it is open."""
        self._gauges[LANE_PAUSED].clear()
        self._gauges[LANE_IN_FLIGHT].clear()
        for chain, signer, reason, in_flight in found:
            name = reason.partition(": ")[0]
            known = name if not name or name in REASONS else "other"
            for one in (*REASONS, "other"):
                self._set(LANE_PAUSED, int(one == known), chain, signer, one)
            self._set(LANE_IN_FLIGHT, in_flight, chain, signer)

    def gas_account(self, chain: str, is_low: bool) -> None:
        self._set(GAS_ACCOUNT_LOW, int(is_low), chain)

    def withdrawal_ended(self, outcome: str, seconds: float) -> None:
        self._add(WITHDRAWALS_ENDED, 1, outcome)
        self._see(WITHDRAWAL_SECONDS, seconds, outcome)

    def withdrawals_open(self, found: Iterable[tuple[str, str, int, float]]) -> None:
        """(chain, state, how many, age of the oldest in seconds) of all that are open; every worker tells the same."""
        self._gauges[WITHDRAWALS_OPEN].clear()
        self._gauges[WITHDRAWAL_OLDEST].clear()
        for chain, state, withdrawals, oldest_age_s in found:
            self._set(WITHDRAWALS_OPEN, withdrawals, chain, state)
            self._set(WITHDRAWAL_OLDEST, oldest_age_s, chain, state)

    def orders_open(self, found: Iterable[tuple[str, int, float, float]]) -> None:
        """(state, how many, age of the oldest, its limit, in seconds) of every state; every worker tells the same."""
        for state, orders, oldest_age_s, limit_s in found:
            self._set(ORDERS_OPEN, orders, state)
            self._set(ORDERS_OLDEST, oldest_age_s, state)
            self._set(ORDERS_AGE_LIMIT, limit_s, state)

    def circle_polled(self, source: str) -> None:
        self._set(CIRCLE_POLLED, time.time(), source)

    def invariants(self, found: Iterable[Result]) -> None:
        """What one look at the invariants found; nothing of a worker that does not lead."""
        results = list(found)
        if not results:
            self._gauges[INVARIANT_OFFENDING].clear()
            self._gauges[INVARIANT_CHECKED].clear()
        for result in results:
            self._set(INVARIANT_OFFENDING, len(result.offending), str(result.number), result.name)
            self._set(INVARIANT_CHECKED, result.at.timestamp() if result.at else time.time(), str(result.number))

    def worker_ready(self, movement: str, *, ready: bool) -> None:
        self._set(WORKER_READY, int(ready), movement)

    def http_request(self, app: str, method: str, route: str, status: int, seconds: float) -> None:
        """`route` is the template (`/v1/deposits/{deposit_id}`), or `unmatched`: a path would make a series per caller."""
        self._add(HTTP_REQUESTS, 1, app, method, route, str(status))
        self._see(HTTP_SECONDS, seconds, app, route)

    def _add(self, metric: Metric, amount: float, *labels: str) -> None:
        counter = self._counters[metric]
        (counter.labels(*labels) if labels else counter).inc(amount)

    def _set(self, metric: Metric, value: float, *labels: str) -> None:
        gauge = self._gauges[metric]
        (gauge.labels(*labels) if labels else gauge).set(value)

    def _see(self, metric: Metric, value: float, *labels: str) -> None:
        histogram = self._histograms[metric]
        (histogram.labels(*labels) if labels else histogram).observe(value)
