"""The page of evidence about a withdrawal: what is stored of it, what each endpoint of its chain says, what the rule does next.

Values are texts, integers and None, as `tx show --format json` prints them: amounts are decimal USDC, fees wei per gas. Neither
keys nor the paths of endpoints, which may carry one, are in it.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any

from agents.withdrawals import stored
from agents.withdrawals.attempts import attempts_of
from agents.withdrawals.in_flight import summed
from agents.withdrawals.raise_fees import remembered
from agents.withdrawals.raising import (
    IN_A_BLOCK,
    LANE_PAUSED,
    RaisePolicy,
    Waiting,
    hopeless,
    is_shut,
    next_kind,
    not_by_rule,
    offer,
)
from agents.withdrawals.wishes import OPEN, wish_of
from agents.withdrawals.withdrawal import Attempt, Lane, Withdrawal
from chain.errors import ChainError
from chain.fees import FeePolicy, Fees, fees
from chain.hot_wallet import HotWallet, Look
from chain.outcomes import nonce
from chain.rpc import Call, Rpc, read_receipt
from chain.wire import amount, mapping, quantity
from ledger.rows import Connection
from ledger.sql import load
from stablerail.config import Settings
from stablerail.connections import rpcs
from stablerail.policies import fee_policy, raise_policy
from stablerail.transfer_evidence import Page, plain, transfer_of, transfer_page
from topics.events import Chain, Rail
from topics.money import format_amount

_sql = load("stablerail", "withdrawals.sql")

BEHIND = "behind"
"""Another nonce of its lane is the next, or nothing was seen of it yet."""
WAITS = "waits"
NOBODY_ANSWERS = "no_endpoint_answers"


async def withdrawal_of(connection: Connection, name: str) -> str | None:
    """The withdrawal of this id (a UUID), or what a transaction of this hash, or a custodian's transfer of this id, is of."""
    with suppress(ValueError):
        id = uuid.UUID(name).hex
        if await stored.read(connection, id) is not None:
            return id
    found: str | None = await connection.fetchval(_sql.of_transaction, name.lower())
    return found or await transfer_of(connection, name) or await transfer_of(connection, name.lower())


async def page(connection: Connection, settings: Settings, id: str, at: datetime) -> Page | None:
    """None when there is no such withdrawal."""
    withdrawal = await stored.read(connection, id)
    if withdrawal is None:
        return None
    group = await attempts_of(connection, id)
    signer = group[0].signer if group else None
    lane = None
    if signer is not None:
        row = await connection.fetchrow(_sql.lane, withdrawal.chain, signer)
        lane = None if row is None else Lane(*row)
    wish = await wish_of(connection, id)
    found: Page = {
        "at": at.isoformat(),
        "withdrawal": _withdrawal(withdrawal),
        "hold": await _hold(connection, withdrawal),
        "history": [plain(dict(row)) for row in await connection.fetch(_sql.history, id)],
        "lane": None if lane is None else plain(lane._asdict()),
        "attempts": [_attempt(attempt) for attempt in group],
        "transfer": None,
        "wish": None if wish is None else plain(wish._asdict()),
        "endpoints": [],
        "fees": None,
        "next": None,
    }
    chain = next((one for one in settings.rpc_urls if one == withdrawal.chain), None)
    if withdrawal.rail == Rail.CIRCLE:
        return found | await _by_custodian(connection, settings, withdrawal, chain)
    if chain is None or signer is None:
        return found
    hashes = [attempt.tx_hash for attempt in group]
    endpoints = rpcs(settings, chain)
    try:
        found["endpoints"] = list(await asyncio.gather(*(_seen(rpc, signer, hashes) for rpc in endpoints)))
        token = settings.usdc_contracts[chain].lower()
        look = await HotWallet(endpoints, signer, token).look()
    finally:
        await asyncio.gather(*(rpc.close() for rpc in endpoints))
    policy, rule = fee_policy(settings, chain), raise_policy(settings)
    if look is not None:
        found["fees"] = _fees(look, policy)
    seen_at = look.block_number if look else 0
    wei = (await summed(connection, (withdrawal.chain, signer), seen_at)).wei
    known = (await remembered(connection, withdrawal.chain)).get(f"{signer}:{group[0].nonce}")
    waits = None if known is None else Waiting.of_plain(known)
    wished = wish is not None and wish.state == OPEN
    found["next"] = {"wish": "is taken up at the chain's next head"} if wished else {}
    found["next"] |= _next(withdrawal, group, lane, look, waits, policy, rule, wei)
    return found


