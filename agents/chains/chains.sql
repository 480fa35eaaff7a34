-- name: cursor
SELECT state FROM chain_cursors WHERE chain = $1

-- name: addresses
-- Our signers' too, and those at the custodian: what arrives there is ours, and its owner nobody.
SELECT address FROM wallets WHERE chain = $1 UNION SELECT signer FROM lanes WHERE chain = $1
UNION SELECT address FROM custodian_wallets WHERE chain = $1
