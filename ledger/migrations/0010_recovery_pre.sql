-- What recovery keeps.

-- Refused events, each once, whatever the times it was refused: what the dead-letter topics hold, and what became of it.
CREATE TABLE dead_letters (
    id uuid PRIMARY KEY, topic text NOT NULL, stage text NOT NULL, event_id uuid, code text NOT NULL, reason text NOT NULL,
    origin text, partition int, position bigint, key bytea, value bytea, headers jsonb NOT NULL, attempts int NOT NULL,
    code_version text NOT NULL, state text NOT NULL CHECK (state IN ('open', 'redriven', 'resolved', 'discarded')),
    redrives int NOT NULL, due_at timestamptz, first_at timestamptz NOT NULL, last_at timestamptz NOT NULL,
    updated_at timestamptz NOT NULL, version bigint NOT NULL, events jsonb NOT NULL
);
CREATE INDEX dead_letters_page ON dead_letters (last_at DESC, id DESC);
CREATE INDEX dead_letters_open ON dead_letters (state, due_at) WHERE state IN ('open', 'redriven');
-- By which ids the inbox knows each: what could not be read has the id of its place, another wherever it was redriven to, and its own
-- once a release reads it.
CREATE VIEW dead_letter_events AS
SELECT id, stage, event_id FROM dead_letters WHERE event_id IS NOT NULL
UNION ALL
SELECT id, stage, jsonb_array_elements_text(events)::uuid FROM dead_letters WHERE events <> '[]';

-- Each time the database was rebuilt from the journal; `first_seq` is the first record of its own. A gate that is there is
-- closed: nobody calls that partner until a person has compared.
CREATE TABLE restores (
    id int PRIMARY KEY, at timestamptz NOT NULL, actor text NOT NULL, first_seq bigint NOT NULL, records bigint NOT NULL
);
CREATE TABLE gates (name text PRIMARY KEY, reason text NOT NULL, closed_at timestamptz NOT NULL, closed_by text NOT NULL);

-- What a person wants of a withdrawal that is signed: the last wish of each. The worker that signs takes it up.
CREATE TABLE attempt_wishes (
    withdrawal_id uuid PRIMARY KEY, chain text NOT NULL, kind text NOT NULL CHECK (kind IN ('speed_up', 'cancel')),
    attempts_max int NOT NULL, state text NOT NULL CHECK (state IN ('open', 'done', 'refused')), code text, n int,
    asked_by text NOT NULL, reason text NOT NULL, asked_at timestamptz NOT NULL, ended_at timestamptz
);
CREATE INDEX attempt_wishes_open ON attempt_wishes (chain) WHERE state = 'open';

-- The invariants of `stablerail verify`, one text of each rule: the rows that break it. 4, 11 and 12 need code; no view has rows
-- when all is well.
-- 1: entries of a transaction sum to zero per asset.
CREATE VIEW invariant_1_transactions_balance AS
SELECT e.transaction_id, a.asset, sum(CASE e.direction WHEN 'd' THEN e.amount ELSE -e.amount END) AS difference
FROM entries e JOIN accounts a ON a.id = e.account_id
GROUP BY e.transaction_id, a.asset
HAVING sum(CASE e.direction WHEN 'd' THEN e.amount ELSE -e.amount END) <> 0;

-- 2: all accounts of an asset sum to zero.
CREATE VIEW invariant_2_assets_balance AS
SELECT asset, sum(balance) AS difference FROM accounts GROUP BY asset HAVING sum(balance) <> 0;

-- 3: balance = sum of entries, versions without gaps. A range of `account` bounds what is read: the entries lead in the first
-- part, and each account is asked for its entries in the second.
CREATE VIEW invariant_3_accounts_proved AS
SELECT e.account_id AS account, a.balance, a.version, e.sum, e.entries, e.last
FROM (
    SELECT account_id, sum(CASE direction WHEN 'd' THEN amount ELSE -amount END) AS sum, count(*) AS entries,
           max(version) AS last, min(version) AS first,
           bool_and(balance_after = before + CASE direction WHEN 'd' THEN amount ELSE -amount END) AS proved
    FROM (
        SELECT account_id, version, direction, amount, balance_after,
               lag(balance_after, 1, 0::numeric) OVER (PARTITION BY account_id ORDER BY version) AS before
        FROM entries
    ) AS lines
    GROUP BY account_id
) AS e
LEFT JOIN accounts a ON a.id = e.account_id
WHERE a.balance IS DISTINCT FROM e.sum OR a.version IS DISTINCT FROM e.last
   OR e.entries <> e.last OR e.first <> 1 OR NOT e.proved
UNION ALL
SELECT a.id, a.balance, a.version, NULL, 0, NULL
FROM accounts a
LEFT JOIN LATERAL (SELECT e.version FROM entries e WHERE e.account_id = a.id LIMIT 1) AS e ON true
WHERE (a.balance <> 0 OR a.version <> 0) AND e.version IS NULL;

-- 5: one transfer, at most one credit: neither by a deposit's second posting, nor by a second deposit of one log of a block.
CREATE VIEW invariant_5_transfers_credited_once AS
SELECT coalesce(replace(d.id::text, '-', ''), l.reference) AS deposit, d.status, d.generation, l.credits, l.reversals,
       l.finals, l.parks, NULL::bigint AS deposits_of_its_log
