-- name: withdrawal
SELECT id, user_id, idempotency_key, rail, chain, asset, amount, recipient, status, code, requested_at, updated_at, settled_at
FROM withdrawals
WHERE id = $1

-- name: history
SELECT status, code, actor, at
FROM withdrawal_history
WHERE withdrawal_id = $1
ORDER BY version

-- name: attempts
SELECT tx_hash, signer, nonce, n, kind, status, error, gas_limit, max_fee, priority_fee, block_hash, block_number,
       signed_at, broadcast_at, updated_at
FROM attempts
WHERE withdrawal_id = $1
ORDER BY signed_at, nonce, n

-- name: transfer
SELECT custodian, transfer_id, state, tx_hashes, block_number, reason, created_at, updated_at
FROM custodian_transfers
WHERE withdrawal_id = $1

-- name: head
SELECT (state -> 'recent' -> -1 ->> 'number')::bigint FROM chain_cursors WHERE chain = $1

-- name: page
SELECT id, user_id, idempotency_key, rail, chain, asset, amount, recipient, status, code, requested_at, updated_at, settled_at
FROM withdrawals
WHERE ($1::text IS NULL OR status = $1) AND ($2::text IS NULL OR chain = $2)
  AND ($3::timestamptz IS NULL OR (requested_at, id) < ($3, $4::uuid))
ORDER BY requested_at DESC, id DESC
LIMIT $5

-- name: page_of_user
SELECT id, user_id, idempotency_key, rail, chain, asset, amount, recipient, status, code, requested_at, updated_at, settled_at
FROM withdrawals
WHERE user_id = $6 AND ($1::text IS NULL OR status = $1) AND ($2::text IS NULL OR chain = $2)
  AND ($3::timestamptz IS NULL OR (requested_at, id) < ($3, $4::uuid))
ORDER BY requested_at DESC, id DESC
LIMIT $5

-- name: page_of_open
-- Few at any time, among however many that have ended: the second condition is that of their own index.
SELECT id, user_id, idempotency_key, rail, chain, asset, amount, recipient, status, code, requested_at, updated_at, settled_at
FROM withdrawals
WHERE status = $1 AND settled_at IS NULL AND ($2::text IS NULL OR chain = $2)
  AND ($3::timestamptz IS NULL OR (requested_at, id) < ($3, $4::uuid))
ORDER BY requested_at DESC, id DESC
LIMIT $5
