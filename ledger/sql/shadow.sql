-- name: moved
-- What the accounts moved since their marks; what follows says where it is written. All under the accounts' locks.
-- The advisory lock is for its queue: row locks that can be shared would let us pass by who waits to move the phase, for ever.
WITH queued AS MATERIALIZED (SELECT pg_advisory_xact_lock_shared(hashtextextended(current_schema(), 13))),
phase AS MATERIALIZED (
    SELECT s.phase FROM shadow s CROSS JOIN queued
    WHERE s.name = 'phase' AND s.phase = ANY($5::text[]) FOR KEY SHARE OF s
),
moved AS MATERIALIZED (
    SELECT a.id, a.owner, a.type, x.before, x.after, x.version
    FROM unnest($1::text::uuid[], $2::text::numeric[], $3::text::numeric[], $4::text::bigint[])
        AS x(id, before, after, version)
    JOIN accounts a ON a.id = x.id AND a.type IN ({types})
    WHERE EXISTS (SELECT FROM phase)
),
marked AS MATERIALIZED (
    SELECT m.account_id, m.balance FROM shadow_marks m JOIN moved ON moved.id = m.account_id
    ORDER BY m.account_id FOR UPDATE OF m
),
remarked AS (
    UPDATE shadow_marks m SET version = moved.version, balance = moved.after
    FROM moved JOIN marked ON marked.account_id = moved.id WHERE m.account_id = moved.id
),
first_marked AS (
    INSERT INTO shadow_marks (account_id, version, balance)
    SELECT id, version, after FROM moved WHERE id NOT IN (SELECT account_id FROM marked)
),
each AS MATERIALIZED (
    SELECT {key} AS key, owner, type,
           floor(moved.after / {step}) - floor(coalesce(marked.balance, moved.before) / {step}) AS steps
    FROM moved LEFT JOIN marked ON marked.account_id = moved.id
)

-- name: to_outbox
INSERT INTO shadow_outbox (owner, type, amount)
SELECT owner, type, sum(steps) * {step} FROM each WHERE key IS NOT NULL AND steps <> 0 GROUP BY owner, type ORDER BY owner, type

-- name: to_rows
-- To their owners' rows, which are locked sorted.
, changed AS MATERIALIZED (
    SELECT key, {sums} FROM each WHERE key IS NOT NULL AND steps <> 0 GROUP BY key
),
locked AS MATERIALIZED (
    SELECT l.{user} AS key FROM {table} l JOIN changed ON changed.key = l.{user} ORDER BY l.{user} FOR UPDATE OF l
),
updated AS (
    UPDATE {table} l SET {sets} FROM changed c JOIN locked ON locked.key = c.key WHERE l.{user} = c.key
)
INSERT INTO {table} ({user}, {columns})
SELECT c.key, {values} FROM changed c WHERE c.key NOT IN (SELECT key FROM locked) ORDER BY c.key

-- name: look
SELECT 'phase', '', '', phase FROM shadow WHERE name = 'phase'
UNION ALL
SELECT 'ledger', owner, type, sum(balance)::text FROM accounts
WHERE owner = ANY($1::text[]) AND owner <> {system} GROUP BY owner, type
UNION ALL
SELECT 'legacy', l.{user}::text, v.type, v.value
FROM (SELECT {key} AS id FROM unnest($1::text[]) x) y
JOIN {table} l ON l.{user} = y.id
CROSS JOIN LATERAL (VALUES {values}) AS v(type, value)

-- name: look_at_one
-- As look, for one customer: planned once, since a plan for an array is never as cheap as one for the array it is called with.
SELECT s.phase, ARRAY(
    SELECT type || ' ' || balance FROM accounts WHERE owner = $1::text AND owner <> {system}
), l.{user} IS NOT NULL, {values}
FROM (SELECT) AS always
LEFT JOIN shadow s ON s.name = 'phase'
LEFT JOIN {table} l ON l.{user} = {key}

-- name: ledger_alone
SELECT asset, type, sum(balance)::text FROM accounts WHERE owner = $1 GROUP BY asset, type ORDER BY asset, type

-- name: look_here
-- Of a table elsewhere: our side, and what is still to be told there.
SELECT 'phase', '', '', phase, NULL::uuid FROM shadow WHERE name = 'phase'
UNION ALL
SELECT 'ledger', owner, type, sum(balance)::text, NULL FROM accounts
WHERE owner = ANY($1::text[]) AND owner <> {system} GROUP BY owner, type
UNION ALL
SELECT 'waiting', owner, type, amount::text, id FROM shadow_outbox WHERE owner = ANY($1::text[])
ORDER BY 1, 2, 3, 5

