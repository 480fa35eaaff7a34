-- name: owner_balances
SELECT asset, type, sum(balance)::text FROM accounts WHERE owner = $1 GROUP BY asset, type ORDER BY asset, type

-- name: balance
SELECT balance::text FROM accounts WHERE id = $1

-- name: balance_at
SELECT last_balance::text FROM last_entry($1, $2)

-- name: balances_of_shards
SELECT shard, balance::text FROM accounts WHERE owner = $1 AND type = $2 AND asset = $3

-- name: balances_of_shards_at
SELECT a.shard, coalesce(l.last_balance, 0)::text
FROM accounts a LEFT JOIN LATERAL last_entry(a.id, $4) l ON true
WHERE a.owner = $1 AND a.type = $2 AND a.asset = $3

-- name: balance_around
-- Per shard: the balance before the transaction's time, after its last line here, and at the end of its time.
SELECT a.shard, coalesce(b.last_balance, 0)::text, own.balance_after::text, coalesce(u.last_balance, 0)::text
FROM accounts a
LEFT JOIN LATERAL last_entry(a.id, $5::timestamptz - interval '1 microsecond') b ON true
LEFT JOIN LATERAL last_entry(a.id, $5) u ON true
LEFT JOIN LATERAL (
    SELECT e.balance_after FROM entries e
    WHERE e.account_id = a.id AND e.version > coalesce(b.last_version, 0) AND e.version <= u.last_version
      AND e.transaction_id = $6
    ORDER BY e.version DESC LIMIT 1
) AS own ON true
WHERE a.owner = $1 AND a.type = $2 AND a.asset = $3 AND ($4::text IS NULL OR a.shard = $4)
ORDER BY a.shard COLLATE "C"

-- name: open_statement
-- Versions and balances before the first line and at the last. A time that is NULL is open: from the beginning, until now.
SELECT a.id, a.shard, coalesce(f.last_version, 0), coalesce(f.last_balance, 0)::text,
       CASE WHEN $6::timestamptz IS NULL THEN a.version ELSE coalesce(u.last_version, 0) END,
       CASE WHEN $6::timestamptz IS NULL THEN a.balance ELSE coalesce(u.last_balance, 0) END::text
FROM accounts a
LEFT JOIN LATERAL last_entry(a.id, $5::timestamptz - interval '1 microsecond') f ON true
LEFT JOIN LATERAL last_entry(a.id, $6::timestamptz - interval '1 microsecond') u ON true
WHERE a.owner = $1 AND a.type = $2 AND a.asset = $3 AND ($4::text IS NULL OR a.shard = $4)
ORDER BY a.shard COLLATE "C"

-- name: resume_statement
SELECT a.id, s.shard, coalesce(f.balance_after, 0)::text, coalesce(p.balance_after, 0)::text,
       coalesce(u.balance_after, 0)::text
FROM unnest($4::text[], $5::bigint[], $6::bigint[], $7::bigint[]) AS s(shard, first, done, last)
JOIN accounts a ON a.owner = $1 AND a.type = $2 AND a.asset = $3 AND a.shard = s.shard AND a.version >= s.last
LEFT JOIN entries f ON f.account_id = a.id AND f.version = s.first
LEFT JOIN entries p ON p.account_id = a.id AND p.version = s.done
LEFT JOIN entries u ON u.account_id = a.id AND u.version = s.last
ORDER BY s.shard COLLATE "C"

-- name: statement_lines
-- Each shard's next lines by its key, merged. The limits keep both joins to look-ups by key, whatever the planner guesses.
SELECT m.at, m.shard, m.version, m.transaction_id, t.kind, t.reference, m.direction, m.amount::text
FROM (
    SELECT e.*, s.shard
    FROM unnest($1::uuid[], $2::text[], $3::bigint[], $4::bigint[]) AS s(id, shard, done, last)
    CROSS JOIN LATERAL (
        SELECT * FROM entries WHERE account_id = s.id AND version > s.done AND version <= s.last ORDER BY version LIMIT $5
    ) AS e
    ORDER BY e.at, s.shard COLLATE "C", e.version LIMIT $5
) AS m
LEFT JOIN LATERAL (SELECT kind, reference FROM transactions WHERE id = m.transaction_id LIMIT 1) AS t ON true
ORDER BY m.at, m.shard COLLATE "C", m.version

-- name: trial_balance
SELECT asset, type, count(*), coalesce(sum(balance) FILTER (WHERE balance > 0), 0)::text,
       coalesce(-sum(balance) FILTER (WHERE balance < 0), 0)::text
FROM accounts
GROUP BY asset, type ORDER BY asset, type

-- name: trial_balance_at
-- Accounts that have not moved since need no search.
SELECT asset, type, count(*), coalesce(sum(balance) FILTER (WHERE balance > 0), 0)::text,
       coalesce(-sum(balance) FILTER (WHERE balance < 0), 0)::text
FROM (
    SELECT asset, type, balance FROM accounts WHERE updated_at <= $1
    UNION ALL
    SELECT a.asset, a.type, l.last_balance
    FROM accounts a CROSS JOIN LATERAL last_entry(a.id, $1) l WHERE a.updated_at > $1
) AS held
GROUP BY asset, type ORDER BY asset, type

-- name: transaction
SELECT id, kind, reference, at FROM transactions WHERE id = $1

-- name: transactions_of_reference
SELECT id, kind, reference, at FROM transactions
WHERE reference = $1 AND reference <> '' AND ($2::timestamptz IS NULL OR (at, id) > ($2, $3::uuid))
ORDER BY at, id LIMIT $4

-- name: entries_of_transactions
-- By time first: entries have an index of times, which are their transaction's own, and none of transactions. One by one: joined,
-- a few millions would be read whole for any of them.
SELECT e.transaction_id, a.owner, a.type, a.asset, a.shard, e.direction, e.amount::text, e.balance_after::text, e.version
FROM unnest($1::uuid[], $2::timestamptz[]) AS t(id, at)
CROSS JOIN LATERAL (SELECT * FROM entries WHERE at = t.at AND transaction_id = t.id OFFSET 0) AS e
JOIN accounts a ON a.id = e.account_id
ORDER BY e.transaction_id, e.seq
