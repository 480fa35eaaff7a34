-- name: cursor
SELECT since FROM source_cursors WHERE source = $1

-- name: known
SELECT x.id, t.state, t.created_at, r.evidence
FROM unnest($1::text[], $2::uuid[]) AS x(id, report)
LEFT JOIN circle_transfers t ON t.id = x.id
LEFT JOIN deposit_reports r ON r.id = x.report

-- name: overdue
SELECT id, state FROM circle_transfers
WHERE ended_at IS NULL AND created_at < $1 AND starts_with(id, 'circle_mint:') = $6
  AND looked_at - created_at < ($2::timestamptz - looked_at) * $3::int
ORDER BY coalesce(array_position($5::text[], id), 0), looked_at
LIMIT $4

-- name: past
SELECT id FROM circle_transfers
WHERE ended_at IS NOT NULL AND created_at < $1 AND starts_with(id, 'circle_mint:') = $3 ORDER BY created_at LIMIT $2
