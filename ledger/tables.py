"""Every journaled table, declared once, in the column order of its rows. What a rebuild restores is exactly this list.

Declared outside (not journaled, not rebuilt): `outbox` and `relay` (the way to the journal itself), `leases` (who is
calling a partner just now), `rate_limits` (when a partner may be asked next), `workers` and `worker_restarts` (the
processes of the moment), `crashes` (how often an event stopped a process), `rebuild_checks` (what the last comparison
with the journal found), `shadow_marks` (what a table that is no part of the journal has: it is lost or kept with that
table), `shadow_outbox` (what such a table elsewhere is still to be given), `api_keys` (credentials).
"""

from __future__ import annotations

from typing import Final

from ledger.rows import Table

OWNERS: Final = Table(
    "owners",
    ("stage", "topic", "partition"),
    "stage:text topic:text partition:int epoch:int position:int head:bytes",
)
AUDIT: Final = Table(
    "audit",
    ("stage", "topic", "partition", "position"),
    "stage:text topic:text partition:int position:int at:time actor:text summary:json digest:bytes head:bytes"
    " batch:int ledger:bytes logs:bytes",
)
INBOX: Final = Table(
    "inbox",
    ("stage", "event_id"),
    "stage:text event_id:uuid attempt:int fingerprint:uuid outcome:text at:time",
)
SCHEDULE: Final = Table(
    "schedule",
    ("stage", "event_id"),
    "stage:text event_id:uuid attempt:int topic:text key:bytes value:bytes headers:json code:text available_at:time",
)
ACCOUNTS: Final = Table(
    "accounts",
    ("id",),
    "id:uuid owner:text type:text asset:text shard:text balance:numeric version:int updated_at:time closed_at:time",
    changing=("balance", "version", "updated_at", "closed_at"),
)
TRANSACTIONS: Final = Table(
    "transactions",
    ("id",),
    "id:uuid kind:text reference:text fingerprint:uuid at:time hold_id:uuid hold_step:text reverses:uuid batch:int",
)
ENTRIES: Final = Table(
    "entries",
    ("account_id", "version"),
    "account_id:uuid version:int transaction_id:uuid seq:int direction:text amount:numeric balance_after:numeric at:time",
)
HOLDS: Final = Table(
    "holds",
    ("id",),
    "id:uuid source_id:uuid pending_id:uuid amount:numeric remaining:numeric captured:numeric state:text expires_at:time"
    " created_at:time ended_at:time version:int",
)
REVERSALS: Final = Table(
    "reversals",
    ("transaction_id", "seq"),
    "transaction_id:uuid seq:int account_id:uuid direction:text amount:numeric reversed:numeric",
)
COUNTERS: Final = Table("counters", ("name",), "name:text value:numeric version:int updated_at:time")
CALLS: Final = Table(
    "calls",
    ("id",),
    "id:uuid stage:text partner:text operation:text idempotency_key:uuid request:json fingerprint:bytes"
    " state:text created_at:time concluded_at:time generation:int attempts:int due_at:time error:text parent_id:uuid",
)
CALL_MEMBERS: Final = Table(
    "call_members",
    ("stage", "event_id", "item"),
    "stage:text event_id:uuid item:text call_id:uuid context:json request:json queued_at:time",
)
WALLET_REQUESTS: Final = Table(
    "wallet_requests",
    ("user_id", "chain"),
    "user_id:text chain:text status:text requested_at:time ready_at:time error:text",
)
WALLET_JOBS: Final = Table(
    "wallet_provisioning_jobs",
    ("user_id",),
    "user_id:text state:text attempts:int error:text created_at:time started_at:time next_attempt_at:time"
    " finished_at:time updated_at:time version:int",
)
WALLET_SETS: Final = Table("wallet_sets", ("network",), "network:text wallet_set_id:text created_at:time")
KYC_STANDINGS: Final = Table(
    "kyc_standings",
    ("user_id",),
    "user_id:text standing:text vendor:text vendor_event_id:text decided_at:text changed_at:time",
)
WALLETS: Final = Table(
    "wallets", ("chain", "address"), "chain:text address:text user_id:text wallet_id:text created_at:time"
)
DEPOSITS: Final = Table(
    "deposits",
    ("id",),
    "id:uuid n:int chain:text tx_hash:text recipient:text asset:text amount:numeric user_id:text"
    " status:text generation:int buffer_shard:text block_hash:text block_number:int log_index:int"
    " credited_at:time finalized_at:time updated_at:time sender:text held:text counted:numeric",
)
DEPOSIT_REPORTS: Final = Table(
    "deposit_reports",
    ("id",),
    "id:uuid source:text transfer_id:text group_id:uuid deposit_id:uuid evidence:text block_hash:text reported_at:time",
)
LIMITS: Final = Table("limits", ("name",), "name:text value:numeric updated_by:text updated_at:time")
DENIED_ADDRESSES: Final = Table(
    "denied_addresses", ("chain", "address"), "chain:text address:text reason:text denied_by:text denied_at:time"
)
WITHDRAWALS: Final = Table(
    "withdrawals",
    ("id",),
    "id:uuid user_id:text idempotency_key:text fingerprint:uuid rail:text chain:text asset:text amount:numeric"
    " recipient:text status:text code:text hold_id:uuid requested_at:time updated_at:time settled_at:time version:int",
    changing=("status", "code", "updated_at", "settled_at", "version"),
)
WITHDRAWAL_HISTORY: Final = Table(
    "withdrawal_history",
    ("withdrawal_id", "version"),
    "withdrawal_id:uuid version:int status:text code:text actor:text at:time",
)
LANES: Final = Table(
    "lanes",
    ("chain", "signer"),
    "chain:text signer:text next_nonce:int chain_nonce:int status:text reason:text version:int updated_at:time",
    changing=("next_nonce", "chain_nonce", "status", "reason", "version", "updated_at"),
)
LANE_KEYS: Final = Table("lane_keys", ("chain", "signer"), "chain:text signer:text source:text updated_at:time")
GAS_TOP_UPS: Final = Table(
    "gas_top_ups",
    ("chain", "signer", "nonce"),
    "chain:text signer:text nonce:int lane:text amount:numeric state:text block_number:int signed_at:time ended_at:time",
)
ATTEMPTS: Final = Table(
    "attempts",
    ("chain", "tx_hash"),
    "chain:text tx_hash:text signer:text nonce:int n:int kind:text withdrawal_id:uuid raw:bytes gas_limit:int"
    " max_fee:numeric priority_fee:numeric status:text error:text block_hash:text block_number:int"
    " signed_at:time broadcast_at:time updated_at:time version:int",
    changing=("status", "error", "block_hash", "block_number", "broadcast_at", "updated_at", "version"),
)
ATTEMPT_WISHES: Final = Table(
    "attempt_wishes",
    ("withdrawal_id",),
    "withdrawal_id:uuid chain:text kind:text attempts_max:int state:text code:text n:int asked_by:text reason:text"
    " asked_at:time ended_at:time",
    changing=("kind", "attempts_max", "state", "code", "n", "asked_by", "reason", "asked_at", "ended_at"),
)
ORDERS: Final = Table(
    "orders",
    ("id",),
    "id:uuid order_id:text fingerprint:uuid user_id:text amount:numeric filled:numeric status:text code:text hold_id:uuid"
    " ends_as:text fills_due:numeric placed_at:time updated_at:time ended_at:time version:int",
    changing=("filled", "status", "ends_as", "fills_due", "updated_at", "ended_at", "version"),
)
ORDER_FILLS: Final = Table(
    "order_fills", ("id",), "id:uuid order_id:uuid fill_id:text amount:numeric paid_from:text at:time"
)
CUSTODIAN_TRANSFERS: Final = Table(
    "custodian_transfers",
    ("withdrawal_id",),
    "withdrawal_id:uuid custodian:text wallet_id:text transfer_id:text state:text tx_hashes:text block_number:int"
    " reason:text created_at:time updated_at:time version:int",
    changing=("transfer_id", "state", "tx_hashes", "block_number", "reason", "updated_at", "version"),
)
CUSTODIAN_TRANSFER_HISTORY: Final = Table(
    "custodian_transfer_history",
    ("withdrawal_id", "version"),
    "withdrawal_id:uuid version:int state:text transfer_id:text tx_hashes:text block_number:int reason:text at:time",
)
CUSTODIAN_WALLETS: Final = Table(
    "custodian_wallets",
    ("chain", "address"),
    "chain:text address:text custodian:text wallet_id:text created_at:time",
)
CHAIN_CURSORS: Final = Table("chain_cursors", ("chain",), "chain:text state:json updated_at:time")
SOURCE_CURSORS: Final = Table("source_cursors", ("source",), "source:text since:time updated_at:time")
CIRCLE_TRANSFERS: Final = Table(
    "circle_transfers", ("id",), "id:text state:text created_at:time looked_at:time ended_at:time"
)
AUDIT_LOGS: Final = Table(
    "audit_logs",
    ("batch", "n"),
    "batch:int n:int at:time actor:text action:text resource:text resource_id:text before:json after:json"
    " status:text error:text address:text user_agent:text",
)
DEAD_LETTERS: Final = Table(
    "dead_letters",
    ("id",),
    "id:uuid topic:text stage:text event_id:uuid code:text reason:text origin:text partition:int position:int key:bytes"
    " value:bytes headers:json attempts:int code_version:text state:text redrives:int due_at:time first_at:time"
    " last_at:time updated_at:time version:int events:json",
    changing=(
        "code", "reason", "partition", "position", "attempts", "code_version", "state", "redrives", "due_at", "last_at",
        "updated_at", "version", "events",
    ),
)  # fmt: skip
CORRECTIONS: Final = Table(
    "corrections",
    ("id",),
    "id:uuid kind:text state:text reason:text reference:text legs:json transaction_id:uuid"
    " requested_by:text requested_at:time decided_by:text decided_at:time",
)
RESTORES: Final = Table("restores", ("id",), "id:int at:time actor:text first_seq:int records:int")
GATES: Final = Table("gates", ("name",), "name:text reason:text closed_at:time closed_by:text")
SHADOW: Final = Table(
    "shadow", ("name",), "name:text version:int phase:text changed_at:time changed_by:text reason:text"
)
SHADOW_DISCREPANCIES: Final = Table(
    "shadow_discrepancies",
    ("id",),
    "id:uuid user_id:text type:text ledger:numeric legacy:text first_seen:time last_seen:time",
)
RECONCILIATIONS: Final = Table(
    "reconciliations",
    ("id",),
    "id:uuid started_at:time ended_at:time actor:text compared:json differences:int gaps:json",
)
RECONCILIATION_DIFFERENCES: Final = Table(
    "reconciliation_differences",
    ("run_id", "n"),
    "run_id:uuid n:int comparison:text user_id:text account:text ledger:numeric other:numeric",
)

