-- name: open_by_state
SELECT CASE WHEN fills_due IS NULL THEN 'reserved' ELSE 'fills_missing' END AS state, count(*) AS orders,
       min(CASE WHEN fills_due IS NULL THEN placed_at ELSE updated_at END) AS oldest
FROM orders
WHERE status = 'reserved'
GROUP BY 1

-- name: unplaced
SELECT attempt, count(*) AS events, min(available_at) AS due
FROM schedule
WHERE stage = ANY($1::text[]) AND code = $2
GROUP BY attempt
