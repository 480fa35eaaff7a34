-- name: wallets
SELECT w.chain, w.address, w.user_id
FROM unnest($1::text[], $2::text[]) AS x(chain, address)
JOIN wallets w ON w.chain = x.chain AND w.address = x.address

-- name: reports
SELECT replace(r.id::text, '-', ''), r.source, r.transfer_id, replace(r.group_id::text, '-', ''),
       replace(r.deposit_id::text, '-', ''), r.evidence, r.block_hash, r.reported_at
FROM unnest($1::text::uuid[]) AS x(group_id)
JOIN deposit_reports r ON r.group_id = x.group_id
UNION
SELECT replace(r.id::text, '-', ''), r.source, r.transfer_id, replace(r.group_id::text, '-', ''),
       replace(r.deposit_id::text, '-', ''), r.evidence, r.block_hash, r.reported_at
FROM unnest($2::text::uuid[]) AS x(id)
JOIN deposit_reports r ON r.id = x.id

-- name: grouped
SELECT replace(r.group_id::text, '-', ''), replace(r.id::text, '-', '')
FROM unnest($1::text::uuid[]) AS x(group_id)
JOIN deposit_reports r ON r.group_id = x.group_id

-- name: locked
SELECT replace(d.id::text, '-', ''), d.n, d.chain, d.tx_hash, d.recipient, d.asset,
       d.amount::text, d.user_id, d.status, d.generation, d.buffer_shard, d.block_hash, d.block_number, d.log_index,
       d.credited_at, d.finalized_at, d.updated_at, d.sender, d.held, d.counted::text
FROM unnest($1::uuid[]) AS x(id)
JOIN deposits d ON d.id = x.id
ORDER BY d.id
FOR UPDATE OF d

-- name: denied
SELECT d.chain, d.address
FROM unnest($1::text[], $2::text[]) AS x(chain, address)
JOIN denied_addresses d ON d.chain = x.chain AND d.address = x.address

-- name: ours
-- Which of these addresses are customers' wallets, signers of ours or our wallets at the custodian.
SELECT x.chain, x.address
FROM unnest($1::text[], $2::text[]) AS x(chain, address)
WHERE EXISTS (SELECT FROM wallets w WHERE w.chain = x.chain AND w.address = x.address)
   OR EXISTS (SELECT FROM lanes l WHERE l.chain = x.chain AND l.signer = x.address)
   OR EXISTS (SELECT FROM custodian_wallets c WHERE c.chain = x.chain AND c.address = x.address)

-- name: closed
SELECT owner FROM accounts WHERE id = ANY($1::uuid[]) AND closed_at IS NOT NULL

-- name: due
-- The oldest first. Each part walks an index of its own to its limit, however long the backlog above the final block.
SELECT replace(d.id::text, '-', ''), d.tx_hash, d.block_hash, d.recipient, d.amount::text
FROM (
    (SELECT * FROM deposits WHERE chain = $1 AND status IN ('credited', 'orphaned') AND block_number <= $2
     ORDER BY block_number LIMIT $3)
    UNION ALL
    (SELECT * FROM deposits WHERE chain = $1 AND status IN ('credited', 'orphaned') AND block_number IS NULL LIMIT $3)
    UNION ALL
    (SELECT * FROM deposits WHERE chain = $1 AND status = 'pending' AND block_number <= $2
     ORDER BY block_number LIMIT $3)
    UNION ALL
    (SELECT * FROM deposits WHERE chain = $1 AND status = 'pending' AND block_number IS NULL LIMIT $3)
    UNION ALL  -- and what somebody has placed where the chain was not by far
    (SELECT * FROM deposits WHERE chain = $1 AND status IN ('credited', 'orphaned') AND block_number > $4
     AND updated_at < to_timestamp($5) ORDER BY block_number LIMIT $3)
    UNION ALL
    (SELECT * FROM deposits WHERE chain = $1 AND status = 'pending' AND block_number > $4
     AND updated_at < to_timestamp($5) ORDER BY block_number LIMIT $3)
) AS d
ORDER BY d.block_number
LIMIT $3

-- name: scanned
-- How far the scanner has read these chains.
SELECT chain, (state #>> '{recent,-1,number}')::bigint FROM chain_cursors
WHERE chain = ANY($1::text[]) AND state #>> '{recent,-1,number}' IS NOT NULL

-- name: not_signed
-- What a customer's withdrawals hold and may still be given back, the newest first; locked in the order in which those that
-- sign lock what waits.
WITH locked AS (
    SELECT w.*
    FROM withdrawals w
    WHERE w.user_id = ANY($1::text[]) AND w.status IN ('pending', 'signing') AND w.hold_id IS NOT NULL
    ORDER BY w.requested_at, w.id
    FOR UPDATE
)
SELECT replace(w.id::text, '-', ''), w.user_id, w.idempotency_key, replace(w.fingerprint::text, '-', ''), w.rail,
       w.chain, w.asset, w.amount::text, w.recipient, w.status, w.code, replace(w.hold_id::text, '-', ''),
       w.requested_at, w.updated_at, w.settled_at, w.version
FROM locked w
ORDER BY w.requested_at DESC, w.id

-- name: count_not_signed
SELECT count(*) FROM withdrawals
WHERE user_id = ANY($1::text[]) AND status IN ('pending', 'signing') AND hold_id IS NOT NULL
