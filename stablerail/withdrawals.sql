-- name: open_by_state
SELECT chain, status, count(*) AS withdrawals, min(requested_at) AS oldest
FROM withdrawals
WHERE status NOT IN ('completed', 'failed', 'cancelled')
GROUP BY chain, status
ORDER BY chain, status

-- name: lanes
SELECT l.chain, l.signer, l.next_nonce, l.chain_nonce, l.status, l.reason, count(a.nonce) AS in_flight,
       min(a.signed_at) AS oldest
FROM lanes l
LEFT JOIN (
    SELECT chain, signer, nonce, min(signed_at) AS signed_at
    FROM attempts WHERE status IN ('signed', 'broadcast', 'mined') GROUP BY chain, signer, nonce
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
