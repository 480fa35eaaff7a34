"""Circle Mint's notifications, version 1, over Amazon SNS: incoming transfers -> deposits.notified; payments -> payments.updated;
wallets and recipients -> circle.wallets.updated.

SNS delivers at least once, in any order, and Circle sends from two regions: each fact has an id made of Circle's own id and of what
it says, never of the SNS message. A transfer that is not `complete` is not told: it can still fail, and Mint's chains are not
read by us, so that nobody could take the credit back. A subscription is confirmed by ourselves, at Amazon's own address only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Annotated, Any, Final

import orjson
import structlog
from pydantic import Field, ValidationError

from connectors import errors
from connectors.circle.chains import EVM_CHAINS, Network, from_mint
from connectors.circle.sns import SnsVerifier, read
from connectors.circle.transactions import Model, wrong_schema
from connectors.webhooks.source import Act, Ignored, NotNow, NotUnderstood, Publish, Translation
from topics import catalog
from topics.catalog import Topic
from topics.envelope import value_of
from topics.events import Address, CircleWalletUpdated, DepositNotified, Event, Evidence, PaymentUpdated, Text, TxHash

log = structlog.get_logger()

SOURCE: Final = "circle_mint"
HEADER: Final = "x-amz-sns-message-type"
"""Which requests are SNS's; what a message is, its signed body says."""

Confirm = Callable[[str], Awaitable[object]]
"""GET without redirects; raises connectors.errors.ConnectorError."""


class _Envelope(Model):
    notification_type: str
    version: int = 1


class _Money(Model):
    amount: str
    currency: Annotated[str, Field(pattern=r"^[A-Z]{3,10}$")]


class _Place(Model):
    type: str
    id: str | None = None
    chain: Annotated[str, Field(pattern=r"^[A-Z0-9]{1,20}$")] | None = None
    address: Address | None = None


class _Transfer(Model):
    id: Text
    source: _Place
    destination: _Place
    amount: _Money
    status: str
    transaction_hash: TxHash | None = None


class _Incoming(Model):
    """What a transfer needs to be somebody's deposit."""

    chain: str
    to: Address
    tx_hash: TxHash


class _Payment(Model):
    id: Text
    type: Text
    status: Text
    amount: _Money | None = None
    transaction_hash: TxHash | None = None
    update_date: Text | None = None


class _Recipient(Model):
    id: Text
    status: Text | None = None
    chain: Text | None = None
    address: Address | None = None
    update_date: Text | None = None


class _Wallet(Model):
    wallet_id: Text
    status: Text | None = None
    update_date: Text | None = None


UNFINISHED: Final = frozenset({"pending", "running"})
IGNORED_TYPES: Final = frozenset(
    {
        "paymentIntents",
        "payouts",
        "deposits",
        "wire",
        "externalEntities",
        "creditTransfers",
        "creditFees",
        "creditRepayments",
        "approvalWorkflowTransferApproved",
        "approvalWorkflowTransferRejected",
    }
)
ENDED: Final = frozenset({"complete", "failed"})
"""Of a transfer: states that no other follows."""
NOT_INCOMING: Final = Ignored("transfers.not_incoming")
_ASSETS: Final = {"USD": "USDC"}
"""Mint shows USDC by the currency it stands for."""


def translate(message: bytes | str, network: Network) -> Translation:
    """What a notification of Circle's says. Pure and total."""
    try:
        content = orjson.loads(message)
    except orjson.JSONDecodeError:
        return NotUnderstood("not_json", "the message is not JSON")
    try:
        envelope = _Envelope.model_validate(content)
        if envelope.version != 1:
            return NotUnderstood("unsupported_version", "the notification's version is not 1")
        if envelope.notification_type in IGNORED_TYPES:
            return Ignored(envelope.notification_type)
        reader = _READERS.get(envelope.notification_type)
        if reader is None:
            return NotUnderstood("unknown_type", f"notificationType {envelope.notification_type[:80]!a}")
        return reader(content, network)
    except ValidationError as error:
        return wrong_schema(error)


def notified(transfer: Any) -> Translation:
    """What a transfer says, the same from a notification, the list and a look-up. Pure and total."""
    try:
        return _notified(_Transfer.model_validate(transfer))
    except ValidationError as error:
        return wrong_schema(error)


def _transfer(content: Mapping[str, Any], _network: Network) -> Translation:
    return notified(content.get("transfer"))


