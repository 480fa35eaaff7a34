-- Holds, reversals, closed accounts. Nothing that a writer of 0001 does is refused, and nothing waits for long: new columns
-- are empty, new constraints bind new rows only (0002_ledger_core_post.sql looks at the old ones).
ALTER TABLE accounts ADD closed_at timestamptz;
ALTER TABLE accounts ADD CONSTRAINT accounts_closed_empty CHECK (closed_at IS NULL OR balance = 0) NOT VALID;

ALTER TABLE transactions ADD hold_id uuid, ADD hold_step text, ADD reverses uuid;
ALTER TABLE transactions ADD CONSTRAINT transactions_hold_step
    CHECK (hold_step IN ('open', 'capture', 'void', 'expire') AND (hold_step IS NULL) = (hold_id IS NULL)) NOT VALID;

CREATE TABLE holds (
    id uuid PRIMARY KEY, source_id uuid NOT NULL, pending_id uuid NOT NULL,
    created_at timestamptz NOT NULL, expires_at timestamptz, ended_at timestamptz, version bigint NOT NULL,
    amount numeric(38, 0) NOT NULL CHECK (amount > 0),
    remaining numeric(38, 0) NOT NULL CHECK (remaining >= 0), captured numeric(38, 0) NOT NULL CHECK (captured >= 0),
    state text NOT NULL CHECK (state IN ('open', 'posted', 'voided', 'expired')),
    CHECK (remaining + captured <= amount),
    CHECK ((state = 'open') = (remaining > 0) AND (state = 'open') = (ended_at IS NULL))
) WITH (fillfactor = 80);
CREATE INDEX holds_due ON holds (expires_at, id) WHERE state = 'open';
CREATE INDEX holds_source ON holds (source_id) WHERE state = 'open';

CREATE TABLE reversals (
    transaction_id uuid NOT NULL, seq smallint NOT NULL, account_id uuid NOT NULL,
    direction char(1) NOT NULL CHECK (direction IN ('d', 'c')),
    amount numeric(38, 0) NOT NULL, reversed numeric(38, 0) NOT NULL CHECK (reversed >= 0),
    PRIMARY KEY (transaction_id, seq), CHECK (reversed <= amount)
);
