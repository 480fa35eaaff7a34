-- name: open_by_state
SELECT chain, status, count(*) AS withdrawals, min(requested_at) AS oldest
FROM withdrawals
WHERE settled_at IS NULL
GROUP BY chain, status
ORDER BY chain, status

-- name: lanes
SELECT l.chain, l.signer, l.next_nonce, l.chain_nonce, l.status, l.reason, count(a.nonce) AS in_flight,
       count(a.nonce) FILTER (WHERE a.unmined) AS unmined, min(a.signed_at) AS oldest
FROM lanes l
LEFT JOIN (
    SELECT chain, signer, nonce, bool_and(phase = 'unmined') AS unmined, min(signed_at) AS signed_at
    FROM attempts WHERE phase IN ('unmined', 'mined') GROUP BY chain, signer, nonce
) AS a ON a.chain = l.chain AND a.signer = l.signer
GROUP BY l.chain, l.signer
ORDER BY l.chain, l.signer

-- name: of_transaction
SELECT replace(withdrawal_id::text, '-', '') FROM attempts WHERE tx_hash = $1 AND withdrawal_id IS NOT NULL

-- name: history
SELECT version, status, code, actor, at FROM withdrawal_history WHERE withdrawal_id = $1::text::uuid ORDER BY version

-- name: hold
SELECT state, amount::text AS amount, remaining::text AS remaining, captured::text AS captured FROM holds WHERE id = $1::text::uuid

-- name: lane
SELECT chain, signer, next_nonce, chain_nonce, status, reason, version, updated_at FROM lanes WHERE chain = $1 AND signer = $2

-- name: of_transfer
-- By the custodian's id, or by a hash that it told of.
SELECT replace(withdrawal_id::text, '-', '') FROM custodian_transfers
WHERE transfer_id = $1 OR string_to_array(tx_hashes, ' ') @> ARRAY[$1::text]
LIMIT 1

-- name: transfer
SELECT t.custodian, t.wallet_id, w.address AS wallet_address, t.transfer_id, t.state, t.tx_hashes, t.block_number, t.reason,
       t.created_at, t.updated_at
FROM custodian_transfers t
LEFT JOIN custodian_wallets w ON w.chain = $2 AND w.custodian = t.custodian AND w.wallet_id = t.wallet_id
WHERE t.withdrawal_id = $1::text::uuid

-- name: transfer_history
SELECT version, state, transfer_id, tx_hashes, block_number, reason, at
FROM custodian_transfer_history WHERE withdrawal_id = $1::text::uuid ORDER BY version

-- name: call_of
SELECT replace(c.id::text, '-', '') AS id, c.idempotency_key::text AS idempotency_key, coalesce(c.state, 'waiting') AS state,
       coalesce(c.attempts, 0) AS attempts, c.error, coalesce(c.request, m.request)::text AS request, m.queued_at, c.created_at,
       c.concluded_at, c.due_at, l.attempts AS taken, l.until AS leased_until
FROM call_members m
LEFT JOIN calls c ON c.id = m.call_id
LEFT JOIN leases l ON l.call_id = c.id
WHERE m.stage = 'transfer_by_custodian' AND m.item = $1

-- name: later
SELECT stage, attempt, code, available_at, value FROM schedule
WHERE stage = $1 AND key = ANY ($2::bytea[])
   OR stage = $3 AND key = $4 AND convert_from(value, 'UTF8')::jsonb ->> 'withdrawal_id' = $5
ORDER BY available_at

-- name: gate
SELECT reason FROM gates WHERE name = $1
