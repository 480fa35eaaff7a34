-- When no writer of 0001 is left. Reads the tables while they are written.
ALTER TABLE accounts VALIDATE CONSTRAINT accounts_closed_empty;
ALTER TABLE transactions VALIDATE CONSTRAINT transactions_hold_step;
