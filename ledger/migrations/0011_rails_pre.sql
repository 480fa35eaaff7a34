-- Lanes that come and go, their keys and gas, and the second rail of withdrawals.
SELECT 1;

-- The rail `circle`: a withdrawal's transfer at the custodian. `state` in its words, `tx_hashes` all that it told of, oldest first.
CREATE TABLE custodian_transfers (
    withdrawal_id uuid PRIMARY KEY, custodian text NOT NULL, wallet_id text NOT NULL, transfer_id text,
    state text NOT NULL, tx_hashes text NOT NULL, block_number bigint, reason text,
    created_at timestamptz NOT NULL, updated_at timestamptz NOT NULL, version bigint NOT NULL
) WITH (fillfactor = 50);
CREATE INDEX custodian_transfers_transfer ON custodian_transfers (transfer_id);

-- Our wallets at a custodian that withdrawals leave from: what they hold is in the custody mirror.
CREATE TABLE custodian_wallets (
    chain text NOT NULL, address text NOT NULL, custodian text NOT NULL, wallet_id text NOT NULL,
    created_at timestamptz NOT NULL, PRIMARY KEY (chain, address)
);
