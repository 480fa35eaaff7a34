-- name: at_checkpoint
SELECT a.stage, a.topic, a.partition, a.head
FROM audit a
JOIN unnest($1::text[], $2::text[], $3::int[], $4::bigint[]) AS c(stage, topic, partition, position)
  USING (stage, topic, partition, position)

-- name: audit_chain
SELECT a.stage, a.topic, a.partition, a.position, a.at, a.actor, a.summary, a.digest, a.head, a.batch, a.ledger, a.logs
FROM audit a
LEFT JOIN unnest($1::text[], $2::text[], $3::int[], $4::bigint[]) AS c(stage, topic, partition, position)
  USING (stage, topic, partition)
WHERE a.position > coalesce(c.position, 0)
ORDER BY a.stage, a.topic, a.partition, a.position

-- name: owner_heads
SELECT stage, topic, partition, position, head FROM owners

-- name: count_audit
SELECT count(*) FROM audit

-- name: count_entries
SELECT count(*) FROM entries e JOIN transactions t ON t.id = e.transaction_id WHERE t.batch >= $1

-- name: seals
SELECT batch, ledger, logs, stage, topic, partition, position FROM audit WHERE batch >= $1 ORDER BY batch, topic, partition

-- name: sealed_logs
SELECT batch, batch, n, at, actor, action, resource, resource_id, before, after, status, error, address, user_agent
FROM audit_logs WHERE batch >= $1 ORDER BY batch, n

-- name: sealed_transactions
SELECT batch, replace(id::text, '-', ''), kind, reference, replace(fingerprint::text, '-', ''), at,
       replace(hold_id::text, '-', ''), hold_step, replace(reverses::text, '-', ''), batch
FROM transactions WHERE batch >= $1 ORDER BY batch, id

-- name: sealed_entries
SELECT t.batch, replace(e.account_id::text, '-', ''), e.version, replace(e.transaction_id::text, '-', ''), e.seq,
       e.direction, e.amount::text, e.balance_after::text, e.at
FROM entries e JOIN transactions t ON t.id = e.transaction_id
WHERE t.batch >= $1
ORDER BY t.batch, e.account_id, e.version

-- name: orphans
SELECT e.account_id, e.version, e.transaction_id
FROM entries e
WHERE NOT EXISTS (SELECT FROM transactions t WHERE t.id = e.transaction_id)
LIMIT $1

-- name: unsealed
SELECT t.id, t.kind, t.reference, t.at
FROM transactions t
WHERE t.batch IS NULL AND NOT EXISTS (SELECT FROM audit a WHERE a.batch IS NULL AND a.at = t.at)
LIMIT $1