JOURNALED: Final = (
    OWNERS,
    AUDIT,
    INBOX,
    SCHEDULE,
    ACCOUNTS,
    TRANSACTIONS,
    ENTRIES,
    HOLDS,
    REVERSALS,
    COUNTERS,
    LIMITS,
    DENIED_ADDRESSES,
    WITHDRAWALS,
    WITHDRAWAL_HISTORY,
    LANES,
    LANE_KEYS,
    GAS_TOP_UPS,
    ATTEMPTS,
    ATTEMPT_WISHES,
    ORDERS,
    ORDER_FILLS,
    CUSTODIAN_TRANSFERS,
    CUSTODIAN_TRANSFER_HISTORY,
    CUSTODIAN_WALLETS,
    CALLS,
    CALL_MEMBERS,
    WALLET_REQUESTS,
    WALLET_JOBS,
    WALLET_SETS,
    KYC_STANDINGS,
    WALLETS,
    DEPOSITS,
    DEPOSIT_REPORTS,
    CHAIN_CURSORS,
    SOURCE_CURSORS,
    CIRCLE_TRANSFERS,
    AUDIT_LOGS,
    CORRECTIONS,
    DEAD_LETTERS,
    RESTORES,
    GATES,
    SHADOW,
    SHADOW_DISCREPANCIES,
    RECONCILIATIONS,
    RECONCILIATION_DIFFERENCES,
)
APPEND_ONLY: Final = (AUDIT, TRANSACTIONS, ENTRIES, AUDIT_LOGS, WITHDRAWAL_HISTORY, CUSTODIAN_TRANSFER_HISTORY)
"""Their rows are added and never changed: the application's role may not, and a trigger refuses it."""
BY_NAME: Final = {table.name: table for table in JOURNALED}
