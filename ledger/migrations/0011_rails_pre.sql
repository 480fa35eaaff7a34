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

-- 7: a withdrawal debits at most once and pays at most once; settled xor released. What Circle sends has a transfer there,
-- and no attempt of ours.
CREATE VIEW invariant_7_withdrawals_settled_once AS
SELECT coalesce(replace(w.id::text, '-', ''), l.reference) AS withdrawal, w.status, h.state AS hold, l.holds, l.paid,
       l.released, c.payments, c.nonces
FROM withdrawals w
FULL JOIN (
    SELECT reference,
           count(*) FILTER (WHERE kind = 'withdrawal_hold') AS holds,
           count(*) FILTER (WHERE kind = 'withdrawal') AS paid,
           count(*) FILTER (WHERE kind = 'withdrawal_release') AS released
    FROM transactions WHERE kind IN ('withdrawal_hold', 'withdrawal', 'withdrawal_release') GROUP BY reference
) AS l ON l.reference = replace(w.id::text, '-', '')
LEFT JOIN holds h ON h.id = w.hold_id
LEFT JOIN (
    SELECT withdrawal_id, count(DISTINCT (chain, signer, nonce)) AS nonces,
           count(*) FILTER (WHERE kind = 'payment' AND status = 'confirmed') AS payments
    FROM attempts WHERE withdrawal_id IS NOT NULL GROUP BY withdrawal_id
) AS c ON c.withdrawal_id = w.id
LEFT JOIN custodian_transfers t ON t.withdrawal_id = w.id
WHERE w.id IS NULL
   OR coalesce(l.holds, 0) <> CASE WHEN w.hold_id IS NULL THEN 0 ELSE 1 END
   OR coalesce(l.paid, 0) <> CASE WHEN w.status = 'completed' THEN 1 ELSE 0 END
   OR coalesce(l.released, 0) <> CASE WHEN w.hold_id IS NOT NULL AND w.status IN ('failed', 'cancelled') THEN 1 ELSE 0 END
   OR h.state IS DISTINCT FROM CASE WHEN w.hold_id IS NULL THEN NULL
                                    WHEN w.status = 'completed' THEN 'posted'
                                    WHEN w.status IN ('failed', 'cancelled') THEN 'voided'
                                    ELSE 'open' END
   OR h.amount <> w.amount
   OR w.hold_id IS NULL AND w.status NOT IN ('pending', 'failed', 'cancelled')
   OR c.nonces > 1 OR c.payments > 1
   OR c.payments = 1 AND w.status IN ('pending', 'signing', 'failed', 'cancelled')
   OR w.rail = 'chain' AND (w.status = 'completed' AND coalesce(c.payments, 0) <> 1
                            OR w.status IN ('broadcasting', 'confirming') AND c.nonces IS NULL)
   OR w.rail = 'circle' AND (c.nonces IS NOT NULL
                             OR w.status IN ('broadcasting', 'confirming', 'completed') AND t.withdrawal_id IS NULL
                             OR w.status = 'completed' AND t.transfer_id IS NULL
                             OR w.status IN ('failed', 'cancelled') AND t.state = 'COMPLETE')
   OR w.rail = 'chain' AND t.withdrawal_id IS NOT NULL;
