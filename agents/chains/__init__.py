"""Chains that we read ourselves: heads and transfers to our wallets."""
