"""Every event that may be said. Past-tense facts, frozen; amounts are decimal strings in JSON and base units inside.

A change that an old reader would misunderstand is a new version: a new model, and the old one stays until its topic's
retention has passed. Unknown fields are ignored, so adding an optional field is no new version.
"""

from __future__ import annotations

from enum import StrEnum
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from topics.money import Amount, Balance, Total

Text = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[\x21-\x7e][\x20-\x7e]*$")]
"""Printable ASCII: identifiers of ours and of vendors."""
Address = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[0-9A-Za-z_.:-]+$")]
"""Checked by the chain's own rules where it is used, not here: an event of an unknown chain must stay readable."""
TxHash = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[0-9A-Za-z]+$")]
BlockHash = Annotated[str, StringConstraints(pattern=r"^0x[0-9a-f]{64}$")]


class Chain(StrEnum):
    """The chains we have wallets on; which network (mainnet or testnet) is a setting of the deployment."""

    ETH = "ETH"
    SOL = "SOL"
    APTOS = "APTOS"
    MATIC = "MATIC"
    AVAX = "AVAX"


_set = object.__setattr__  # the models are frozen


class Event(BaseModel):
    """The base: frozen, versioned."""

    model_config = ConfigDict(frozen=True, extra="ignore", str_strip_whitespace=False, use_attribute_docstrings=True)
    type: ClassVar[str]
    version: Literal[1] = 1

    @classmethod
    @cache
    def ce_type(cls) -> str:
        """`ce_type` header: io.stablerail.<type>.v<version>."""
        return f"io.stablerail.{cls.type}.v{cls.model_fields['version'].default}"

    @classmethod
    def known(cls, **fields: Any) -> Self:
        """An event of our own making whose every field is as the model holds it: validating it again would cost more than
        deciding it. The tests validate what is emitted."""
        event = cls.__new__(cls)
        _set(event, "__pydantic_fields_set__", set(fields))
        _set(event, "__pydantic_extra__", None)
        _set(event, "__pydantic_private__", None)
        fields["version"] = cls.__pydantic_fields__["version"].default
        _set(event, "__dict__", fields)
        return event

    def identity(self) -> str:
        """The event's id when a producer outside the project sent none: made of the payload's own identity fields."""
        raise NotImplementedError


class KycApproved(Event):
    """A KYC vendor approved a customer."""

    type = "kyc.approved"
    user_id: Text
    vendor: Text
    """`sumsub`"""
    applicant_id: Text
    """The vendor's id of the person."""
    vendor_event_id: Text
    approved_at: Text
    """The vendor's own words for the time; not parsed."""

    def identity(self) -> str:
        return f"{self.vendor}:{self.vendor_event_id}"


class KycRejected(Event):
    """A KYC vendor rejected a customer, perhaps one it had approved before."""

    type = "kyc.rejected"
    user_id: Text
    vendor: Text
    applicant_id: Text
    vendor_event_id: Text
    rejected_at: Text
    """The vendor's own words for the time."""
    final: bool
    """Whether the customer may not try again."""

    def identity(self) -> str:
        return f"{self.vendor}:{self.vendor_event_id}"


class WalletsRequested(Event):
    """A customer is to have a wallet on each of these chains."""

    type = "wallets.requested"
    user_id: Text
    chains: Annotated[tuple[Chain, ...], Field(min_length=1)]

    def identity(self) -> str:
        return f"{self.user_id}:{','.join(self.chains)}"


class ProvisionedWallet(BaseModel):
    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)
    chain: Chain
    address: Address
    wallet_id: Text
    """The custodian's id."""


class WalletsProvisioned(Event):
    """A customer has these wallets."""

    type = "wallets.provisioned"
    user_id: Text
    wallets: tuple[ProvisionedWallet, ...]

    def identity(self) -> str:
        return f"{self.user_id}:{','.join(w.chain for w in self.wallets)}"


class WalletsFrozen(Event):
    """Whether a customer may withdraw has changed with the word of the KYC vendor. Deposits are credited all the same."""

    type = "wallets.frozen"
    user_id: Text
    frozen: bool
    reason: Text
    """`kyc_rejected` or `kyc_approved`."""
    vendor_event_id: Text

    def identity(self) -> str:
        return f"{self.user_id}:{self.vendor_event_id}"


