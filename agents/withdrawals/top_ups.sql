-- name: on_their_way
-- On a chain, by whichever account; each with the attempt that ended it, where track_confirmations has found one.
SELECT t.chain, t.signer, t.nonce, t.lane, t.amount, t.state, t.block_number, t.signed_at, t.ended_at,
       a.status, a.block_number
FROM gas_top_ups t
LEFT JOIN attempts a
    ON a.chain = t.chain AND a.signer = t.signer AND a.nonce = t.nonce AND a.status IN ('confirmed', 'reverted')
WHERE t.chain = $1 AND t.state = 'open'
ORDER BY t.signer, t.nonce

-- name: lanes
-- Of the chain's lanes that may be given coins: whether a top-up is on its way from anybody, and the block of the newest.
SELECT l.signer, EXISTS (SELECT FROM gas_top_ups t WHERE t.chain = l.chain AND t.lane = l.signer AND t.state = 'open'),
       (SELECT max(t.block_number) FROM gas_top_ups t WHERE t.chain = l.chain AND t.lane = l.signer)
FROM lanes l
WHERE l.chain = $1 AND (l.status = 'open' OR l.status = 'paused' AND l.reason = ANY ($2::text[]))
ORDER BY l.signer

-- name: given
-- On a chain since then, by whichever account, also what failed: it may have cost.
SELECT coalesce(sum(t.amount), 0) FROM gas_top_ups t WHERE t.chain = $1 AND t.signed_at >= $2

-- name: lock_top_up
SELECT chain, signer, nonce, lane, amount, state, block_number, signed_at, ended_at
FROM gas_top_ups WHERE chain = $1 AND signer = $2 AND nonce = $3
FOR UPDATE

-- name: list
-- The newest first, each with the attempt that ended it, or its newest.
SELECT t.chain, t.signer, t.nonce, t.lane, t.amount::text AS amount, t.state, t.block_number, t.signed_at, t.ended_at,
       a.n AS attempts, a.tx_hash, a.status, a.error
FROM gas_top_ups t
LEFT JOIN LATERAL (
    SELECT x.tx_hash, x.status, x.error, max(x.n) OVER () AS n FROM attempts x
    WHERE x.chain = t.chain AND x.signer = t.signer AND x.nonce = t.nonce
    ORDER BY x.status IN ('confirmed', 'reverted') DESC, x.n DESC LIMIT 1
) AS a ON true
WHERE ($1::text IS NULL OR t.chain = $1) AND ($2::text IS NULL OR t.state = $2)
ORDER BY t.signed_at DESC, t.nonce DESC
LIMIT $3
