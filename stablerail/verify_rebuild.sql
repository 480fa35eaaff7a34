-- name: lock_relay
SELECT FROM relay WHERE id = 1 FOR UPDATE

-- name: waiting
SELECT seq, record FROM outbox WHERE NOT journaled ORDER BY seq

-- name: store
INSERT INTO rebuild_checks AS c (id, at, records, offending) VALUES (1, $1, $2, $3::jsonb)
ON CONFLICT (id) DO UPDATE SET at = excluded.at, records = excluded.records, offending = excluded.offending

-- name: stored
SELECT at, records, offending::text FROM rebuild_checks
