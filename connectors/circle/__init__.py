"""Circle's developer-controlled wallets (W3S): client, chain names, signed notifications, and a sandbox server of it."""
