-- name: mirrors
-- Each chain's mirror beside what the rows of its deposits and withdrawals, and corrections ($1), make of it.
SELECT chain, coalesce(sum(mirror), 0)::text, coalesce(sum(rows), 0)::text
FROM (
    SELECT shard AS chain, balance AS mirror, NULL::numeric AS rows FROM accounts WHERE type = 'custody_usdc'
    UNION ALL
    SELECT chain, NULL, sum(amount) FROM deposits WHERE status IN ('finalized', 'parked') GROUP BY chain
    UNION ALL
    SELECT chain, NULL, -sum(amount) FROM withdrawals WHERE status = 'completed' GROUP BY chain
    UNION ALL
    SELECT a.shard, NULL, sum(CASE e.direction WHEN 'd' THEN e.amount ELSE -e.amount END)
    FROM transactions t JOIN entries e ON e.transaction_id = t.id JOIN accounts a ON a.id = e.account_id
    WHERE t.kind = $1 AND a.type = 'custody_usdc'
    GROUP BY a.shard
) AS parts
GROUP BY chain
ORDER BY chain

-- name: owed
-- What is owed in USDC, and what stands against it: the mirror and deposits on their way to it, less what the company got by dealing
-- with customers ($2: kinds). $1: types of accounts whose money is somebody else's.
SELECT (SELECT coalesce(sum(balance), 0) FROM accounts WHERE asset = 'USDC' AND type = ANY ($1::text[]))::text,
       ((SELECT coalesce(sum(balance), 0) FROM accounts WHERE type = 'custody_usdc')
      + (SELECT coalesce(sum(amount), 0) FROM deposits WHERE status IN ('credited', 'orphaned'))
      - (SELECT coalesce(sum(CASE e.direction WHEN 'd' THEN e.amount ELSE -e.amount END
                             * CASE a.type WHEN 'custody_usdc' THEN 1 ELSE -1 END), 0)
         FROM transactions t JOIN entries e ON e.transaction_id = t.id JOIN accounts a ON a.id = e.account_id
         WHERE t.kind = ANY ($2::text[]) AND a.asset = 'USDC' AND (a.type = 'custody_usdc' OR a.type = ANY ($1::text[]))))::text

-- name: newest
SELECT replace(id::text, '-', ''), started_at, ended_at, actor, compared, differences, gaps
FROM reconciliations
ORDER BY started_at DESC, id
LIMIT $1

-- name: one
SELECT replace(id::text, '-', ''), started_at, ended_at, actor, compared, differences, gaps
FROM reconciliations WHERE id = $1

-- name: last_whole
SELECT max(ended_at) FROM reconciliations WHERE gaps = '[]'

-- name: differences
SELECT comparison, user_id, account, ledger::text, other::text FROM reconciliation_differences WHERE run_id = $1 ORDER BY n

-- name: outlived
-- Runs beyond the newest $1.
SELECT replace(id::text, '-', '') FROM reconciliations ORDER BY started_at DESC, id OFFSET $1

-- name: outlived_differences
SELECT replace(run_id::text, '-', ''), n FROM reconciliation_differences WHERE run_id = ANY ($1::uuid[]) ORDER BY run_id, n

-- name: balances
-- But for what a table elsewhere is still to be given.
SELECT a.owner, a.type, (a.balance - coalesce(
    (SELECT sum(o.amount) FROM shadow_outbox o WHERE o.owner = a.owner AND o.type = a.type), 0))::text
FROM accounts a WHERE a.owner = ANY ($1::text[]) AND a.type = ANY ($2::text[])

-- name: owners
-- Customers who have anything on accounts of these types, at most $3, behind $1.
SELECT DISTINCT owner FROM accounts
WHERE owner > $1 AND type = ANY ($2::text[]) AND balance <> 0
ORDER BY owner
LIMIT $3
