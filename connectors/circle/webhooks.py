"""Circle's notifications, version 2: proven by ECDSA over the raw body, then translated to `deposits.notified` and
`transfers.notified`.

Circle signs with X-Circle-Signature (Base64 of a DER signature) and names the key in X-Circle-Key-Id. There is no time
in the signature: a replay is harmless because notificationId is the event's id. Delivery is at least once, in any order.
The key is Circle's, not ours: whoever has an account there can have it sign what happens in his own wallets, with references of
his choice, and send us that. Only the subscription's id, which is signed too, says that it was meant for us.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Mapping
from collections.abc import Set as AbstractSet
from functools import partial
from typing import Any, Final
from uuid import UUID

import orjson
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import ValidationError

from connectors import errors
from connectors.circle.chains import Network
from connectors.circle.lookups import Lookups
from connectors.circle.transactions import SOURCE, Model, notified, transferred, wrong_schema
from connectors.webhooks.source import Ignored, NotUnderstood, Publish, RefusalCode, Refused, Translation
from topics import catalog
from topics.events import Text

KEYS_MAX: Final = 64  # Circle confirmed each of them, so nobody else can fill the cache
LOOKUPS_PER_MIN: Final = 10  # unknown key ids we ask Circle about: random ones must not use up its rate limit

FetchKey = Callable[[str], Awaitable[bytes]]
"""CircleClient.notification_public_key."""


class CircleWebhooks:
    """Circle's part of the bridge (connectors.webhooks.source.WebhookSource)."""

    def __init__(
        self,
        fetch_key: FetchKey,
        network: Network,
        usdc_tokens: Mapping[str, str],
        *,
        subscriptions: Collection[str] = (),
        lookups_per_min: int = LOOKUPS_PER_MIN,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`usdc_tokens`: Circle's token id -> our asset, such as {"5797fbd6-…": "USDC"}. `subscriptions`: the ids of ours; without
        any, every one is taken for ours. `clock` in seconds."""
        self._fetch_key = fetch_key
        self._network = network
        self._usdc_tokens = dict(usdc_tokens)
        self._subscriptions = frozenset(one.lower() for one in subscriptions)
        self._keys: OrderedDict[str, ec.EllipticCurvePublicKey] = OrderedDict()
        self._lookups: dict[str, asyncio.Task[ec.EllipticCurvePublicKey]] = {}
        self._budget = Lookups(lookups_per_min, clock)

    @property
    def vendor(self) -> str:
        return SOURCE

    async def verify(self, headers: Mapping[str, str], body: bytes) -> None:
        """Returns when Circle signed exactly these bytes; raises Refused otherwise."""
        given = {name.lower(): value for name, value in headers.items()}
        signature, key_id = given.get("x-circle-signature"), given.get("x-circle-key-id")
        if not signature or not key_id:
            raise Refused(RefusalCode.MISSING_SIGNATURE, "X-Circle-Signature and X-Circle-Key-Id are both needed")
        try:
            der = base64.b64decode(signature, validate=True)
        except ValueError:
            raise Refused(RefusalCode.BAD_SIGNATURE, "the signature is not Base64") from None
        key = await self._key(_key_id(key_id))
        try:
            key.verify(der, body, ec.ECDSA(hashes.SHA256()))
        except InvalidSignature:
            raise Refused(RefusalCode.BAD_SIGNATURE, "the signature is not over these bytes by that key") from None
        if self._subscriptions and not _is_of(self._subscriptions, body):
            raise Refused(RefusalCode.UNKNOWN_TOPIC, "the subscription is none of ours")

    def translate(self, body: bytes) -> tuple[Translation, ...]:
        return (translate(body, self._network, self._usdc_tokens),)

    async def _key(self, key_id: str) -> ec.EllipticCurvePublicKey:
        if key_id in self._keys:
            self._keys.move_to_end(key_id)
            return self._keys[key_id]
        lookup = self._lookups.get(key_id)
        if lookup is None:
            self._spend_lookup(key_id)
            lookup = asyncio.create_task(self._look_up(key_id))
            self._lookups[key_id] = lookup
            lookup.add_done_callback(partial(self._looked_up, key_id))
        # Shielded: one caller who gives up must not fail the others who wait for the same key.
        return await asyncio.shield(lookup)

    def _looked_up(self, key_id: str, lookup: asyncio.Task[ec.EllipticCurvePublicKey]) -> None:
        del self._lookups[key_id]
        if not lookup.cancelled():
            lookup.exception()  # seen, also when everybody who waited has given up

    def _spend_lookup(self, key_id: str) -> None:
        if not self._budget.spend(key_id):
            raise Refused(RefusalCode.KEY_UNAVAILABLE, "too_many_unknown_keys: we do not ask Circle for more now")

    async def _look_up(self, key_id: str) -> ec.EllipticCurvePublicKey:
        try:
            key = serialization.load_der_public_key(await self._fetch_key(key_id))
        except errors.Refused as error:
            if error.status in (400, 404):
                raise Refused(RefusalCode.UNKNOWN_KEY, "Circle knows no such key") from None
            raise Refused(RefusalCode.KEY_UNAVAILABLE, f"Circle refuses the look-up: {error.status}") from None
        except errors.ConnectorError as error:
            raise Refused(RefusalCode.KEY_UNAVAILABLE, f"Circle cannot be asked for the key: {error.code}") from None
        except (ValueError, UnsupportedAlgorithm):
            raise Refused(RefusalCode.UNSUPPORTED_ALGORITHM, "the key is not readable") from None
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise Refused(RefusalCode.UNSUPPORTED_ALGORITHM, "the key is not one of P-256")
        self._keys[key_id] = key
        if len(self._keys) > KEYS_MAX:
            self._keys.popitem(last=False)
        return key


def _key_id(text: str) -> str:
    """The key id in canonical form; Circle is never asked for what is not a UUID."""
    try:
        if len(text) != 36:
            raise ValueError
        return str(UUID(text))
    except ValueError:
        raise Refused(RefusalCode.UNKNOWN_KEY, "the key id is not a UUID") from None


class _Envelope(Model):
    notification_id: Text
    notification_type: str
    notification: dict[str, Any]
    version: int = 2


INBOUND: Final = "transactions.inbound"
OUTBOUND: Final = "transactions.outbound"
_OF_NO_INTEREST: Final = {
    "webhooks": {"test"},
    "challenges": {
        "accelerateTransaction",
        "cancelTransaction",
        "changePin",
        "contractExecution",
        "createTransaction",
        "createWallet",
        "initialize",
        "restorePin",
        "setPin",
        "setSecurityQuestions",
    },
    "contracts": {"eventLog"},
    "modularWallet": {"userOperation", "inboundTransfer", "outboundTransfer"},
    "travelRule": {"statusUpdate", "deny", "approve"},
    "rampSession": {
        "completed",
        "depositReceived",
        "expired",
        "failed",
        "kycApproved",
        "kycRejected",
        "kycSubmitted",
    },
}
IGNORED_TYPES: Final = frozenset(f"{family}.{kind}" for family, kinds in _OF_NO_INTEREST.items() for kind in kinds)


def _is_of(subscriptions: AbstractSet[str], body: bytes) -> bool:
    """Or says nothing that is done: Circle's test of a new subscription has no id of it."""
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError:
        return False
    said = content if isinstance(content, dict) else {}
    mine, kind = said.get("subscriptionId"), said.get("notificationType")
    return isinstance(mine, str) and (
        mine.lower() in subscriptions or (isinstance(kind, str) and kind in IGNORED_TYPES)
    )


def translate(body: bytes | Mapping[str, Any], network: Network, usdc_tokens: Mapping[str, str]) -> Translation:
    """What a verified notification says. Pure and total."""
    try:
        content = orjson.loads(body) if isinstance(body, bytes) else body
    except orjson.JSONDecodeError:
        return NotUnderstood("not_json", "the body is not JSON")
    try:
        envelope = _Envelope.model_validate(content)
    except ValidationError as error:
        return wrong_schema(error)
    if envelope.version != 2:
        return NotUnderstood("unsupported_version", "the notification's version is not 2")
    if envelope.notification_type in IGNORED_TYPES:
        return Ignored(envelope.notification_type)
    if envelope.notification_type == OUTBOUND:
        return _outbound(envelope, network, usdc_tokens)
    if envelope.notification_type != INBOUND:
        return NotUnderstood("unknown_type", f"notificationType {envelope.notification_type[:80]!a}")
    event = notified(envelope.notification, network, usdc_tokens)
    if isinstance(event, NotUnderstood):
        return event
    return Publish(catalog.DEPOSITS_NOTIFIED, event.to.encode(), event, envelope.notification_id, SOURCE)


def _outbound(envelope: _Envelope, network: Network, usdc_tokens: Mapping[str, str]) -> Translation:
    event = transferred(envelope.notification, network, usdc_tokens)
    if event is None:
        return Ignored(OUTBOUND)
    if isinstance(event, NotUnderstood):
        return event
    key = (event.reference or event.transfer_id).encode()
    return Publish(catalog.TRANSFERS_NOTIFIED, key, event, envelope.notification_id, SOURCE)
