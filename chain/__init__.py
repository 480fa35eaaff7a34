"""What a chain says: assets, addresses, logs, finality and the scan's arithmetic (pure); rpc, scanner, evidence (I/O)."""
