"""Every topic, declared once. `stablerail topics create` makes what is missing and reports what differs.

Names here carry no prefix; `Topic.named(prefix)` is what the broker knows. Co-partitioned topics (same key, same count)
keep a wallet's, a customer's and a chain's events in order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from topics import events
from topics.events import Event

DAY_MS = 24 * 60 * 60 * 1000

INPUT_BYTES_MAX = 1_000_000
"""A value over it is refused at the edge, and by the stage where a producer is not ours."""
RECORD_BYTES_MAX = 8_000_000
"""Journal and dead letters carry inputs plus what we add; larger commit records go in parts."""
FRAMING_BYTES = 100_000
"""The broker takes so much more than a topic's limit: headers, and the framing of batches."""
FRAMING_BYTES_USED = 90_000
"""So much of it a message may have that is sent once more, with headers of ours."""


@dataclass(frozen=True)
class Topic:
    name: str
    key: str
    """What the message key is, for people and for AsyncAPI."""
    models: tuple[type[Event], ...] = ()
    partitions: int = 4
    retention_ms: int = 7 * DAY_MS
    bytes_max: int = INPUT_BYTES_MAX
    compacted: bool = False
    config: dict[str, str] = field(default_factory=dict, hash=False)

    def named(self, prefix: str) -> str:
        """The topic's name on the broker."""
        return f"{prefix}{self.name}"

    @property
    def dlq(self) -> Topic:
        """Where its refused messages go, with their bytes."""
        return Topic(
            name=f"{self.name}.dlq",
            key="as the refused message",
            partitions=1,
            retention_ms=90 * DAY_MS,
            bytes_max=RECORD_BYTES_MAX,
        )

    def broker_config(self) -> dict[str, str]:
        """Topic-level settings as the broker names them."""
        return {
            "retention.ms": str(self.retention_ms),
            "max.message.bytes": str(self.bytes_max + FRAMING_BYTES),
            "cleanup.policy": "compact" if self.compacted else "delete",
            # the broker unpacks what a producer compressed, so the limit holds for the contents: no bomb reaches us
            "compression.type": "uncompressed",
            **self.config,
        }


KYC_APPROVED = Topic("kyc.approved", key="user id", models=(events.KycApproved,))
KYC_REJECTED = Topic("kyc.rejected", key="user id", models=(events.KycRejected,))
WALLETS_REQUESTED = Topic("wallets.requested", key="user id", models=(events.WalletsRequested,))
WALLETS_PROVISIONED = Topic("wallets.provisioned", key="user id", models=(events.WalletsProvisioned,))
WALLETS_FROZEN = Topic("wallets.frozen", key="user id", models=(events.WalletsFrozen,))
DEPOSITS_NOTIFIED = Topic("deposits.notified", key="destination address", models=(events.DepositNotified,))
DEPOSITS_CREDITED = Topic("deposits.credited", key="destination address", models=(events.DepositCredited,))
DEPOSITS_FINALIZED = Topic("deposits.finalized", key="destination address", models=(events.DepositFinalized,))
DEPOSITS_PARKED = Topic("deposits.parked", key="destination address", models=(events.DepositParked,))
CHAIN_HEADS = Topic("chain.heads", key="chain", models=(events.HeadSeen,), retention_ms=DAY_MS)
WITHDRAWALS_REQUESTED = Topic("withdrawals.requested", key="user id", models=(events.WithdrawalRequested,))
WITHDRAWALS_ACCEPTED = Topic("withdrawals.accepted", key="chain", models=(events.WithdrawalAccepted,))
TRANSFERS_NOTIFIED = Topic(
    "transfers.notified", key="withdrawal id, else transfer id", models=(events.TransferNotified,)
)
TRANSACTIONS_SIGNED = Topic("transactions.signed", key="lane: chain:signer", models=(events.TransactionSigned,))
TRANSACTIONS_BROADCAST = Topic(
    "transactions.broadcast", key="lane: chain:signer", models=(events.TransactionBroadcast,)
)
TRANSACTIONS_CONFIRMED = Topic(
    "transactions.confirmed", key="lane: chain:signer", models=(events.TransactionConfirmed,)
)
WITHDRAWALS_SETTLED = Topic("withdrawals.settled", key="user id", models=(events.WithdrawalSettled,))
ORDERS_PLACED = Topic("orders.placed", key="order id", models=(events.OrderPlaced,))
ORDERS_RESERVED = Topic("orders.reserved", key="order id", models=(events.OrderReserved,))
ORDERS_REJECTED = Topic("orders.rejected", key="order id", models=(events.OrderRejected,))
ORDERS_FILLED = Topic("orders.filled", key="order id", models=(events.OrderFilled,))
ORDERS_CANCELLED = Topic("orders.cancelled", key="order id", models=(events.OrderCancelled,))
ORDERS_EXPIRED = Topic("orders.expired", key="order id", models=(events.OrderExpired,))
ORDERS_SETTLED = Topic("orders.settled", key="order id", models=(events.OrderSettled,))
BROKER_FUNDED = Topic("broker.funded", key="funding id", models=(events.BrokerFunded,))
BUFFERS_LEVELS = Topic("buffers.levels", key="account", models=(events.BufferLevel,), partitions=1, compacted=True)
BUFFERS_TABLE = Topic("buffers.table", key="account, JSON", partitions=1, compacted=True)
"""The change log of the Faust table over it: who takes the partition over has the levels before the first event."""
NONCES_TABLE = Topic("nonces.table", key="lane, JSON", compacted=True)
"""The change log of the Faust table over transactions.signed, partitioned like it."""
PAYMENTS_UPDATED = Topic("payments.updated", key="payment id", models=(events.PaymentUpdated,))
CIRCLE_WALLETS_UPDATED = Topic("circle.wallets.updated", key="wallet id", models=(events.CircleWalletUpdated,))
WEBHOOKS_DLQ = Topic("webhooks.dlq", key="vendor", partitions=1, retention_ms=90 * DAY_MS, bytes_max=RECORD_BYTES_MAX)
JOURNAL = Topic(
    "journal",
    key="sequence number, 8 bytes, big endian",
    partitions=1,
    retention_ms=-1,
    bytes_max=RECORD_BYTES_MAX,
)

