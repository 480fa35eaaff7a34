-- What recovery keeps.
SELECT;

-- Each time the database was rebuilt from the journal; `first_seq` is the first record of its own. A gate that is there is
-- closed: nobody calls that partner until a person has compared.
CREATE TABLE restores (
    id int PRIMARY KEY, at timestamptz NOT NULL, actor text NOT NULL, first_seq bigint NOT NULL, records bigint NOT NULL
);
CREATE TABLE gates (name text PRIMARY KEY, reason text NOT NULL, closed_at timestamptz NOT NULL, closed_by text NOT NULL);
