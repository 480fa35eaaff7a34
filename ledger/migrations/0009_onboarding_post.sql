-- When no writer of the release before is left. Reads the tables while they are written.
ALTER TABLE calls VALIDATE CONSTRAINT calls_state_check;
ALTER TABLE wallet_requests VALIDATE CONSTRAINT wallet_requests_status_check;
