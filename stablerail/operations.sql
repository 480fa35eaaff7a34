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
LEFT JOIN LATERAL (
    SELECT user_id, chain, tx_hash FROM deposits
    WHERE id = CASE WHEN o.reference ~ '^[0-9a-f]{32}$' THEN o.reference::uuid END LIMIT 1
) AS d ON true
WHERE o.balance <> 0 AND ($2::text IS NULL OR o.reference = $2)
ORDER BY o.since, o.reference

-- name: open_write_offs
SELECT count(*) FROM corrections WHERE state = 'requested' AND reference = $1

-- name: judged
-- Deposits that are late, and all.
SELECT count(*) FILTER (WHERE status IN ('pending', 'credited', 'orphaned') AND block_number <= $2), count(*)
FROM deposits WHERE chain = $1
