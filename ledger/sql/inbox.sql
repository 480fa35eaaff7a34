-- name: claim
-- One row: NULL when all are new, which is nearly always; else which are new and which are repeats that we scheduled.
WITH claimed AS (
    INSERT INTO inbox AS i (stage, event_id, attempt, fingerprint, outcome, at)
    SELECT $1, x.event_id, x.attempt, x.fingerprint, 'done', $5
    FROM unnest($2::text::uuid[], $3::text::int[], $4::text::uuid[]) AS x(event_id, attempt, fingerprint)
    ORDER BY x.event_id
    ON CONFLICT (stage, event_id) DO UPDATE
    SET attempt = excluded.attempt, outcome = excluded.outcome, at = excluded.at
    WHERE i.outcome = 'retry' AND i.attempt < excluded.attempt AND i.fingerprint = excluded.fingerprint
    RETURNING i.event_id, (xmax <> 0) AS again
)
SELECT CASE WHEN count(*) FILTER (WHERE NOT again) < $6::int
            THEN coalesce(array_agg(event_id) FILTER (WHERE NOT again), '{}') END,
       coalesce(array_agg(event_id) FILTER (WHERE again), '{}')
FROM claimed

-- name: known
SELECT i.event_id, i.fingerprint
FROM unnest($2::uuid[]) AS x(event_id)
JOIN inbox i ON i.stage = $1 AND i.event_id = x.event_id

-- name: settle
UPDATE inbox i SET outcome = x.outcome
FROM unnest($2::uuid[], $3::text[]) AS x(event_id, outcome)
WHERE i.stage = $1 AND i.event_id = x.event_id
