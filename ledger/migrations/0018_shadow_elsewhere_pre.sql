-- What a legacy table in another server is still to be given: written with the posting, told in order, deleted when told.

CREATE TABLE shadow_outbox (
    n bigint GENERATED ALWAYS AS IDENTITY, id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
    owner text NOT NULL, type text NOT NULL, amount numeric(38, 0) NOT NULL
);
CREATE INDEX shadow_outbox_order ON shadow_outbox (n);
CREATE INDEX shadow_outbox_owner ON shadow_outbox (owner);