INPUTS = (
    KYC_APPROVED,
    KYC_REJECTED,
    WALLETS_REQUESTED,
    WALLETS_PROVISIONED,
    WALLETS_FROZEN,
    DEPOSITS_NOTIFIED,
    DEPOSITS_CREDITED,
    DEPOSITS_FINALIZED,
    DEPOSITS_PARKED,
    CHAIN_HEADS,
    WITHDRAWALS_REQUESTED,
    WITHDRAWALS_ACCEPTED,
    TRANSFERS_NOTIFIED,
    TRANSACTIONS_SIGNED,
    TRANSACTIONS_BROADCAST,
    TRANSACTIONS_CONFIRMED,
    WITHDRAWALS_SETTLED,
    ORDERS_PLACED,
    ORDERS_RESERVED,
    ORDERS_REJECTED,
    ORDERS_FILLED,
    ORDERS_CANCELLED,
    ORDERS_EXPIRED,
    ORDERS_SETTLED,
    BROKER_FUNDED,
    PAYMENTS_UPDATED,
    CIRCLE_WALLETS_UPDATED,
)
"""Topics that stages read or the world reads; each has a dead-letter topic."""

TOPICS: tuple[Topic, ...] = (
    *INPUTS,
    *(topic.dlq for topic in INPUTS),
    WEBHOOKS_DLQ,
    JOURNAL,
    BUFFERS_LEVELS,
    BUFFERS_TABLE,
    NONCES_TABLE,
)


def by_name(name: str) -> Topic:
    """The declared topic of that name (without prefix). KeyError when there is none."""
    return _BY_NAME[name]


_BY_NAME = {topic.name: topic for topic in TOPICS}


def bytes_max(name: str) -> int:
    """The largest record batch that the topic takes; an undeclared topic (a test's) is taken for an input."""
    topic = _BY_NAME.get(name)
    return INPUT_BYTES_MAX if topic is None else topic.bytes_max


def bytes_of(key: bytes | None, value: bytes | None, headers: Iterable[tuple[str, bytes | None]]) -> int:
    """What a message takes in a batch, but for its own framing: some tens of bytes."""
    size = len(key or b"") + len(value or b"")
    return size + sum(len(name.encode(errors="replace")) + len(content or b"") + 8 for name, content in headers)


def fits(name: str, key: bytes | None, value: bytes | None, headers: Iterable[tuple[str, bytes | None]]) -> bool:
    """Whether the topic takes such a message once more."""
    return bytes_of(key, value, headers) <= bytes_max(name) + FRAMING_BYTES_USED