def _next(
    withdrawal: Withdrawal,
    group: Sequence[Attempt],
    lane: Lane | None,
    look: Look | None,
    waits: Waiting | None,
    policy: FeePolicy,
    rule: RaisePolicy,
    wei: int,
) -> Page:
    """What the rule does under the next head."""
    if look is None:
        return {"rule": "nothing", "why": NOBODY_ANSWERS}
    why = hopeless(withdrawal, group) or (IN_A_BLOCK if group[0].nonce < look.nonce else "")
    why = why or not_by_rule(withdrawal, group[-1], look.history.base_fee)
    if why:
        return {"rule": "nothing", "why": why}
    if waits is None:
        return {"rule": "nothing", "why": BEHIND}
    passed = look.block_number - waits.block
    since: Page = {"since_block": waits.block, "waiting_since": waits.at.isoformat(), "blocks": max(passed, 0)}
    found = LANE_PAUSED if is_shut(lane) else ""
    offered = found or offer(
        group, group[-1].kind, rule.attempts_max, fees(look.history, policy), policy, look.native - wei
    )
    if not isinstance(offered, Fees):
        return {"rule": "nothing", "why": offered, **since}
    fields: Page = {"max_fee": str(offered.max_fee), "priority_fee": str(offered.priority_fee)}
    fields = {"kind": next_kind(group, None), **fields, **since}
    if passed < rule.blocks:
        return {"rule": WAITS, "blocks_left": rule.blocks - passed, **fields}
    return {"rule": "raises", **fields}


async def _by_custodian(
    connection: Connection, settings: Settings, withdrawal: Withdrawal, chain: Chain | None
) -> Page:
    """Of a withdrawal that a custodian sends; every hash that it told of is looked for on a chain that we read."""
    found = await transfer_page(connection, settings, withdrawal)
    transfer = found["transfer"]
    if chain is not None and transfer is not None and transfer["wallet_address"] is not None:
        endpoints = rpcs(settings, chain)
        asked = [_seen(rpc, transfer["wallet_address"], transfer["tx_hashes"]) for rpc in endpoints]
        try:
            found["endpoints"] = list(await asyncio.gather(*asked))
        finally:
            await asyncio.gather(*(rpc.close() for rpc in endpoints))
    return found


async def _seen(rpc: Rpc, signer: str, hashes: Sequence[str]) -> Page:
    """What one endpoint says, in one batch."""
    calls = [
        Call("eth_chainId", [], quantity),
        Call("eth_getBlockByNumber", ["latest", False], _head),
        nonce(signer),
        Call("eth_getTransactionCount", [signer, "pending"], quantity),
    ]
    for tx_hash in hashes:
        calls.append(Call("eth_getTransactionReceipt", [tx_hash], _receipt))
        calls.append(Call("eth_getTransactionByHash", [tx_hash], bool))
    try:
        chain_id, head, mined, pending, *rest = await rpc.ask(calls)
    except ChainError as error:
        return {"endpoint": rpc.endpoint, "error": error.code}
    attempts = [
        {"tx_hash": tx_hash, **(receipt or {"where": "in the pool" if known else "unknown"})}
        for tx_hash, receipt, known in zip(hashes, rest[::2], rest[1::2], strict=True)
    ]
    return {
        "endpoint": rpc.endpoint, "chain_id": chain_id, "expected_chain_id": rpc.chain_id, **head, "nonce": mined,
        "pending_nonce": pending, "attempts": attempts,
    }  # fmt: skip


def _head(raw: Any) -> Page:
    block = mapping(raw)
    return {"head": quantity(block["number"]), "base_fee": str(amount(block["baseFeePerGas"]))}


def _receipt(raw: Any) -> Page | None:
    if raw is None:
        return None
    receipt = read_receipt(raw)
    where = "mined" if receipt.succeeded else "mined, reverted"
    return {"where": where, "block_number": receipt.block_number, "block_hash": receipt.block_hash}


def _fees(look: Look, policy: FeePolicy) -> Page:
    market = fees(look.history, policy)
    return {
        "next_base_fee": str(look.history.base_fee),
        "market_max_fee": None if market is None else str(market.max_fee),
        "market_priority_fee": None if market is None else str(market.priority_fee),
        "cap": str(policy.max_fee_cap),
        "coins_wei": str(look.native),
    }


async def _hold(connection: Connection, withdrawal: Withdrawal) -> Page | None:
    row = None if withdrawal.hold_id is None else await connection.fetchrow(_sql.hold, withdrawal.hold_id)
    if row is None:
        return None
    amounts = {name: format_amount(int(row[name])) for name in ("amount", "remaining", "captured")}
    return {"id": withdrawal.hold_id, "state": row["state"], **amounts}


def _withdrawal(withdrawal: Withdrawal) -> Page:
    names = ("id", "user_id", "rail", "chain", "asset", "recipient", "status", "code", "requested_at", "updated_at")
    found = plain({name: getattr(withdrawal, name) for name in names})
    return {**found, "amount": format_amount(withdrawal.amount)}


def _attempt(attempt: Attempt) -> Page:
    names = (
        "n", "kind", "tx_hash", "signer", "nonce", "status", "error", "gas_limit", "block_number", "block_hash", "signed_at",
        "broadcast_at",
    )  # fmt: skip
    found = plain({name: getattr(attempt, name) for name in names})
    return {**found, "max_fee": str(attempt.max_fee), "priority_fee": str(attempt.priority_fee)}
