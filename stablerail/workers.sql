-- name: beat
-- The worker as it is; those that were not heard of for long are forgotten, the last of a movement a day later: that nobody works there
-- is to be seen. When its movement was last told to restart. One clock for all: the server's.
WITH told AS (
    INSERT INTO workers AS w (id, movement, host, pid, started_at, seen_at, trouble, figures)
    VALUES ($1, $2, $3, $4, $5, now(), $6::text::jsonb, $7::text::jsonb)
    ON CONFLICT (id) DO UPDATE SET movement = excluded.movement, started_at = excluded.started_at,
        seen_at = excluded.seen_at, trouble = excluded.trouble, figures = excluded.figures
), forgotten AS (
    DELETE FROM workers w
    WHERE seen_at < now() - make_interval(secs => $8) AND id <> $1
      AND (movement = $2 OR EXISTS (
          SELECT FROM workers n WHERE n.movement = w.movement AND (n.seen_at, n.id) > (w.seen_at, w.id))
          OR seen_at < now() - interval '1 day')
)
SELECT ordered_at FROM worker_restarts WHERE movement = $2

-- name: workers
SELECT id, movement, host, pid, started_at, seen_at, extract(epoch FROM now() - seen_at)::float8 AS silent_s, trouble, figures
FROM workers ORDER BY movement, id

-- name: jobs
SELECT state, count(*), count(*) FILTER (WHERE state = 'in_progress' AND updated_at < $1)
FROM wallet_provisioning_jobs
GROUP BY state
ORDER BY state

-- name: order
INSERT INTO worker_restarts AS r (movement, ordered_by, ordered_at) VALUES ($1, $2, $3)
ON CONFLICT (movement) DO UPDATE SET ordered_by = excluded.ordered_by, ordered_at = excluded.ordered_at
