-- name: lead
SELECT pg_try_advisory_lock(hashtext(current_schema() || ' ' || $1))

-- name: silence
SELECT set_config('idle_session_timeout', $1, false)
