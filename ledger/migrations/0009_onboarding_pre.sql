-- A call may be made for several members; it is repeated as it was, and ends concluded, failed, or split into others. Empty
-- columns: an older release made the call.
ALTER TABLE calls
    ADD generation int, ADD attempts int, ADD due_at timestamptz, ADD error text,
    ADD parent_id uuid;
ALTER TABLE calls DROP CONSTRAINT calls_state_check;
ALTER TABLE calls ADD CONSTRAINT calls_state_check CHECK (state IN ('open', 'concluded', 'split', 'failed')) NOT VALID;
ALTER TABLE call_members ALTER call_id DROP NOT NULL, ADD request jsonb, ADD queued_at timestamptz;
CREATE INDEX call_members_waiting ON call_members (stage, queued_at) WHERE call_id IS NULL;
CREATE INDEX call_members_user ON call_members ((request ->> 'user_id')) WHERE request ->> 'user_id' IS NOT NULL;

-- requested: told to provision_wallets; pending: with a performer.
ALTER TABLE wallet_requests ADD error text;
ALTER TABLE wallet_requests DROP CONSTRAINT wallet_requests_status_check;
ALTER TABLE wallet_requests ADD CONSTRAINT wallet_requests_status_check
    CHECK (status IN ('requested', 'pending', 'ready', 'failed')) NOT VALID;

-- One per approved customer; the result per chain is in wallet_requests.
CREATE TABLE wallet_provisioning_jobs (
    user_id text PRIMARY KEY,
    state text NOT NULL CHECK (state IN ('queued', 'in_progress', 'retry', 'completed', 'failed')),
    attempts int NOT NULL, error text, created_at timestamptz NOT NULL, started_at timestamptz,
    next_attempt_at timestamptz, finished_at timestamptz, updated_at timestamptz NOT NULL, version bigint NOT NULL
);
CREATE INDEX wallet_provisioning_jobs_open ON wallet_provisioning_jobs (state, updated_at) WHERE state <> 'completed';

-- Circle's wallet set that customers' wallets are in, made once per network.
CREATE TABLE wallet_sets (network text PRIMARY KEY, wallet_set_id text NOT NULL, created_at timestamptz NOT NULL);

-- The KYC vendor's last word on a customer. Who is rejected has deposits credited and withdraws nothing.
CREATE TABLE kyc_standings (
    user_id text PRIMARY KEY, standing text NOT NULL CHECK (standing IN ('approved', 'rejected')),
    vendor text NOT NULL, vendor_event_id text NOT NULL, decided_at text NOT NULL, changed_at timestamptz NOT NULL
);

-- Outside the journal: when a partner may be asked next, by all workers together.
CREATE TABLE rate_limits (name text PRIMARY KEY, next_at timestamptz NOT NULL) WITH (fillfactor = 20);

-- Outside the journal: the worker processes as they were last seen, and which are to start anew.
CREATE TABLE workers (
    id text PRIMARY KEY, movement text NOT NULL, host text NOT NULL, pid int NOT NULL, started_at timestamptz NOT NULL,
    seen_at timestamptz NOT NULL, trouble jsonb NOT NULL, figures jsonb NOT NULL
) WITH (fillfactor = 50);
CREATE TABLE worker_restarts (movement text PRIMARY KEY, ordered_by text NOT NULL, ordered_at timestamptz NOT NULL);
