-- name: lock_accounts
SELECT x.number, a.balance::text, a.version, a.updated_at, a.closed_at
FROM unnest($1::text::uuid[]) WITH ORDINALITY AS x(id, number)
JOIN accounts a ON a.id = x.id
ORDER BY a.id
FOR UPDATE OF a

-- name: lock_holds
SELECT replace(h.id::text, '-', ''), s.owner, s.type, s.asset, s.shard, p.owner, p.type, p.asset, p.shard,
       h.amount::text, h.remaining::text, h.captured::text, h.state, h.expires_at, h.created_at, h.ended_at, h.version
FROM unnest($1::text::uuid[]) AS x(id)
JOIN holds h ON h.id = x.id
JOIN accounts s ON s.id = h.source_id
JOIN accounts p ON p.id = h.pending_id
ORDER BY h.id
FOR UPDATE OF h

-- name: lock_reversals
SELECT replace(r.transaction_id::text, '-', ''), r.seq, a.owner, a.type, a.asset, a.shard, r.direction,
       r.amount::text, r.reversed::text
FROM unnest($1::text::uuid[]) AS x(id)
JOIN reversals r ON r.transaction_id = x.id
JOIN accounts a ON a.id = r.account_id
ORDER BY r.transaction_id, r.seq
FOR UPDATE OF r

-- name: lock_counters
SELECT c.name, c.value::text, c.version
FROM unnest($1::text[]) AS x(name)
JOIN counters c ON c.name = x.name
ORDER BY c.name
FOR UPDATE OF c

-- name: known
SELECT replace(t.id::text, '-', ''), replace(t.fingerprint::text, '-', ''), t.at, replace(t.hold_id::text, '-', ''),
       t.hold_step, replace(t.reverses::text, '-', '')
FROM unnest($1::text::uuid[]) AS x(id)
JOIN transactions t ON t.id = x.id

-- name: entries_of
SELECT replace(e.transaction_id::text, '-', ''), e.seq, replace(e.account_id::text, '-', ''), e.version, e.direction,
       e.amount::text, e.balance_after::text, e.at
FROM entries e
WHERE e.at = ANY($1::timestamptz[]) AND e.transaction_id = ANY($2::text::uuid[])
ORDER BY e.transaction_id, e.seq

-- name: accounts_named
SELECT replace(a.id::text, '-', ''), a.owner, a.type, a.asset, a.shard
FROM unnest($1::text::uuid[]) AS x(id)
JOIN accounts a ON a.id = x.id

-- name: sources_of
SELECT replace(h.id::text, '-', ''), replace(h.source_id::text, '-', '')
FROM unnest($1::text::uuid[]) AS x(id)
JOIN holds h ON h.id = x.id

-- name: holds_due
SELECT replace(h.id::text, '-', ''), t.reference
FROM holds h
JOIN transactions t ON t.id = h.id
WHERE h.state = 'open' AND h.expires_at <= $1
ORDER BY h.expires_at, h.id
LIMIT $2

-- name: count_open_holds
SELECT count(*) FROM holds WHERE state = 'open' AND source_id = $1
