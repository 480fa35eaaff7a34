-- What several workers share and must not exceed. Updated by every transaction that counts: keep pages loose.
CREATE TABLE counters (
    name text PRIMARY KEY, value numeric(38, 0) NOT NULL, version bigint NOT NULL, updated_at timestamptz NOT NULL
) WITH (fillfactor = 50);

-- Limits that people change while the system runs.
CREATE TABLE limits (
    name text PRIMARY KEY, value numeric(38, 0) NOT NULL CHECK (value >= 0),
    updated_by text NOT NULL, updated_at timestamptz NOT NULL
);

-- Addresses we take no money from and send none to.
CREATE TABLE denied_addresses (
    chain text NOT NULL, address text NOT NULL, reason text NOT NULL,
    denied_by text NOT NULL, denied_at timestamptz NOT NULL,
    PRIMARY KEY (chain, address)
);
