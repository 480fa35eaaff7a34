-- What became final above a block: once a minute, custody asks for each chain what its wallets do not hold yet there. Deposits come
-- into it in the order of their blocks, so what a commit adds lies at its end.
CREATE INDEX deposits_final ON deposits (chain, block_number) WHERE status IN ('finalized', 'parked');
