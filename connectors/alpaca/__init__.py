"""Alpaca's Broker API: the client, and a sandbox that speaks its wire format."""
