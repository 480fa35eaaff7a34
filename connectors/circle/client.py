"""Circle's APIs, W3S and Mint, as far as we use them. Base URLs, paths and bodies: developers.circle.com.

A call returns its result or raises one of connectors.errors. Nothing is retried here: a mutating call that ended without
a readable answer is repeated by the caller with the same idempotency key, for which Circle returns the first result.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple
from urllib.parse import quote

import orjson
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from pydantic import BaseModel, ConfigDict, SecretStr, TypeAdapter, ValidationError
from pydantic.alias_generators import to_camel

from connectors.circle.chains import Network
from connectors.errors import CREDENTIALS, ConnectorError, RateLimited, Refused, Unavailable, Unknown
from connectors.partner import PartnerClient, wait_s
from topics.events import Text

MINT_URLS: Final[Mapping[Network, str]] = {
    "testnet": "https://api-sandbox.circle.com",
    "mainnet": "https://api.circle.com",
}
PAGE_SIZE: Final = 50  # Circle's maximum
PAGES_MAX: Final = (
    20  # one customer has a wallet per chain; a server that ignores `pageAfter` must not hold us for ever
)
REPLY_BYTES_MAX: Final = 4_000_000  # 200 wallets on each of 4 chains are 400 kB
KEY_BITS: Final = (1024, 16_384)
"""Of the entity's public key. Nothing is encrypted with one of fewer or more."""
LEAST: Final = "0.000001"
"""Of USDC; a wallet that holds less holds none."""
_ID: Final = TypeAdapter[str](Text)
SOMETHING_WENT_WRONG: Final = "-1"  # Circle's code for a failure of its own, sent with status 400
SECRET_REFUSED: Final = frozenset({"156013", "156016"})
"""Sent with status 400: the entity secret is not the registered one; none is registered."""
WALLET_SET: Final = "our wallet set"
CIPHERTEXT_USED: Final = frozenset({"156004", "177602"})
"""Each of ours is new: somebody between us has sent the request twice, and this is the answer to the second."""


class CircleWallet(BaseModel):
    """A wallet as Circle describes it; unknown fields and unknown states are kept out of our way."""

    model_config = ConfigDict(frozen=True, extra="ignore", alias_generator=to_camel, populate_by_name=True)
    id: Text
    address: str
    blockchain: str
    """Circle's name: see connectors.circle.chains."""
    state: str = "LIVE"
    ref_id: str | None = None


class WalletHolding(NamedTuple):
    """What a wallet holds of one token, by Circle's word."""

    id: str
    address: str
    wallet_set_id: str
    amount: str
    """A decimal string in whole tokens."""


class _Circle(PartnerClient):
    """One API key."""

    def __init__(self, base_url: str, api_key: SecretStr, timeout_s: float) -> None:
        super().__init__(base_url, timeout_s, REPLY_BYTES_MAX)
        self._api_key = api_key

    def _authorization(self) -> str:
        return f"Bearer {self._api_key.get_secret_value()}"

    async def _data(
        self, method: str, path: str, *, body: Mapping[str, Any] | None = None, params: Mapping[str, str] | None = None
    ) -> Any:
        """The `data` of a 2xx answer, None where it has none; or a ConnectorError."""
        answer = await self._ask(method, path, body=None if body is None else orjson.dumps(body), params=params)
        if not answer.is_ok:
            raise _failure(answer.status, answer.raw, answer.headers.get("Retry-After"))
        return _json(answer.raw).get("data")


class MintClient(_Circle):
    """Circle Mint's API with its own key. Use as an async context, or call start and close."""

    async def inbound_page(self, *, since: datetime | None = None, after: str | None = None) -> list[dict[str, Any]]:
        """At most PAGE_SIZE transfers, newest first, those that left the account among them: made at `since` or later, older than
        the one with id `after`. A page that is not full is the last."""
        params = {"pageSize": str(PAGE_SIZE), "from": None if since is None else _z(since), "pageAfter": after}
        given = {name: value for name, value in params.items() if value is not None}
        listed = await self._data("GET", "/v1/businessAccount/transfers", params=given)
        if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
            raise Unknown("Circle's reply holds no transfers")
        return listed

    async def transaction(self, transfer_id: str) -> dict[str, Any]:
        """One transfer as it is now. Raises Refused (404) when Circle knows none of this id."""
        found = await self._data("GET", f"/v1/businessAccount/transfers/{quote(transfer_id, safe='')}")
        if not isinstance(found, dict):
            raise Unknown("Circle's reply holds no transfer")
        return found


