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

-- name: withdrawals_settled_once
SELECT coalesce(replace(w.id::text, '-', ''), l.reference) AS withdrawal, w.status, h.state AS hold, l.holds, l.paid,
       l.released, c.payments, c.nonces
FROM withdrawals w
FULL JOIN (
    SELECT reference,
           count(*) FILTER (WHERE kind = 'withdrawal_hold') AS holds,
           count(*) FILTER (WHERE kind = 'withdrawal') AS paid,
           count(*) FILTER (WHERE kind = 'withdrawal_release') AS released
    FROM transactions WHERE kind IN ('withdrawal_hold', 'withdrawal', 'withdrawal_release') GROUP BY reference
) AS l ON l.reference = replace(w.id::text, '-', '')
LEFT JOIN holds h ON h.id = w.hold_id
LEFT JOIN (
    SELECT withdrawal_id, count(DISTINCT (chain, signer, nonce)) AS nonces,
           count(*) FILTER (WHERE kind = 'payment' AND status = 'confirmed') AS payments
    FROM attempts WHERE withdrawal_id IS NOT NULL GROUP BY withdrawal_id
) AS c ON c.withdrawal_id = w.id
WHERE w.id IS NULL
   OR coalesce(l.holds, 0) <> CASE WHEN w.hold_id IS NULL THEN 0 ELSE 1 END
   OR coalesce(l.paid, 0) <> CASE WHEN w.status = 'completed' THEN 1 ELSE 0 END
   OR coalesce(l.released, 0) <> CASE WHEN w.hold_id IS NOT NULL AND w.status IN ('failed', 'cancelled') THEN 1 ELSE 0 END
   OR h.state IS DISTINCT FROM CASE WHEN w.hold_id IS NULL THEN NULL
                                    WHEN w.status = 'completed' THEN 'posted'
                                    WHEN w.status IN ('failed', 'cancelled') THEN 'voided'
                                    ELSE 'open' END
   OR h.amount <> w.amount
   OR w.hold_id IS NULL AND w.status NOT IN ('pending', 'failed', 'cancelled')
   OR c.nonces > 1 OR c.payments > 1
   OR c.payments = 1 AND w.status IN ('pending', 'signing', 'failed', 'cancelled')
   OR w.rail = 'chain' AND (w.status = 'completed' AND coalesce(c.payments, 0) <> 1
                            OR w.status IN ('broadcasting', 'confirming') AND c.nonces IS NULL)

-- name: count_withdrawals
SELECT count(*) FROM withdrawals

-- name: nonces_used_once
SELECT coalesce(l.chain, n.chain) AS chain, coalesce(l.signer, n.signer) AS signer, l.next_nonce, n.nonce, n.mined,
       n.withdrawals, n.after
FROM lanes l
FULL JOIN (
    SELECT chain, signer, nonce,
           count(*) FILTER (WHERE status IN ('mined', 'confirmed', 'reverted')) AS mined,
           count(DISTINCT withdrawal_id) AS withdrawals,
           lead(nonce) OVER (PARTITION BY chain, signer ORDER BY nonce) AS after
    FROM attempts GROUP BY chain, signer, nonce
) AS n ON n.chain = l.chain AND n.signer = l.signer
WHERE l.chain IS NULL AND n.chain IS NOT NULL
   OR n.mined > 1 OR n.withdrawals > 1 OR n.nonce >= l.next_nonce
   -- below the chain's own count a nonce that is none of ours was used by somebody else, and stops nothing
   OR coalesce(n.after, l.next_nonce) > greatest(n.nonce + 1, l.chain_nonce)

-- name: count_nonces
SELECT count(*) FROM (SELECT DISTINCT chain, signer, nonce FROM attempts) AS used

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