FROM deposits d
FULL JOIN (
    SELECT reference,
           count(*) FILTER (WHERE kind = 'deposit') AS credits,
           count(*) FILTER (WHERE kind = 'deposit_reversed') AS reversals,
           count(*) FILTER (WHERE kind = 'deposit_final') AS finals,
           count(*) FILTER (WHERE kind = 'deposit_parked') AS parks
    FROM transactions WHERE kind IN ('deposit', 'deposit_reversed', 'deposit_final', 'deposit_parked')
    GROUP BY reference
) AS l ON l.reference = replace(d.id::text, '-', '')
WHERE d.id IS NULL OR coalesce(l.credits, 0) <> d.generation
   OR coalesce(l.credits, 0) - coalesce(l.reversals, 0)
      <> CASE WHEN d.status IN ('credited', 'orphaned', 'finalized') THEN 1 ELSE 0 END
   OR coalesce(l.finals, 0) <> CASE WHEN d.status = 'finalized' THEN 1 ELSE 0 END
   OR coalesce(l.parks, 0) <> CASE WHEN d.status = 'parked' THEN 1 ELSE 0 END
UNION ALL
SELECT min(replace(d.id::text, '-', '')), 'credited', NULL, NULL, NULL, NULL, NULL, count(*)
FROM deposits d
WHERE d.status IN ('credited', 'finalized', 'parked') AND d.log_index IS NOT NULL AND d.block_hash IS NOT NULL
GROUP BY d.chain, d.block_hash, d.log_index
HAVING count(*) > 1;

-- 6: every final inbound transfer is credited, rejected or parked within a day. `verify` asks the chains as well and is
-- stricter: what is a hundred blocks below the final one is late.
CREATE VIEW invariant_6_deposits_judged AS
SELECT replace(d.id::text, '-', '') AS deposit, d.chain, d.tx_hash, d.status, d.held, d.updated_at
FROM deposits d
WHERE d.status IN ('pending', 'credited', 'orphaned') AND d.updated_at < now() - interval '1 day';

-- 8: nonces per lane without gap, one mined transaction per nonce.
CREATE VIEW invariant_8_nonces_used_once AS
SELECT coalesce(l.chain, n.chain) AS chain, coalesce(l.signer, n.signer) AS signer, l.next_nonce, n.nonce, n.mined,
       n.withdrawals, n.after
FROM lanes l
FULL JOIN (
    SELECT chain, signer, nonce,
           count(*) FILTER (WHERE status IN ('mined', 'confirmed', 'reverted')) AS mined,
           count(DISTINCT withdrawal_id) AS withdrawals,
           lead(nonce) OVER (PARTITION BY chain, signer ORDER BY nonce) AS after
    FROM attempts GROUP BY chain, signer, nonce
) AS n ON n.chain = l.chain AND n.signer = l.signer
WHERE l.chain IS NULL AND n.chain IS NOT NULL
   OR n.mined > 1 OR n.withdrawals > 1 OR n.nonce >= l.next_nonce
   -- below the chain's own count a nonce that is none of ours was used by somebody else, and stops nothing
   OR coalesce(n.after, l.next_nonce) > greatest(n.nonce + 1, l.chain_nonce);

-- 9: every commit record is journaled and emitted, within a minute. `verify --kafka` reads the topics.
CREATE VIEW invariant_9_records_emitted AS
SELECT seq, stage, topic, journaled, at FROM outbox WHERE at < now() - interval '1 minute';

-- 10: every input event has exactly one outcome: what is to be repeated is scheduled, and nothing else is.
CREATE VIEW invariant_10_events_settled_once AS
SELECT coalesce(i.stage, s.stage) AS stage, coalesce(i.event_id, s.event_id) AS event, i.outcome, i.attempt,
       s.attempt AS scheduled
FROM inbox i FULL JOIN schedule s ON s.stage = i.stage AND s.event_id = i.event_id
WHERE s.event_id IS NOT NULL AND (i.outcome IS DISTINCT FROM 'retry' OR s.attempt <= i.attempt)
   OR s.event_id IS NULL AND i.outcome = 'retry';

-- 10: and what was refused is a dead letter, an hour later at most; by the time of the newest commit, so that a recovery that stands
-- still together with everything else is not taken for a loss.
CREATE VIEW invariant_10_refusals_kept AS
SELECT i.stage, i.event_id AS event, i.attempt, i.at AS refused_at
FROM inbox i
WHERE i.outcome = 'rejected'
  AND i.at < (SELECT max(a.at) FROM owners o JOIN audit a USING (stage, topic, partition, position)) - interval '1 hour'
  AND NOT EXISTS (SELECT FROM dead_letter_events d WHERE d.stage = i.stage AND d.event_id = i.event_id);

-- 13: after faults stop, everything drains: nothing that the system does by itself is long overdue. Records are 9's, deposits 6's.
CREATE VIEW invariant_13_nothing_stays AS
SELECT 'repeat' AS what, s.stage, replace(s.event_id::text, '-', '') AS id, s.code AS state, s.available_at AS due
FROM schedule s WHERE s.available_at < now() - interval '1 hour'
UNION ALL
SELECT 'call', c.stage, replace(c.id::text, '-', ''), c.operation, coalesce(c.due_at, c.created_at)
FROM calls c WHERE c.state = 'open' AND coalesce(c.due_at, c.created_at) < now() - interval '1 hour'
UNION ALL
SELECT 'call member', m.stage, replace(m.event_id::text, '-', ''), m.item, m.queued_at
FROM call_members m WHERE m.call_id IS NULL AND m.queued_at < now() - interval '1 hour'
UNION ALL
SELECT 'withdrawal', w.rail, replace(w.id::text, '-', ''), w.status, w.updated_at
FROM withdrawals w
WHERE w.status IN ('pending', 'signing', 'broadcasting', 'confirming') AND w.updated_at < now() - interval '1 day';

-- What the last `stablerail verify --rebuild` found: invariant 12. Not journaled.
CREATE TABLE rebuild_checks (id int PRIMARY KEY CHECK (id = 1), at timestamptz NOT NULL, records bigint NOT NULL, offending jsonb NOT NULL);
