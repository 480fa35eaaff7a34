-- name: take
WITH due AS (
    SELECT c.id
    FROM calls c
    LEFT JOIN leases l ON l.call_id = c.id
    WHERE c.stage = $1 AND c.state = 'open' AND (l.until IS NULL OR l.until < $3)
    ORDER BY c.created_at
    LIMIT $5
    FOR UPDATE OF c SKIP LOCKED
), taken AS (
    INSERT INTO leases AS l (call_id, holder, until, attempts)
    SELECT due.id, $2, $4, 1 FROM due
    ON CONFLICT (call_id) DO UPDATE SET holder = excluded.holder, until = excluded.until, attempts = l.attempts + 1
    WHERE l.until < $3
    RETURNING l.call_id, l.attempts
)
SELECT replace(c.id::text, '-', ''), c.idempotency_key, c.request, m.context, t.attempts
FROM taken t
JOIN calls c ON c.id = t.call_id
JOIN call_members m ON m.call_id = c.id

-- name: lock_open
SELECT replace(c.id::text, '-', ''), c.stage, c.partner, c.operation, replace(c.idempotency_key::text, '-', ''),
       c.request, c.fingerprint, c.created_at
FROM calls c
WHERE c.id = $1 AND c.state = 'open'
FOR UPDATE

-- name: again
UPDATE leases SET until = $2, last_error = $3 WHERE call_id = $1

-- name: release
DELETE FROM leases WHERE call_id = $1
