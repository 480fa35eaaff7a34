-- Lanes that come and go, their keys and gas, and the second rail of withdrawals.

-- Where the keys of lanes are, and lanes that sign no more.
CREATE TABLE lane_keys (
    chain text NOT NULL, signer text NOT NULL, source text NOT NULL, updated_at timestamptz NOT NULL,
    PRIMARY KEY (chain, signer)
);
ALTER TABLE lanes DROP CONSTRAINT lanes_status_check,
    ADD CONSTRAINT lanes_status_check CHECK (status IN ('open', 'paused', 'draining', 'retired'));

-- What a block's head looks at, however many wait in the pool.
CREATE INDEX attempts_mined ON attempts (chain, block_number) WHERE status = 'mined';

-- Coins that the gas account gave to a lane: the transaction with this nonce of its own. `amount` has 6 decimals.
CREATE TABLE gas_top_ups (
    chain text NOT NULL, signer text NOT NULL, nonce bigint NOT NULL, lane text NOT NULL,
    amount numeric(38, 0) NOT NULL CHECK (amount > 0), state text NOT NULL CHECK (state IN ('open', 'done', 'failed')),
    block_number bigint, signed_at timestamptz NOT NULL, ended_at timestamptz, PRIMARY KEY (chain, signer, nonce)
);
CREATE UNIQUE INDEX gas_top_ups_open ON gas_top_ups (chain, lane) WHERE state = 'open';
CREATE INDEX gas_top_ups_lane ON gas_top_ups (chain, lane, block_number);
CREATE INDEX gas_top_ups_day ON gas_top_ups (chain, signed_at);
ALTER TABLE attempts DROP CONSTRAINT attempts_kind_check,
    ADD CONSTRAINT attempts_kind_check CHECK (kind IN ('payment', 'cancel', 'top_up'));
