-- Owner rows: who may commit for a partition, and the head of its hash chain. Updated by every commit: keep pages loose.
CREATE TABLE owners (
    stage text NOT NULL, topic text NOT NULL, partition int NOT NULL,
    epoch bigint NOT NULL, position bigint NOT NULL, head bytea NOT NULL,
    PRIMARY KEY (stage, topic, partition)
) WITH (fillfactor = 20);

CREATE TABLE audit (
    stage text NOT NULL, topic text NOT NULL, partition int NOT NULL, position bigint NOT NULL,
    at timestamptz NOT NULL, actor text NOT NULL, summary jsonb NOT NULL, digest bytea NOT NULL, head bytea NOT NULL,
    PRIMARY KEY (stage, topic, partition, position)
);

CREATE TABLE inbox (
    stage text NOT NULL, event_id uuid NOT NULL, attempt int NOT NULL,
    fingerprint uuid NOT NULL, outcome text NOT NULL CHECK (outcome IN ('done', 'rejected', 'retry')),
    at timestamptz NOT NULL,
    PRIMARY KEY (stage, event_id)
);

-- Outside the journal: it is the way to it. The record is compressed by us; PostgreSQL must not try again.
CREATE TABLE outbox (
    seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    stage text NOT NULL, topic text NOT NULL, partitions int[] NOT NULL, at timestamptz NOT NULL,
    journaled boolean NOT NULL DEFAULT false, record bytea NOT NULL
);
ALTER TABLE outbox ALTER record SET STORAGE EXTERNAL;
CREATE INDEX outbox_waiting ON outbox (seq) WHERE NOT journaled;

CREATE TABLE relay (id int PRIMARY KEY);
INSERT INTO relay VALUES (1);

CREATE TABLE schedule (
    stage text NOT NULL, event_id uuid NOT NULL, attempt int NOT NULL,
    topic text NOT NULL, key bytea, value bytea NOT NULL, headers jsonb NOT NULL,
    code text NOT NULL, available_at timestamptz NOT NULL,
    PRIMARY KEY (stage, event_id)
);
CREATE INDEX schedule_due ON schedule (available_at);
CREATE INDEX schedule_parked ON schedule (stage, key);

CREATE TABLE crashes (
    stage text NOT NULL, topic text NOT NULL, partition int NOT NULL, "offset" bigint NOT NULL,
    count int NOT NULL, error text NOT NULL, last_at timestamptz NOT NULL,
    PRIMARY KEY (stage, topic, partition, "offset")
);

CREATE TABLE accounts (
    id uuid PRIMARY KEY,
    owner text NOT NULL, type text NOT NULL, asset text NOT NULL, shard text NOT NULL,
    balance numeric(38, 0) NOT NULL, version bigint NOT NULL, updated_at timestamptz NOT NULL,
    UNIQUE (owner, type, asset, shard),
    CHECK (owner = 'system' OR balance >= 0)
) WITH (fillfactor = 50);

-- Columns of fixed width first, so that none is padded. The hash index finds a reference of any length by four bytes; ask
-- with "AND reference <> ''" so that it is used.
CREATE TABLE transactions (
    id uuid PRIMARY KEY, fingerprint uuid NOT NULL, at timestamptz NOT NULL,
    kind text NOT NULL, reference text NOT NULL
);
CREATE INDEX transactions_reference ON transactions USING hash (reference) WHERE reference <> '';