class Evidence(StrEnum):
    """How sure a report of a transfer is, weakest first; or that it will never come."""

    SEEN = "seen"
    """Somebody says so."""
    CONFIRMED = "confirmed"
    """In a block, not final."""
    COMPLETE = "complete"
    """Final, in the source's words."""
    FAILED = "failed"
    """It will never come. Only the custodian's word is taken for it, and only on chains that we do not read."""


class DepositNotified(Event):
    """Somebody reports a transfer to an address of ours.  Key: the destination address, lower case on EVM chains."""

    type = "deposits.notified"
    source: Text
    """Who reports: `circle`, `scanner`, or another producer's name."""
    transfer_id: Text
    """The source's own id of the transfer: its transaction id, or `<block hash>:<log index>`."""
    chain: Text
    """A `Chain`; another one is refused by the stage with unknown_chain."""
    tx_hash: TxHash
    to: Address
    asset: Text
    """`USDC`; another one is refused by the stage with unsupported_token."""
    amount: Amount
    evidence: Evidence
    block_hash: BlockHash | None = None
    block_number: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    log_index: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    """Only a reader of the chain knows it."""
    sender: Address | None = None
    """Where the transfer came from, in the source's words."""

    def identity(self) -> str:
        return f"{self.source}:{self.transfer_id}:{self.evidence}"


class DepositCredited(Event):
    """A deposit is on its owner's balance.  Key: as deposits.notified."""

    type = "deposits.credited"
    deposit_id: Text
    user_id: Text
    chain: Chain
    tx_hash: TxHash
    to: Address
    asset: Text
    amount: Amount
    transaction_id: Text
    """The ledger transaction."""

    def identity(self) -> str:
        return self.transaction_id


class DepositFinalized(Event):
    """The end of a deposit: final on its chain, or reversed because the chain dropped it."""

    type = "deposits.finalized"
    deposit_id: Text
    user_id: Text
    chain: Chain
    tx_hash: TxHash
    asset: Text
    amount: Amount
    outcome: Literal["finalized", "reversed"]
    transaction_id: Text
    shortfall: Amount | None = None
    """Of a reversed one: what the customer did not have any more, and owes us."""

    def identity(self) -> str:
        return self.transaction_id


class DepositParked(Event):
    """A transfer to a wallet of ours is final on its chain, and nobody is credited: it is in suspense until people assign it.
    Key: as deposits.notified."""

    type = "deposits.parked"
    deposit_id: Text
    user_id: Text | None = None
    """Whose wallet it is; None where nobody knows."""
    chain: Chain
    tx_hash: TxHash
    to: Address
    sender: Address | None = None
    asset: Text
    amount: Amount
    reason: Literal["denied", "below_minimum", "unknown_owner", "account_closed"]
    transaction_id: Text

    def identity(self) -> str:
        return self.transaction_id


class HeadSeen(Event):
    """A chain has a new head.  Key: the chain. Taken by its number, so repeats and old ones do nothing."""

    type = "chain.heads"
    chain: Chain
    chain_id: Annotated[int, Field(ge=1, lt=2**63)]
    number: Annotated[int, Field(ge=0, lt=2**63)]
    block_hash: BlockHash
    timestamp_s: Annotated[int, Field(ge=0, lt=2**40)]

    def identity(self) -> str:
        return f"{self.chain}:{self.number}:{self.block_hash}"


class Rail(StrEnum):
    """The way money leaves by."""

    CHAIN = "chain"
    """Our own hot wallet signs a transaction."""
    CIRCLE = "circle"
    """Circle's transfer API sends it."""


Asked = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]
"""What a customer wrote, right or wrong, without control characters (PostgreSQL keeps no NUL): the stage's refusal is an
answer to the customer, not a dead letter."""


class WithdrawalRequested(Event):
    """A customer wants USDC sent to an address.  Key: user id."""

    type = "withdrawals.requested"
    user_id: Text
    idempotency_key: Text
    """The customer's own; one withdrawal for each, for ever."""
    chain: Asked
    asset: Asked
    amount: Asked
    """A decimal string, such as "25.00"."""
    to: Asked
    rail: Asked = Rail.CHAIN.value

    def identity(self) -> str:
        # both may hold a colon: the length tells where one ends and the other begins
        return f"{len(self.user_id)}:{self.user_id}:{self.idempotency_key}"


