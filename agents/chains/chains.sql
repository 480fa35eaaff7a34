-- name: cursor
SELECT state FROM chain_cursors WHERE chain = $1

-- name: rescans
SELECT chain FROM chain_cursors WHERE starts_with(chain, $1)

-- name: addresses
-- Our signers' too, and those at the custodian: what arrives there is ours, and its owner nobody. More wallets than $2 are not
-- read: then it is asked which addresses are ours.
(SELECT address FROM wallets WHERE chain = $1 LIMIT $2) UNION SELECT signer FROM lanes WHERE chain = $1
UNION SELECT address FROM custodian_wallets WHERE chain = $1

-- name: ours
-- Of these.
SELECT address FROM wallets WHERE chain = $1 AND address = ANY ($2::text[])
UNION SELECT signer FROM lanes WHERE chain = $1 AND signer = ANY ($2::text[])
UNION SELECT address FROM custodian_wallets WHERE chain = $1 AND address = ANY ($2::text[])
