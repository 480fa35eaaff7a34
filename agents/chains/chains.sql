-- name: cursor
SELECT state FROM chain_cursors WHERE chain = $1

-- name: addresses
SELECT address FROM wallets WHERE chain = $1
