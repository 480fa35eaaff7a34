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

-- name: read_writer
SELECT o.topic, o.partition, o.epoch, o.position, o.head, (SELECT nextval('batches')),
       a.number, a.balance, a.version, a.updated_at, a.closed_at
FROM owners o
LEFT JOIN (
    SELECT x.number, a.balance::text, a.version, a.updated_at, a.closed_at
    FROM unnest($3::text::uuid[]) WITH ORDINALITY AS x(id, number)
    JOIN accounts a ON a.id = x.id
) AS a ON true
WHERE o.stage = $1 AND o.topic = $2 AND o.partition = 0

-- name: unchanged
-- Whether owner rows and open accounts are what was read before; they are locked then. Who has one of them in hand is not waited
-- for: two that each have what the other wants would wait for ever.
SELECT (
    SELECT count(*) FROM (
        SELECT FROM owners o
        JOIN unnest($3::int[], $6::text::bigint[], $7::text::bytea[]) AS x(partition, position, head) ON o.partition = x.partition
        WHERE o.stage = $1 AND o.topic = $2 AND o.position = x.position AND o.head = x.head
        FOR UPDATE OF o SKIP LOCKED
    ) AS owned
) = cardinality($3::int[]) AND (
    SELECT count(*) FROM (
        SELECT FROM accounts a
        JOIN (SELECT unnest($8::text::uuid[]) AS id, unnest($9::text::bigint[]) AS version) AS x ON a.id = x.id
        WHERE a.version = x.version AND a.closed_at IS NULL
        FOR UPDATE OF a SKIP LOCKED
    ) AS held
) = cardinality($8::text::uuid[])
