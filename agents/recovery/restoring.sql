-- name: last_restore
SELECT id, at, actor, first_seq, records FROM restores ORDER BY id DESC LIMIT 1

-- name: lanes
SELECT chain, signer, next_nonce, chain_nonce, status, reason, version, updated_at
FROM lanes
ORDER BY chain, signer
FOR UPDATE

-- name: partners_called
SELECT DISTINCT partner FROM calls

-- name: gates
SELECT name, reason, closed_at, closed_by FROM gates ORDER BY name

-- name: lock_gate
SELECT name, reason, closed_at, closed_by FROM gates WHERE name = $1 FOR UPDATE

-- name: closed_lanes
-- Also those that were paused before, and stay so.
SELECT chain, signer, next_nonce, chain_nonce, status, reason, version, updated_at
FROM lanes
WHERE status = 'paused' AND (reason = 'restored' OR starts_with(reason, 'restored: '))
ORDER BY chain, signer

-- name: used_nonces
-- Those below $3 that were signed for and are not final in our books, with every attempt. What a person looks at already, as
-- another's transaction has its nonce, is known; so is what a person has ended for that (foreign.py): all its attempts say so.
SELECT a.nonce, array_agg(a.tx_hash ORDER BY a.n)
FROM attempts a LEFT JOIN withdrawals w ON w.id = a.withdrawal_id
WHERE a.chain = $1 AND a.signer = $2 AND a.nonce < $3
GROUP BY a.nonce
HAVING NOT bool_or(a.status IN ('confirmed', 'reverted'))
   AND NOT coalesce(bool_or(w.status = 'manual_review' AND w.code = 'nonce_taken'), FALSE)  -- a top-up has no withdrawal
   AND NOT bool_and(a.status = 'replaced' AND coalesce(a.error = 'nonce_taken', FALSE))
ORDER BY a.nonce

-- name: last_before
SELECT max(at) FROM audit WHERE stage <> $1 AND at <= $2

-- name: wallet_set
SELECT wallet_set_id FROM wallet_sets WHERE network = $1

-- name: wallets_known
-- Of these places, those whose wallet we have; and the wallets that we send from.
SELECT w.chain, w.address
FROM unnest($1::text[], $2::text[]) AS x(chain, address)
JOIN wallets w ON w.chain = x.chain AND w.address = x.address
UNION
SELECT chain, address FROM custodian_wallets

-- name: wallets_wanted
-- Of these customers and chains, those for which a call of ours may have been made that has not brought a wallet.
SELECT x.user_id, x.chain
FROM unnest($1::text[], $2::text[]) AS x(user_id, chain)
WHERE EXISTS (
    SELECT FROM call_members m JOIN calls c ON c.id = m.call_id
    WHERE m.request ->> 'user_id' = x.user_id AND m.request -> 'chains' ? x.chain AND c.state IN ('open', 'failed')
)

-- name: transfers_known
-- Of these transfers of the custodian's, with our references: those that we have, or that a call that is repeated with its key made.
SELECT x.id
FROM unnest($1::text[], $2::text::uuid[]) AS x(id, withdrawal_id)
JOIN custodian_transfers t ON t.withdrawal_id = x.withdrawal_id
WHERE t.transfer_id = x.id OR t.transfer_id IS NULL

-- name: parked
SELECT replace(id::text, '-', ''), user_id, chain, amount::text, recipient, coalesce(code, ''), updated_at
FROM withdrawals
WHERE status = 'manual_review'
ORDER BY updated_at, id
LIMIT $1

-- name: findings
-- What the newest comparison of each said.
SELECT DISTINCT ON (resource_id) resource_id, at, error, after
FROM audit_logs
WHERE resource = ANY ($1::text[]) AND action = 'recovery.compared'
ORDER BY resource_id, at DESC, batch DESC, n DESC

-- name: highest_block
-- An endpoint below it has not seen what we have.
SELECT max(block_number) FROM attempts WHERE chain = $1
