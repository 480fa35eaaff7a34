-- name: make_owners
INSERT INTO owners (stage, topic, partition, epoch, position, head)
SELECT $1, x.topic, x.partition, 0, 0, ''
FROM unnest($2::text[], $3::int[]) AS x(topic, partition)
ORDER BY x.topic, x.partition
ON CONFLICT DO NOTHING

-- name: lock_owners
SELECT o.topic, o.partition, o.epoch, o.position, o.head, (SELECT nextval('batches'))
FROM owners o
JOIN unnest($2::text[], $3::int[]) AS x(topic, partition) ON o.topic = x.topic AND o.partition = x.partition
WHERE o.stage = $1
ORDER BY o.topic, o.partition
FOR UPDATE OF o

-- name: insert_record
INSERT INTO outbox (stage, topic, partitions, at, record)
SELECT $1::text, $2::text, $3::int[], $4::timestamptz, $5::bytea WHERE {written}
RETURNING seq
