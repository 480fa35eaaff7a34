"""What journal records and hashes rely on for ever: columns are told apart by their place, and a hash covers each of them."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from ledger.proof import ledger_digest
from ledger.rows import Op, Table, block
from ledger.tables import BY_NAME, ENTRIES, TRANSACTIONS

HELD = """
owners stage,topic,partition | stage:text topic:text partition:int epoch:int position:int head:bytes
audit stage,topic,partition,position | stage:text topic:text partition:int position:int at:time actor:text
    summary:json digest:bytes head:bytes batch:int ledger:bytes logs:bytes
inbox stage,event_id | stage:text event_id:uuid attempt:int fingerprint:uuid outcome:text at:time
schedule stage,event_id | stage:text event_id:uuid attempt:int topic:text key:bytes value:bytes headers:json code:text
    available_at:time
accounts id | id:uuid owner:text type:text asset:text shard:text balance:numeric version:int updated_at:time
    closed_at:time | balance version updated_at closed_at
transactions id | id:uuid kind:text reference:text fingerprint:uuid at:time hold_id:uuid hold_step:text reverses:uuid
    batch:int
entries account_id,version | account_id:uuid version:int transaction_id:uuid seq:int direction:text amount:numeric
    balance_after:numeric at:time
holds id | id:uuid source_id:uuid pending_id:uuid amount:numeric remaining:numeric captured:numeric state:text
    expires_at:time created_at:time ended_at:time version:int
reversals transaction_id,seq | transaction_id:uuid seq:int account_id:uuid direction:text amount:numeric
    reversed:numeric
counters name | name:text value:numeric version:int updated_at:time
limits name | name:text value:numeric updated_by:text updated_at:time
denied_addresses chain,address | chain:text address:text reason:text denied_by:text denied_at:time
withdrawals id | id:uuid user_id:text idempotency_key:text fingerprint:uuid rail:text chain:text asset:text
    amount:numeric recipient:text status:text code:text hold_id:uuid requested_at:time updated_at:time settled_at:time
    version:int | status code updated_at settled_at version
withdrawal_history withdrawal_id,version | withdrawal_id:uuid version:int status:text code:text actor:text at:time
lanes chain,signer | chain:text signer:text next_nonce:int chain_nonce:int status:text reason:text version:int
    updated_at:time | next_nonce chain_nonce status reason version updated_at
lane_keys chain,signer | chain:text signer:text source:text updated_at:time
gas_top_ups chain,signer,nonce | chain:text signer:text nonce:int lane:text amount:numeric state:text block_number:int
    signed_at:time ended_at:time
attempts chain,tx_hash | chain:text tx_hash:text signer:text nonce:int n:int kind:text withdrawal_id:uuid raw:bytes
    gas_limit:int max_fee:numeric priority_fee:numeric status:text error:text block_hash:text block_number:int
    signed_at:time broadcast_at:time updated_at:time version:int | status error block_hash block_number broadcast_at
    updated_at version
attempt_wishes withdrawal_id | withdrawal_id:uuid chain:text kind:text attempts_max:int state:text code:text n:int
    asked_by:text reason:text asked_at:time ended_at:time | kind attempts_max state code n asked_by reason asked_at
    ended_at
orders id | id:uuid order_id:text fingerprint:uuid user_id:text amount:numeric filled:numeric status:text code:text
    hold_id:uuid ends_as:text fills_due:numeric placed_at:time updated_at:time ended_at:time version:int | filled
    status ends_as fills_due updated_at ended_at version
order_fills id | id:uuid order_id:uuid fill_id:text amount:numeric paid_from:text at:time
custodian_transfers withdrawal_id | withdrawal_id:uuid custodian:text wallet_id:text transfer_id:text state:text
    tx_hashes:text block_number:int reason:text created_at:time updated_at:time version:int | transfer_id state
    tx_hashes block_number reason updated_at version
custodian_transfer_history withdrawal_id,version | withdrawal_id:uuid version:int state:text transfer_id:text
    tx_hashes:text block_number:int reason:text at:time
custodian_wallets chain,address | chain:text address:text custodian:text wallet_id:text created_at:time
calls id | id:uuid stage:text partner:text operation:text idempotency_key:uuid request:json fingerprint:bytes
    state:text created_at:time concluded_at:time generation:int attempts:int due_at:time error:text parent_id:uuid
