-- name: create
INSERT INTO api_keys (id, name, scope, secret_sha256, created_at)
VALUES ($1, $2, $3, $4, clock_timestamp())
RETURNING created_at

-- name: revoke
UPDATE api_keys SET revoked_at = clock_timestamp()
WHERE id = $1 AND revoked_at IS NULL
RETURNING name, scope

-- name: list
SELECT id, name, scope, created_at, revoked_at
FROM api_keys
ORDER BY created_at, id

-- name: find
SELECT id, name, scope, secret_sha256, created_at, revoked_at
FROM api_keys
WHERE id = $1 AND revoked_at IS NULL
