-- name: any_open
SELECT EXISTS (SELECT FROM attempts WHERE chain = $1 AND phase IN ('unmined', 'mined'))

-- name: open_attempts
-- What one look needs of the open attempts, however many there are: those in blocks, those of the hashes that were seen in new
-- blocks ($2), and of each lane all those of the $3 lowest nonces that are in none: the chain takes no other before them.
SELECT f.tx_hash, f.signer, f.nonce, f.n, f.status, f.block_hash, f.block_number, f.updated_at,
       (SELECT coalesce(w.code, '') FROM withdrawals w WHERE w.id = f.withdrawal_id AND w.status = 'manual_review')
FROM (
    SELECT tx_hash, signer, nonce, n, status, block_hash, block_number, updated_at, withdrawal_id
    FROM attempts WHERE chain = $1 AND phase = 'mined'
    UNION
    SELECT tx_hash, signer, nonce, n, status, block_hash, block_number, updated_at, withdrawal_id
    FROM attempts WHERE chain = $1 AND tx_hash = ANY ($2) AND phase = 'unmined'
    UNION
    SELECT a.*
    FROM lanes l
    CROSS JOIN LATERAL (
        SELECT DISTINCT o.nonce FROM attempts o
        WHERE o.chain = l.chain AND o.signer = l.signer AND o.phase = 'unmined'
        ORDER BY o.nonce LIMIT $3
    ) AS n
    CROSS JOIN LATERAL (
        SELECT tx_hash, signer, nonce, n, status, block_hash, block_number, updated_at, withdrawal_id
        FROM attempts x
        WHERE x.chain = l.chain AND x.signer = l.signer AND x.nonce = n.nonce AND x.phase = 'unmined'
        OFFSET 0
    ) AS a
    WHERE l.chain = $1
) AS f
ORDER BY f.nonce, f.signer, f.n

-- name: hashes_of_nonces
SELECT a.signer, a.nonce, a.tx_hash
FROM unnest($2::text[], $3::bigint[]) AS x(signer, nonce)
JOIN attempts a ON a.chain = $1 AND a.signer = x.signer AND a.nonce = x.nonce

-- name: cursor
SELECT state FROM chain_cursors WHERE chain = $1

-- name: withdrawals_of_nonces
SELECT DISTINCT replace(a.withdrawal_id::text, '-', '')
FROM unnest($1::text[], $2::text[], $3::bigint[]) AS x(chain, signer, nonce)
JOIN attempts a ON a.chain = x.chain AND a.signer = x.signer AND a.nonce = x.nonce
WHERE a.withdrawal_id IS NOT NULL

-- name: lock_attempts
SELECT a.chain, a.tx_hash, a.signer, a.nonce, a.n, a.kind, replace(a.withdrawal_id::text, '-', ''), a.raw, a.gas_limit,
       a.max_fee, a.priority_fee, a.status, a.error, a.block_hash, a.block_number, a.signed_at, a.broadcast_at,
       a.updated_at, a.version
FROM unnest($1::text[], $2::text[], $3::bigint[]) AS x(chain, signer, nonce)
JOIN attempts a ON a.chain = x.chain AND a.signer = x.signer AND a.nonce = x.nonce
ORDER BY a.chain, a.signer, a.nonce, a.n
FOR UPDATE OF a

-- name: lock_lanes
SELECT l.chain, l.signer, l.next_nonce, l.chain_nonce, l.status, l.reason, l.version, l.updated_at
FROM unnest($1::text[], $2::text[]) AS x(chain, signer)
JOIN lanes l ON l.chain = x.chain AND l.signer = x.signer
ORDER BY l.chain, l.signer
FOR UPDATE OF l

-- name: attempts_by_hash
SELECT a.chain, a.tx_hash, a.signer, a.nonce, a.n, a.kind, replace(a.withdrawal_id::text, '-', ''), a.raw, a.gas_limit,
       a.max_fee, a.priority_fee, a.status, a.error, a.block_hash, a.block_number, a.signed_at, a.broadcast_at,
       a.updated_at, a.version
FROM unnest($1::text[], $2::text[]) AS x(chain, tx_hash)
JOIN attempts a ON a.chain = x.chain AND a.tx_hash = x.tx_hash

-- name: to_send
-- Last of each: whether its lane sends nothing until it was compared with its chain.
SELECT a.chain, a.tx_hash, a.signer, a.nonce, a.n, replace(a.withdrawal_id::text, '-', ''), a.raw, a.status,
       EXISTS (SELECT FROM lanes l WHERE l.chain = a.chain AND l.signer = a.signer AND l.status = 'paused'
               AND (l.reason = 'restored' OR starts_with(l.reason, 'restored: ')))
FROM unnest($1::text[], $2::text[]) AS x(chain, tx_hash)
JOIN attempts a ON a.chain = x.chain AND a.tx_hash = x.tx_hash

-- name: attempts_of
SELECT a.chain, a.tx_hash, a.signer, a.nonce, a.n, a.kind, replace(a.withdrawal_id::text, '-', ''), a.raw, a.gas_limit,
       a.max_fee, a.priority_fee, a.status, a.error, a.block_hash, a.block_number, a.signed_at, a.broadcast_at,
       a.updated_at, a.version
FROM attempts a
WHERE a.withdrawal_id = $1::text::uuid
ORDER BY a.n
