-- What recovery keeps.

-- Refused events, each once, whatever the times it was refused: what the dead-letter topics hold, and what became of it.
CREATE TABLE dead_letters (
    id uuid PRIMARY KEY, topic text NOT NULL, stage text NOT NULL, event_id uuid, code text NOT NULL, reason text NOT NULL,
    origin text, partition int, position bigint, key bytea, value bytea, headers jsonb NOT NULL, attempts int NOT NULL,
    code_version text NOT NULL, state text NOT NULL CHECK (state IN ('open', 'redriven', 'resolved', 'discarded')),
    redrives int NOT NULL, due_at timestamptz, first_at timestamptz NOT NULL, last_at timestamptz NOT NULL,
    updated_at timestamptz NOT NULL, version bigint NOT NULL
);
CREATE INDEX dead_letters_page ON dead_letters (last_at DESC, id DESC);
CREATE INDEX dead_letters_open ON dead_letters (state, due_at) WHERE state IN ('open', 'redriven');

-- Each time the database was rebuilt from the journal; `first_seq` is the first record of its own. A gate that is there is
-- closed: nobody calls that partner until a person has compared.
CREATE TABLE restores (
    id int PRIMARY KEY, at timestamptz NOT NULL, actor text NOT NULL, first_seq bigint NOT NULL, records bigint NOT NULL
);
CREATE TABLE gates (name text PRIMARY KEY, reason text NOT NULL, closed_at timestamptz NOT NULL, closed_by text NOT NULL);