def _notified(transfer: _Transfer) -> Translation:
    if transfer.source.type != "blockchain" or transfer.destination.type != "wallet":
        return NOT_INCOMING
    if transfer.status in UNFINISHED:
        return Ignored("transfers.unfinished")
    if transfer.status == "failed":
        return Ignored("transfers.failed")
    if transfer.status != "complete":
        return NotUnderstood("unknown_state", f"a transfer in status {transfer.status[:80]!a}")
    incoming = _Incoming.model_validate(
        {"chain": transfer.source.chain, "to": transfer.destination.address, "txHash": transfer.transaction_hash}
    )
    chain = from_mint(incoming.chain)
    in_hex = chain in EVM_CHAINS
    event = DepositNotified(
        source=SOURCE,
        transfer_id=transfer.id,
        chain=chain or f"circle:{incoming.chain}",
        tx_hash=incoming.tx_hash.lower() if in_hex else incoming.tx_hash,
        to=incoming.to.lower() if in_hex else incoming.to,
        asset=_ASSETS.get(transfer.amount.currency, f"circle:{transfer.amount.currency}"),
        amount=transfer.amount.amount,
        evidence=Evidence.COMPLETE,
    )
    return _said(catalog.DEPOSITS_NOTIFIED, event.to, event, transfer.id)


def _payment(content: Mapping[str, Any], _network: Network) -> Translation:
    payment = _Payment.model_validate(content.get("payment"))
    event = PaymentUpdated(
        source=SOURCE,
        payment_id=payment.id,
        kind=payment.type,
        status=payment.status,
        amount=payment.amount and payment.amount.amount,
        currency=payment.amount and payment.amount.currency,
        tx_hash=payment.transaction_hash,
        updated_at=payment.update_date,
    )
    return _said(catalog.PAYMENTS_UPDATED, payment.id, event, payment.id)


def _recipient(content: Mapping[str, Any], _network: Network) -> Translation:
    given = _Recipient.model_validate(content.get("addressBookRecipient"))
    event = CircleWalletUpdated(
        wallet_id=given.id,
        kind="addressBookRecipients",
        status=given.status,
        chain=given.chain,
        address=given.address,
        updated_at=given.update_date,
    )
    return _said(catalog.CIRCLE_WALLETS_UPDATED, given.id, event, given.id)


def _wallet(content: Mapping[str, Any], _network: Network) -> Translation:
    """Circle documents no such type; configurations of ours name it, so it is read should it come."""
    given = _Wallet.model_validate(content.get("wallet"))
    event = CircleWalletUpdated(
        wallet_id=given.wallet_id, kind="wallets", status=given.status, updated_at=given.update_date
    )
    return _said(catalog.CIRCLE_WALLETS_UPDATED, given.wallet_id, event, given.wallet_id)


def _said(topic: Topic, key: str, event: Event, resource_id: str) -> Publish:
    """Both regions say the same in messages of different ids; another state of the resource is another event."""
    contents = hashlib.blake2b(value_of(event), digest_size=8).hexdigest()
    return Publish(topic, key.encode(), event, f"{event.type}:{resource_id}:{contents}", SOURCE)


_READERS: Final[Mapping[str, Callable[[Mapping[str, Any], Network], Translation]]] = {
    "transfers": _transfer,
    "payments": _payment,
    "addressBookRecipients": _recipient,
    "wallets": _wallet,
}


class MintWebhooks:
    """Circle Mint's part of the bridge (connectors.webhooks.source.WebhookSource)."""

    def __init__(self, verifier: SnsVerifier, confirm: Confirm, network: Network) -> None:
        self._verifier = verifier
        self._confirm = confirm
        self._network = network

    @property
    def vendor(self) -> str:
        return SOURCE

    async def verify(self, _headers: Mapping[str, str], body: bytes) -> None:
        await self._verifier.verify(body)

    def translate(self, body: bytes) -> tuple[Translation, ...]:
        message = read(body)
        if message is None:
            return (NotUnderstood("wrong_schema", "the body is no message of Amazon SNS"),)
        if message.Type == "Notification":
            return (translate(message.Message, self._network),)
        if message.Type == "UnsubscribeConfirmation":
            log.warning("sns_unsubscribed", topic=message.TopicArn)
            return (Ignored("unsubscribed"),)
        if message.SubscribeURL is None or not self._verifier.trust.allows(message.SubscribeURL):
            return (NotUnderstood("bad_subscribe_url", "SubscribeURL is not an address of Amazon SNS"),)
        return (Act("subscription_confirmed", partial(self._subscribe, message.SubscribeURL)),)

    async def _subscribe(self, url: str) -> None:
        """Confirming twice is confirming once."""
        try:
            await self._confirm(url)
        except errors.ConnectorError as error:
            raise NotNow(f"the subscription could not be confirmed: {error.code}") from None