-- (account, version) proves that none is missing, is the statement's order, and the key to distribute by. `at` is exactly
-- the transaction's: rows of one time lie together, so a few bytes per range of pages find a transaction's entries.
CREATE TABLE entries (
    account_id uuid NOT NULL, transaction_id uuid NOT NULL, version bigint NOT NULL, at timestamptz NOT NULL,
    seq smallint NOT NULL, direction char(1) NOT NULL CHECK (direction IN ('d', 'c')),
    amount numeric(38, 0) NOT NULL CHECK (amount > 0), balance_after numeric(38, 0) NOT NULL,
    PRIMARY KEY (account_id, version)
);
CREATE INDEX entries_at ON entries USING brin (at) WITH (pages_per_range = 16, autosummarize = on);
-- Every 16th entry of an account. An account's times never run backwards against its versions, so the last of them that is
-- not later than a time bounds the search for the last entry to the 16 from it on: two look-ups, however long the account.
-- An index of all entries would cost each posting sixteen times as much.
CREATE INDEX entries_landmarks ON entries (account_id, at, version) WHERE version % 16 = 0;

CREATE TABLE calls (
    id uuid PRIMARY KEY,
    stage text NOT NULL, partner text NOT NULL, operation text NOT NULL, idempotency_key uuid NOT NULL UNIQUE,
    request jsonb NOT NULL, fingerprint bytea NOT NULL,
    state text NOT NULL CHECK (state IN ('open', 'concluded')),
    created_at timestamptz NOT NULL, concluded_at timestamptz
);
CREATE INDEX calls_open ON calls (stage, created_at) WHERE state = 'open';

CREATE TABLE call_members (
    stage text NOT NULL, event_id uuid NOT NULL, item text NOT NULL, call_id uuid NOT NULL, context jsonb NOT NULL,
    PRIMARY KEY (stage, event_id, item)
);
CREATE INDEX call_members_call ON call_members (call_id);

CREATE TABLE leases (
    call_id uuid PRIMARY KEY,
    holder text NOT NULL, until timestamptz NOT NULL, attempts int NOT NULL, last_error text
);

CREATE TABLE wallet_requests (
    user_id text NOT NULL, chain text NOT NULL, status text NOT NULL CHECK (status IN ('requested', 'ready', 'failed')),
    requested_at timestamptz NOT NULL, ready_at timestamptz,
    PRIMARY KEY (user_id, chain)
);

CREATE TABLE wallets (
    chain text NOT NULL, address text NOT NULL, user_id text NOT NULL, wallet_id text NOT NULL,
    created_at timestamptz NOT NULL,
    PRIMARY KEY (chain, address)
);
CREATE INDEX wallets_user ON wallets (user_id);

-- The id is the group's (the same for all equal transfers of a transaction to an address) with n in its last two bytes.
CREATE TABLE deposits (
    id uuid PRIMARY KEY, n int NOT NULL,
    chain text NOT NULL, tx_hash text NOT NULL, recipient text NOT NULL, asset text NOT NULL,
    amount numeric(38, 0) NOT NULL, user_id text NOT NULL,
    status text NOT NULL CHECK (status IN ('pending', 'credited', 'orphaned', 'finalized', 'reversed')),
    generation int NOT NULL, buffer_shard text NOT NULL,
    block_hash text, block_number bigint, log_index int,
    credited_at timestamptz, finalized_at timestamptz, updated_at timestamptz NOT NULL
);
CREATE INDEX deposits_open ON deposits (chain, block_number) WHERE status IN ('credited', 'orphaned');
CREATE INDEX deposits_user ON deposits (user_id, credited_at);

-- The id is made of source and transfer id: two short keys instead of texts.
CREATE TABLE deposit_reports (
    id uuid PRIMARY KEY,
    source text NOT NULL, transfer_id text NOT NULL, group_id uuid NOT NULL, deposit_id uuid NOT NULL,
    evidence text NOT NULL, block_hash text, reported_at timestamptz NOT NULL
);
CREATE INDEX deposit_reports_group ON deposit_reports (group_id);

CREATE TABLE chain_cursors (chain text PRIMARY KEY, state jsonb NOT NULL, updated_at timestamptz NOT NULL);

CREATE TABLE api_keys (
    id text PRIMARY KEY, name text NOT NULL, scope text[] NOT NULL, secret_sha256 bytea NOT NULL,
    created_at timestamptz NOT NULL, revoked_at timestamptz
);
