-- name: denied
SELECT chain, address, reason, denied_by, denied_at
FROM denied_addresses
WHERE $1::text IS NULL OR chain = $1
ORDER BY chain, address

-- name: is_denied
SELECT EXISTS (SELECT FROM denied_addresses WHERE chain = $1 AND address = $2)

-- name: shortfalls
-- What is still owed of each reversed deposit: the account's own entries, summed by what they are about.
SELECT o.reference, d.user_id, d.chain, d.tx_hash, (-o.balance)::text AS owed, o.since
FROM (
    SELECT t.reference, sum(CASE e.direction WHEN 'd' THEN e.amount ELSE -e.amount END) AS balance, min(e.at) AS since
    FROM entries e
    JOIN transactions t ON t.id = e.transaction_id
    WHERE e.account_id = $1
    GROUP BY t.reference
) AS o
LEFT JOIN deposits d ON replace(d.id::text, '-', '') = o.reference
WHERE o.balance <> 0 AND ($2::text IS NULL OR o.reference = $2)
ORDER BY o.since, o.reference

-- name: open_write_offs
SELECT count(*) FROM corrections WHERE state = 'requested' AND reference = $1

-- name: our_addresses
-- Whose holdings the custody mirror is of: customers' wallets, signers, and where something was parked that has no owner.
SELECT address FROM wallets WHERE chain = $1
UNION SELECT signer FROM lanes WHERE chain = $1
UNION SELECT recipient FROM deposits WHERE chain = $1 AND status = 'parked' AND user_id IS NULL

-- name: judged
-- On the chain and not in the mirror yet; in the mirror and above the final block; the mirror; late; all.
WITH ours AS (
    SELECT address FROM wallets WHERE chain = $1
    UNION SELECT signer FROM lanes WHERE chain = $1
    UNION SELECT recipient FROM deposits WHERE chain = $1 AND status = 'parked' AND user_id IS NULL
)
SELECT
    (SELECT coalesce(sum(amount), 0) FROM deposits
     WHERE chain = $1 AND block_number <= $2
       AND (status = 'credited' OR status = 'pending' AND held <> 'unproven')
       AND recipient IN (SELECT address FROM ours))::text,
    (SELECT coalesce(sum(amount), 0) FROM deposits
     WHERE chain = $1 AND status IN ('finalized', 'parked') AND block_number > $2)::text,
    (SELECT coalesce(sum(balance), 0) FROM accounts WHERE type = 'custody_usdc' AND shard = $1)::text,
    (SELECT count(*) FROM deposits
     WHERE chain = $1 AND status IN ('pending', 'credited', 'orphaned') AND block_number <= $3)::text,
    (SELECT count(*) FROM deposits WHERE chain = $1)::text
