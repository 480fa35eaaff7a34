-- name: lock
SELECT replace(t.withdrawal_id::text, '-', ''), t.custodian, t.wallet_id, t.transfer_id, t.state, t.tx_hashes,
       t.block_number, t.reason, t.created_at, t.updated_at, t.version
FROM unnest($1::text::uuid[]) AS x(id)
JOIN custodian_transfers t ON t.withdrawal_id = x.id
ORDER BY t.withdrawal_id
FOR UPDATE OF t

-- name: of_transfers
SELECT t.transfer_id, replace(t.withdrawal_id::text, '-', '')
FROM custodian_transfers t
WHERE t.custodian = $1 AND t.transfer_id = ANY ($2::text[])

-- name: asked
SELECT replace(t.withdrawal_id::text, '-', ''), t.transfer_id, t.tx_hashes, w.chain, w.recipient, w.amount::text
FROM custodian_transfers t JOIN withdrawals w ON w.id = t.withdrawal_id
WHERE t.withdrawal_id = ANY ($1::text::uuid[]) OR t.transfer_id = ANY ($2::text[])

-- name: open
-- The oldest first, each with the code of its review, where it is in one.
SELECT replace(t.withdrawal_id::text, '-', ''), t.custodian, t.wallet_id, t.transfer_id, t.state, t.tx_hashes,
       t.block_number, t.reason, t.created_at, t.updated_at, t.version,
       CASE WHEN w.status = 'manual_review' THEN w.code END
FROM withdrawals w JOIN custodian_transfers t ON t.withdrawal_id = w.id
WHERE w.rail = 'circle' AND w.settled_at IS NULL AND t.transfer_id IS NOT NULL
ORDER BY t.created_at

-- name: wallets
SELECT chain, wallet_id FROM custodian_wallets WHERE custodian = $1
