-- name: settled
-- What became of these events.
SELECT replace(i.event_id::text, '-', ''), i.attempt, replace(i.fingerprint::text, '-', ''), i.outcome
FROM unnest($2::text::uuid[]) AS x(event_id)
JOIN inbox i ON i.stage = $1 AND i.event_id = x.event_id

-- name: epochs
SELECT o.topic, o.partition, o.epoch
FROM unnest($2::text[], $3::int[]) AS x(topic, partition)
JOIN owners o ON o.stage = $1 AND o.topic = x.topic AND o.partition = x.partition
