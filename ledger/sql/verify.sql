-- name: transactions_balanced
SELECT e.transaction_id, a.asset, sum(CASE e.direction WHEN 'd' THEN e.amount ELSE -e.amount END) AS difference
FROM entries e JOIN accounts a ON a.id = e.account_id
GROUP BY e.transaction_id, a.asset
HAVING sum(CASE e.direction WHEN 'd' THEN e.amount ELSE -e.amount END) <> 0

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

-- name: assets_balanced
SELECT asset, sum(balance) AS difference FROM accounts GROUP BY asset HAVING sum(balance) <> 0

-- name: count_accounts
SELECT count(*) FROM accounts

-- name: accounts_proved
SELECT coalesce(a.id, e.account_id) AS account, a.balance, a.version, e.sum, e.entries, e.last
FROM (SELECT * FROM accounts WHERE id BETWEEN $1 AND $2) AS a
FULL JOIN (
    SELECT account_id, sum(CASE direction WHEN 'd' THEN amount ELSE -amount END) AS sum, count(*) AS entries,
           max(version) AS last, min(version) AS first,
           bool_and(balance_after = before + CASE direction WHEN 'd' THEN amount ELSE -amount END) AS proved
    FROM (
        SELECT *, lag(balance_after, 1, 0::numeric) OVER (PARTITION BY account_id ORDER BY version) AS before
        FROM entries WHERE account_id BETWEEN $1 AND $2
    ) AS lines
    GROUP BY account_id
) AS e ON e.account_id = a.id
WHERE a.balance IS DISTINCT FROM coalesce(e.sum, 0) OR a.version IS DISTINCT FROM coalesce(e.last, 0)
   OR e.entries <> e.last OR e.first <> 1 OR NOT e.proved

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

-- name: credited_once
SELECT coalesce(replace(d.id::text, '-', ''), l.reference) AS deposit, d.status, d.generation, l.credits, l.reversals,
       l.finals, l.parks
FROM deposits d
FULL JOIN (
    SELECT reference,
           count(*) FILTER (WHERE kind = 'deposit') AS credits,
           count(*) FILTER (WHERE kind = 'deposit_reversed') AS reversals,
           count(*) FILTER (WHERE kind = 'deposit_final') AS finals,
           count(*) FILTER (WHERE kind = 'deposit_parked') AS parks
    FROM transactions WHERE kind IN ('deposit', 'deposit_reversed', 'deposit_final', 'deposit_parked')
    GROUP BY reference
) AS l ON l.reference = replace(d.id::text, '-', '')
WHERE d.id IS NULL OR coalesce(l.credits, 0) <> d.generation
   OR coalesce(l.credits, 0) - coalesce(l.reversals, 0)
      <> CASE WHEN d.status IN ('credited', 'orphaned', 'finalized') THEN 1 ELSE 0 END
   OR coalesce(l.finals, 0) <> CASE WHEN d.status = 'finalized' THEN 1 ELSE 0 END
   OR coalesce(l.parks, 0) <> CASE WHEN d.status = 'parked' THEN 1 ELSE 0 END

-- name: count_deposits
SELECT count(*) FROM deposits

-- name: waiting_records
SELECT seq, stage, topic, journaled, at FROM outbox WHERE at < now() - interval '1 minute'

-- name: count_commits
SELECT count(*) FROM audit

-- name: events_settled
SELECT i.stage, i.event_id, i.outcome, s.attempt AS scheduled
FROM inbox i FULL JOIN schedule s ON s.stage = i.stage AND s.event_id = i.event_id
WHERE s.event_id IS NOT NULL AND (i.outcome IS DISTINCT FROM 'retry' OR s.attempt <= i.attempt)

-- name: count_events
SELECT count(*) FROM inbox
