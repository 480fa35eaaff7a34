-- name: any_due
SELECT EXISTS (SELECT 1 FROM schedule WHERE available_at <= $1 AND code <> $2)

-- name: due
SELECT stage, replace(event_id::text, '-', ''), attempt, topic, key, value, headers, available_at
FROM schedule
WHERE available_at <= $1 AND code <> $3
ORDER BY available_at
LIMIT $2
FOR UPDATE

-- name: waiting
SELECT count(*) FROM (SELECT 1 FROM outbox WHERE at < $1 LIMIT 10000) AS old
