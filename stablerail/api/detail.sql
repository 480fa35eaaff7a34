-- name: holds
SELECT h.id, p.asset, p.type, h.amount, h.remaining, t.kind, t.reference, h.created_at
FROM accounts s
JOIN holds h ON h.source_id = s.id AND h.state = 'open'
JOIN accounts p ON p.id = h.pending_id
JOIN transactions t ON t.id = h.id
WHERE s.owner = $1
ORDER BY h.created_at, h.id
LIMIT $2
