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
