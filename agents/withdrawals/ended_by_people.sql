-- name: never_asked
-- Whether no call for a transfer was ever made of it. Of one that was asked for ($2) before a restore nobody knows.
SELECT EXISTS (SELECT FROM call_members WHERE stage = 'transfer_by_custodian' AND item = $1 AND call_id IS NULL)
   AND NOT EXISTS (SELECT FROM restores WHERE at >= $2)

-- name: waiting
-- Of which no call was made yet. Locked: nobody makes one meanwhile.
SELECT replace(event_id::text, '-', ''), item, request, context, queued_at
FROM call_members
WHERE stage = 'transfer_by_custodian' AND item = $1 AND call_id IS NULL
FOR UPDATE

-- name: open_call
SELECT c.id FROM call_members m JOIN calls c ON c.id = m.call_id
WHERE m.stage = 'transfer_by_custodian' AND m.item = $1 AND c.state = 'open'
FOR UPDATE OF c

-- name: stop
-- Takes the lease, unless a performer has it: nobody takes the call then, and who had it before may not ask any more.
INSERT INTO leases AS l (call_id, holder, until, attempts) VALUES ($1, $2, $4, 1)
ON CONFLICT (call_id) DO UPDATE SET holder = excluded.holder, until = excluded.until, attempts = l.attempts + 1
WHERE l.holder = '' OR starts_with(l.holder, 'people:') OR l.until <= $3
RETURNING true

-- name: stopped
SELECT until FROM leases WHERE call_id = $1 AND holder = $2 AND until > $3 FOR UPDATE

-- name: release
DELETE FROM leases WHERE call_id = $1

-- name: wallet
SELECT address FROM custodian_wallets WHERE chain = $1 AND custodian = $2 AND wallet_id = $3

-- name: payment_of
-- What else a transaction is of.
SELECT coalesce(replace(a.withdrawal_id::text, '-', ''), 'a top-up') FROM attempts a
WHERE a.chain = $1 AND a.tx_hash = $2 AND a.withdrawal_id IS DISTINCT FROM $3::text::uuid
UNION ALL
SELECT replace(t.withdrawal_id::text, '-', '') FROM custodian_transfers t JOIN withdrawals w ON w.id = t.withdrawal_id
WHERE string_to_array(t.tx_hashes, ' ') @> ARRAY[$2] AND w.chain = $1 AND t.withdrawal_id <> $3::text::uuid
UNION ALL
SELECT split_part(c.reference, ':', 1) FROM corrections c
WHERE c.kind = 'withdrawal_paid' AND c.state = 'approved' AND split_part(c.reference, ':', 2) = $2
  AND split_part(c.reference, ':', 1) <> $3
LIMIT 1
