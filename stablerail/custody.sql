-- name: wallets
SELECT address FROM wallets WHERE chain = $1
UNION
SELECT signer FROM lanes WHERE chain = $1
ORDER BY 1

-- name: expected
SELECT ((SELECT coalesce(sum(balance), 0) FROM accounts WHERE type = 'custody_usdc' AND shard = $1)
      + (SELECT coalesce(sum(amount), 0) FROM deposits
         WHERE chain = $1 AND status = 'credited' AND block_number <= $2)
      - (SELECT coalesce(sum(amount), 0) FROM deposits
         WHERE chain = $1 AND status = 'finalized' AND block_number > $2)
      - (SELECT coalesce(sum(w.amount), 0) FROM withdrawals w JOIN attempts a ON a.withdrawal_id = w.id
         WHERE w.chain = $1 AND w.status NOT IN ('completed', 'failed', 'cancelled')
           AND a.kind = 'payment' AND a.status IN ('mined', 'confirmed') AND a.block_number <= $2)
      + (SELECT coalesce(sum(w.amount), 0) FROM attempts a JOIN withdrawals w ON w.id = a.withdrawal_id
         WHERE a.chain = $1 AND a.kind = 'payment' AND a.status = 'confirmed' AND a.block_number > $2
           AND w.status = 'completed'))::text
