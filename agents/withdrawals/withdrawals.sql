-- name: lock
SELECT replace(w.id::text, '-', ''), w.user_id, w.idempotency_key, replace(w.fingerprint::text, '-', ''), w.rail,
       w.chain, w.asset, w.amount::text, w.recipient, w.status, w.code, replace(w.hold_id::text, '-', ''),
       w.requested_at, w.updated_at, w.settled_at, w.version
FROM unnest($1::text::uuid[]) AS x(id)
JOIN withdrawals w ON w.id = x.id
ORDER BY w.id
FOR UPDATE OF w

-- name: read
SELECT replace(w.id::text, '-', ''), w.user_id, w.idempotency_key, replace(w.fingerprint::text, '-', ''), w.rail,
       w.chain, w.asset, w.amount::text, w.recipient, w.status, w.code, replace(w.hold_id::text, '-', ''),
       w.requested_at, w.updated_at, w.settled_at, w.version
FROM withdrawals w
WHERE w.id = $1::text::uuid

-- name: limits
SELECT name, value::text FROM limits WHERE name LIKE 'withdrawal.%'

-- name: own_addresses
-- Of chains whose addresses are alike: a key of ours opens the same address on each of them.
SELECT w.address FROM wallets w WHERE w.chain = ANY ($1::text[]) AND w.address = ANY ($2::text[])
UNION
SELECT l.signer FROM lanes l WHERE l.chain = ANY ($1::text[]) AND l.signer = ANY ($2::text[])
UNION
SELECT c.address FROM custodian_wallets c WHERE c.chain = ANY ($1::text[]) AND c.address = ANY ($2::text[])

-- name: denied_addresses
SELECT d.address FROM denied_addresses d WHERE d.chain = ANY ($1::text[]) AND d.address = ANY ($2::text[])

-- name: frozen
SELECT k.user_id FROM unnest($1::text[]) AS x(user_id) JOIN kyc_standings k ON k.user_id = x.user_id
WHERE k.standing = 'rejected'
