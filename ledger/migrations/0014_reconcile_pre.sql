-- What was reconciled, and what differed: the newest runs, and of each the first differences (ledger/reconciling.py bounds both).
CREATE TABLE reconciliations (
    id uuid PRIMARY KEY, started_at timestamptz NOT NULL, ended_at timestamptz NOT NULL CHECK (ended_at >= started_at),
    actor text NOT NULL, compared jsonb NOT NULL, differences bigint NOT NULL CHECK (differences >= 0), gaps jsonb NOT NULL
);
CREATE INDEX reconciliations_newest ON reconciliations (started_at DESC, id);
CREATE TABLE reconciliation_differences (
    run_id uuid NOT NULL, n int NOT NULL, comparison text NOT NULL, user_id text NOT NULL, account text NOT NULL,
    ledger numeric(38, 0), other numeric(38, 0), PRIMARY KEY (run_id, n)
);
