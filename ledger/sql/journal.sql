-- name: lock_relay
SELECT id FROM relay WHERE id = 1 FOR UPDATE

-- name: standing
SELECT (SELECT id FROM relay WHERE id = 1), (SELECT coalesce(max(first_seq), 0) FROM restores)

-- name: missing
-- The last of these places that the audit has not, or has with another head.
SELECT x.number
FROM unnest($1::text[], $2::text[], $3::int[], $4::bigint[], $5::bytea[])
    WITH ORDINALITY AS x(stage, topic, partition, position, head, number)
WHERE NOT EXISTS (
    SELECT FROM audit a
    WHERE a.stage = x.stage AND a.topic = x.topic AND a.partition = x.partition AND a.position = x.position AND a.head = x.head
)
ORDER BY x.number DESC LIMIT 1

-- name: waiting
SELECT seq, octet_length(record), (SELECT min(seq) FROM outbox WHERE journaled AND seq >= $1 AND seq <> ALL($2::bigint[])),
    pg_snapshot_xmin(pg_current_snapshot())::text::bigint, pg_current_xact_id()::text::bigint
FROM outbox WHERE NOT journaled AND seq >= $1 AND seq <> ALL($2::bigint[]) ORDER BY seq

-- name: records
SELECT seq, record FROM outbox WHERE seq = ANY($1::bigint[])

-- name: mark
WITH gone AS (DELETE FROM outbox WHERE seq = ANY($2::bigint[]))
UPDATE outbox SET journaled = true WHERE seq = ANY($1::bigint[])

-- name: left_by_partitions
-- Above $4 the first of them until their bytes pass $5, one at least.
SELECT seq, record
FROM (
    SELECT seq, record, sum(octet_length(record)) OVER (ORDER BY seq) - octet_length(record) AS before
    FROM (
        SELECT o.seq, o.record
        FROM outbox o
        WHERE o.stage = $1 AND o.topic = $2 AND o.partitions && $3::int[] AND o.journaled AND o.seq > $4
        ORDER BY o.seq
        LIMIT 100
    ) AS first
) AS counted
WHERE before < $5
ORDER BY seq

-- name: left_behind
-- The first of them until their bytes pass $2, one at least.
SELECT seq, record
FROM (
    SELECT seq, record, sum(octet_length(record)) OVER (ORDER BY seq) - octet_length(record) AS before
    FROM (SELECT o.seq, o.record FROM outbox o WHERE o.at < $1 AND o.journaled ORDER BY o.seq LIMIT 100) AS first
) AS counted
WHERE before < $2
ORDER BY seq

-- name: delete
DELETE FROM outbox WHERE seq = ANY($1::bigint[])

-- name: is_copy
SELECT NOT EXISTS (SELECT FROM relay)
