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