class CircleClient(_Circle):
    """W3S with one API key and one entity secret. Use as an async context, or call start and close."""

    def __init__(self, base_url: str, api_key: SecretStr, entity_secret: SecretStr, timeout_s: float = 10.0) -> None:
        try:
            known = len(bytes.fromhex(entity_secret.get_secret_value())) == 32
        except ValueError:
            known = False
        if not known:
            raise ValueError("Circle's entity secret is 64 hexadecimal characters")
        super().__init__(base_url, api_key, timeout_s)
        self._entity_secret = entity_secret
        self._entity_key: rsa.RSAPublicKey | None = None
        self._entity_key_lock = asyncio.Lock()

    async def create_wallet_set(self, idempotency_key: str, name: str) -> str:
        """The id of the wallet set."""
        body = {"idempotencyKey": idempotency_key, "name": name}
        data = await self._mutate("/v1/w3s/developer/walletSets", body)
        return id_of(data.get("walletSet"))

    async def create_wallets(
        self,
        idempotency_key: str,
        wallet_set_id: str,
        blockchains: Sequence[str],
        metadata: Sequence[tuple[str, str]],
    ) -> list[CircleWallet]:
        """One EOA wallet per (name, ref_id) and blockchain (Circle's names). Match the reply by ref_id and blockchain."""
        body = {
            "idempotencyKey": idempotency_key,
            "walletSetId": wallet_set_id,
            "blockchains": list(blockchains),
            "accountType": "EOA",
            "count": len(metadata),
            "metadata": [{"name": name, "refId": ref_id} for name, ref_id in metadata],
        }
        return _wallets(await self._mutate("/v1/w3s/developer/wallets", body))

    async def list_wallets(self, ref_id: str) -> list[CircleWallet]:
        """All wallets with this reference, newest first."""
        found: list[CircleWallet] = []
        params = {"refId": ref_id, "pageSize": str(PAGE_SIZE)}
        for _ in range(PAGES_MAX):
            page = _wallets(await self._call("GET", "/v1/w3s/wallets", params=params))
            found += page
            if len(page) < PAGE_SIZE:
                return found
            params["pageAfter"] = page[-1].id
        raise Unknown(f"more than {PAGES_MAX * PAGE_SIZE} wallets of one reference")

    async def wallets_page(
        self, *, since: datetime | None = None, after: str | None = None, wallet_set_id: str | None = None
    ) -> list[CircleWallet]:
        """At most PAGE_SIZE wallets, oldest first: those made at `since` or later, behind the one with id `after`. A page that is
        not full is the last."""
        params = {
            "order": "ASC",
            "pageSize": str(PAGE_SIZE),
            "from": None if since is None else _z(since),
            "pageAfter": after,
            "walletSetId": wallet_set_id,
        }
        given = {name: value for name, value in params.items() if value is not None}
        return _wallets(await self._call("GET", "/v1/w3s/wallets", params=given))

    async def wallet(self, wallet_id: str) -> CircleWallet:
        """One wallet. Raises Refused (404) when Circle knows none of this id."""
        data = await self._call("GET", f"/v1/w3s/wallets/{quote(wallet_id, safe='')}")
        return _wallets({"wallets": [data.get("wallet")]})[0]

    async def token_address(self, token_id: str) -> str:
        """The contract, or what the chain has in its place, of a token. Raises Refused (404) when Circle knows none of this id."""
        data = await self._call("GET", f"/v1/w3s/tokens/{quote(token_id, safe='')}")
        try:
            return str(data["token"]["tokenAddress"])
        except (KeyError, TypeError):
            raise Unknown("Circle's reply holds no token address") from None

    async def holdings_page(
        self, blockchain: str, token_id: str, token_address: str, *, after: str | None = None
    ) -> tuple[list[WalletHolding], str | None]:
        """The wallets of at most PAGE_SIZE that hold any of the token, behind the one with id `after`, and where the next page
        begins; None: this was the last. `blockchain`: Circle's name."""
        params = {
            "blockchain": blockchain, "tokenAddress": token_address, "amount__gte": LEAST, "pageSize": str(PAGE_SIZE),
        }  # fmt: skip
        if after is not None:
            params["pageAfter"] = after
        data = await self._call("GET", "/v1/w3s/developer/wallets/balances", params=params)
        try:
            wallets = list(data["wallets"])
            found = [
                WalletHolding(str(one["id"]), str(one["address"]), str(one["walletSetId"]), amount)
                for one in wallets
                for amount in _amounts(one["tokenBalances"], token_id)
            ]
            return found, str(wallets[-1]["id"]) if len(wallets) >= PAGE_SIZE else None
        except (KeyError, TypeError):
            raise Unknown("Circle's reply holds no wallets with balances") from None

    async def holding(self, wallet_id: str, token_id: str, token_address: str) -> str:
        """What one wallet holds of the token, a decimal string in whole tokens. Raises Refused (404) for an unknown wallet."""
        path = f"/v1/w3s/wallets/{quote(wallet_id, safe='')}/balances"
        data = await self._call("GET", path, params={"tokenAddress": token_address})
        try:
            return next(iter(_amounts(data["tokenBalances"], token_id)), "0")
        except (KeyError, TypeError):
            raise Unknown("Circle's reply holds no balances") from None

    async def create_transfer(
        self,
        idempotency_key: str,
        *,
        wallet_id: str,
        token_id: str,
        destination_address: str,
        amount: str,
        fee_level: str,
        ref_id: str,
    ) -> dict[str, Any]:
        """Has the wallet send so much (a decimal string) of the token: {"id", "state"}. That it was taken says nothing of funds
        or gas: those fail it later."""
        body = {
            "idempotencyKey": idempotency_key,
            "walletId": wallet_id,
            "tokenId": token_id,
            "destinationAddress": destination_address,
            "amounts": [amount],
            "feeLevel": fee_level,
            "refId": ref_id,
        }
        data = await self._mutate("/v1/w3s/developer/transactions/transfer", body)
        return {**data, "id": id_of(data)}

    async def list_transactions(
        self,
        *,
        blockchain: str | None = None,
        tx_hash: str | None = None,
        destination_address: str | None = None,
    ) -> list[dict[str, Any]]:
        """All inbound transactions that match, oldest first, as `transactions.notified` takes them. `blockchain`: Circle's name."""
        found: list[dict[str, Any]] = []
        after: str | None = None
        for _ in range(PAGES_MAX):
            page = await self.inbound_page(
                after=after, blockchain=blockchain, tx_hash=tx_hash, destination_address=destination_address
            )
            found += page
            if len(page) < PAGE_SIZE:
                return found
            after = str(page[-1].get("id"))
        raise Unknown(f"more than {PAGES_MAX * PAGE_SIZE} transactions in one answer")

    async def inbound_page(
        self,
        *,
        since: datetime | None = None,
        after: str | None = None,
        blockchain: str | None = None,
        tx_hash: str | None = None,
        destination_address: str | None = None,
    ) -> list[dict[str, Any]]:
        """At most PAGE_SIZE inbound transactions, oldest first: those made at `since` or later, behind the one with id `after`.
        A page that is not full is the last."""
        return await self._transactions_page(
            "INBOUND", since, after, blockchain=blockchain, txHash=tx_hash, destinationAddress=destination_address
        )

    async def outbound_page(
        self, *, since: datetime | None = None, after: str | None = None, destination_address: str | None = None
    ) -> list[dict[str, Any]]:
        """As `inbound_page`, of what left our wallets."""
        return await self._transactions_page("OUTBOUND", since, after, destinationAddress=destination_address)

    async def _transactions_page(
        self, tx_type: str, since: datetime | None, after: str | None, **filters: str | None
    ) -> list[dict[str, Any]]:
        params = {
            "txType": tx_type,
            "order": "ASC",
            "pageSize": str(PAGE_SIZE),
            "from": None if since is None else _z(since),
            "pageAfter": after,
            **filters,
        }
        given = {name: value for name, value in params.items() if value is not None}
        listed = (await self._call("GET", "/v1/w3s/transactions", params=given)).get("transactions")
        if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
            raise Unknown("Circle's reply holds no transactions")
        return listed

    async def transaction(self, transaction_id: str) -> dict[str, Any]:
        """One transaction as it is now. Raises Refused (404) when Circle knows none of this id."""
        found = (await self._call("GET", f"/v1/w3s/transactions/{quote(transaction_id, safe='')}")).get("transaction")
        if not isinstance(found, dict):
            raise Unknown("Circle's reply holds no transaction")
        return found

    async def notification_public_key(self, key_id: str) -> bytes:
        """DER SubjectPublicKeyInfo of the key that signs notifications. Raises Refused when Circle knows no such key."""
        data = await self._call("GET", f"/v2/notifications/publicKey/{key_id}")
        try:
            return base64.b64decode(data["publicKey"], validate=True)
        except (KeyError, TypeError, ValueError):
            raise Unknown("Circle's reply holds no public key") from None

    async def _mutate(self, path: str, body: dict[str, Any]) -> Mapping[str, Any]:
        # A ciphertext is good for one request, so it is made here and is no part of what callers store and repeat.
        try:
            return await self._call("POST", path, body={**body, "entitySecretCiphertext": await self._ciphertext()})
        except Refused as error:
            if error.ours:
                self._entity_key = None  # perhaps Circle has another one now
            raise

    async def _ciphertext(self) -> str:
        oaep = padding.OAEP(mgf=padding.MGF1(hashes.SHA256()), algorithm=hashes.SHA256(), label=None)
        secret = bytes.fromhex(self._entity_secret.get_secret_value())
        return base64.b64encode((await self._public_key()).encrypt(secret, oaep)).decode()

    async def _public_key(self) -> rsa.RSAPublicKey:
        async with self._entity_key_lock:
            if self._entity_key is None:
                try:
                    data = await self._call("GET", "/v1/w3s/config/entity/publicKey")
                except (Unavailable, Unknown, Refused) as error:
                    if isinstance(error, Refused) and error.ours:
                        raise
                    # Only a look-up failed: the mutating call it was for has not been sent.
                    raise Unavailable(f"the entity public key: {error}", sent=False) from None
                self._entity_key = _rsa_key(data.get("publicKey"))
            return self._entity_key

    async def _call(
        self, method: str, path: str, *, body: Mapping[str, Any] | None = None, params: Mapping[str, str] | None = None
    ) -> Mapping[str, Any]:
        """The `data` of a 2xx answer, an object; or a ConnectorError."""
        data = await self._data(method, path, body=body, params=params)
        if not isinstance(data, dict):
            raise Unknown("an unreadable reply")
        return data


