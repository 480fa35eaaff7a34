-- Where a source that we ask has been read up to: in the source's own time.
CREATE TABLE source_cursors (source text PRIMARY KEY, since timestamptz NOT NULL, updated_at timestamptz NOT NULL);

-- Circle's inbound transactions that the poller still minds: those that it may meet again in its overlap, and those that are
-- not at their end. They go when neither holds.
CREATE TABLE circle_transfers (
    id text PRIMARY KEY, state text NOT NULL, created_at timestamptz NOT NULL, looked_at timestamptz NOT NULL,
    ended_at timestamptz
);
CREATE INDEX circle_transfers_open ON circle_transfers (looked_at) WHERE ended_at IS NULL;
CREATE INDEX circle_transfers_ended ON circle_transfers (created_at) WHERE ended_at IS NOT NULL;
