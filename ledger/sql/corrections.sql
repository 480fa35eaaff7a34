-- name: find
SELECT replace(id::text, '-', '') AS id, kind, state, reason, reference, legs,
       replace(transaction_id::text, '-', '') AS transaction_id, requested_by, requested_at, decided_by, decided_at
FROM corrections WHERE id = $1::text::uuid

-- name: list
SELECT replace(id::text, '-', '') AS id, kind, state, reason, reference, legs,
       replace(transaction_id::text, '-', '') AS transaction_id, requested_by, requested_at, decided_by, decided_at
FROM corrections WHERE $1::text IS NULL OR state = $1
ORDER BY requested_at DESC, id LIMIT $2

-- name: customers
SELECT o.owner FROM unnest($1::text[]) AS o(owner)
WHERE EXISTS (SELECT FROM accounts a WHERE a.owner = o.owner)
   OR EXISTS (SELECT FROM wallets w WHERE w.user_id = o.owner)
   OR EXISTS (SELECT FROM wallet_requests w WHERE w.user_id = o.owner)
