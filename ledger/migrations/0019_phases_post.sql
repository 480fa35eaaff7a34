-- When no reader of the release before is left.
DROP INDEX attempts_open, attempts_mined, attempts_confirmed, withdrawals_open;
