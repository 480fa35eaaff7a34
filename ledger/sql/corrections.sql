-- name: find
SELECT replace(id::text, '-', '') AS id, kind, state, reason, reference, legs,
       replace(transaction_id::text, '-', '') AS transaction_id, requested_by, requested_at, decided_by, decided_at
FROM corrections WHERE id = $1::text::uuid

-- name: list
SELECT replace(id::text, '-', '') AS id, kind, state, reason, reference, legs,
       replace(transaction_id::text, '-', '') AS transaction_id, requested_by, requested_at, decided_by, decided_at
FROM corrections WHERE $1::text IS NULL OR state = $1
ORDER BY requested_at DESC, id LIMIT $2

-- name: asked
-- What is asked for and not decided, about one thing.
SELECT legs FROM corrections WHERE state = 'requested' AND kind = $1 AND reference = $2

-- name: parked
-- Of one thing in suspense: what came in, and what is left of it. By reference, then by time, as reading.sql finds entries.
SELECT coalesce(sum(e.amount) FILTER (WHERE e.direction = 'd'), 0)::text,
       coalesce(sum(CASE e.direction WHEN 'd' THEN e.amount ELSE -e.amount END), 0)::text
FROM transactions t
CROSS JOIN LATERAL (SELECT * FROM entries WHERE at = t.at AND transaction_id = t.id OFFSET 0) AS e
WHERE t.reference = $1 AND t.reference <> '' AND e.account_id = $2

-- name: held
SELECT coalesce(sum(remaining), 0)::text FROM holds WHERE pending_id = $1 AND state = 'open'

-- name: customers
SELECT o.owner FROM unnest($1::text[]) AS o(owner)
WHERE EXISTS (SELECT FROM accounts a WHERE a.owner = o.owner)
   OR EXISTS (SELECT FROM wallets w WHERE w.user_id = o.owner)
   OR EXISTS (SELECT FROM wallet_requests w WHERE w.user_id = o.owner)
