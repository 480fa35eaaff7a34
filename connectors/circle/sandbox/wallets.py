"""Routes under /v1/w3s: the entity secret, wallet sets, wallets, balances, tokens, transactions."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from decimal import Decimal
from typing import Annotated, Any, Protocol, TypeVar

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse
from pydantic import UUID4, BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from connectors.circle.sandbox import keys, tokens
from connectors.circle.sandbox.chainwatch import decimal
from connectors.circle.sandbox.rpc import Rpc
from connectors.circle.sandbox.state import (
    CircleError,
    Paging,
    State,
    Wallet,
    WalletSet,
    invalid,
    not_found,
    now,
)


class _Body(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel)


class _Secret(_Body):
    entity_secret_ciphertext: str


class _Mutation(_Secret):
    idempotency_key: UUID4

    def content(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True)


class _CreateWalletSet(_Mutation):
    name: str | None = None


class _Metadata(_Body):
    name: str | None = None
    ref_id: str | None = None


class _CreateWallets(_Mutation):
    wallet_set_id: str
    blockchains: Annotated[list[str], Field(min_length=1)]
    account_type: str = "EOA"
    count: Annotated[int, Field(ge=1, le=200)] = 1
    metadata: list[_Metadata] | None = None


class _Shown(Protocol):
    def shown(self) -> dict[str, Any]: ...


def _data(name: str, found: Iterable[_Shown]) -> dict[str, Any]:
    return {"data": {name: [item.shown() for item in found]}}


PageQuery = Annotated[Paging, Query()]


def routes(state: State, rpc: Rpc | None) -> APIRouter:
    """`rpc` asks the watched chain, if one is watched, for balances."""
    router = APIRouter(prefix="/v1/w3s")
    _entity(router, state)
    _wallet_sets(router, state)
    _wallets(router, state)
    _balances(router, state, rpc)
    _transactions(router, state)
    return router


def _entity(router: APIRouter, state: State) -> None:
    @router.get("/config/entity/publicKey")
    async def public_key() -> dict[str, Any]:
        return {"data": {"publicKey": keys.entity_public_pem(keys.entity_key(state.config.rsa_bits))}}

    @router.post("/config/entity/entitySecret", status_code=201)
    async def register(body: _Secret) -> dict[str, Any]:
        if state.entity_secret is not None:
            raise CircleError(409, 156015, "The secret for this entity has already been set.")
        secret = state.check_ciphertext(body.entity_secret_ciphertext)
        if len(secret) != 32:
            raise invalid("entitySecretCiphertext", "the entity secret is not 32 bytes")
        state.entity_secret = secret
        return {"data": {"recoveryFile": base64.b64encode(b"sandbox recovery file").decode()}}


def _wallet_sets(router: APIRouter, state: State) -> None:
    @router.post("/developer/walletSets")
    async def create(body: _CreateWalletSet) -> JSONResponse:
        def act() -> dict[str, Any]:
            wallet_set = WalletSet(name=body.name)
            state.wallet_sets[wallet_set.id] = wallet_set
            return {"walletSet": wallet_set.shown()}

        state.authorise(body.entity_secret_ciphertext)
        status, data = state.once("createWalletSet", body.content(), act)
        return JSONResponse({"data": data}, status)

    @router.get("/walletSets")
    async def listed(paging: PageQuery) -> dict[str, Any]:
        return _data("walletSets", paging.page(list(state.wallet_sets.values())))

    @router.get("/walletSets/{wallet_set_id}")
    async def one(wallet_set_id: str) -> dict[str, Any]:
        if wallet_set_id not in state.wallet_sets:
            raise not_found("wallet set")
        return {"data": {"walletSet": state.wallet_sets[wallet_set_id].shown()}}


def _wallets(router: APIRouter, state: State) -> None:
    @router.post("/developer/wallets")
    async def create(body: _CreateWallets) -> JSONResponse:
        state.authorise(body.entity_secret_ciphertext)
        status, data = state.once("createWallets", body.content(), lambda: _create_wallets(state, body))
        return JSONResponse({"data": data}, status)

    @router.get("/wallets")
    async def listed(
        paging: PageQuery,
        address: str | None = None,
        blockchain: str | None = None,
        wallet_set_id: Annotated[str | None, Query(alias="walletSetId")] = None,
        ref_id: Annotated[str | None, Query(alias="refId")] = None,
    ) -> dict[str, Any]:
        wanted = {"address": address, "blockchain": blockchain, "wallet_set_id": wallet_set_id, "ref_id": ref_id}
        return _data("wallets", paging.page(_matching(state.of_reference(ref_id), wanted)))

    @router.get("/wallets/{wallet_id}")
    async def one(wallet_id: str) -> dict[str, Any]:
        return {"data": {"wallet": _wallet(state, wallet_id).shown()}}


def _create_wallets(state: State, body: _CreateWallets) -> dict[str, Any]:
    if len(body.wallet_set_id) != 36:
        raise invalid("walletSetId", "not a UUID")
    if body.wallet_set_id not in state.wallet_sets:
        raise not_found("wallet set")
    if body.account_type != "EOA":
        raise invalid("accountType", "the sandbox makes EOA wallets only")
    unknown = [name for name in body.blockchains if name not in tokens.BLOCKCHAINS]
    if unknown or len(set(body.blockchains)) != len(body.blockchains):
        raise invalid("blockchains", f"each once, of {', '.join(tokens.BLOCKCHAINS)}")
    if bad := state.refused & {*body.blockchains, *(m.ref_id for m in body.metadata or ())}:
        raise invalid("blockchains" if bad & {*body.blockchains} else "metadata", "refused on demand")
    metadata = [_Metadata()] * body.count if body.metadata is None else body.metadata
    if len(metadata) != body.count:
        raise invalid("metadata", "as many items as count")
    made: list[Wallet] = []
    for item in metadata:
        pairs: dict[str, keys.KeyPair] = {}
        for name in body.blockchains:
            family = tokens.BLOCKCHAINS[name].family
            if family not in pairs:  # one address on all EVM chains
                pairs[family] = state.new_key_pair(family)
            pair = pairs[family]
            wallet = Wallet(
                address=pair.address,
                blockchain=name,
                wallet_set_id=body.wallet_set_id,
                name=item.name,
                ref_id=item.ref_id,
            )
            state.add_wallet(wallet, pair)
            made.append(wallet)
    return {"wallets": [wallet.shown() for wallet in made if wallet.ref_id not in state.hidden]}


def _balances(router: APIRouter, state: State, rpc: Rpc | None) -> None:
    addresses = {}
    if state.config.usdc_address is not None:
        addresses[state.config.evm_blockchain] = state.config.usdc_address.lower()

    async def of(wallet: Wallet, token_address: str | None) -> list[dict[str, Any]]:
        known = dict.fromkeys(t.token_id for t in state.transactions.values() if t.wallet_id == wallet.id)
        held = {token_id: str(amount) for token_id in known if (amount := state.held(wallet.id, token_id))}
        if rpc is not None and wallet.blockchain == state.config.evm_blockchain:
            held[tokens.usdc_token_id(wallet.blockchain)] = decimal(await rpc.usdc_balance(wallet.address))
        return [
            {"amount": amount, "token": token, "updateDate": now()}
            for token_id, amount in held.items()
            if (token := tokens.token(token_id, addresses)) is not None
            and token_address in (None, token.get("tokenAddress"))
        ]

    @router.get("/wallets/{wallet_id}/balances")
    async def balances(
        wallet_id: str, token_address: Annotated[str | None, Query(alias="tokenAddress")] = None
    ) -> dict[str, Any]:
        return {"data": {"tokenBalances": await of(_wallet(state, wallet_id), token_address)}}

    @router.get("/developer/wallets/balances")
    async def with_balances(
        paging: PageQuery,
        blockchain: str,
        token_address: Annotated[str | None, Query(alias="tokenAddress")] = None,
        amount_gte: Annotated[Decimal, Query(alias="amount__gte")] = Decimal(0),
    ) -> dict[str, Any]:
        """Of the other filters none is simulated."""
        listed = [wallet for wallet in state.wallets.values() if wallet.blockchain == blockchain]
        held = {wallet.id: await of(wallet, token_address) for wallet in listed}
        enough = [w for w in listed if sum((Decimal(each["amount"]) for each in held[w.id]), Decimal(0)) >= amount_gte]
        rows = [{**wallet.shown(), "tokenBalances": held[wallet.id]} for wallet in paging.page(enough)]
        return {"data": {"wallets": rows}}

    @router.get("/tokens/{token_id}")
    async def token(token_id: str) -> dict[str, Any]:
        found = tokens.token(token_id, addresses)
        if found is None:
            raise not_found("token")
        return {"data": {"token": found}}


def _transactions(router: APIRouter, state: State) -> None:
    @router.get("/transactions")
    async def listed(
        paging: PageQuery,
        blockchain: str | None = None,
        destination_address: Annotated[str | None, Query(alias="destinationAddress")] = None,
        state_: Annotated[str | None, Query(alias="state")] = None,
        tx_hash: Annotated[str | None, Query(alias="txHash")] = None,
        tx_type: Annotated[str | None, Query(alias="txType")] = None,
        wallet_ids: Annotated[str | None, Query(alias="walletIds")] = None,
    ) -> dict[str, Any]:
        wanted = {
            "blockchain": blockchain,
            "destination_address": destination_address,
            "state": state_,
            "tx_hash": tx_hash,
            "transaction_type": tx_type,
        }
        found = _matching(state.transactions.values(), wanted)
        if wallet_ids is not None:
            found = [t for t in found if t.wallet_id in wallet_ids.split(",")]
        return _data("transactions", paging.page(found))

    @router.get("/transactions/{transaction_id}")
    async def one(transaction_id: str) -> dict[str, Any]:
        if transaction_id not in state.transactions:
            raise not_found("transaction")
        return {"data": {"transaction": state.transactions[transaction_id].shown()}}


def _wallet(state: State, wallet_id: str) -> Wallet:
    if wallet_id not in state.wallets:
        raise not_found("wallet")
    return state.wallets[wallet_id]


R = TypeVar("R")


def _matching(items: Iterable[R], wanted: dict[str, str | None]) -> list[R]:
    return [i for i in items if all(getattr(i, name) == v for name, v in wanted.items() if v is not None)]
