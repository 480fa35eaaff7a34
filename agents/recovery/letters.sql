-- name: lock
SELECT replace(d.id::text, '-', ''), d.topic, d.stage, replace(d.event_id::text, '-', ''), d.code, d.reason, d.origin,
       d.partition, d.position, d.key, d.value, d.headers::text, d.attempts, d.code_version, d.state, d.redrives, d.due_at,
       d.first_at, d.last_at, d.updated_at, d.version, d.events::text
FROM unnest($1::text::uuid[]) AS x(id)
JOIN dead_letters d ON d.id = x.id
ORDER BY d.id
FOR UPDATE OF d

-- name: page
-- $1 topic, $2 code, $3 state, $4 codes of a class, $5 since, $6 and $7 the place, $8 how many, $9 only what can be redriven
SELECT replace(d.id::text, '-', ''), d.topic, d.stage, replace(d.event_id::text, '-', ''), d.code, d.reason, d.origin,
       d.partition, d.position, d.key, d.value, d.headers::text, d.attempts, d.code_version, d.state, d.redrives, d.due_at,
       d.first_at, d.last_at, d.updated_at, d.version, d.events::text
FROM dead_letters d
WHERE ($1::text IS NULL OR d.topic IN ($1, $1 || '.dlq')) AND ($2::text IS NULL OR d.code = $2)
  AND ($3::text[] IS NULL OR d.state = ANY($3)) AND ($4::text[] IS NULL OR d.code = ANY($4))
  AND ($5::timestamptz IS NULL OR d.last_at >= $5)
  AND ($6::timestamptz IS NULL OR (d.last_at, d.id) < ($6, $7::uuid))
  AND (NOT $9::boolean OR d.origin IS NOT NULL AND NOT EXISTS (
      SELECT FROM inbox i WHERE i.stage = d.stage AND i.event_id = d.event_id AND i.outcome = 'done'))
ORDER BY d.last_at DESC, d.id DESC
LIMIT $8

-- name: one
SELECT replace(d.id::text, '-', ''), d.topic, d.stage, replace(d.event_id::text, '-', ''), d.code, d.reason, d.origin,
       d.partition, d.position, d.key, d.value, d.headers::text, d.attempts, d.code_version, d.state, d.redrives, d.due_at,
       d.first_at, d.last_at, d.updated_at, d.version, d.events::text
FROM dead_letters d WHERE d.id = $1::uuid

-- name: codes
SELECT DISTINCT code FROM dead_letters

-- name: due
SELECT replace(id::text, '-', '') FROM dead_letters WHERE state = 'open' AND due_at <= $1 ORDER BY due_at LIMIT $2

-- name: settled
-- Sent again, and settled by their stage since.
SELECT replace(d.id::text, '-', '')
FROM dead_letters d
WHERE d.state = 'redriven' AND EXISTS (
    SELECT FROM inbox i
    WHERE i.stage = d.stage AND i.outcome = 'done'
      AND (i.event_id = d.event_id OR i.event_id IN (SELECT e::uuid FROM jsonb_array_elements_text(d.events) AS e)))
LIMIT $1

-- name: open
SELECT code, count(*) FROM dead_letters WHERE state = 'open' GROUP BY code

-- name: done
SELECT i.stage, replace(i.event_id::text, '-', '')
FROM unnest($1::text[], $2::text::uuid[]) AS x(stage, event_id)
JOIN inbox i ON i.stage = x.stage AND i.event_id = x.event_id
WHERE i.outcome = 'done'
