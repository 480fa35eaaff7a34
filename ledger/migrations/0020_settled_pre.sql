-- Withdrawals that two people have ended: a correction that says how. What they know of the transaction is not in our books, so
-- a payment may be none of our attempts, and a transfer that Circle calls COMPLETE may be given back.
ALTER TABLE corrections DROP CONSTRAINT corrections_kind_check,
    ADD CONSTRAINT corrections_kind_check CHECK (kind IN
        ('correction', 'suspense_assigned', 'withdrawal_paid', 'withdrawal_failed'));

CREATE OR REPLACE VIEW invariant_7_withdrawals_settled_once AS
SELECT coalesce(replace(w.id::text, '-', ''), l.reference) AS withdrawal, w.status, h.state AS hold, l.holds, l.paid,
       l.released, c.payments, c.nonces
FROM withdrawals w
FULL JOIN (
    SELECT reference,
           count(*) FILTER (WHERE kind = 'withdrawal_hold') AS holds,
           count(*) FILTER (WHERE kind = 'withdrawal') AS paid,
           count(*) FILTER (WHERE kind = 'withdrawal_release') AS released
    FROM transactions WHERE kind IN ('withdrawal_hold', 'withdrawal', 'withdrawal_release') GROUP BY reference
) AS l ON l.reference = replace(w.id::text, '-', '')
LEFT JOIN holds h ON h.id = w.hold_id
LEFT JOIN (
    SELECT withdrawal_id, count(DISTINCT (chain, signer, nonce)) AS nonces,
           count(*) FILTER (WHERE kind = 'payment' AND status = 'confirmed') AS payments
    FROM attempts WHERE withdrawal_id IS NOT NULL GROUP BY withdrawal_id
) AS c ON c.withdrawal_id = w.id
LEFT JOIN custodian_transfers t ON t.withdrawal_id = w.id
LEFT JOIN (
    SELECT split_part(reference, ':', 1) AS withdrawal, kind FROM corrections
    WHERE kind IN ('withdrawal_paid', 'withdrawal_failed') AND state = 'approved'
) AS p ON p.withdrawal = replace(w.id::text, '-', '')
WHERE w.id IS NULL
   OR coalesce(l.holds, 0) <> CASE WHEN w.hold_id IS NULL THEN 0 ELSE 1 END
   OR coalesce(l.paid, 0) <> CASE WHEN w.status = 'completed' THEN 1 ELSE 0 END
   OR coalesce(l.released, 0) <> CASE WHEN w.hold_id IS NOT NULL AND w.status IN ('failed', 'cancelled') THEN 1 ELSE 0 END
   OR h.state IS DISTINCT FROM CASE WHEN w.hold_id IS NULL THEN NULL
                                    WHEN w.status = 'completed' THEN 'posted'
                                    WHEN w.status IN ('failed', 'cancelled') THEN 'voided'
                                    ELSE 'open' END
   OR h.amount <> w.amount
   OR w.hold_id IS NULL AND w.status NOT IN ('pending', 'failed', 'cancelled')
   OR c.nonces > 1 OR c.payments > 1
   OR c.payments = 1 AND w.status IN ('pending', 'signing', 'failed', 'cancelled')
   OR p.kind IS NOT NULL AND w.status <> CASE p.kind WHEN 'withdrawal_paid' THEN 'completed' ELSE 'failed' END
   OR w.rail = 'chain' AND (w.status = 'completed' AND coalesce(c.payments, 0) <> 1 AND p.kind IS NULL
                            OR w.status IN ('broadcasting', 'confirming') AND c.nonces IS NULL)
   OR w.rail = 'circle' AND (c.nonces IS NOT NULL
                             OR w.status IN ('broadcasting', 'confirming', 'completed') AND t.withdrawal_id IS NULL
                             OR w.status = 'completed' AND t.transfer_id IS NULL AND p.kind IS NULL
                             OR w.status IN ('failed', 'cancelled') AND t.state = 'COMPLETE' AND p.kind IS NULL)
   OR w.rail = 'chain' AND t.withdrawal_id IS NOT NULL;
