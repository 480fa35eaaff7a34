-- The last entry of an account at `until` or before it; no row when there is none. One plain SELECT, so that PostgreSQL puts
-- it into the statement that calls it. The landmark first, then entries from it on: each part has a limit of its own, so
-- that no plan can turn the order around and walk through the account.
CREATE FUNCTION last_entry(account uuid, until timestamptz, OUT last_version bigint, OUT last_balance numeric)
RETURNS SETOF record LANGUAGE sql STABLE ROWS 1 AS $$
    SELECT found.version, found.balance_after
    FROM (
        SELECT coalesce((
            SELECT l.version FROM entries l
            WHERE l.account_id = account AND l.version % 16 = 0 AND l.at <= until
            ORDER BY l.at DESC, l.version DESC LIMIT 1
        ), 0) AS version OFFSET 0
    ) AS landmark
    CROSS JOIN LATERAL (
        SELECT e.version, e.balance_after FROM entries e
        WHERE e.account_id = account AND e.version >= landmark.version AND e.version < landmark.version + 16
          AND e.at <= until
        ORDER BY e.version DESC LIMIT 1
    ) AS found
$$;
