-- name: chains
SELECT r.chain, r.status, r.error, w.address
FROM wallet_requests r
LEFT JOIN LATERAL (
    SELECT address FROM wallets WHERE user_id = r.user_id AND chain = r.chain AND r.status = 'ready'
    ORDER BY created_at, address LIMIT 1
) AS w ON true
WHERE r.user_id = $1
ORDER BY r.chain

-- name: job
SELECT attempts, next_attempt_at, error, version FROM wallet_provisioning_jobs WHERE user_id = $1

-- name: frozen
SELECT EXISTS (SELECT FROM kyc_standings WHERE user_id = $1 AND standing = 'rejected')
