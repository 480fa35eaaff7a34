-- name: known_user
SELECT EXISTS (SELECT FROM wallets WHERE user_id = $1)
    OR EXISTS (SELECT FROM accounts WHERE owner = $1)
    OR EXISTS (SELECT FROM wallet_requests WHERE user_id = $1)

-- name: not_final
SELECT asset, sum(amount) AS amount
FROM deposits
WHERE user_id = $1 AND status IN ('credited', 'orphaned')
GROUP BY asset

-- name: wallets
SELECT w.chain, w.address, w.wallet_id, w.created_at
FROM wallets w
WHERE w.user_id = $1
ORDER BY w.chain, w.created_at, w.address

-- name: wallets_awaited
SELECT chain, status
FROM wallet_requests
WHERE user_id = $1 AND status <> 'ready'
ORDER BY chain

-- name: deposit
SELECT id, n, chain, tx_hash, recipient, asset, amount, user_id, status, generation,
       block_hash, block_number, log_index, credited_at, finalized_at, updated_at, sender, held
FROM deposits
WHERE id = $1

-- name: reports
SELECT source, transfer_id, evidence, block_hash, reported_at
FROM deposit_reports
WHERE deposit_id = $1 AND group_id = (left($1::uuid::text, 32) || '0000')::uuid
ORDER BY reported_at, source, transfer_id

-- name: transactions
SELECT id, kind, at
FROM transactions
WHERE id = ANY ($1::uuid[])
ORDER BY at, id

-- name: entries
-- The customer's own lines, found by the key (account_id, version): entries have no index by transaction.
SELECT e.transaction_id, a.type, a.asset, e.direction, e.amount, e.balance_after, e.version
FROM accounts a
JOIN entries e ON e.account_id = a.id
WHERE a.owner = $1 AND e.transaction_id = ANY ($2::uuid[])
ORDER BY e.transaction_id, e.seq

-- name: deposits_first
SELECT id, n, chain, tx_hash, recipient, asset, amount, user_id, status, generation,
       block_hash, block_number, log_index, credited_at, finalized_at, updated_at, sender, held
FROM deposits
WHERE user_id = $1
ORDER BY credited_at DESC NULLS FIRST, id DESC
LIMIT $2

-- name: deposits_after_pending
SELECT id, n, chain, tx_hash, recipient, asset, amount, user_id, status, generation,
       block_hash, block_number, log_index, credited_at, finalized_at, updated_at, sender, held
FROM deposits
WHERE user_id = $1 AND (credited_at IS NOT NULL OR id < $3)
ORDER BY credited_at DESC NULLS FIRST, id DESC
LIMIT $2

-- name: deposits_after
SELECT id, n, chain, tx_hash, recipient, asset, amount, user_id, status, generation,
       block_hash, block_number, log_index, credited_at, finalized_at, updated_at, sender, held
FROM deposits
WHERE user_id = $1 AND (credited_at, id) < ($4, $3)
ORDER BY credited_at DESC NULLS FIRST, id DESC
LIMIT $2

-- name: listed
-- By the primary key: what is asked for is most of the table, or few rows of it will do.
SELECT id, n, chain, tx_hash, recipient, asset, amount, user_id, status, generation,
       block_hash, block_number, log_index, credited_at, finalized_at, updated_at, sender, held
FROM deposits
WHERE ($4::uuid IS NULL OR id > $4)
  AND ($1::text IS NULL OR user_id = $1) AND ($2::text IS NULL OR chain = $2) AND ($3::text IS NULL OR status = $3)
ORDER BY id
LIMIT $5

-- name: listed_of_user
SELECT id, n, chain, tx_hash, recipient, asset, amount, user_id, status, generation,
       block_hash, block_number, log_index, credited_at, finalized_at, updated_at, sender, held
FROM deposits
WHERE user_id = $1 AND ($4::uuid IS NULL OR id > $4)
  AND ($2::text IS NULL OR chain = $2) AND ($3::text IS NULL OR status = $3)
ORDER BY id
LIMIT $5

-- name: listed_odd
-- What is rare has an index of its own: "deposits_odd", by its very condition.
SELECT id, n, chain, tx_hash, recipient, asset, amount, user_id, status, generation,
       block_hash, block_number, log_index, credited_at, finalized_at, updated_at, sender, held
FROM deposits
WHERE status = $3 AND status IN ('pending', 'orphaned', 'reversed', 'parked', 'vanished')
  AND ($4::uuid IS NULL OR id > $4)
  AND ($1::text IS NULL OR user_id = $1) AND ($2::text IS NULL OR chain = $2)
ORDER BY id
LIMIT $5

-- name: listed_wallets
SELECT w.chain, w.address, w.wallet_id, w.created_at, w.user_id
FROM wallets w
WHERE ($3::text IS NULL OR (w.chain, w.address) > ($3, $4))
  AND ($1::text IS NULL OR w.user_id = $1) AND ($2::text IS NULL OR w.chain = $2)
ORDER BY w.chain, w.address
LIMIT $5
