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