call_members stage,event_id,item | stage:text event_id:uuid item:text call_id:uuid context:json request:json
    queued_at:time
wallet_requests user_id,chain | user_id:text chain:text status:text requested_at:time ready_at:time error:text
wallet_provisioning_jobs user_id | user_id:text state:text attempts:int error:text created_at:time started_at:time
    next_attempt_at:time finished_at:time updated_at:time version:int
wallet_sets network | network:text wallet_set_id:text created_at:time
kyc_standings user_id | user_id:text standing:text vendor:text vendor_event_id:text decided_at:text changed_at:time
wallets chain,address | chain:text address:text user_id:text wallet_id:text created_at:time
deposits id | id:uuid n:int chain:text tx_hash:text recipient:text asset:text amount:numeric user_id:text status:text
    generation:int buffer_shard:text block_hash:text block_number:int log_index:int credited_at:time finalized_at:time
    updated_at:time sender:text held:text counted:numeric
deposit_reports id | id:uuid source:text transfer_id:text group_id:uuid deposit_id:uuid evidence:text block_hash:text
    reported_at:time
chain_cursors chain | chain:text state:json updated_at:time
source_cursors source | source:text since:time updated_at:time
circle_transfers id | id:text state:text created_at:time looked_at:time ended_at:time
audit_logs batch,n | batch:int n:int at:time actor:text action:text resource:text resource_id:text before:json
    after:json status:text error:text address:text user_agent:text
corrections id | id:uuid kind:text state:text reason:text reference:text legs:json transaction_id:uuid
    requested_by:text requested_at:time decided_by:text decided_at:time
dead_letters id | id:uuid topic:text stage:text event_id:uuid code:text reason:text origin:text partition:int
    position:int key:bytes value:bytes headers:json attempts:int code_version:text state:text redrives:int due_at:time
    first_at:time last_at:time updated_at:time version:int events:json | code reason partition position attempts
    code_version state redrives due_at last_at updated_at version events
restores id | id:int at:time actor:text first_seq:int records:int
gates name | name:text reason:text closed_at:time closed_by:text
shadow name | name:text version:int phase:text changed_at:time changed_by:text reason:text
shadow_discrepancies id | id:uuid user_id:text type:text ledger:numeric legacy:text first_seen:time last_seen:time
reconciliations id | id:uuid started_at:time ended_at:time actor:text compared:json differences:int gaps:json
reconciliation_differences run_id,n | run_id:uuid n:int comparison:text user_id:text account:text ledger:numeric
    other:numeric
"""
"""name key | columns | columns that change, of every journaled table. Append what is new; nothing else of it is ever edited: a record
that lies in a journal, of whatever version, has the first so many columns of these, without their names."""

AT = datetime(2026, 7, 1, 12, tzinfo=UTC)
VALUES: dict[str, tuple[Any, Any]] = {
    "uuid": ("a" * 32, "b" * 32), "text": ("x", "y"), "int": (1, 2), "numeric": (1, 2),
    "time": (AT, AT + timedelta(microseconds=1)),
}  # fmt: skip


def test_the_columns_of_journaled_tables_are_only_ever_appended() -> None:
    held = [line.split(" | ") for line in re.sub(r"\n +", " ", HELD).strip().splitlines()]
    assert len(held) > 40
    for about, spec, *changing in held:
        name, key = about.split(" ")
        table = BY_NAME[name]
        assert table.key == tuple(key.split(",")), f"{name}: a record's deletions are by the key"
        assert table.spec.split()[: len(spec.split())] == spec.split(), name
        changes = changing[0].split() if changing else []
        assert list(table.changing[: len(changes)]) == changes, name


@pytest.mark.parametrize("table", [TRANSACTIONS, ENTRIES], ids=lambda table: table.name)
def test_the_hash_of_ledger_rows_covers_every_column(table: Table) -> None:
    """A column beside it could be edited and no chain would break."""
    row = [VALUES[kind][0] for _, kind in table.columns]
    hashes = {ledger_digest([block(table, Op.INSERT, [tuple(row)])])}
    for place, (_, kind) in enumerate(table.columns):
        edited = (*row[:place], VALUES[kind][1], *row[place + 1 :])
        hashes.add(ledger_digest([block(table, Op.INSERT, [edited])]))
    assert len(hashes) == len(row) + 1
