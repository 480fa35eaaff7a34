"""What exists in the sandbox: records, idempotency, used ciphertexts, paging. Nothing here does I/O."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Protocol, TypeVar
from uuid import uuid4

import orjson
from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from connectors.circle.sandbox import keys
from connectors.circle.sandbox.config import SandboxConfig

_ZERO = Decimal(0)


class CircleError(Exception):
    """An answer in Circle's error format."""

    def __init__(self, status: int, code: int, message: str, errors: list[dict[str, Any]] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body: dict[str, Any] = {"code": code, "message": message}
        if errors:
            self.body["errors"] = errors


def invalid(location: str, message: str, error: str = "invalid_value") -> CircleError:
    """400, code 2: Circle's answer to a parameter it does not take."""
    detail = {"error": error, "message": message, "location": location, "constraints": {}}
    return CircleError(400, 2, "API parameter invalid", [detail])


def not_found(what: str) -> CircleError:
    # Circle's six-digit product codes are not published; clients branch on the status.
    return CircleError(404, 404, f"{what} not found")


def now() -> datetime:
    return datetime.now(UTC)


class Record(BaseModel):
    """What Circle stores and shows, in its camelCase."""

    model_config = ConfigDict(frozen=True, alias_generator=to_camel, populate_by_name=True)
    id: str = Field(default_factory=lambda: str(uuid4()))
    create_date: datetime = Field(default_factory=now)
    update_date: datetime = Field(default_factory=now)

    def shown(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class WalletSet(Record):
    custody_type: str = "DEVELOPER"
    name: str | None = None


class Wallet(Record):
    address: str
    blockchain: str
    wallet_set_id: str
    account_type: str = "EOA"
    custody_type: str = "DEVELOPER"
    state: str = "LIVE"
    name: str | None = None
    ref_id: str | None = None


class Transaction(Record):
    state: str
    blockchain: str
    wallet_id: str
    token_id: str
    amounts: list[str]
    source_address: str
    destination_address: str
    tx_hash: str | None = None
    """None: not sent yet."""
    block_hash: str | None = None
    block_height: int | None = None
    transaction_type: str = "INBOUND"
    operation: str = "TRANSFER"
    custody_type: str = "DEVELOPER"
    first_confirm_date: datetime | None = Field(default_factory=now)
    ref_id: str | None = None
    fee_level: str | None = None
    error_reason: str | None = None
    error_details: str | None = None


@dataclass
class Plan:
    """What becomes of a transfer out, by itself."""

    until: str = "COMPLETE"
    """The last state that it reaches; there it stays until /_control moves it."""
    end: str | None = None
    """A word after that: `FAILED`, `DENIED`, `CANCELLED`."""
    error_reason: str | None = None
    broadcast: bool = True
    """Whether the transaction that it tells of at SENT is ever sent."""


class Subscription(Record):
    name: str = "webhook"
    endpoint: str
    enabled: bool = True
    notification_types: list[str] = ["*"]
    restricted: bool = False

    def wants(self, notification_type: str) -> bool:
        family = notification_type.partition(".")[0] + ".*"
        wanted = {notification_type, family} & set(self.notification_types)
        return self.enabled and (not self.restricted or bool(wanted) or notification_type == "webhooks.test")


@dataclass(frozen=True)
class _Answer:
    fingerprint: str
    data: dict[str, Any]


@dataclass
class State:
    """Everything the sandbox remembers. Dictionaries keep the order of creation."""

    config: SandboxConfig
    entity_secret: bytes | None = field(init=False, repr=False)
    wallet_sets: dict[str, WalletSet] = field(default_factory=dict)
    wallets: dict[str, Wallet] = field(default_factory=dict)
    key_pairs: dict[str, keys.KeyPair] = field(default_factory=dict, repr=False)
    """By wallet id."""
    transactions: dict[str, Transaction] = field(default_factory=dict)
    subscriptions: dict[str, Subscription] = field(default_factory=dict)
    notification_key: keys.NotificationKey = field(default_factory=keys.NotificationKey)
    plans: dict[str | None, Plan] = field(default_factory=dict)
    """Of transfers to come, by reference or destination address."""
    refused: set[str | None] = field(default_factory=set)
    """References and blockchains for which no wallet is made: 400."""
    hidden: set[str | None] = field(default_factory=set)
    """References whose wallets are made and left out of the answer."""
    answers: dict[str, _Answer] = field(default_factory=dict)
    """By idempotency key, of calls that were carried out. Whoever empties it plays a Circle that has forgotten them."""
    _spare: dict[str, list[keys.KeyPair]] = field(default_factory=dict, repr=False)
    _ciphertexts: set[bytes] = field(default_factory=set)
    _by_address: dict[tuple[str, str], str] = field(default_factory=dict)
    _by_reference: dict[str | None, list[Wallet]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        secret = self.config.entity_secret
        self.entity_secret = None if secret is None else bytes.fromhex(secret)
        for family in ("evm", "solana", "aptos") if self.config.keys_beforehand else ():
            self._spare[family] = [keys.new_key_pair(family) for _ in range(self.config.keys_beforehand)]

    def new_key_pair(self, family: str) -> keys.KeyPair:
        spare = self._spare.get(family)
        return spare.pop() if spare else keys.new_key_pair(family)

    def add_wallet(self, wallet: Wallet, key_pair: keys.KeyPair) -> None:
        self.wallets[wallet.id] = wallet
        self.key_pairs[wallet.id] = key_pair
        self._by_address[wallet.blockchain, wallet.address] = wallet.id
        self._by_reference.setdefault(wallet.ref_id, []).append(wallet)

    def of_reference(self, ref_id: str | None) -> list[Wallet]:
        """All wallets where no reference is given."""
        return list(self.wallets.values()) if ref_id is None else self._by_reference.get(ref_id, [])

    def wallet_at(self, blockchain: str, address: str) -> Wallet | None:
        wallet_id = self._by_address.get((blockchain, address))
        return None if wallet_id is None else self.wallets[wallet_id]

    def held(self, wallet_id: str, token_id: str) -> Decimal:
        """What a wallet on a chain that is not watched has by our records: what came in, less what left or is leaving."""
        of = [t for t in self.transactions.values() if (t.wallet_id, t.token_id) == (wallet_id, token_id)]
        came = sum(
            (Decimal(t.amounts[0]) for t in of if t.transaction_type == "INBOUND" and t.state == "COMPLETE"), _ZERO
        )
        return came - sum((Decimal(t.amounts[0]) for t in of if t.transaction_type == "OUTBOUND" and t.tx_hash), _ZERO)

    def change(self, transaction_id: str, **changes: Any) -> Transaction:
        """The transaction with these fields changed."""
        changed = self.transactions[transaction_id].model_copy(update={**changes, "update_date": now()})
        self.transactions[transaction_id] = changed
        return changed

    def check_ciphertext(self, ciphertext: str) -> bytes:
        """The secret inside a ciphertext that was never used before. Raises CircleError."""
        digest = hashlib.sha256(ciphertext.encode()).digest()
        secret = keys.decrypt(keys.entity_key(self.config.rsa_bits), ciphertext)
        if secret is None:
            raise CircleError(400, 156013, "The provided entity secret is invalid.")
        if digest in self._ciphertexts:
            raise CircleError(400, 156004, "Reusing an entity secret ciphertext is not allowed.")
        self._ciphertexts.add(digest)
        return secret

    def authorise(self, ciphertext: str) -> None:
        """The caller of a mutating call holds the registered entity secret."""
        secret = self.check_ciphertext(ciphertext)
        if self.entity_secret is None:
            raise CircleError(400, 156016, "The entity secret has not been set yet.")
        if secret != self.entity_secret:
            raise CircleError(400, 156013, "The provided entity secret is invalid.")

    def once(
        self, endpoint: str, body: dict[str, Any], act: Callable[[], dict[str, Any]]
    ) -> tuple[int, dict[str, Any]]:
        """(201, the result of `act`), or (200, the first result) when the idempotency key was used for this request."""
        key = body["idempotencyKey"]
        meant = {name: value for name, value in body.items() if name != "entitySecretCiphertext"}
        content = orjson.dumps([endpoint, meant], option=orjson.OPT_SORT_KEYS)
        fingerprint = hashlib.sha256(content).hexdigest()
        stored = self.answers.get(key)
        if stored is None:
            data = act()
            self.answers[key] = _Answer(fingerprint, data)
            return 201, data
        if stored.fingerprint != fingerprint:
            raise CircleError(409, 409, "the idempotency key was used for another request")
        return 200, stored.data


class _Dated(Protocol):
    @property
    def id(self) -> str: ...
    @property
    def create_date(self) -> datetime: ...


T = TypeVar("T", bound=_Dated)


class Paging(BaseModel):
    """Circle's query parameters of every list."""

    page_size: int = Field(default=10, ge=1, alias="pageSize")
    page_after: str | None = Field(default=None, alias="pageAfter")
    page_before: str | None = Field(default=None, alias="pageBefore")
    order: str = Field(default="DESC", pattern="^(ASC|DESC)$")
    since: datetime | None = Field(default=None, alias="from")
    to: datetime | None = None

    def page(self, items: Sequence[T]) -> list[T]:
        """One page of `items`, given in order of creation."""
        if self.page_after is not None and self.page_before is not None:
            raise invalid("pageBefore", "pageAfter and pageBefore cannot both be given", "not_required")
        ordered = list(items) if self.order == "ASC" else list(reversed(items))
        size = min(self.page_size, 50)
        start, end = 0, len(ordered)
        places = {item.id: place for place, item in enumerate(ordered)}
        cursor = self.page_after or self.page_before
        if cursor is not None:
            if cursor not in places:
                raise invalid("pageAfter" if self.page_after else "pageBefore", "no such item in this list")
            start, end = (places[cursor] + 1, end) if self.page_after else (0, places[cursor])
        kept = [item for item in ordered[start:end] if self._in_range(item.create_date)]
        return kept[:size] if self.page_before is None else kept[-size:]

    def _in_range(self, date: datetime) -> bool:
        since, to = (None if d is None else d if d.tzinfo else d.replace(tzinfo=UTC) for d in (self.since, self.to))
        return (since is None or date >= since) and (to is None or date <= to)
