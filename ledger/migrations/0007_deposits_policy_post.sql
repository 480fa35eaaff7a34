-- When no writer of the version before is left. Reads the table while it is written.
ALTER TABLE deposits VALIDATE CONSTRAINT deposits_status_check;
