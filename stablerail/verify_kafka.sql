-- name: waiting
SELECT seq FROM outbox

-- name: is_waiting
SELECT EXISTS (SELECT FROM outbox WHERE stage = $1 AND topic = $2 AND $3 = ANY (partitions) AND NOT journaled)

-- name: links
SELECT stage, topic, partition, position, head FROM audit WHERE at >= $1 AND at < $2

-- name: consumers
SELECT DISTINCT stage, topic FROM owners WHERE topic <> '-' ORDER BY stage, topic

-- name: known
SELECT replace(i.event_id::text, '-', '') FROM unnest($2::uuid[]) AS x(id) JOIN inbox i ON i.stage = $1 AND i.event_id = x.id

-- name: first_seq
SELECT coalesce(max(first_seq), 0) FROM restores

-- name: is_late
-- At none of these places the audit has this head, or nothing although its chain has come so far.
SELECT NOT EXISTS (
    SELECT
    FROM unnest($1::text[], $2::text[], $3::int[], $4::bigint[], $5::bytea[]) AS x(stage, topic, partition, position, head)
    LEFT JOIN audit a USING (stage, topic, partition, position)
    LEFT JOIN owners o USING (stage, topic, partition)
    WHERE a.head = x.head OR a.head IS NULL AND o.position >= x.position
)
