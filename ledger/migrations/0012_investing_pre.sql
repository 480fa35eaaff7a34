-- Orders, what they hold, and a legacy table beside the ledger.
SELECT 1;
