"""A server of Circle's W3S wire format, with real keys and addresses, for demos and tests. State is in memory only.

server       CircleSandbox: runs it in this process;  python -m connectors.circle.sandbox runs it as one of its own
app          the FastAPI app: who may call, error bodies, life cycle of the background work
wallets      wallet sets, wallets, balances, tokens, transactions, the entity secret
transfers    transfers out, which really move USDC on the watched chain, and their states
webhooks     subscriptions and the keys of notifications
mint         Circle Mint's notifications: subscriptions of two regions, signed as Amazon SNS signs
control      /_control: faults, injected transfers, disorder of deliveries, the sandbox's own records
state        what exists, idempotency, paging
keys         the entity's RSA key, the signing key of notifications, key pairs and addresses of each chain
gate         faults on demand and rate limits, before anything else sees a request
chainwatch   reads an EVM chain and turns USDC logs into inbound transactions
deliveries   signs and delivers notifications: retries, duplicates, drops, other order

Not simulated: SCA wallets, screening, fees, accelerating and cancelling a transfer, the faucet.
"""

from connectors.circle.sandbox.config import SandboxConfig
from connectors.circle.sandbox.server import CircleSandbox

__all__ = ["CircleSandbox", "SandboxConfig"]
