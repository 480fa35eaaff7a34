-- Shadow mode: how far ledger and legacy table have come together, what of the ledger the legacy table has, where they differ.

CREATE TABLE shadow (
    name text PRIMARY KEY, version bigint NOT NULL,
    phase text NOT NULL CHECK (phase IN ('off', 'shadow', 'ledger', 'strict', 'cut_over')),
    changed_at timestamptz NOT NULL, changed_by text NOT NULL, reason text
) WITH (fillfactor = 50);

-- The account's balance as the legacy table has it: what lies between is still to be written there.
CREATE TABLE shadow_marks (
    account_id uuid PRIMARY KEY, version bigint NOT NULL, balance numeric(38, 0) NOT NULL
) WITH (fillfactor = 70);

-- `legacy` as it was read: what others write there need not be whole base units.
CREATE TABLE shadow_discrepancies (
    id uuid PRIMARY KEY, user_id text NOT NULL, type text NOT NULL, ledger numeric(38, 0) NOT NULL, legacy text NOT NULL,
    first_seen timestamptz NOT NULL, last_seen timestamptz NOT NULL
) WITH (fillfactor = 70);
CREATE INDEX shadow_discrepancies_seen ON shadow_discrepancies (last_seen);
