-- Where a transfer came from, why it was not credited at once (`held`), and what of it is counted as credited and not final.
-- NULL: written before this migration, or while it went up, by a worker of the version before.
ALTER TABLE deposits ADD COLUMN sender text, ADD COLUMN held text, ADD COLUMN counted numeric(38, 0);

-- Transfers to wallets of ours whose owner nobody knows are deposits too, and two ends more.
ALTER TABLE deposits ALTER COLUMN user_id DROP NOT NULL;
ALTER TABLE deposits DROP CONSTRAINT deposits_status_check;
ALTER TABLE deposits ADD CONSTRAINT deposits_status_check CHECK (status IN
    ('pending', 'credited', 'orphaned', 'finalized', 'reversed', 'parked', 'vanished')) NOT VALID;

-- What finality has to judge beside the credited ones, and what people look for. A deposit that is credited at once and
-- becomes final is in neither.
CREATE INDEX deposits_pending ON deposits (chain, block_number) WHERE status = 'pending';
CREATE INDEX deposits_odd ON deposits (status, id) WHERE status IN
    ('pending', 'orphaned', 'reversed', 'parked', 'vanished');
