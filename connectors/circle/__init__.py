"""Circle's developer-controlled wallets (W3S) and Mint: clients, chain names, signed notifications, and a sandbox server of both."""
