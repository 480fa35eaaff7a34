-- name: calls_of
-- Calls with the customer that were given up or wait, locked. A call under way is left alone: it has a lease with a holder.
SELECT c.id
FROM calls c
WHERE c.id IN (
    SELECT m.call_id FROM call_members m WHERE m.stage = $1 AND m.request ->> 'user_id' = $2 AND m.call_id IS NOT NULL
) AND (c.state = 'failed' OR (c.state = 'open' AND c.due_at IS NOT NULL))
ORDER BY c.id
FOR UPDATE

-- name: states
SELECT id, state FROM calls WHERE id = ANY ($1::uuid[])

-- name: due_now
-- A lease without a holder only says when; one is made where there is none, so that the call counts as taken before.
INSERT INTO leases AS l (call_id, holder, until, attempts) SELECT unnest($1::uuid[]), '', $2, 1
ON CONFLICT (call_id) DO UPDATE SET until = excluded.until WHERE l.holder = ''

-- name: without_chain
SELECT DISTINCT w.user_id
FROM wallet_requests w
WHERE w.user_id > $2
  AND NOT EXISTS (SELECT FROM wallet_requests r WHERE r.user_id = w.user_id AND r.chain = $1)
  AND NOT EXISTS (SELECT FROM kyc_standings k WHERE k.user_id = w.user_id AND k.standing = 'rejected')
ORDER BY w.user_id
LIMIT $3

-- name: count_without_chain
SELECT count(DISTINCT w.user_id)
FROM wallet_requests w
WHERE NOT EXISTS (SELECT FROM wallet_requests r WHERE r.user_id = w.user_id AND r.chain = $1)
  AND NOT EXISTS (SELECT FROM kyc_standings k WHERE k.user_id = w.user_id AND k.standing = 'rejected')
