-- name: lock
SELECT x.number, a.balance::text, a.version, a.updated_at
FROM unnest($1::text::uuid[]) WITH ORDINALITY AS x(id, number)
JOIN accounts a ON a.id = x.id
ORDER BY a.id
FOR UPDATE OF a

-- name: known
SELECT replace(t.id::text, '-', ''), t.id, t.fingerprint
FROM unnest($1::uuid[]) AS x(id)
JOIN transactions t ON t.id = x.id
