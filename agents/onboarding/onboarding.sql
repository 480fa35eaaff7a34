-- name: requests
SELECT w.user_id, w.chain, w.status, w.requested_at, w.ready_at
FROM wallet_requests w
WHERE w.user_id = ANY($1::text[])
ORDER BY w.user_id, w.chain
FOR UPDATE OF w
