-- What recovery keeps.
SELECT;

-- What a person wants of a withdrawal that is signed: the last wish of each. The worker that signs takes it up.
CREATE TABLE attempt_wishes (
    withdrawal_id uuid PRIMARY KEY, chain text NOT NULL, kind text NOT NULL CHECK (kind IN ('speed_up', 'cancel')),
    attempts_max int NOT NULL, state text NOT NULL CHECK (state IN ('open', 'done', 'refused')), code text, n int,
    asked_by text NOT NULL, reason text NOT NULL, asked_at timestamptz NOT NULL, ended_at timestamptz
);
CREATE INDEX attempt_wishes_open ON attempt_wishes (chain) WHERE state = 'open';
