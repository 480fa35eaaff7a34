-- name: lead
SELECT pg_try_advisory_lock(hashtext(current_schema() || ' ' || $1))

-- name: left
-- Above $2 the first of them until their bytes pass $3, one at least.
SELECT seq, record
FROM (
    SELECT seq, record, sum(octet_length(record)) OVER (ORDER BY seq) - octet_length(record) AS before
    FROM (
        SELECT o.seq, o.record
        FROM outbox o
        WHERE o.stage = $1 AND o.topic = '-' AND o.journaled AND o.seq > $2
        ORDER BY o.seq
        LIMIT 100
    ) AS first
) AS counted
WHERE before < $3
ORDER BY seq

-- name: silence
SELECT set_config('idle_session_timeout', $1, false)
