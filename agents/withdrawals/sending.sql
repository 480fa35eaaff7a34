-- name: to_sign
-- What waits of each chain ($1), at most so many of each ($2), and the lanes ($4, $5), locked in this order: who locks several that
-- wait locks them as they are here, and a lane after them: to count what waits, all of it is locked first. What would be refused by
-- now goes on waiting: its customer was rejected since, or its recipient denied on any chain ($6) whose addresses are the same.
-- OFFSET 0: the list is asked about each in turn. Joined, all that waits would be compared with all of it, for the few that are taken.
WITH waiting AS MATERIALIZED (
    SELECT one.*
    FROM unnest($1::text[], $2::bigint[]) AS x(chain, most)
    CROSS JOIN LATERAL (
        SELECT replace(w.id::text, '-', '') AS id, w.user_id, w.idempotency_key, replace(w.fingerprint::text, '-', '') AS fingerprint,
               w.rail, w.chain, w.asset, w.amount::text AS amount, w.recipient, w.status, w.code,
               replace(w.hold_id::text, '-', '') AS hold_id, w.requested_at, w.updated_at, w.settled_at, w.version
        FROM withdrawals w
        WHERE w.chain = x.chain AND w.waits AND w.rail = 'chain' AND w.asset = $3
          AND NOT EXISTS (SELECT FROM kyc_standings k WHERE k.user_id = w.user_id AND k.standing = 'rejected')
          AND NOT EXISTS (SELECT FROM denied_addresses d WHERE d.chain = ANY ($6::text[]) AND d.address = w.recipient OFFSET 0)
        ORDER BY w.requested_at, w.id
        LIMIT x.most
        FOR UPDATE OF w
    ) AS one
), locked AS MATERIALIZED (
    SELECT l.chain, l.signer, l.next_nonce, l.chain_nonce, l.status, l.reason, l.version, l.updated_at
    FROM unnest($4::text[], $5::text[]) AS x(chain, signer)
    JOIN lanes l ON l.chain = x.chain AND l.signer = x.signer
    WHERE (SELECT count(*) FROM waiting) >= 0
    ORDER BY l.chain, l.signer
    FOR UPDATE OF l
)
SELECT w.*, NULL::text, NULL::text, NULL::bigint, NULL::bigint, NULL::text, NULL::text, NULL::bigint, NULL::timestamptz FROM waiting w
UNION ALL
SELECT NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, l.* FROM locked l

-- name: in_flight
-- Of each nonce the dearest attempt counts. Behind a lane's block is what the chain's own balances may not show yet. In parts: the
-- sum of what is below a nonce ($4), and from there on the first attempts that the asker does not know yet ($5) and those that
-- were raised (in_flight.py). How many rows lie beyond a nonce, a plan cannot know; a limit that it cannot know either ($6: none)
-- has it read them by their index, whatever it guesses.
SELECT x.chain, x.signer, f.*
FROM unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[], $5::bigint[]) AS x(chain, signer, block, start, unknown)
CROSS JOIN LATERAL (
    SELECT 'counted', 0::bigint, count(*) FILTER (WHERE n.unmined), coalesce(sum(n.wei), 0)::text,
           coalesce(sum(n.units), 0)::text
    FROM (
        SELECT bool_and(o.status <> 'mined') AS unmined,
               max(o.gas_limit * o.max_fee + coalesce(o.gas * 1000000000000, 0)) AS wei, max(o.amount) AS units
        FROM (
            SELECT a.nonce, a.status, a.gas_limit, a.max_fee,
                   (SELECT w.amount FROM withdrawals w WHERE w.id = a.withdrawal_id) AS amount,
                   (SELECT g.amount FROM gas_top_ups g
                    WHERE a.kind = 'top_up' AND g.chain = a.chain AND g.signer = a.signer AND g.nonce = a.nonce) AS gas
            FROM attempts a
            WHERE a.chain = x.chain AND a.signer = x.signer AND a.phase IN ('unmined', 'mined')
              AND (a.status <> 'mined' OR a.block_number > x.block) AND a.nonce < x.start
            ORDER BY a.nonce LIMIT $6::bigint
        ) AS o
        GROUP BY o.nonce
    ) AS n
    UNION ALL
    (SELECT 'first', a.nonce, 1,
            (a.gas_limit * a.max_fee + coalesce(
                (SELECT g.amount FROM gas_top_ups g
                 WHERE a.kind = 'top_up' AND g.chain = a.chain AND g.signer = a.signer AND g.nonce = a.nonce)
                * 1000000000000, 0))::text,
            coalesce((SELECT w.amount FROM withdrawals w WHERE w.id = a.withdrawal_id), 0)::text
     FROM attempts a
     WHERE a.chain = x.chain AND a.signer = x.signer AND a.nonce >= x.unknown AND a.n = 1
     ORDER BY a.nonce LIMIT $6::bigint)
    UNION ALL
    SELECT 'raised', a.nonce, 1, max(a.gas_limit * a.max_fee + coalesce(g.amount * 1000000000000, 0))::text, '0'
    FROM attempts a
    LEFT JOIN gas_top_ups g ON a.kind = 'top_up' AND g.chain = a.chain AND g.signer = a.signer AND g.nonce = a.nonce
    WHERE a.chain = x.chain AND a.signer = x.signer AND a.nonce >= x.start AND a.n > 1
    GROUP BY a.nonce
) AS f

-- name: any_restore
SELECT EXISTS (SELECT FROM restores)
