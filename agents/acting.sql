-- name: is_closed
SELECT EXISTS (SELECT FROM gates WHERE name = 'partner:' || $1)

-- name: any_waiting
SELECT EXISTS (SELECT FROM call_members WHERE stage = $1 AND call_id IS NULL)

-- name: waiting
SELECT replace(event_id::text, '-', ''), item, request, context, queued_at
FROM call_members
WHERE stage = $1 AND call_id IS NULL
ORDER BY queued_at, event_id, item
LIMIT $2
FOR UPDATE

-- name: lease
INSERT INTO leases (call_id, holder, until, attempts) SELECT unnest($1::uuid[]), $2, $3, 1

-- name: take
WITH due AS (
    SELECT c.id
    FROM calls c
    LEFT JOIN leases l ON l.call_id = c.id
    WHERE c.stage = $1 AND c.state = 'open' AND (l.until IS NULL OR l.until <= $3)
      AND (c.due_at IS NULL OR c.due_at <= $3) AND c.id <> ALL ($6::uuid[])
    ORDER BY coalesce(c.due_at, c.created_at), c.id
    LIMIT $5
    FOR UPDATE OF c SKIP LOCKED
)
INSERT INTO leases AS l (call_id, holder, until, attempts)
SELECT due.id, $2, $4, 1 FROM due
ON CONFLICT (call_id) DO UPDATE SET holder = excluded.holder, until = excluded.until, attempts = l.attempts + 1
WHERE l.until <= $3
RETURNING l.call_id, l.attempts

-- name: calls
SELECT replace(c.id::text, '-', ''), c.idempotency_key, c.request, c.created_at, coalesce(c.generation, 1),
       coalesce(c.attempts, 0),
       replace(c.parent_id::text, '-', ''), c.error
FROM calls c
WHERE c.id = ANY ($1::uuid[])
ORDER BY coalesce(c.due_at, c.created_at), c.id

-- name: members
-- A member of a call that an older release made has no request of its own: it is the call's.
SELECT replace(m.call_id::text, '-', ''), replace(m.event_id::text, '-', ''), m.item, coalesce(m.request, c.request),
       m.context, coalesce(m.queued_at, c.created_at)
FROM call_members m
JOIN calls c ON c.id = m.call_id
WHERE m.call_id = ANY ($1::uuid[])
ORDER BY m.queued_at, m.event_id, m.item

-- name: lock_open
SELECT replace(id::text, '-', ''), coalesce(attempts, 0) FROM calls WHERE id = ANY ($1::uuid[]) AND state = 'open' ORDER BY id FOR UPDATE

-- name: held
-- Once the calls are locked nobody else takes them.
SELECT replace(call_id::text, '-', ''), attempts FROM leases WHERE call_id = ANY ($1::uuid[]) AND holder = $2

-- name: renew
-- Ours until somebody else takes it, even when it has run out: whoever takes it locks this row and looks at `until` again.
UPDATE leases SET until = $4 WHERE call_id = $1 AND holder = $2 AND attempts = $3 RETURNING true

-- name: put_off
UPDATE leases SET holder = '', until = $3, last_error = $4 WHERE call_id = $1 AND holder = $2

-- name: release
DELETE FROM leases WHERE call_id = ANY ($1::uuid[])

-- name: slots
-- Reserves the next $2 places, $3 seconds apart, for everybody who asks this partner; in how many seconds the first is.
INSERT INTO rate_limits AS r (name, next_at) VALUES ($1, clock_timestamp() + $2::int * $3::float8 * interval '1 second')
ON CONFLICT (name) DO UPDATE
    SET next_at = greatest(r.next_at, clock_timestamp()) + $2::int * $3::float8 * interval '1 second'
RETURNING extract(epoch FROM r.next_at - $2::int * $3::float8 * interval '1 second' - clock_timestamp())::float8
