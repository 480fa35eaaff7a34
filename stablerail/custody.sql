-- name: wallets
SELECT address FROM wallets WHERE chain = $1 ORDER BY address

-- name: expected
SELECT ((SELECT coalesce(sum(balance), 0) FROM accounts WHERE type = 'custody_usdc' AND shard = $1)
      + (SELECT coalesce(sum(amount), 0) FROM deposits
         WHERE chain = $1 AND status = 'credited' AND block_number <= $2)
      - (SELECT coalesce(sum(amount), 0) FROM deposits
         WHERE chain = $1 AND status = 'finalized' AND block_number > $2))::text
