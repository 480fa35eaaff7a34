-- name: waiting
-- The first nonces of a signer that the chain has not counted, with the newest attempt of each.
SELECT a.nonce, max(a.n), (array_agg(a.max_fee::text ORDER BY a.n DESC))[1]
FROM attempts a
WHERE a.chain = $1 AND a.signer = $2 AND a.phase IN ('unmined', 'mined') AND a.nonce >= $3 AND a.nonce < $4
GROUP BY a.nonce
HAVING bool_and(a.status <> 'mined')
ORDER BY a.nonce

-- name: wished
-- New ones first, and of those that wait for something others each time: what a hundred wait for hides nobody's.
SELECT replace(x.withdrawal_id::text, '-', '')
FROM attempt_wishes x
WHERE x.chain = $1 AND x.state = 'open'
ORDER BY x.code IS NOT NULL, CASE WHEN x.code IS NULL THEN x.asked_at END, random()
LIMIT 100

-- name: wishes_of
SELECT replace(x.withdrawal_id::text, '-', ''), x.chain, x.kind, x.attempts_max, x.state, x.code, x.n, x.asked_by, x.reason,
       x.asked_at, x.ended_at
FROM attempt_wishes x
WHERE x.withdrawal_id = ANY ($1::text[]::uuid[])

-- name: nonces_of
SELECT DISTINCT a.chain, a.signer, a.nonce FROM attempts a WHERE a.withdrawal_id = ANY ($1::text[]::uuid[])

-- name: cursor
SELECT state FROM chain_cursors WHERE chain = $1

-- name: top_ups
SELECT t.chain, t.signer, t.nonce, t.lane, t.amount, t.state, t.block_number, t.signed_at, t.ended_at
FROM gas_top_ups t WHERE t.chain = $1 AND t.signer = $2 AND t.nonce = ANY ($3::bigint[])
