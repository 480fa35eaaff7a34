-- Lanes that come and go, their keys and gas, and the second rail of withdrawals.
SELECT 1;