-- name: look_there
-- What was told last, seen with the rows.
SELECT (SELECT told FROM {ours}), x, l.{user} IS NOT NULL, {values}
FROM unnest($1::text[]) x LEFT JOIN {table} l ON l.{user} = {key}

-- name: make_ours
CREATE TABLE IF NOT EXISTS {ours} (
    one boolean PRIMARY KEY DEFAULT true CHECK (one), epoch bigint NOT NULL, told uuid[] NOT NULL
)

-- name: has_ours
SELECT EXISTS (SELECT FROM {ours})

-- name: first_of_ours
INSERT INTO {ours} (epoch, told) VALUES (0, '{}') ON CONFLICT DO NOTHING

-- name: take_over
UPDATE {ours} SET epoch = epoch + 1 RETURNING epoch, told

-- name: fence
SELECT epoch FROM {ours} FOR UPDATE

-- name: told
UPDATE {ours} SET told = $1

-- name: untold
SELECT id, owner, type, amount::text FROM shadow_outbox WHERE owner <> ALL($1::text[]) ORDER BY n LIMIT $2

-- name: forget
DELETE FROM shadow_outbox WHERE id = ANY($1::uuid[])

-- name: waiting
-- Counted by their numbers, some of which may be missing: millions wait after an outage, and this is asked for each batch.
SELECT coalesce(max(n) - min(n) + 1, 0), min(n) FROM shadow_outbox

-- name: given
-- In the table's server: amounts in the ledger's base units.
WITH each AS MATERIALIZED (
    SELECT {key} AS key, type, amount / {step} AS steps
    FROM unnest($1::text[], $2::text[], $3::text[]::numeric[]) AS x(owner, type, amount)
)

-- name: phase
SELECT phase, version, changed_at, changed_by, reason FROM shadow WHERE name = 'phase'

-- name: queue
SELECT pg_advisory_xact_lock(hashtextextended(current_schema(), 13))

-- name: lock_phase
SELECT phase, version, changed_at, changed_by, reason FROM shadow WHERE name = 'phase' FOR UPDATE

-- name: last_difference
SELECT max(last_seen) FROM shadow_discrepancies

-- name: seen
SELECT id, first_seen, last_seen FROM shadow_discrepancies WHERE id = ANY($1::text::uuid[])

-- name: discrepancies
SELECT user_id, type, ledger::text, legacy, first_seen, last_seen FROM shadow_discrepancies
WHERE last_seen >= $1 ORDER BY last_seen DESC, id LIMIT $2

-- name: owners
SELECT DISTINCT owner FROM accounts WHERE owner > $1 AND owner <> $2 ORDER BY owner LIMIT $3

-- name: behind
SELECT replace(a.id::text, '-', ''), a.owner, a.type, a.balance::text, a.version, m.balance::text
FROM accounts a LEFT JOIN shadow_marks m ON m.account_id = a.id
WHERE a.type = ANY($1::text[]) AND a.id > $2::uuid AND m.balance IS DISTINCT FROM a.balance
ORDER BY a.id LIMIT $3

-- name: mark_before
-- The table did not take it: what an account without a mark had there before.
INSERT INTO shadow_marks (account_id, version, balance)
SELECT a.id, 0, x.before
FROM unnest($1::text::uuid[], $2::text::numeric[]) AS x(id, before)
JOIN accounts a ON a.id = x.id AND a.type = ANY($3::text[])
WHERE EXISTS (SELECT FROM shadow WHERE name = 'phase' AND phase = ANY($4::text[]))
ON CONFLICT DO NOTHING

-- name: mark_opening
-- Under the accounts' locks: an opening posting brought each account to what the table has already.
WITH opened AS MATERIALIZED (
    SELECT a.id, a.version, x.legacy, x.opening
    FROM unnest($1::text::uuid[], $2::text::numeric[], $3::text::numeric[]) AS x(id, legacy, opening)
    JOIN accounts a ON a.id = x.id
),
known AS (
    UPDATE shadow_marks m SET balance = m.balance + o.opening, version = o.version
    FROM opened o WHERE m.account_id = o.id RETURNING m.account_id
)
INSERT INTO shadow_marks (account_id, version, balance)
SELECT id, version, legacy FROM opened WHERE id NOT IN (SELECT account_id FROM known)
