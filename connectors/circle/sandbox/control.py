"""Routes under /_control, which no partner has: faults, injected transfers, disorder of deliveries, own records."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

import base58
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from connectors.circle.sandbox.deliveries import Deliveries
from connectors.circle.sandbox.gate import Fault, Gate, Weather
from connectors.circle.sandbox.state import Plan, State, Transaction, invalid, not_found
from connectors.circle.sandbox.tokens import BLOCKCHAINS, usdc_token_id

Decimals = Annotated[str, Field(pattern=r"^\d{1,30}(\.\d{1,18})?$")]


class _Body(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, extra="forbid")


class _Fault(_Body):
    path: str
    kind: Literal["status", "page", "hang", "lost_reply"] = "status"
    method: str | None = None
    status: int = 500
    acts: bool = False
    times: int = 1


class InjectedTransfer(_Body):
    """A transfer on a chain that is not watched, to a wallet given by id, or by blockchain and address."""

    wallet_id: str | None = None
    blockchain: str | None = None
    address: str | None = None
    amount: Decimals
    token_id: str | None = None
    """None: USDC."""
    tx_hash: str | None = None
    """None: a new one."""
    states: list[str] = ["CONFIRMED", "COMPLETE"]


class _State(_Body):
    state: str


class _Weather(_Body):
    unavailable: float = Field(default=0.0, ge=0, le=1)
    lost_replies: float = Field(default=0.0, ge=0, le=1)
    limited: float = Field(default=0.0, ge=0, le=1)
    seed: int = 0


class _Plan(_Body):
    of: str
    """The transfer's reference, or its destination address."""
    until: Literal["INITIATED", "CLEARED", "QUEUED", "SENT", "CONFIRMED", "COMPLETE"] = "COMPLETE"
    end: str | None = None
    error_reason: str | None = None
    broadcast: bool = True


class _Refused(_Body):
    refused: list[str]


class _Disorder(_Body):
    drop: int | None = None
    duplicate: int | None = None
    reorder: int | None = None


def routes(state: State, gate: Gate, deliveries: Deliveries) -> APIRouter:
    router = APIRouter(prefix="/_control")

    @router.post("/faults")
    async def add_fault(body: _Fault) -> dict[str, Any]:
        gate.faults.append(Fault(**body.model_dump()))
        return {"faults": len(gate.faults)}

    @router.delete("/faults")
    async def clear_faults() -> dict[str, Any]:
        gate.faults.clear()
        return {"faults": 0}

    @router.post("/weather")
    async def weather(body: _Weather) -> dict[str, Any]:
        gate.weather = Weather(**body.model_dump())
        return {"weather": body.model_dump()}

    @router.post("/refused")
    async def refused(body: _Refused) -> dict[str, Any]:
        state.refused = set(body.refused)
        return {"refused": body.refused}

    @router.post("/plans")
    async def plan(body: _Plan) -> dict[str, Any]:
        state.plans[body.of] = Plan(**body.model_dump(exclude={"of"}))
        return {"plans": len(state.plans)}

    @router.post("/transfers")
    async def inject(body: InjectedTransfer) -> dict[str, Any]:
        return {"transaction": inject_transfer(state, deliveries, body).shown()}

    @router.post("/transactions/{transaction_id}/state")
    async def move(transaction_id: str, body: _State) -> dict[str, Any]:
        if transaction_id not in state.transactions:
            raise not_found("transaction")
        changed = state.change(transaction_id, state=body.state)
        deliveries.announce(changed)
        return {"transaction": changed.shown()}

    @router.post("/deliveries")
    async def disorder(body: _Disorder) -> dict[str, Any]:
        for name, value in body.model_dump(exclude_none=True).items():
            setattr(deliveries.disorder, name, value)
        if body.reorder == 0:
            deliveries.release()
        return {"disorder": vars(deliveries.disorder)}

    @router.get("/deliveries")
    async def delivered() -> dict[str, Any]:
        return {"deliveries": [delivery.shown() for delivery in deliveries.records]}

    @router.get("/created")
    async def created() -> dict[str, Any]:
        return {
            "walletSets": [wallet_set.shown() for wallet_set in state.wallet_sets.values()],
            "wallets": [wallet.shown() for wallet in state.wallets.values()],
            "transactions": [transaction.shown() for transaction in state.transactions.values()],
        }

    @router.get("/calls")
    async def calls() -> dict[str, int]:
        return dict(gate.calls)

    return router


def inject_transfer(state: State, deliveries: Deliveries, body: InjectedTransfer) -> Transaction:
    """Records the transfer and announces it once per state."""
    if body.wallet_id is not None:
        wallet = state.wallets.get(body.wallet_id)
    else:
        wallet = state.wallet_at(body.blockchain or "", body.address or "")
    if wallet is None:
        raise not_found("wallet")
    if not body.states:
        raise invalid("states", "at least one")
    family = BLOCKCHAINS[wallet.blockchain].family
    transaction = Transaction(
        state=body.states[0],
        blockchain=wallet.blockchain,
        wallet_id=wallet.id,
        token_id=body.token_id or usdc_token_id(wallet.blockchain),
        amounts=[body.amount],
        source_address=_hash(family, 20 if family == "evm" else 32),
        destination_address=wallet.address,
        tx_hash=body.tx_hash or _hash(family, 64 if family == "solana" else 32),
        block_hash=None if family == "aptos" else _hash(family, 32),
        block_height=len(state.transactions) + 1,
    )
    state.transactions[transaction.id] = transaction
    deliveries.announce(transaction)
    for later in body.states[1:]:
        transaction = state.change(transaction.id, state=later)
        deliveries.announce(transaction)
    return transaction


def _hash(family: str, size: int) -> str:
    drawn = os.urandom(size)
    return base58.b58encode(drawn).decode() if family == "solana" else "0x" + drawn.hex()
