-- name: lead
SELECT pg_try_advisory_lock(hashtext(current_schema() || ' ' || $1))

-- name: left
SELECT seq, record FROM outbox WHERE stage = $1 AND topic = '-' AND journaled ORDER BY seq

-- name: silence
SELECT set_config('idle_session_timeout', $1, false)
