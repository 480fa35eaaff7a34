-- Orders, what they hold, and a legacy table beside the ledger.

-- Orders, in the words of whoever places them, and the fills that the broker told of. `fills_due` is what an order was filled for
-- in all, once its end has told: until the fills that are missing come, what they need stays held.
CREATE TABLE orders (
    id uuid PRIMARY KEY, fingerprint uuid NOT NULL, hold_id uuid, version bigint NOT NULL,
    order_id text NOT NULL, user_id text NOT NULL,
    amount numeric(38, 0) NOT NULL CHECK (amount > 0),
    filled numeric(38, 0) NOT NULL CHECK (filled BETWEEN 0 AND amount),
    status text NOT NULL CHECK (status IN ('reserved', 'rejected', 'filled', 'cancelled', 'expired')),
    code text, ends_as text CHECK (ends_as IN ('filled', 'cancelled', 'expired')),
    fills_due numeric(38, 0) CHECK (fills_due BETWEEN filled AND amount),
    placed_at timestamptz NOT NULL, updated_at timestamptz NOT NULL, ended_at timestamptz,
    CHECK ((ended_at IS NULL) = (status = 'reserved')), CHECK ((status = 'rejected') = (code IS NOT NULL))
) WITH (fillfactor = 70);
CREATE INDEX orders_user ON orders (user_id, placed_at, id);
CREATE INDEX orders_open ON orders (placed_at) WHERE status = 'reserved';

-- The id is that of the ledger transaction, made of the order's and the fill's.
CREATE TABLE order_fills (
    id uuid PRIMARY KEY, order_id uuid NOT NULL, fill_id text NOT NULL, amount numeric(38, 0) NOT NULL CHECK (amount > 0),
    paid_from text NOT NULL CHECK (paid_from IN ('hold', 'balance')), at timestamptz NOT NULL
);
CREATE INDEX order_fills_order ON order_fills (order_id);
