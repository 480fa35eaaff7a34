-- The id is made of customer and idempotency key. `version` is that of the last row of its history. What was refused is kept
-- as it was written, also where there is no such rail.
CREATE TABLE withdrawals (
    id uuid PRIMARY KEY, fingerprint uuid NOT NULL, hold_id uuid, version bigint NOT NULL,
    user_id text NOT NULL, idempotency_key text NOT NULL, rail text NOT NULL CHECK (rail IN ('chain', 'circle') OR status = 'failed'),
    chain text NOT NULL, asset text NOT NULL, amount numeric(38, 0) NOT NULL, recipient text NOT NULL,
    status text NOT NULL CHECK (status IN
        ('pending', 'signing', 'broadcasting', 'confirming', 'completed', 'failed', 'cancelled', 'manual_review')),
    code text, requested_at timestamptz NOT NULL, updated_at timestamptz NOT NULL, settled_at timestamptz,
    CHECK ((settled_at IS NOT NULL) = (status IN ('completed', 'failed', 'cancelled')))
) WITH (fillfactor = 70);
CREATE INDEX withdrawals_user ON withdrawals (user_id, requested_at, id);
CREATE INDEX withdrawals_listed ON withdrawals (requested_at, id);
CREATE INDEX withdrawals_open ON withdrawals (chain, status, requested_at)
    WHERE status NOT IN ('completed', 'failed', 'cancelled');

CREATE TABLE withdrawal_history (
    withdrawal_id uuid NOT NULL, version bigint NOT NULL, status text NOT NULL, code text,
    actor text NOT NULL, at timestamptz NOT NULL,
    PRIMARY KEY (withdrawal_id, version)
);
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON withdrawal_history
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

-- A signer of ours on a chain. Its nonces come from here; the chain's own count is a floor.
CREATE TABLE lanes (
    chain text NOT NULL, signer text NOT NULL,
    next_nonce bigint NOT NULL CHECK (next_nonce >= 0), chain_nonce bigint NOT NULL CHECK (chain_nonce >= 0),
    status text NOT NULL CHECK (status IN ('open', 'paused')), reason text NOT NULL,
    version bigint NOT NULL, updated_at timestamptz NOT NULL,
    PRIMARY KEY (chain, signer)
) WITH (fillfactor = 20);

-- Every transaction that we ever signed, stored before it is sent. One withdrawal has one nonce for life; a speed-up or a
-- cancel is the next n of the same nonce.
CREATE TABLE attempts (
    chain text NOT NULL, tx_hash text NOT NULL, withdrawal_id uuid,
    nonce bigint NOT NULL, n int NOT NULL, gas_limit bigint NOT NULL, block_number bigint,
    signer text NOT NULL, kind text NOT NULL CHECK (kind IN ('payment', 'cancel')), raw bytea NOT NULL,
    max_fee numeric(38, 0) NOT NULL, priority_fee numeric(38, 0) NOT NULL,
    status text NOT NULL CHECK (status IN
        ('signed', 'broadcast', 'mined', 'confirmed', 'replaced', 'reverted', 'dropped')),
    error text, block_hash text,
    signed_at timestamptz NOT NULL, broadcast_at timestamptz, updated_at timestamptz NOT NULL, version bigint NOT NULL,
    PRIMARY KEY (chain, tx_hash),
    UNIQUE (chain, signer, nonce, n)
) WITH (fillfactor = 70);
CREATE INDEX attempts_withdrawal ON attempts (withdrawal_id);
CREATE INDEX attempts_confirmed ON attempts (chain, block_number) WHERE status = 'confirmed';
CREATE INDEX attempts_open ON attempts (chain, signer, nonce) WHERE status IN ('signed', 'broadcast', 'mined');
