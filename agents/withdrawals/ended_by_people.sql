-- name: asks
-- Whether the call for a transfer is to be made, or may be made again.
SELECT EXISTS (SELECT FROM call_members m LEFT JOIN calls c ON c.id = m.call_id
               WHERE m.stage = 'transfer_by_custodian' AND m.item = $1 AND coalesce(c.state, 'open') = 'open')

-- name: wallet
SELECT address FROM custodian_wallets WHERE chain = $1 AND custodian = $2 AND wallet_id = $3

-- name: payment_of
-- What else a transaction is of.
SELECT coalesce(replace(a.withdrawal_id::text, '-', ''), 'a top-up') FROM attempts a
WHERE a.chain = $1 AND a.tx_hash = $2 AND a.withdrawal_id IS DISTINCT FROM $3::text::uuid
UNION ALL
SELECT replace(t.withdrawal_id::text, '-', '') FROM custodian_transfers t JOIN withdrawals w ON w.id = t.withdrawal_id
WHERE string_to_array(t.tx_hashes, ' ') @> ARRAY[$2] AND w.chain = $1 AND t.withdrawal_id <> $3::text::uuid
UNION ALL
SELECT split_part(c.reference, ':', 1) FROM corrections c
WHERE c.kind = 'withdrawal_paid' AND c.state = 'approved' AND split_part(c.reference, ':', 2) = $2
  AND split_part(c.reference, ':', 1) <> $3
LIMIT 1
