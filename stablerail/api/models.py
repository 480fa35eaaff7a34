"""The answers' shapes; the ledger's are in stablerail/answers.py.

Amounts are decimal strings with six decimals; times are RFC 3339 in UTC; ids are 32 hex digits."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from agents.withdrawals.withdrawal import Status
from stablerail.answers import Answer, Decimal, Held, Hex
from topics.events import Asked, Rail, Text
from topics.money import parse_amount

_ADDRESS = "0x5b38da6a701c568545dcfcb03fcb875f56beddc4"
_TX = "0x8c1f2d1e6a7b9c3d4e5f60718293a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5"


def _amount(text: str) -> str:
    """As it was written: the same key with another spelling is another request."""
    if not parse_amount(text):
        raise ValueError("the amount must be above zero")
    return text


def _limit(text: str) -> str:
    parse_amount(text)
    return text


def _storable(text: str) -> str:
    if any(one == "\0" or "\ud800" <= one <= "\udfff" for one in text):
        raise ValueError("a text has no NUL and no half of a surrogate pair: PostgreSQL keeps none")
    return text


Storable = Annotated[str, AfterValidator(_storable)]


class Problem(Answer):
    """RFC 9457. `code` is stable and meant for programs; `detail` is for people. Served as application/problem+json."""

    type: str = Field(examples=["about:blank"])
    title: str = Field(examples=["Not Found"])
    status: int = Field(examples=[404])
    code: str = Field(examples=["unknown_user"])
    detail: str = Field(examples=["No wallet and no account belongs to this user."])
    errors: list[dict[str, str]] | None = Field(None, description="the wrong fields, with invalid_request")


class Balance(Held):
    """What a customer has of one asset."""

    not_final: Decimal = Field(description="deposited, credited already, and not final on its chain yet")


class Balances(Answer):
    user_id: str = Field(examples=["user_42"])
    balances: list[Balance]


class Wallet(Answer):
    chain: str = Field(examples=["MATIC"])
    address: str = Field(examples=[_ADDRESS])
    wallet_id: str = Field(description="the custodian's id", examples=["ce714f5b-2f9c-4a64-9d3f-1f6a4f0c7a10"])
    created_at: datetime


class AwaitedWallet(Answer):
    chain: str = Field(examples=["SOL"])
    status: str = Field(description="requested, or failed", examples=["requested"])


class Wallets(Answer):
    user_id: str = Field(examples=["user_42"])
    wallets: list[Wallet]
    awaited: list[AwaitedWallet] = Field(description="chains whose wallet is not there yet")


DepositStatus = Literal["pending", "credited", "orphaned", "finalized", "reversed", "parked", "vanished"]


class Deposit(Answer):
    """One transfer to a customer's wallet."""

    id: Hex
    user_id: str | None = Field(description="null: the wallet's owner is not known", examples=["user_42"])
    status: DepositStatus = Field(
        description="pending: reported, not credited; credited: on the balance; orphaned: its block left the chain. "
        "The ends: finalized; reversed: the chain dropped it, or it failed; parked: final and kept in suspense; vanished: "
        "never credited, and not on its chain"
    )
    chain: str = Field(examples=["MATIC"])
    tx_hash: str = Field(examples=[_TX])
    to: str = Field(examples=[_ADDRESS])
    asset: str = Field(examples=["USDC"])
    amount: Decimal
    n: int = Field(description="the n-th equal transfer to this address in this transaction, from 0", examples=[0])
    generation: int = Field(description="how often it was mined again after a reorg", examples=[0])
    block_hash: str | None
    block_number: int | None
    log_index: int | None = Field(description="known only when we read the chain ourselves")
    credited_at: datetime | None
    finalized_at: datetime | None
    updated_at: datetime
    sender: str | None = Field(description="where it came from, where a source has said", examples=[_ADDRESS])
    held: str | None = Field(
        description="why it was not credited at once: unproven, at_finality, above_instant_limit, above_outstanding_limit, "
        "denied, below_minimum, unknown_owner, account_closed"
    )


class Report(Answer):
    """Who said that this transfer happened, with the best evidence it gave."""

    source: str = Field(examples=["circle"])
    transfer_id: str = Field(description="the source's own id of the transfer")
    evidence: str = Field(description="seen, confirmed, complete or failed", examples=["confirmed"])
    block_hash: str | None = Field(description="in which block our own reader saw it")
    reported_at: datetime


class Entry(Answer):
    """One line on an account of the customer's. It proves itself: the balance after it and the account's version."""

    account: str = Field(examples=["usdc_balance"])
    asset: str = Field(examples=["USDC"])
    direction: Literal["debit", "credit"]
    amount: Decimal
    balance_after: Decimal
    version: int


class Transaction(Answer):
    """A ledger transaction this deposit caused. Lines on the company's own accounts are not shown."""

    id: Hex
    kind: str = Field(examples=["deposit_credited"])
    at: datetime
    entries: list[Entry]


class DepositHistory(Deposit):
    """A deposit, who reported it, and what it did to the ledger, each in order of time."""

    reports: list[Report]
    transactions: list[Transaction]


