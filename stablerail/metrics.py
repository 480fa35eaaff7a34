"""Every metric, in one list. Dashboards and alerts are checked against ALL; nothing else declares one.

Each process has its own `Metrics` on its own registry and serves it at `/metrics`. Label values come from fixed sets
(stages, codes, topics, chains, routes), never from an event, so the number of series is bounded.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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
from ledger.reconciling import Run
from ledger.verify import Result
from stablerail.bulk import BulkHistogram
from topics.codes import Whose
from topics.money import SCALE

REASONS: Final = ("low_gas", "low_usdc", "fees_over_cap", "key_unavailable", "foreign_nonce", "nonce_taken", "restored")
"""Why a lane pauses by itself (agents/withdrawals/sign_transactions.py)."""
SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
EVENTS: Final = (1, 2, 5, 10, 25, 50, 100, 250, 500, 1_000, 2_000)
RECORDS: Final = (1, 2, 3, 5, 10, 20, 50, 100)

MILLIS: Final = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 1_000.0)
WAITS: Final = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1_800.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. Counters get `_total` behind their name when they are served."""

    name: str
    kind: Literal["counter", "gauge", "histogram", "bulk histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = SECONDS


# Stages
STAGE_EVENTS = Metric(
    "stablerail_stage_events",
    "counter",
    "Events by outcome: done, rejected, retry, repeat, reused",
    ("stage", "outcome"),
)
STAGE_REFUSALS = Metric("stablerail_stage_refusals", "counter", "Refused events by code", ("stage", "code"))
STAGE_BATCH_EVENTS = Metric(
    "stablerail_stage_batch_events", "histogram", "Events in one transaction", ("stage",), EVENTS
)
STAGE_BATCH_SECONDS = Metric(
    "stablerail_stage_batch_seconds",
    "histogram",
    "Time of a batch by phase: commit, journal, emit, ack",
    ("stage", "phase"),
)
STAGE_LAG = Metric(
    "stablerail_stage_lag_events",
    "gauge",
    "Events in the topic that the group has not committed",
    ("stage", "partition"),
)
STAGE_OLDEST = Metric(
    "stablerail_stage_oldest_event_age_seconds",
    "gauge",
    "Age of the oldest event not yet processed; 0 = none",
    ("stage",),
)
FUSE_BLOWN = Metric("stablerail_fuse_blown", "gauge", "1 = the stage stopped because it refuses too much", ("stage",))
STAGE_ALERTS = Metric(
    "stablerail_stage_alerts",
    "counter",
    "What a person should look at, by code; the log has the details",
    ("stage", "code"),
)
DEAD_LETTERS = Metric(
    "stablerail_dead_letters", "counter", "Dead letters by the topic they came from", ("topic", "code")
)

DEAD_LETTERS_STORED = Metric(
    "stablerail_dead_letters_stored",
    "counter",
    "Dead letters by whose affair they are, each time one is refused",
    ("class",),
)
DEAD_LETTERS_OPEN = Metric(
    "stablerail_dead_letters_open",
    "gauge",
    "Dead letters that wait for somebody; the worker that counts shows them",
    ("class",),
)

# Commit records
OUTBOX_ROWS = Metric("stablerail_outbox_rows", "gauge", "Commit records not yet journaled and emitted")
RELAY_RECORDS = Metric(
    "stablerail_relay_records", "histogram", "Commit records journaled by one relay transaction", (), RECORDS
)
JOURNAL_BYTES = Metric("stablerail_journal_bytes", "counter", "Bytes this process published to the journal")

# Retention
MAINTAINED_ROWS = Metric("stablerail_maintained_rows", "counter", "Rows that were forgotten, by table", ("table",))
MAINTAINED = Metric(
    "stablerail_maintained_timestamp_seconds",
    "gauge",
    "When what may be forgotten was last forgotten to the end, unix time; the worker that leads says it",
)

# Partners
CALLS = Metric(
    "stablerail_calls",
    "counter",
    "Requests to partners by outcome: ok, refused, retry, unknown",
    ("partner", "outcome"),
)
CALL_SECONDS = Metric("stablerail_call_seconds", "histogram", "Time of one request to a partner", ("partner",))
BREAKER_STATE = Metric(
    "stablerail_breaker_state", "gauge", "Circuit breaker: 0 closed, 1 one request tries, 2 open", ("partner",)
)

# Wallet provisioning: seven names that dashboards elsewhere know
JOBS_PROCESSED = Metric(
    "wallet_provisioning_jobs_processed", "counter", "Jobs that ended, by status: success, failed", ("status",)
)
JOB_SECONDS = Metric(
    "wallet_provisioning_job_duration_seconds", "histogram", "From a job's first call to its end", ("status",), WAITS
)
JOB_RETRIES = Metric("wallet_provisioning_job_retries", "counter", "Attempts of jobs that were put off")
JOB_ERRORS = Metric("wallet_provisioning_job_errors", "counter", "Attempts of jobs that failed", ("error_type",))
WALLETS_CREATED = Metric("wallet_provisioning_wallets_created", "counter", "Wallets stored", ("chain",))
ACTIVE_JOBS = Metric("wallet_provisioning_active_jobs", "gauge", "Jobs that the partner is asked for now")
JOBS_STUCK = Metric("stablerail_wallet_jobs_stuck", "gauge", "Wallet jobs under way for more than 30 minutes")
SCHEDULER_RUNNING = Metric("wallet_provisioning_scheduler_running", "gauge", "1 = this process takes jobs")

# Money
DEPOSITS = Metric(
    "stablerail_deposits",
    "counter",
    "Reports of deposits by who made them (circle, scanner, other; chain = finality) and what became of the deposit",
    ("source", "outcome"),
)
WEBHOOK_TO_LEDGER = Metric(
    "stablerail_webhook_to_ledger_seconds",
    "bulk histogram",
    "From the bridge's publishing Circle's webhook to its credit in the ledger",
)
CUSTODY_DISCREPANCY = Metric(
    "stablerail_custody_discrepancy",
    "gauge",
    "USDC that our wallets hold above the custody mirror, at a final block",
    ("chain",),
)
DISCREPANCY_THRESHOLD = Metric(
    "stablerail_discrepancy_threshold", "gauge", "USDC that two sides may differ by before somebody is told"
)
RECONCILE_DIFFERENCES = Metric(
    "stablerail_reconcile_differences",
    "gauge",
    "What differs by the last reconciliation: legacy, mirror, chain, circle; the worker that leads says it",
    ("comparison",),
)
RECONCILE_DISCREPANCY = Metric(
    "stablerail_reconcile_discrepancy", "gauge", "By how much, in whole units, all added up", ("comparison",)
)
RECONCILED = Metric(
    "stablerail_reconciled_timestamp_seconds",
    "gauge",
    "When everything that is configured was last compared, without a gap, unix time; the worker that leads says it",
)
BUFFER_LEVEL = Metric(
    "stablerail_buffer_level",
    "gauge",
    "What a buffer holds, in whole units of its asset, all shards together",
    ("account",),
)
BUFFER_THRESHOLD = Metric("stablerail_buffer_threshold", "gauge", "Below it the buffer is low", ("account",))

# A legacy table beside the ledger: four names that dashboards elsewhere know
SHADOW_DISCREPANCIES = Metric(
    "ledger_shadow_discrepancy_count",
    "counter",
    "Times that a balance was found to differ between ledger and legacy table",
    ("account_type",),
)
BALANCE_QUERY_MS = Metric(
    "balance_query_duration_ms",
    "histogram",
    "Time of one balance query, of a sample: ledger, legacy",
    ("source",),
    MILLIS,
)
WRITE_SUCCESS = Metric(
    "ledger_write_success_rate", "gauge", "Share of the last 1,000 commits whose postings the legacy table took as well"
)
SHADOW_WRITE_MS = Metric("shadow_mode_write_lag_ms", "histogram", "What the legacy table adds to a commit", (), MILLIS)
SHADOW_WAITING = Metric(
    "stablerail_shadow_waiting",
    "gauge",
    "Differences that a legacy table in another server is still to be given; the worker that gives them says it",
)

# Chains
CHAIN_HEAD = Metric("stablerail_chain_head_number", "gauge", "Highest block seen", ("chain",))
SCANNER_LAG = Metric("stablerail_scanner_lag_blocks", "gauge", "Blocks between the head and the cursor", ("chain",))
RPC_ENDPOINTS = Metric(
    "stablerail_rpc_endpoints",
    "gauge",
    "RPC endpoints that gave a head of their chain; below 2 nothing becomes final",
    ("chain",),
)
RPC_ENDPOINT_STATE = Metric(
    "stablerail_rpc_endpoint_state",
    "gauge",
    "1 = how the RPC endpoint does, as this process has seen it: ok, or what is wrong with it",
    ("chain", "endpoint", "state"),
)

# Withdrawals
LANE_PAUSED = Metric(
    "stablerail_lane_paused",
    "gauge",
    "1 = the lane signs nothing: low_gas, low_usdc, fees_over_cap, key_unavailable, foreign_nonce, nonce_taken, restored, other",
    ("chain", "signer", "reason"),
)
LANE_IN_FLIGHT = Metric(
    "stablerail_lane_in_flight", "gauge", "A lane's transactions that are signed and in no block", ("chain", "signer")
)
GAS_ACCOUNT_LOW = Metric(
    "stablerail_gas_account_low",
    "gauge",
    "1 = the account that gives lanes coins has too little, or has given what it may today",
    ("chain",),
)

WITHDRAWALS_ENDED = Metric(
    "stablerail_withdrawals_ended",
    "counter",
    "Withdrawals by how they ended: completed, failed, cancelled; refused = nothing was held",
    ("outcome",),
)
WITHDRAWAL_SECONDS = Metric(
    "stablerail_withdrawal_seconds",
    "histogram",
    "From the request of a withdrawal to its end",
    ("outcome",),
    (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 45.0, 60.0, 90.0, 120.0, 300.0, 600.0, 1_800.0, 3_600.0, 14_400.0),
)
WITHDRAWALS_OPEN = Metric(
    "stablerail_withdrawals_open", "gauge", "Withdrawals that have not ended, by state", ("chain", "state")
)
WITHDRAWAL_OLDEST = Metric(
    "stablerail_withdrawals_oldest_age_seconds", "gauge", "Age of the oldest of them", ("chain", "state")
)

# Orders: states are those of stablerail/order_figures.py
ORDERS_OPEN = Metric(
    "stablerail_orders_open",
    "gauge",
    "Orders that hold money: reserved, fills_missing; unplaced = fills and ends that wait for their order",
    ("state",),
)
ORDERS_OLDEST = Metric("stablerail_orders_oldest_age_seconds", "gauge", "Age of the oldest of them", ("state",))
ORDERS_AGE_LIMIT = Metric("stablerail_orders_age_limit_seconds", "gauge", "Above it a person must look", ("state",))

# Sources that we ask
CIRCLE_POLLED = Metric(
    "stablerail_circle_polled_timestamp_seconds",
    "gauge",
    "When Circle's inbound list was last read to its end, unix time",
)

# Invariants
INVARIANT_OFFENDING = Metric(
    "stablerail_invariant_offending",
    "gauge",
    "Rows found that break an invariant, at most a hundred of each check; 0 = it holds",
    ("number", "name"),
)
INVARIANT_CHECKED = Metric(
    "stablerail_invariant_checked_timestamp_seconds",
    "gauge",
    "When an invariant was last looked at, unix time",
    ("number",),
)

# Processes
WORKER_READY = Metric(
    "stablerail_worker_ready", "gauge", "1 = the worker has partitions and serves them", ("movement",)
)
HTTP_REQUESTS = Metric(
    "stablerail_http_requests", "counter", "HTTP requests by route template", ("app", "method", "route", "status")
)
HTTP_SECONDS = Metric("stablerail_http_request_seconds", "histogram", "Time of one HTTP request", ("app", "route"))

ALL: Final[tuple[Metric, ...]] = tuple(value for value in list(globals().values()) if isinstance(value, Metric))

Outcome = Literal["done", "rejected", "retry", "repeat", "reused"]


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

    def custody_discrepancy(self, chain: str, base_units: int) -> None:
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

    def shadow_waiting(self, count: int) -> None:
        self._set(SHADOW_WAITING, count)

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

    def lane(self, chain: str, signer: str, reason: str, in_flight: int) -> None:
        """A lane as it was just read; `reason` is empty while it is open."""
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

    def circle_polled(self) -> None:
        self._set(CIRCLE_POLLED, time.time())

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
