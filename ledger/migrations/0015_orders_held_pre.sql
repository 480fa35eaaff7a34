-- 14: an open order holds exactly what it has not spent, an ended one holds nothing: of what was reserved, each unit was spent by a
-- fill or given back. Told three times: by the order and its fills, by its hold, and by the entries of pending_investment; and what a
-- customer's open orders hold is that account's balance.
CREATE VIEW invariant_14_orders_hold_what_they_need AS
SELECT coalesce(replace(o.id::text, '-', ''), l.reference) AS "order", o.user_id, o.status, o.amount, o.filled, h.state AS hold,
       h.remaining AS held, f.fills, f.of_hold, f.posted, l.reserved, l.spent, l.released, NULL::numeric AS pending
FROM orders o
FULL JOIN (
    SELECT t.reference, count(DISTINCT e.account_id) AS accounts, min(a.owner) AS owner,
           coalesce(sum(e.amount) FILTER (WHERE t.kind = 'order_reserved' AND e.direction = 'd'), 0) AS reserved,
           coalesce(sum(e.amount) FILTER (WHERE t.kind = 'order_filled' AND e.direction = 'c'), 0) AS spent,
           coalesce(sum(e.amount) FILTER (WHERE t.kind = 'order_released' AND e.direction = 'c'), 0) AS released
    FROM accounts a
    JOIN entries e ON e.account_id = a.id
    JOIN transactions t ON t.id = e.transaction_id
    WHERE a.type = 'pending_investment' AND t.kind IN ('order_reserved', 'order_filled', 'order_released')
    GROUP BY t.reference
) AS l ON l.reference = replace(o.id::text, '-', '')
LEFT JOIN holds h ON h.id = o.hold_id
LEFT JOIN (
    SELECT f.order_id, sum(f.amount) AS fills, coalesce(sum(f.amount) FILTER (WHERE f.paid_from = 'hold'), 0) AS of_hold,
           count(*) = count(t.id) AS posted
    FROM order_fills f
    LEFT JOIN transactions t ON t.id = f.id AND t.reference = replace(f.order_id::text, '-', '')
                            AND t.kind = CASE f.paid_from WHEN 'hold' THEN 'order_filled' ELSE 'order_filled_late' END
    GROUP BY f.order_id
) AS f ON f.order_id = o.id
WHERE o.id IS NULL
   OR o.filled <> coalesce(f.fills, 0) OR NOT f.posted
   OR (o.status = 'rejected') <> (o.hold_id IS NULL)
   OR o.hold_id IS NULL AND (l.reference IS NOT NULL OR f.order_id IS NOT NULL)
   OR o.hold_id IS NOT NULL AND (
       h.amount IS DISTINCT FROM o.amount OR h.captured <> coalesce(f.of_hold, 0)
       OR h.remaining <> CASE o.status WHEN 'reserved' THEN o.amount - o.filled ELSE 0 END
       OR (h.state = 'open') <> (o.status = 'reserved') OR h.state = 'expired'
       OR l.owner IS DISTINCT FROM o.user_id OR l.accounts > 1
       OR l.reserved <> o.amount OR l.spent <> h.captured OR l.released <> o.amount - h.captured - h.remaining
       OR o.fills_due = o.filled AND o.status = 'reserved'
   )
UNION ALL
SELECT NULL, coalesce(a.owner, o.user_id), 'reserved', NULL, NULL, NULL, o.held, NULL, NULL, NULL, NULL, NULL, NULL, a.balance
FROM (SELECT owner, sum(balance) AS balance FROM accounts WHERE type = 'pending_investment' GROUP BY owner) AS a
FULL JOIN (SELECT user_id, sum(amount - filled) AS held FROM orders WHERE status = 'reserved' GROUP BY user_id) AS o
       ON o.user_id = a.owner
WHERE coalesce(a.balance, 0) <> coalesce(o.held, 0);
