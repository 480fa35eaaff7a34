-- name: claim
INSERT INTO inbox AS i (stage, event_id, attempt, fingerprint, outcome, at)
SELECT $1, x.event_id, x.attempt, decode(x.fingerprint, 'hex'), 'done', $5
FROM unnest($2::text::uuid[], $3::text::int[], $4::text::text[]) AS x(event_id, attempt, fingerprint)
ORDER BY x.event_id
ON CONFLICT (stage, event_id) DO UPDATE
SET attempt = excluded.attempt, outcome = excluded.outcome, at = excluded.at
WHERE i.outcome = 'retry' AND i.attempt < excluded.attempt AND i.fingerprint = excluded.fingerprint
RETURNING i.event_id, (xmax <> 0)

-- name: known
SELECT i.event_id, i.fingerprint
FROM unnest($2::uuid[]) AS x(event_id)
JOIN inbox i ON i.stage = $1 AND i.event_id = x.event_id

-- name: settle
UPDATE inbox i SET outcome = x.outcome
FROM unnest($2::uuid[], $3::text[]) AS x(event_id, outcome)
WHERE i.stage = $1 AND i.event_id = x.event_id
