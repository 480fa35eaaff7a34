-- name: page
SELECT batch, n, at, actor, action, resource, resource_id, before, after, status, error, address, user_agent
FROM audit_logs
WHERE ($1::text IS NULL OR actor = $1) AND ($2::text IS NULL OR action = $2) AND ($3::text IS NULL OR resource = $3)
  AND ($4::text IS NULL OR resource_id = $4) AND ($5::timestamptz IS NULL OR at >= $5)
  AND ($6::timestamptz IS NULL OR at < $6)
  AND ($7::timestamptz IS NULL OR (at, batch, n) > ($7, $8::bigint, $9::int))
ORDER BY at, batch, n
LIMIT $10
