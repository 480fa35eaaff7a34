-- name: wallets
SELECT w.chain, w.address, w.user_id
FROM unnest($1::text[], $2::text[]) AS x(chain, address)
JOIN wallets w ON w.chain = x.chain AND w.address = x.address

-- name: reports
SELECT replace(r.id::text, '-', ''), r.source, r.transfer_id, replace(r.group_id::text, '-', ''),
       replace(r.deposit_id::text, '-', ''), r.evidence, r.block_hash, r.reported_at
FROM unnest($1::text::uuid[]) AS x(group_id)
JOIN deposit_reports r ON r.group_id = x.group_id
UNION
SELECT replace(r.id::text, '-', ''), r.source, r.transfer_id, replace(r.group_id::text, '-', ''),
       replace(r.deposit_id::text, '-', ''), r.evidence, r.block_hash, r.reported_at
FROM unnest($2::text::uuid[]) AS x(id)
JOIN deposit_reports r ON r.id = x.id

-- name: locked
SELECT replace(d.id::text, '-', ''), d.n, d.chain, d.tx_hash, d.recipient, d.asset,
       d.amount::text, d.user_id, d.status, d.generation, d.buffer_shard, d.block_hash, d.block_number, d.log_index,
       d.credited_at, d.finalized_at, d.updated_at
FROM unnest($1::uuid[]) AS x(id)
JOIN deposits d ON d.id = x.id
ORDER BY d.id
FOR UPDATE OF d

-- name: due
SELECT replace(d.id::text, '-', ''), d.tx_hash, d.block_hash, d.recipient, d.amount::text
FROM deposits d
WHERE d.chain = $1 AND d.status IN ('credited', 'orphaned')
  AND (d.block_number <= $2 OR d.block_number IS NULL)
ORDER BY d.block_number
LIMIT $3
