"""Transfers out: taken without a look at funds, then INITIATED to COMPLETE by themselves, or as a Plan says.

    INITIATED ─▶ CLEARED ─▶ QUEUED ─▶ SENT ─▶ CONFIRMED ─▶ COMPLETE      any of them ─▶ FAILED | DENIED | CANCELLED

On the chain that is watched the money really moves, from the wallet's own address; on the others a hash is drawn. Every state
from QUEUED on is told.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from decimal import Decimal
from typing import Annotated, Any, Final, Literal

import base58
import structlog
from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import UUID4, BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from connectors.circle.sandbox.config import SandboxConfig
from connectors.circle.sandbox.rpc import Rpc, RpcError
from connectors.circle.sandbox.state import Plan, State, Transaction, Wallet, invalid, not_found
from connectors.circle.sandbox.tokens import BLOCKCHAINS, usdc_token_id

log = structlog.get_logger()

PATH: Final = ("INITIATED", "CLEARED", "QUEUED", "SENT", "CONFIRMED", "COMPLETE")
UNTOLD: Final = frozenset({"INITIATED", "CLEARED"})
ENDED: Final = frozenset({"COMPLETE", "FAILED", "DENIED", "CANCELLED"})
SCALE: Final = 10**6


class _Transfer(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel)
    idempotency_key: UUID4
    entity_secret_ciphertext: str
    wallet_id: str
    token_id: str
    destination_address: Annotated[str, Field(min_length=1)]
    amounts: Annotated[
        list[Annotated[str, Field(pattern=r"^\d{1,30}(\.\d{1,6})?$")]], Field(min_length=1, max_length=1)
    ]
    fee_level: Literal["LOW", "MEDIUM", "HIGH"]
    ref_id: str | None = None


class Transfers:
    """`close` belongs to the server's life cycle."""

    def __init__(
        self, config: SandboxConfig, state: State, rpc: Rpc | None, announce: Callable[[Transaction], None]
    ) -> None:
        self._config, self._state, self._rpc, self._announce = config, state, rpc, announce
        self._tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def create(self, body: _Transfer) -> dict[str, Any]:
        wallet = self._state.wallets.get(body.wallet_id)
        if wallet is None:
            raise not_found("wallet")
        if body.token_id != usdc_token_id(wallet.blockchain):
            raise invalid("tokenId", "not USDC on the wallet's blockchain")
        if body.ref_id in self._state.refused or body.destination_address in self._state.refused:
            raise invalid("destinationAddress", "refused on demand")
        transfer = Transaction(
            state="INITIATED",
            blockchain=wallet.blockchain,
            wallet_id=wallet.id,
            token_id=body.token_id,
            amounts=body.amounts,
            source_address=wallet.address,
            destination_address=body.destination_address,
            transaction_type="OUTBOUND",
            first_confirm_date=None,
            ref_id=body.ref_id,
            fee_level=body.fee_level,
        )
        self._state.transactions[transfer.id] = transfer
        plans = self._state.plans
        plan = plans.get(body.ref_id) or plans.get(body.destination_address) or Plan()
        task = asyncio.create_task(self._go(transfer.id, wallet, plan))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return {"id": transfer.id, "state": transfer.state}

    async def _go(self, key: str, wallet: Wallet, plan: Plan) -> None:
        for state in PATH[1 : PATH.index(plan.until) + 1]:
            self._change(key, **await self._reached(key, wallet, plan, state))
            if self._state.transactions[key].state in ENDED:
                return
        if plan.end is not None:
            self._change(key, state=plan.end, error_reason=plan.error_reason)

    async def _reached(self, key: str, wallet: Wallet, plan: Plan, state: str) -> dict[str, Any]:
        """What the step to `state` changes, once it can be made."""
        while True:
            try:
                change = await self._step(self._state.transactions[key], wallet, plan, state)
                if change is not None:
                    return change
            except RpcError as error:
                await log.awarning("sandbox_chain_unreachable", reason=str(error))
            await asyncio.sleep(self._config.poll_s)

    async def _step(self, transfer: Transaction, wallet: Wallet, plan: Plan, state: str) -> dict[str, Any] | None:
        if transfer.state in ENDED:
            return {}  # /_control was quicker
        rpc = self._rpc if wallet.blockchain == self._config.evm_blockchain and plan.broadcast else None
        if state == "SENT":
            return await self._sent(transfer, wallet, plan, rpc)
        if state in ("CONFIRMED", "COMPLETE") and rpc is not None:
            assert transfer.tx_hash is not None
            mined = await rpc.mined(transfer.tx_hash)
            if mined is None:
                return None
            block, succeeded = mined
            place = {"block_hash": block.hash, "block_height": block.number}
            if not succeeded:
                return {"state": "FAILED", "error_reason": "TRANSACTION_REVERTED", **place}
            head = await rpc.block("latest")
            deep = head is not None and block.number <= head.number - self._config.confirmations + 1
            return {"state": state, **place} if state == "CONFIRMED" or deep else None
        return {"state": state}

    async def _sent(self, transfer: Transaction, wallet: Wallet, plan: Plan, rpc: Rpc | None) -> dict[str, Any]:
        amount = int(Decimal(transfer.amounts[0]) * SCALE)
        if rpc is not None:
            if await rpc.usdc_balance(wallet.address) < amount:
                return {"state": "FAILED", "error_reason": "INSUFFICIENT_TOKEN"}
            return {
                "state": "SENT",
                "tx_hash": await rpc.send_usdc(wallet.address, transfer.destination_address, amount),
            }
        if plan.broadcast and self._state.held(wallet.id, transfer.token_id) < Decimal(transfer.amounts[0]):
            return {"state": "FAILED", "error_reason": "INSUFFICIENT_TOKEN"}
        is_solana = BLOCKCHAINS[wallet.blockchain].family == "solana"
        drawn = base58.b58encode(os.urandom(64)).decode() if is_solana else "0x" + os.urandom(32).hex()
        return {"state": "SENT", "tx_hash": drawn}

    def _change(self, key: str, **changes: Any) -> None:
        if changes:
            changed = self._state.change(key, **changes)
            if changed.state not in UNTOLD:
                self._announce(changed)


def routes(transfers: Transfers, state: State) -> APIRouter:
    router = APIRouter(prefix="/v1/w3s/developer/transactions")

    @router.post("/transfer")
    async def create(body: _Transfer) -> JSONResponse:
        state.authorise(body.entity_secret_ciphertext)
        content = body.model_dump(mode="json", by_alias=True)
        status, data = state.once("createTransfer", content, lambda: transfers.create(body))
        return JSONResponse({"data": data}, status)

    return router
