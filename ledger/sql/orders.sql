-- name: lock_orders
SELECT replace(o.id::text, '-', ''), o.order_id, replace(o.fingerprint::text, '-', ''), o.user_id, o.amount::text,
       o.filled::text, o.status, o.code, replace(o.hold_id::text, '-', ''), o.ends_as, o.fills_due::text,
       o.placed_at, o.updated_at, o.ended_at, o.version
FROM unnest($1::text::uuid[]) AS x(id)
JOIN orders o ON o.id = x.id
ORDER BY o.id
FOR UPDATE OF o

-- name: fills
SELECT replace(f.id::text, '-', ''), replace(f.order_id::text, '-', ''), f.fill_id, f.amount::text, f.paid_from, f.at
FROM unnest($1::text::uuid[]) AS x(id)
JOIN order_fills f ON f.id = x.id
