-- name: own_and_claim
-- The owner rows, locked; beside each, the same for all: NULL when all events are new, which is nearly always, else which are
-- new, and which are repeats that we scheduled. Nothing is claimed unless every owner row is at our epoch. ON CONFLICT sees
-- what was committed while the lock was waited for, although the statement's snapshot is older.
WITH owned AS MATERIALIZED (
    SELECT o.topic, o.partition, o.epoch, o.position, o.head, x.epoch AS expected
    FROM owners o
    JOIN unnest($2::text[], $3::int[], $4::bigint[]) AS x(topic, partition, epoch)
      ON o.topic = x.topic AND o.partition = x.partition
    WHERE o.stage = $1
    ORDER BY o.topic, o.partition
    FOR UPDATE OF o
), claimed AS (
    INSERT INTO inbox AS i (stage, event_id, attempt, fingerprint, outcome, at)
    SELECT $1, x.event_id, x.attempt, x.fingerprint, 'done', $8
    FROM (SELECT unnest($5::text::uuid[]) AS event_id, unnest($6::text::int[]) AS attempt,
                 unnest($7::text::uuid[]) AS fingerprint) AS x
    WHERE (SELECT count(*) FROM owned WHERE epoch = expected) = cardinality($2)
    ORDER BY x.event_id
    ON CONFLICT (stage, event_id) DO UPDATE
    SET attempt = excluded.attempt, outcome = excluded.outcome, at = excluded.at
    WHERE i.outcome IN ('retry', 'rejected') AND i.attempt < excluded.attempt AND i.fingerprint = excluded.fingerprint
    RETURNING i.event_id, (xmax <> 0) AS again
), told AS (
    SELECT CASE WHEN count(*) FILTER (WHERE NOT again) < $9::int
                THEN coalesce(array_agg(event_id) FILTER (WHERE NOT again), '{}') END AS fresh,
           coalesce(array_agg(event_id) FILTER (WHERE again), '{}') AS again
    FROM claimed
)
SELECT owned.topic, owned.partition, owned.epoch, owned.position, owned.head, batch.number, told.fresh, told.again
FROM owned, told, (SELECT nextval('batches') AS number) AS batch
ORDER BY owned.topic, owned.partition

-- name: known
SELECT i.event_id, i.fingerprint
FROM unnest($2::uuid[]) AS x(event_id)
JOIN inbox i ON i.stage = $1 AND i.event_id = x.event_id

-- name: settle
UPDATE inbox i SET outcome = x.outcome
FROM unnest($2::uuid[], $3::text[]) AS x(event_id, outcome)
WHERE i.stage = $1 AND i.event_id = x.event_id
