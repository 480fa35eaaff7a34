-- What became of a custodian's transfers, step by step; and the ways to them from what people have at hand.

-- A line for each version of a row of custodian_transfers.
CREATE TABLE custodian_transfer_history (
    withdrawal_id uuid NOT NULL, version bigint NOT NULL, state text NOT NULL, transfer_id text, tx_hashes text NOT NULL,
    block_number bigint, reason text, at timestamptz NOT NULL,
    PRIMARY KEY (withdrawal_id, version)
);
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON custodian_transfer_history
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();

-- From a hash, and from a withdrawal to its call.
CREATE INDEX custodian_transfers_hashes ON custodian_transfers USING gin (string_to_array(tx_hashes, ' '));
CREATE INDEX call_members_transfers ON call_members (item) WHERE stage = 'transfer_by_custodian';
