-- name: lead
SELECT pg_try_advisory_lock(hashtext(current_schema() || ' sweeper'))

-- name: any_due
SELECT EXISTS (SELECT 1 FROM schedule WHERE available_at <= $1)

-- name: due
SELECT stage, replace(event_id::text, '-', ''), attempt, topic, key, value, headers
FROM schedule
WHERE available_at <= $1
ORDER BY available_at
LIMIT $2
FOR UPDATE

-- name: waiting
SELECT count(*) FROM (SELECT 1 FROM outbox WHERE at < $1 LIMIT 10000) AS old
