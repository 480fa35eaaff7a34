-- name: wallets
-- Whose holdings the mirror is of: customers' wallets, signers, our wallets at the custodian, and where something was parked that
-- has no owner. At most $3, behind $2: each part is bounded, so that a page of millions costs a page.
(SELECT address FROM wallets WHERE chain = $1 AND address > $2 ORDER BY address LIMIT $3)
UNION
(SELECT signer FROM lanes WHERE chain = $1 AND signer > $2 ORDER BY signer LIMIT $3)
UNION
(SELECT address FROM custodian_wallets WHERE chain = $1 AND address > $2 ORDER BY address LIMIT $3)
UNION
SELECT recipient FROM deposits WHERE chain = $1 AND status = 'parked' AND user_id IS NULL AND recipient > $2
ORDER BY 1
LIMIT $3

-- name: expected
WITH ours AS (
    SELECT address FROM wallets WHERE chain = $1
    UNION SELECT signer FROM lanes WHERE chain = $1
    UNION SELECT address FROM custodian_wallets WHERE chain = $1
    UNION SELECT recipient FROM deposits WHERE chain = $1 AND status = 'parked' AND user_id IS NULL
)
SELECT ((SELECT coalesce(sum(balance), 0) FROM accounts
         WHERE owner = 'system' AND type = 'custody_usdc' AND shard = $1)
      + (SELECT coalesce(sum(amount), 0) FROM deposits
         WHERE chain = $1 AND (status = 'credited' OR status = 'pending' AND held <> 'unproven') AND block_number <= $2
           AND recipient IN (SELECT address FROM ours))
      - (SELECT coalesce(sum(amount), 0) FROM deposits
         WHERE chain = $1 AND status IN ('finalized', 'parked') AND block_number > $2)
      - (SELECT coalesce(sum(w.amount), 0) FROM withdrawals w JOIN attempts a ON a.withdrawal_id = w.id
         WHERE w.chain = $1 AND w.settled_at IS NULL
           AND a.kind = 'payment' AND a.status IN ('mined', 'confirmed') AND a.block_number <= $2)
      - (SELECT coalesce(sum(w.amount), 0) FROM withdrawals w JOIN custodian_transfers t ON t.withdrawal_id = w.id
         WHERE w.chain = $1 AND w.settled_at IS NULL
           AND t.state IN ('CONFIRMED', 'COMPLETE') AND t.block_number <= $2)
      + (SELECT coalesce(sum(w.amount), 0) FROM withdrawals w JOIN custodian_transfers t ON t.withdrawal_id = w.id
         WHERE w.chain = $1 AND w.status = 'completed' AND t.block_number > $2)
      + (SELECT coalesce(sum(w.amount), 0) FROM attempts a JOIN withdrawals w ON w.id = a.withdrawal_id
         WHERE a.chain = $1 AND a.kind = 'payment' AND a.phase = 'confirmed' AND a.block_number > $2
           AND w.status = 'completed'))::text

-- name: chains
-- Of $1, those that we have money or wallets on, and whether wallets at Circle are among them.
SELECT c.chain, EXISTS (SELECT FROM wallets w WHERE w.chain = c.chain) OR
                EXISTS (SELECT FROM custodian_wallets w WHERE w.chain = c.chain) AS at_circle
FROM unnest($1::text[]) WITH ORDINALITY AS c(chain, n)
WHERE EXISTS (SELECT FROM wallets w WHERE w.chain = c.chain) OR
      EXISTS (SELECT FROM custodian_wallets w WHERE w.chain = c.chain) OR
      EXISTS (SELECT FROM accounts a WHERE a.owner = 'system' AND a.type = 'custody_usdc' AND a.shard = c.chain)
ORDER BY c.n

-- name: at_circle
-- Our wallets at Circle, at most $3, behind $2.
(SELECT address FROM wallets WHERE chain = $1 AND address > $2 ORDER BY address LIMIT $3)
UNION
(SELECT address FROM custodian_wallets WHERE chain = $1 AND address > $2 ORDER BY address LIMIT $3)
ORDER BY 1
LIMIT $3

-- name: known
-- Whose the addresses are, of those that are ours at Circle; empty: the company's.
SELECT address, user_id FROM wallets WHERE chain = $1 AND address = ANY ($2::text[])
UNION ALL
SELECT address, '' FROM custodian_wallets WHERE chain = $1 AND address = ANY ($2::text[])

-- name: wallet_sets
SELECT wallet_set_id FROM wallet_sets

-- name: by_word
-- Of a chain that we do not read: the mirror, what may have left by Circle's hand already, what may have come already, which two
-- indexes have between them.
SELECT (SELECT coalesce(sum(balance), 0) FROM accounts
        WHERE owner = 'system' AND type = 'custody_usdc' AND shard = $1)::text,
       (SELECT coalesce(sum(w.amount), 0) FROM withdrawals w JOIN custodian_transfers t ON t.withdrawal_id = w.id
        WHERE w.chain = $1 AND w.settled_at IS NULL)::text,
       (SELECT coalesce(sum(amount), 0) FROM deposits
        WHERE chain = $1 AND (status = 'pending' OR status IN ('credited', 'orphaned')) AND held IS DISTINCT FROM 'unproven')::text
