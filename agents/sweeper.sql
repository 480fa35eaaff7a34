-- name: any_due
SELECT EXISTS (SELECT 1 FROM schedule WHERE available_at <= $1 AND code <> $2)

-- name: due
-- The first of them until their bytes pass $4, one at least, and how many there are up to $2. The values themselves are read of
-- those alone: their lengths stand in the rows.
SELECT stage, replace(event_id::text, '-', ''), attempt, topic, key, value, headers, available_at, found
FROM (
    SELECT *, count(*) OVER () AS found,
        sum(size) OVER (ORDER BY available_at ROWS UNBOUNDED PRECEDING) - size AS before
    FROM (
        SELECT *, octet_length(value) + octet_length(headers::text) AS size
        FROM schedule
        WHERE available_at <= $1 AND code <> $3
        ORDER BY available_at
        LIMIT $2
        FOR UPDATE
    ) AS due
) AS counted
WHERE before < $4
ORDER BY available_at

-- name: waiting
SELECT count(*) FROM (SELECT 1 FROM outbox WHERE at < $1 LIMIT 10000) AS old
