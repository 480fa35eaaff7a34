-- In the order in which writers come to them: in another one a writer would be some deadlock's victim.
LOCK TABLE transactions, entries, audit IN ACCESS EXCLUSIVE MODE;

-- Which commit wrote a row, and the hash of what it wrote. NULL: written before this migration, or while it went up, by
-- a worker of the version before.
CREATE SEQUENCE batches;
ALTER TABLE audit ADD COLUMN batch bigint, ADD COLUMN ledger bytea, ADD COLUMN logs bytea;
ALTER TABLE transactions ADD COLUMN batch bigint;

-- What people and programs did beside the flow of events. Sealed by the commit's row in `audit`.
CREATE TABLE audit_logs (
    batch bigint NOT NULL, n int NOT NULL,
    at timestamptz NOT NULL, actor text NOT NULL, action text NOT NULL, resource text NOT NULL, resource_id text NOT NULL,
    before jsonb, after jsonb,
    status text NOT NULL CHECK (status IN ('done', 'refused')), error text, address text, user_agent text,
    PRIMARY KEY (batch, n)
);
CREATE INDEX audit_logs_at ON audit_logs (at, batch, n);
CREATE INDEX audit_logs_resource ON audit_logs (resource, resource_id);

CREATE TABLE corrections (
    id uuid PRIMARY KEY,
    kind text NOT NULL CHECK (kind IN ('correction', 'suspense_assigned')),
    state text NOT NULL CHECK (state IN ('requested', 'approved', 'rejected')),
    reason text NOT NULL, reference text NOT NULL, legs jsonb NOT NULL, transaction_id uuid NOT NULL,
    requested_by text NOT NULL, requested_at timestamptz NOT NULL, decided_by text, decided_at timestamptz,
    CHECK (state <> 'approved' OR decided_by <> requested_by), CHECK ((state = 'requested') = (decided_by IS NULL))
);
CREATE INDEX corrections_open ON corrections (requested_at) WHERE state = 'requested';

-- Privileges bind the application's role; this binds the owner as well, who must take it away knowingly.
CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION '% of % refused: its rows are append-only', TG_OP, TG_TABLE_NAME
        USING ERRCODE = 'restrict_violation', HINT = 'A mistake is undone by a reversal or a correction.';
END
$$;
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON transactions
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON entries
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
CREATE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_logs
    FOR EACH STATEMENT EXECUTE FUNCTION refuse_change();