class WithdrawalAccepted(Event):
    """A withdrawal is valid and its amount is held: it waits for a signature.  Key: the chain."""

    type = "withdrawals.accepted"
    withdrawal_id: Text
    user_id: Text
    rail: Rail
    chain: Chain
    asset: Text
    amount: Amount
    to: Address

    def identity(self) -> str:
        return self.withdrawal_id


class TransferNotified(Event):
    """The custodian, or who looks at its list, says how a transfer out stands.  Key: its withdrawal's id, else the transfer's."""

    type = "transfers.notified"
    source: Text
    """Whose transfer it is: `circle`."""
    transfer_id: Text
    """The custodian's own id; `refused:<call>` of one that it did not take."""
    reference: Text | None = None
    """What we called it when we asked for it: the withdrawal's id. A notification may lack it."""
    state: Text
    """In the custodian's words: `SENT`, `COMPLETE`, `FAILED`; ours are `REFUSED` and `NOT_SHOWN`."""
    chain: Text | None = None
    to: Address | None = None
    amount: Amount | None = None
    tx_hash: TxHash | None = None
    """The newest: one that the custodian sends with higher fees has another."""
    block_number: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    reason: Text | None = None
    """Why it failed, in the custodian's words: `INSUFFICIENT_TOKEN`."""

    def identity(self) -> str:
        return f"{self.source}:{self.transfer_id}:{self.state}"


class TransactionSigned(Event):
    """A transaction of ours is signed and stored.  Key: the lane, `<chain>:<signer>`."""

    type = "transactions.signed"
    chain: Chain
    signer: Address
    nonce: Annotated[int, Field(ge=0, lt=2**63)]
    n: Annotated[int, Field(ge=1, lt=2**31)]
    """Which attempt of this nonce."""
    tx_hash: TxHash
    withdrawal_id: Text
    """What it pays; `top_up:<nonce>` where it gives coins for gas to a lane of ours."""

    def identity(self) -> str:
        return self.tx_hash


class TransactionBroadcast(TransactionSigned):
    """A node has a transaction of ours, for the first time or again.  Key: the lane."""

    type = "transactions.broadcast"


class TransactionConfirmed(Event):
    """A transaction of ours is final on its chain.  Key: the lane."""

    type = "transactions.confirmed"
    chain: Chain
    signer: Address
    nonce: Annotated[int, Field(ge=0, lt=2**63)]
    tx_hash: TxHash
    withdrawal_id: Text
    block_hash: BlockHash
    block_number: Annotated[int, Field(ge=0, lt=2**63)]
    outcome: Literal["confirmed", "reverted"]
    reason: str = ""
    """Why it reverted, as far as it can be told."""

    def identity(self) -> str:
        return f"{self.tx_hash}:{self.block_hash}"


class WithdrawalSettled(Event):
    """The end of a withdrawal.  Key: user id."""

    type = "withdrawals.settled"
    withdrawal_id: Text
    user_id: Text
    rail: Asked
    chain: Asked
    asset: Asked
    amount: Asked
    to: Asked
    outcome: Literal["completed", "failed", "cancelled"]
    code: Text | None = None
    """Why it failed."""
    tx_hash: TxHash | None = None
    """The transaction that was mined, paid or reverted."""

    def identity(self) -> str:
        return self.withdrawal_id


class OrderPlaced(Event):
    """A customer wants to invest: so much USDC is to be reserved before the broker gets the order.  Key: order id."""

    type = "orders.placed"
    order_id: Text
    """Yours; unique for ever."""
    user_id: Text
    amount: Amount
    """The most that it may cost."""

    def identity(self) -> str:
        return self.order_id


class OrderReserved(OrderPlaced):
    """The money of an order is set aside: the broker may have it.  Key: order id."""

    type = "orders.reserved"


class OrderRejected(OrderPlaced):
    """Nothing was set aside: the order must not be sent to the broker.  Key: order id."""

    type = "orders.rejected"
    code: Text
    """Why."""


