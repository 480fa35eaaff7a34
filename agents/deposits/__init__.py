"""Deposits: notified -> credited at once -> final, or reversed when the chain dropped them."""
