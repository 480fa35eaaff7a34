-- name: transactions_balanced_since
SELECT e.transaction_id, a.asset, sum(CASE e.direction WHEN 'd' THEN e.amount ELSE -e.amount END) AS difference
FROM entries e JOIN accounts a ON a.id = e.account_id JOIN transactions t ON t.id = e.transaction_id
WHERE t.batch >= $1
GROUP BY e.transaction_id, a.asset
HAVING sum(CASE e.direction WHEN 'd' THEN e.amount ELSE -e.amount END) <> 0

-- name: count_transactions
SELECT count(*) FROM transactions

-- name: count_transactions_since
SELECT count(*) FROM transactions WHERE batch >= $1

-- name: count_accounts
SELECT count(*) FROM accounts

-- name: entries_proved_since
SELECT e.account_id AS account, e.version, e.direction, e.amount, e.balance_after, b.balance_after AS before
FROM entries e
JOIN transactions t ON t.id = e.transaction_id
LEFT JOIN entries b ON b.account_id = e.account_id AND b.version = e.version - 1
WHERE t.batch >= $1
  AND (e.balance_after <> coalesce(b.balance_after, 0) + CASE e.direction WHEN 'd' THEN e.amount ELSE -e.amount END
       OR (b.version IS NULL) <> (e.version = 1)
       OR NOT EXISTS (SELECT FROM accounts a WHERE a.id = e.account_id))

-- name: accounts_at_last_entry
SELECT a.id AS account, a.balance, a.version, e.balance_after, e.version AS last
FROM accounts a
LEFT JOIN LATERAL (
    SELECT version, balance_after FROM entries WHERE account_id = a.id ORDER BY version DESC LIMIT 1
) AS e ON true
WHERE a.balance <> coalesce(e.balance_after, 0) OR a.version <> coalesce(e.version, 0)

-- name: count_deposits
SELECT count(*) FROM deposits

-- name: count_withdrawals
SELECT count(*) FROM withdrawals

-- name: count_nonces
SELECT count(*) FROM (SELECT DISTINCT chain, signer, nonce FROM attempts) AS used

-- name: records_overdue
-- Of what is not told a minute after its commit: while a worker is at work, and has been for that minute; else after an hour, or an
-- hour after a restore, whose commits are old. A copy tells nothing.
SELECT v.*
FROM invariant_9_records_emitted v
WHERE EXISTS (SELECT FROM relay)
  AND (EXISTS (SELECT FROM workers WHERE seen_at > now() - interval '15 seconds' AND started_at < now() - interval '1 minute')
       OR greatest(v.at, (SELECT max(at) FROM restores)) < now() - interval '1 hour')

-- name: count_commits
SELECT count(*) FROM audit

-- name: count_events
SELECT count(*) FROM inbox

-- name: count_orders
SELECT count(*) FROM orders

-- name: count_overdue
SELECT (SELECT count(*) FROM schedule) + (SELECT count(*) FROM calls WHERE state = 'open')
     + (SELECT count(*) FROM call_members WHERE call_id IS NULL)
     + (SELECT count(*) FROM withdrawals WHERE settled_at IS NULL)