class OrderFilled(Event):
    """The broker filled an order, or a part of it.  Key: order id."""

    type = "orders.filled"
    order_id: Text
    fill_id: Text
    """The broker's id of this fill."""
    amount: Amount
    """What this fill cost."""
    filled_total: Total | None = None
    """With the last fill: what the whole order cost. What was reserved beyond it is given back, once all fills that it sums
    have come."""

    def identity(self) -> str:
        told = f"{self.order_id}:{self.fill_id}"
        return told if self.filled_total is None else f"{told}:{self.filled_total}"


class OrderCancelled(Event):
    """An order ends without being filled any more.  Key: order id."""

    type = "orders.cancelled"
    order_id: Text
    filled_total: Total | None = None
    """What its fills cost in all: those that have not come yet are waited for. Without it, what remains is given back at once."""

    def identity(self) -> str:
        # a total that was refused is told again, put right
        return self.order_id if self.filled_total is None else f"{self.order_id}:{self.filled_total}"


class OrderExpired(OrderCancelled):
    """An order's time is over.  Key: order id."""

    type = "orders.expired"


class OrderSettled(Event):
    """The end of an order: nothing of it is reserved any more.  Key: order id."""

    type = "orders.settled"
    order_id: Text
    user_id: Text
    outcome: Literal["filled", "cancelled", "expired"]
    filled: Total
    released: Total
    """What was reserved and not needed."""

    def identity(self) -> str:
        return self.order_id


class BrokerFunded(Event):
    """USD of the company's own have arrived at the broker's firm account.  Key: funding id."""

    type = "broker.funded"
    funding_id: Text
    """Yours or the bank's; unique for ever."""
    amount: Amount
    """USD."""

    def identity(self) -> str:
        return self.funding_id


class BufferLevel(Event):
    """What a buffer account holds after a commit that moved it.  Key: the account. Taken by the highest version, so repeats
    and old ones do nothing."""

    type = "buffers.levels"
    account: Text
    """As `stablerail ledger balance` takes it: `system.system_buffer_usdc[3]:USDC`."""
    account_type: Text
    asset: Text
    shard: Annotated[str, StringConstraints(max_length=200)] = ""
    balance: Balance
    account_version: Annotated[int, Field(ge=0, lt=2**63)]
    """Entries of the account so far."""

    def identity(self) -> str:
        return f"{self.account}:{self.account_version}"


class PaymentUpdated(Event):
    """A payment or refund at the custodian's business account has a new status.  Key: payment id."""

    type = "payments.updated"
    source: Text
    """`circle_mint`"""
    payment_id: Text
    kind: Text
    """In the source's words: `payment`, `refund`."""
    status: Text
    """In the source's words: `pending`, `confirmed`, `paid`, `failed`, `action_required`."""
    amount: Amount | None = None
    currency: Text | None = None
    tx_hash: TxHash | None = None
    updated_at: Text | None = None
    """The source's own words for the time; not parsed."""

    def identity(self) -> str:
        return f"{self.source}:{self.payment_id}:{self.status}"


class CircleWalletUpdated(Event):
    """A wallet or a recipient's address at Circle's business account changed.  Key: wallet id."""

    type = "circle.wallets.updated"
    wallet_id: Text
    kind: Text
    """Circle's notification type: `addressBookRecipients`, `wallets`."""
    status: Text | None = None
    """In Circle's words: `pending`, `active`, `inactive`, `denied`."""
    chain: Text | None = None
    """Circle's name."""
    address: Address | None = None
    updated_at: Text | None = None
    """Circle's own words for the time; not parsed."""

    def identity(self) -> str:
        return f"{self.kind}:{self.wallet_id}:{self.status}:{self.updated_at}"


EVENTS: tuple[type[Event], ...] = (
    KycApproved,
    KycRejected,
    WalletsRequested,
    WalletsProvisioned,
    WalletsFrozen,
    DepositNotified,
    DepositCredited,
    DepositFinalized,
    DepositParked,
    HeadSeen,
    WithdrawalRequested,
    WithdrawalAccepted,
    TransferNotified,
    TransactionSigned,
    TransactionBroadcast,
    TransactionConfirmed,
    WithdrawalSettled,
    OrderPlaced,
    OrderReserved,
    OrderRejected,
    OrderFilled,
    OrderCancelled,
    OrderExpired,
    OrderSettled,
    BrokerFunded,
    BufferLevel,
    PaymentUpdated,
    CircleWalletUpdated,
)
