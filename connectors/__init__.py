"""Other people's systems: one folder per partner, each with a sandbox server that speaks its wire format."""
