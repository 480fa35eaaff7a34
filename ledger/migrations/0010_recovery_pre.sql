-- What recovery keeps.
SELECT;
