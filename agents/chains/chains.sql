-- name: lead
SELECT pg_try_advisory_lock(hashtext(current_schema() || ' ' || $1))

-- name: cursor
SELECT state FROM chain_cursors WHERE chain = $1

-- name: addresses
SELECT address FROM wallets WHERE chain = $1
