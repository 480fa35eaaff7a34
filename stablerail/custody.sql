-- name: wallets
-- Whose holdings the mirror is of: customers' wallets, signers, our wallets at the custodian, and where something was parked that
-- has no owner.
SELECT address FROM wallets WHERE chain = $1
UNION
SELECT signer FROM lanes WHERE chain = $1
UNION
SELECT address FROM custodian_wallets WHERE chain = $1
UNION
SELECT recipient FROM deposits WHERE chain = $1 AND status = 'parked' AND user_id IS NULL
ORDER BY 1

-- name: expected
WITH ours AS (
    SELECT address FROM wallets WHERE chain = $1
    UNION SELECT signer FROM lanes WHERE chain = $1
    UNION SELECT address FROM custodian_wallets WHERE chain = $1
    UNION SELECT recipient FROM deposits WHERE chain = $1 AND status = 'parked' AND user_id IS NULL
)
SELECT ((SELECT coalesce(sum(balance), 0) FROM accounts WHERE type = 'custody_usdc' AND shard = $1)
      + (SELECT coalesce(sum(amount), 0) FROM deposits
         WHERE chain = $1 AND (status = 'credited' OR status = 'pending' AND held <> 'unproven') AND block_number <= $2
           AND recipient IN (SELECT address FROM ours))
      - (SELECT coalesce(sum(amount), 0) FROM deposits
         WHERE chain = $1 AND status IN ('finalized', 'parked') AND block_number > $2)
      - (SELECT coalesce(sum(w.amount), 0) FROM withdrawals w JOIN attempts a ON a.withdrawal_id = w.id
         WHERE w.chain = $1 AND w.status NOT IN ('completed', 'failed', 'cancelled')
           AND a.kind = 'payment' AND a.status IN ('mined', 'confirmed') AND a.block_number <= $2)
      - (SELECT coalesce(sum(w.amount), 0) FROM withdrawals w JOIN custodian_transfers t ON t.withdrawal_id = w.id
         WHERE w.chain = $1 AND w.status NOT IN ('completed', 'failed', 'cancelled')
           AND t.state IN ('CONFIRMED', 'COMPLETE') AND t.block_number <= $2)
      + (SELECT coalesce(sum(w.amount), 0) FROM withdrawals w JOIN custodian_transfers t ON t.withdrawal_id = w.id
         WHERE w.chain = $1 AND w.status = 'completed' AND t.block_number > $2)
      + (SELECT coalesce(sum(w.amount), 0) FROM attempts a JOIN withdrawals w ON w.id = a.withdrawal_id
         WHERE a.chain = $1 AND a.kind = 'payment' AND a.status = 'confirmed' AND a.block_number > $2
           AND w.status = 'completed'))::text
