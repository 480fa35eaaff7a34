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
