-- What a lane has sped up is found at once, however much it has in flight.
CREATE INDEX attempts_raised ON attempts (chain, signer, nonce) WHERE n > 1;
