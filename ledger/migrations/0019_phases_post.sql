-- When no reader of the release before is left.
LOCK TABLE withdrawals, attempts IN ACCESS EXCLUSIVE MODE;
DROP INDEX attempts_open, attempts_mined, attempts_confirmed, withdrawals_open;
