"""Every metric, in one list. Dashboards and alerts are checked against ALL; nothing else declares one (metrics.py feeds them).

Label values come from fixed sets (stages, codes, topics, chains, routes), never from an event, so the number of series is
bounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

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
    "Events by outcome: done, rejected, retry, repeat, reused, skipped (another stage's)",
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
SHADOW_OLDEST = Metric(
    "stablerail_shadow_oldest_age_seconds",
    "gauge",
    "For how long some of them has waited at least, since the worker that gives them looked first; 0 = none does",
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
    "When Circle's inbound list (circle, circle_mint) was last read to its end, unix time",
    ("source",),
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