def id_of(thing: Any) -> str:
    """What Circle calls it: an id that our books and events can hold. With any other the thing is there, and nobody can name it."""
    try:
        return _ID.validate_python(thing["id"])
    except (KeyError, TypeError, ValidationError):
        raise Unknown("Circle's reply holds no readable id") from None


def _amounts(balances: Any, token_id: str) -> list[str]:
    return [str(balance["amount"]) for balance in balances if balance["token"]["id"] == token_id]


def _z(time: datetime) -> str:
    """As Circle writes it."""
    return time.astimezone(UTC).isoformat().replace("+00:00", "Z")


def _json(raw: bytes) -> dict[str, Any]:
    try:
        answer = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _failure(status: int, raw: bytes, retry_after: str | None) -> ConnectorError:
    answer = _json(raw)
    # Circle's are numbers; `null` and "NotFound" are others' words
    partner_code = str(answer["code"]) if type(answer.get("code")) is int else None
    message = "".join(one for one in str(answer.get("message", ""))[:300] if " " <= one <= "~")
    if status == 429:
        return RateLimited(wait_s(retry_after))
    if status >= 500 or status == 408 or (status == 400 and partner_code == SOMETHING_WENT_WRONG):
        return Unavailable(f"{status} (code {partner_code}): {message}", sent=True)
    if partner_code in CIPHERTEXT_USED:
        return Unknown(f"{status} (code {partner_code}): {message}")
    ours = CREDENTIALS if partner_code in SECRET_REFUSED else WALLET_SET if _faults(answer, "walletSetId") else ""
    refused = Refused(status, partner_code, message, ours=ours)
    if status < 400 or (partner_code is None and not refused.ours):
        # Every refusal of Circle's has a code. This is the word of something before it, which does not know what Circle did.
        return Unknown(f"an answer that is not Circle's, with status {status}")
    return refused


def _faults(answer: Mapping[str, Any], field: str) -> bool:
    """Whether it is this field of the request that Circle does not take."""
    errors = answer.get("errors")
    return isinstance(errors, list) and any(isinstance(one, dict) and one.get("location") == field for one in errors)


def _wallets(data: Mapping[str, Any]) -> list[CircleWallet]:
    wallets = data.get("wallets")
    if not isinstance(wallets, list):
        raise Unknown("Circle's reply holds no wallets")
    try:
        return [CircleWallet.model_validate(wallet) for wallet in wallets]
    except ValidationError as error:
        raise Unknown(f"a wallet in Circle's reply is unreadable: {error.error_count()} fields") from None


def _rsa_key(pem: object) -> rsa.RSAPublicKey:
    try:
        key = serialization.load_pem_public_key(str(pem).encode())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, rsa.RSAPublicKey) or not KEY_BITS[0] <= key.key_size <= KEY_BITS[1]:
        raise Unavailable("Circle's entity public key is no usable RSA key in PEM", sent=False)
    return key
