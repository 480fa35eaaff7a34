-- name: lanes
SELECT chain, signer, next_nonce, chain_nonce, status, reason, version, updated_at FROM lanes ORDER BY chain, signer

-- name: lane_keys
-- Where the keys of lanes are that were added; NULL: of the settings.
SELECT chain, signer, k.source, l.status
FROM lane_keys k FULL JOIN lanes l USING (chain, signer)
ORDER BY chain, signer

-- name: open_nonces
-- Of a lane: those that the chain has not ended yet.
SELECT DISTINCT a.nonce FROM attempts a
WHERE a.chain = $1 AND a.signer = $2 AND a.phase IN ('unmined', 'mined')
ORDER BY a.nonce
