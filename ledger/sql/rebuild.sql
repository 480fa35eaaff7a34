-- name: owners
SELECT stage, topic, partition, epoch, position, head FROM owners

-- name: waiting
SELECT seq FROM outbox WHERE NOT journaled

-- name: unjournaled
SELECT seq, record FROM outbox WHERE NOT journaled AND seq <> ALL($1::bigint[]) ORDER BY seq

-- name: another
SELECT x.number
FROM unnest($1::text[], $2::text[], $3::int[], $4::bigint[], $5::bytea[], $6::bytea[])
    WITH ORDINALITY AS x(stage, topic, partition, position, digest, head, number)
LEFT JOIN audit a USING (stage, topic, partition, position)
WHERE a.digest IS DISTINCT FROM x.digest OR a.head IS DISTINCT FROM x.head
ORDER BY x.number LIMIT 1

-- name: tell_again
INSERT INTO outbox (seq, stage, topic, partitions, at, journaled, record) OVERRIDING SYSTEM VALUE
VALUES ($1, $2, $3, $4, $5, true, $6)
ON CONFLICT (seq) DO NOTHING

-- name: told
DELETE FROM outbox WHERE seq < $1 AND (journaled OR seq = ANY($2::bigint[]))

-- name: journaled
UPDATE outbox SET journaled = true WHERE NOT journaled AND seq = ANY($1::bigint[])

-- name: to_tell
SELECT count(*) FROM outbox

-- name: number_records
SELECT setval('outbox_seq_seq', greatest($1::bigint, (SELECT last_value + is_called::int FROM outbox_seq_seq)), false)

-- name: number_batches
SELECT setval('batches', greatest($1::bigint, (SELECT last_value + is_called::int FROM batches)), false)

-- name: summarize
-- Else whoever looks for a transaction's entries reads all of them, until the server's own upkeep comes by.
SELECT brin_summarize_new_values('entries_at')

-- name: outgrown
SELECT relname FROM pg_class
WHERE oid = ANY($1::text[]::regclass[]) AND pg_relation_size(oid) / current_setting('block_size')::int > 2 * relpages + $2
