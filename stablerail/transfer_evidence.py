"""The page of evidence about a withdrawal that a custodian sends: the call for it, what the custodian told and says now, what the
rule does next. stablerail/evidence.py puts it on the page.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

import orjson

from agents.withdrawals import settle_transfers, transfer_by_custodian
from agents.withdrawals.withdrawal import ENDED, Status, Withdrawal
from connectors.circle.client import CircleClient
from connectors.circle.transactions import SOURCE
from connectors.errors import ConnectorError
from ledger.rows import Connection
from ledger.sql import load
from stablerail.config import Settings

_sql = load("stablerail", "withdrawals.sql")

Page = dict[str, Any]

_SAID: Final = ("state", "txHash", "errorReason", "errorDetails", "blockHeight", "createDate", "updateDate")
"""Of what Circle shows of a transfer."""


async def transfer_of(connection: Connection, name: str) -> str | None:
    """The withdrawal that a custodian's transfer is of, by the transfer's id or by a transaction's hash."""
    found: str | None = await connection.fetchval(_sql.of_transfer, name)
    return found


async def transfer_page(connection: Connection, settings: Settings, withdrawal: Withdrawal) -> Page:
    """What is stored of the transfer, and what the custodian says where its credentials are set."""
    row = await connection.fetchrow(_sql.transfer, withdrawal.id, withdrawal.chain)
    transfer = None if row is None else plain(dict(row))
    if transfer is not None:
        transfer["tx_hashes"] = transfer["tx_hashes"].split()
    call = await _call(connection, withdrawal.id)
    later = await _later(connection, withdrawal, transfer)
    gate = await connection.fetchval(_sql.gate, f"partner:{SOURCE}")
    return {
        "transfer": transfer,
        "transfer_history": [
            plain(dict(step)) for step in await connection.fetch(_sql.transfer_history, withdrawal.id)
        ],
        "call": call,
        "later": later,
        "custodian_says": await _says(settings, transfer),
        "next": _next(withdrawal, transfer, call, later, gate),
    }


def _next(
    withdrawal: Withdrawal, transfer: Page | None, call: Page | None, later: list[Page], gate: str | None
) -> Page:
    """What the rule does by itself."""
    if withdrawal.status in ENDED:
        return {"rule": "nothing", "why": "ended"}
    if withdrawal.status == Status.MANUAL_REVIEW and withdrawal.code not in (None, *settle_transfers.GOES_ON):
        return {"rule": "nothing", "why": withdrawal.code}
    if call is not None and call["state"] in ("waiting", "open") and gate is not None:
        return {"rule": "asks_custodian", "why": f"gate closed: {gate}"}
    if call is not None and call["state"] in ("waiting", "open"):
        return {
            "rule": "asks_custodian",
            "attempt": call["attempts"] + 1,
            "due_at": call["due_at"],
            "why": call["error"],
        }
    if later:
        first = min(later, key=lambda one: str(one["available_at"]))
        return {
            "rule": "looks_again",
            "why": first["code"],
            "attempt": first["attempt"],
            "due_at": first["available_at"],
        }
    if transfer is None:
        return {"rule": "wants_transfer", "why": withdrawal.status}
    return {"rule": "waits_for_custodian", "why": transfer["state"]}


async def _call(connection: Connection, withdrawal_id: str) -> Page | None:
    """The call that asks for it; `waiting` where it is wanted and not made."""
    row = await connection.fetchrow(_sql.call_of, withdrawal_id)
    if row is None:
        return None
    found = plain(dict(row))
    found["request"] = orjson.loads(found["request"]) if found["request"] else None
    return found


async def _later(connection: Connection, withdrawal: Withdrawal, transfer: Page | None) -> list[Page]:
    """Events about it that come again."""
    names = [withdrawal.id, *([transfer["transfer_id"]] if transfer and transfer["transfer_id"] else [])]
    keys = [name.encode() for name in names]
    stages = (settle_transfers.NAME, transfer_by_custodian.NAME)
    rows = await connection.fetch(_sql.later, stages[0], keys, stages[1], withdrawal.chain.encode(), withdrawal.id)
    found = []
    for row in rows:
        one = plain(dict(row))
        said = orjson.loads(one.pop("value"))
        found.append({**one, "said": said.get("state"), "tx_hash": said.get("tx_hash")})
    return found


async def _says(settings: Settings, transfer: Page | None) -> Page | None:
    """The custodian's own word, now."""
    key, secret = settings.circle_api_key, settings.circle_entity_secret
    if transfer is None or transfer["transfer_id"] is None or key is None or secret is None:
        return None
    try:
        async with CircleClient(settings.circle_api_url, key, secret, settings.call_timeout_s) as client:
            said = await client.transaction(transfer["transfer_id"])
    except ConnectorError as error:
        return {"error": str(error.code)}
    return {name: said[name] for name in _SAID if isinstance(said.get(name), str | int)}


def plain(row: dict[str, Any]) -> Page:
    return {name: one.isoformat() if isinstance(one, datetime) else one for name, one in row.items()}
