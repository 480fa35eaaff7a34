-- name: requests
-- Joined: a generic plan may compare every row of the table with every element of an array.
SELECT w.user_id, w.chain, w.status, w.requested_at, w.ready_at, w.error
FROM unnest($1::text[]) AS u(user_id) JOIN wallet_requests w ON w.user_id = u.user_id
ORDER BY w.user_id, w.chain
FOR UPDATE OF w

-- name: jobs
SELECT j.user_id, j.state, j.attempts, j.error, j.created_at, j.started_at, j.next_attempt_at, j.finished_at,
       j.updated_at, j.version
FROM unnest($1::text[]) AS u(user_id) JOIN wallet_provisioning_jobs j ON j.user_id = u.user_id
ORDER BY j.user_id
FOR UPDATE OF j

-- name: owners
-- Whose the addresses are already: chain and address in two arrays.
SELECT w.chain, w.address, w.user_id
FROM wallets w
WHERE (w.chain, w.address) IN (SELECT * FROM unnest($1::text[], $2::text[]))

-- name: wallet_set
SELECT wallet_set_id FROM wallet_sets WHERE network = $1

-- name: standings
SELECT k.user_id, k.standing, k.vendor, k.vendor_event_id, k.decided_at, k.changed_at
FROM unnest($1::text[]) AS u(user_id) JOIN kyc_standings k ON k.user_id = u.user_id
ORDER BY k.user_id
FOR UPDATE OF k
