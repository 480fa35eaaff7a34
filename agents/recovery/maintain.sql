-- name: stages
SELECT DISTINCT stage, topic FROM owners WHERE topic <> '-'

-- name: oldest_open
SELECT min(requested_at) FROM withdrawals WHERE settled_at IS NULL

-- name: inbox
-- $1 stages, $2 before when what was done at once may go, $3 before when the rest may.
SELECT i.stage, replace(i.event_id::text, '-', '')
FROM inbox i
JOIN unnest($1::text[], $2::timestamptz[], $3::timestamptz[]) AS x(stage, plain, other) ON x.stage = i.stage
WHERE i.outcome <> 'retry' AND i.at < CASE WHEN i.outcome = 'done' AND i.attempt = 1 THEN x.plain ELSE x.other END

-- name: inbox_still
SELECT i.stage, replace(i.event_id::text, '-', '')
FROM unnest($4::text[], $5::uuid[]) AS k(stage, event_id)
JOIN inbox i ON i.stage = k.stage AND i.event_id = k.event_id
JOIN unnest($1::text[], $2::timestamptz[], $3::timestamptz[]) AS x(stage, plain, other) ON x.stage = i.stage
WHERE i.outcome <> 'retry' AND i.at < CASE WHEN i.outcome = 'done' AND i.attempt = 1 THEN x.plain ELSE x.other END
ORDER BY i.stage, i.event_id
FOR UPDATE OF i

-- name: calls
-- What failed stays: a person may have it made again, with its key.
SELECT replace(c.id::text, '-', '')
FROM calls c
JOIN unnest($1::text[], $2::timestamptz[]) AS x(stage, before) ON x.stage = c.stage
WHERE c.state IN ('concluded', 'split') AND c.concluded_at < x.before

-- name: calls_still
SELECT replace(c.id::text, '-', '')
FROM unnest($3::uuid[]) AS k(id)
JOIN calls c ON c.id = k.id
JOIN unnest($1::text[], $2::timestamptz[]) AS x(stage, before) ON x.stage = c.stage
WHERE c.state IN ('concluded', 'split') AND c.concluded_at < x.before
ORDER BY c.id
FOR UPDATE OF c

-- name: members
SELECT m.stage, replace(m.event_id::text, '-', ''), m.item
FROM unnest($1::uuid[]) AS k(call_id)
JOIN call_members m ON m.call_id = k.call_id
ORDER BY m.stage, m.event_id, m.item
FOR UPDATE OF m

-- name: counters
-- A day's counters, $1 their first word, of days before $2.
SELECT name FROM counters WHERE split_part(name, ' ', 1) = $1 AND split_part(name, ' ', 2) COLLATE "C" < $2

-- name: counters_still
SELECT c.name FROM unnest($3::text[]) AS k(name) JOIN counters c ON c.name = k.name
WHERE split_part(c.name, ' ', 1) = $1 AND split_part(c.name, ' ', 2) COLLATE "C" < $2
ORDER BY c.name
FOR UPDATE OF c

-- name: crashes
DELETE FROM crashes WHERE last_at < $1

-- name: count_crashes
SELECT count(*) FROM crashes WHERE last_at < $1

-- name: last_run
SELECT at FROM audit
WHERE stage = $1 AND topic = '-' AND partition = 0 AND summary ? 'maintained'
ORDER BY position DESC
LIMIT 1

-- name: letters
-- Not while the inbox says that the event was refused: some of its rows are kept for ever.
SELECT replace(d.id::text, '-', '') FROM dead_letters d
WHERE d.state IN ('resolved', 'discarded') AND d.updated_at < $1 AND NOT EXISTS (
    SELECT FROM dead_letter_events e JOIN inbox i ON i.stage = e.stage AND i.event_id = e.event_id
    WHERE e.id = d.id AND i.outcome = 'rejected')

-- name: letters_still
SELECT replace(d.id::text, '-', '')
FROM unnest($2::uuid[]) AS k(id)
JOIN dead_letters d ON d.id = k.id
WHERE d.state IN ('resolved', 'discarded') AND d.updated_at < $1 AND NOT EXISTS (
    SELECT FROM dead_letter_events e JOIN inbox i ON i.stage = e.stage AND i.event_id = e.event_id
    WHERE e.id = d.id AND i.outcome = 'rejected')
ORDER BY d.id
FOR UPDATE OF d
