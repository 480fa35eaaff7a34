-- What indexes say of a status without naming it: a row whose status changes and whose phase does not keeps its entries in every
-- index (a HOT update), and that is what most changes of a payment are, where its page has room for it: a batch's rows lie side by
-- side and change in one commit. A generated column writes its table anew, and writers wait meanwhile: seconds for a million rows.

-- Both before either is written anew: who holds the one by then and waits for the other would end this each time.
LOCK TABLE withdrawals, attempts IN ACCESS EXCLUSIVE MODE;
ALTER TABLE attempts SET (fillfactor = 45);
ALTER TABLE withdrawals SET (fillfactor = 45);
ALTER TABLE attempts ADD COLUMN phase text NOT NULL
    GENERATED ALWAYS AS (CASE WHEN status IN ('signed', 'broadcast') THEN 'unmined' ELSE status END) STORED;
CREATE INDEX attempts_unended ON attempts (chain, signer, nonce) WHERE phase IN ('unmined', 'mined');
CREATE INDEX attempts_in_blocks ON attempts (chain, phase, block_number) WHERE phase IN ('mined', 'confirmed');

ALTER TABLE withdrawals ADD COLUMN waits boolean NOT NULL GENERATED ALWAYS AS (status = 'signing') STORED;
CREATE INDEX withdrawals_waiting ON withdrawals (chain, requested_at, id) WHERE waits;
CREATE INDEX withdrawals_unsettled ON withdrawals (chain, requested_at) WHERE settled_at IS NULL;