class Deposits(Answer):
    deposits: list[Deposit] = Field(description="pending ones first, then the newest credited first")
    next: str | None = Field(description="cursor of the next page; null = this was the last")


class WithdrawalWish(BaseModel):
    """What is asked for. Whether it may be is decided after the answer: `withdrawals.settled`, or the withdrawal itself, tells."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    user_id: Text = Field(description="your own id of the customer", examples=["user_42"])
    chain: Asked = Field(examples=["MATIC"])
    asset: Asked = Field(examples=["USDC"])
    amount: Annotated[str, AfterValidator(_amount)] = Field(
        description="decimal string above zero, at most six decimals", max_length=40, examples=["25.00"]
    )
    to: Asked = Field(description="where it goes", examples=[_ADDRESS])
    rail: Rail = Field(
        Rail.CHAIN, description="chain: signed by our own wallet; circle: sent by Circle, where that is set up"
    )


class Withdrawal(Answer):
    """Money on its way out."""

    id: Hex
    user_id: str = Field(examples=["user_42"])
    idempotency_key: str = Field(examples=["payout-7"])
    status: Status = Field(
        description="pending: asked for; signing: accepted and held; broadcasting and confirming: it may be on its way; "
        "completed, failed and cancelled are the ends; manual_review: a person looks",
        examples=[Status.PENDING],
    )
    code: str | None = Field(description="why it failed, or is looked at", examples=["insufficient_funds"])
    rail: str = Field(examples=["chain"])
    chain: str = Field(examples=["MATIC"])
    asset: str = Field(examples=["USDC"])
    amount: Decimal
    to: str = Field(examples=[_ADDRESS])
    requested_at: datetime
    updated_at: datetime
    settled_at: datetime | None


class WithdrawalStep(Answer):
    status: Status
    code: str | None
    actor: str = Field(description="the stage, or the API key", examples=["accept_withdrawals"])
    at: datetime


class Attempt(Answer):
    """A transaction that was signed for a withdrawal."""

    tx_hash: str = Field(examples=[_TX])
    signer: str = Field(examples=[_ADDRESS])
    nonce: int
    n: int = Field(description="which of its nonce's attempts, from 1")
    kind: Literal["payment", "cancel"]
    status: Literal["signed", "broadcast", "mined", "confirmed", "replaced", "reverted", "dropped"]
    error: str | None
    gas_limit: int
    max_fee_wei: str = Field(description="per gas", examples=["60000000000"])
    priority_fee_wei: str = Field(description="per gas", examples=["30000000000"])
    block_hash: str | None
    block_number: int | None
    confirmations: int | None = Field(description="blocks on top of its own, as far as the chain was read")
    signed_at: datetime
    broadcast_at: datetime | None
    updated_at: datetime


class CustodianTransfer(Answer):
    """What a custodian makes of a withdrawal that it sends."""

    custodian: str = Field(examples=["circle"])
    transfer_id: str | None = Field(description="the custodian's own id; null = it has not answered yet")
    state: str = Field(description="in the custodian's words; ASKED and REFUSED are ours", examples=["SENT"])
    tx_hashes: list[str] = Field(description="all that it told of, the oldest first", examples=[[_TX]])
    block_number: int | None
    reason: str | None = Field(description="why it failed, in its words", examples=["INSUFFICIENT_TOKEN"])
    created_at: datetime
    updated_at: datetime


class WithdrawalHistory(Withdrawal):
    """A withdrawal, each state it had, and the transactions signed for it, or the transfer that a custodian makes."""

    history: list[WithdrawalStep]
    attempts: list[Attempt]
    transfer: CustodianTransfer | None = Field(None, description="of the rail `circle`, once it was asked for")


class Withdrawals(Answer):
    withdrawals: list[Withdrawal] = Field(description="the newest first")
    next: str | None = Field(description="cursor of the next page; null = this was the last")


class Limit(Answer):
    """A limit that holds."""

    name: str = Field(examples=["withdrawal.max.MATIC"])
    value: Decimal
    default: Decimal = Field(description="what the settings say, and holds where nobody set another")
    updated_by: str | None = Field(
        description="who set it; null = the default holds", examples=["key:0123456789abcdef"]
    )
    updated_at: datetime | None


class Limits(Answer):
    limits: list[Limit]


class LimitChanges(BaseModel):
    """Names and their new values; null unsets."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    limits: Annotated[
        dict[str, Annotated[str, AfterValidator(_limit)] | None],
        Field(min_length=1, max_length=100, examples=[{"withdrawal.max.MATIC": "5000.00"}]),
    ]


class ListedDeposits(Answer):
    deposits: list[Deposit] = Field(description="in the order of their ids")
    next: str | None = Field(description="cursor of the next page; null = this was the last")


class ListedWallet(Wallet):
    user_id: str = Field(examples=["user_42"])


class ListedWallets(Answer):
    wallets: list[ListedWallet] = Field(description="in the order of chains and addresses")
    next: str | None = Field(description="cursor of the next page; null = this was the last")


class Health(Answer):
    status: str = Field(examples=["ok"])
