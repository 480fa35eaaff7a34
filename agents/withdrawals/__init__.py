"""Money goes out: request, signature, broadcast, confirmation, settlement."""
