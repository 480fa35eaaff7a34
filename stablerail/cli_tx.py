"""`stablerail tx show|speed-up|cancel`: the transactions of a withdrawal: the page of evidence, and what people wish of them.

No key is here: a wish is stored, and the worker of withdrawals signs at the chain's next head.
"""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from agents.withdrawals import raising, stored, wishes
from agents.withdrawals.errors import NotRaisable, UnknownWithdrawal
from agents.withdrawals.sign_transactions import CANCEL
from agents.withdrawals.wishes import Wish
from chain.fees import GWEI, FeePolicy
from ledger.rows import Connection
from stablerail.cli_base import (
    EXIT_USAGE,
    Actor,
    Format,
    changed,
    fail,
    looked_up,
    needed_settings,
    out,
    show_json,
    show_table,
)
from stablerail.config import Settings
from topics.events import Chain, Rail

tx_app = typer.Typer(no_args_is_help=True, help="Transactions of withdrawals: seen, sped up, cancelled.")

Id = Annotated[
    str,
    typer.Argument(
        metavar="ID", help="the withdrawal's id; `show` takes a transaction's hash, or Circle's id of a transfer, too"
    ),
]
Reason = Annotated[str, typer.Option(help="why, for the audit")]
Force = Annotated[bool, typer.Option(help=f"beyond the rule's number of attempts, up to {raising.ATTEMPTS_MAX}")]

REMEDIES: dict[str, str] = {
    raising.NOT_SIGNED_YET: "nothing of it is signed; POST /v1/withdrawals/ID/cancel gives it back",
    raising.HAS_ENDED: "it has ended",
    raising.IN_A_BLOCK: "one of its attempts is in a block; the chain decides",
    raising.CANCELLING: "its newest attempt is a cancel; speed-up raises that",
    raising.ATTEMPTS_USED: f"as many attempts as the rule allows; --force goes to {raising.ATTEMPTS_MAX}",
    "fees_over_cap": "an eighth more is over the network's cap, STABLERAIL_WITHDRAWAL_FEE_CAPS_GWEI",
    "nonce_taken": "something that is none of ours used its nonce; another attempt cannot be mined; `stablerail lanes release LANE NONCE` gives it back,"
    " and where that was the payment `stablerail withdrawals settle ID --paid` ends it",
    "unexpected_transfers": "its payment was mined and moved something else; another attempt cannot be mined; `stablerail withdrawals settle` ends it",
}


@tx_app.command("speed-up")
def speed_up(id: Id, reason: Reason, force: Force = False, actor: Actor = None) -> None:
    """Sign the next attempt of the same nonce with higher fees; of a cancel that is on its way, the cancel."""
    _wish(id, wishes.SPEED_UP, reason, force, actor)


@tx_app.command("cancel")
def cancel(id: Id, reason: Reason, force: Force = False, actor: Actor = None) -> None:
    """Sign an attempt of the same nonce that moves nothing. Whichever is mined decides: the hold goes back only if it wins."""
    _wish(id, CANCEL, reason, force, actor)


@tx_app.command("show")
def show(id: Id, format: Format = "table") -> None:
    """The page of evidence: what is stored, what each endpoint says, what the rule does next. Changes nothing."""
    from stablerail.evidence import page, withdrawal_of

    settings = needed_settings("database_url", logs=False)

    async def read(connection: Connection) -> Any:
        found = await withdrawal_of(connection, id)
        return None if found is None else await page(connection, settings, found, datetime.now(UTC))

    found = looked_up(read)
    if found is None:
        fail(f"unknown_withdrawal: {id}; `GET /v1/withdrawals` lists them")
    if format == "json":
        show_json(found)
    else:
        _print(found)


def _wish(id: str, kind: str, reason: str, force: bool, actor: str | None) -> None:
    settings = needed_settings("database_url", logs=False)
    key = _key(id)
    if key is None:
        fail(f"{id}: an id is a UUID", EXIT_USAGE)

    async def ask(connection: Connection, who: str, at: datetime) -> Wish:
        withdrawal = await stored.read(connection, key)
        if withdrawal is None:
            raise UnknownWithdrawal
        allowed = raising.ATTEMPTS_MAX if force else 1 + settings.withdrawal_speed_ups_max
        policy = _policy(settings, withdrawal.chain)
        return await wishes.ask(connection, key, kind, allowed, policy, reason, at, who)

    try:
        wish = changed(ask, actor)
    except UnknownWithdrawal as error:
        fail(f"{error.code}: {id}; `GET /v1/withdrawals` lists them")
    except NotRaisable as error:
        fail(f"{error.why}: {REMEDIES[error.why]}")
    except ValueError as error:
        fail(f"bad_reason: {error}", EXIT_USAGE)
    said = f"{kind} of {id} is asked for by {wish.asked_by}; the worker of withdrawals signs it at the next head"
    out.print(f"{said}: `stablerail tx show {id}`")


def _policy(settings: Settings, chain: str) -> FeePolicy:
    from stablerail.policies import fee_policy

    try:
        return fee_policy(settings, Chain(chain))
    except (ValueError, KeyError):
        raise NotRaisable(raising.NOT_SIGNED_YET) from None  # a network that we never sign for


def _key(id: str) -> str | None:
    try:
        return uuid.UUID(id).hex
    except ValueError:
        return None


def _print(page: dict[str, Any]) -> None:
    w = page["withdrawal"]
    code = f" ({w['code']})" if w["code"] else ""
    out.print(
        f"withdrawal {w['id']}: {w['status']}{code}, {w['amount']} {w['asset']} of {w['user_id']} to {w['recipient']} on {w['chain']}"
    )
    if page["hold"]:
        out.print(f"hold {page['hold']['state']}, {page['hold']['remaining']} of {page['hold']['amount']} held")
    if page["lane"]:
        lane = page["lane"]
        reason = f": {lane['reason']}" if lane["reason"] else ""
        out.print(f"lane {lane['chain']}:{lane['signer']} {lane['status']}{reason}, next nonce {lane['next_nonce']}")
    if page["withdrawal"]["rail"] == Rail.CIRCLE:
        _print_transfer(page)
    _table("history", ("at", "status", "code", "actor"), page["history"])
    if page["transfer"]:
        _table("transfer", ("at", "state", "reason", "block_number", "tx_hashes"), page["transfer_history"])
    rows = [{**one, "max fee": _gwei(one["max_fee"]), "tip": _gwei(one["priority_fee"])} for one in page["attempts"]]
    columns = (
        "n",
        "kind",
        "nonce",
        "status",
        "max fee",
        "tip",
        "signed_at",
        "broadcast_at",
        "block_number",
        "error",
        "tx_hash",
    )
    _table("attempts", columns, rows)
    for one in page["endpoints"]:
        if "error" in one:
            out.print(f"\n{one['endpoint']}: {one['error']}")
            continue
        wrong = "" if one["chain_id"] == one["expected_chain_id"] else f" (expected {one['expected_chain_id']})"
        out.print(
            f"\n{one['endpoint']}: chain {one['chain_id']}{wrong}, head {one['head']}, base fee {_gwei(one['base_fee'])},"
            f" nonce {one['nonce']} mined, {one['pending_nonce']} with its pool"
        )
        for seen in one["attempts"]:
            block = f" in block {seen['block_number']}" if "block_number" in seen else ""
            out.print(f"  {seen['tx_hash']} {seen['where']}{block}")
    if page["fees"]:
        asked = page["fees"]
        market = "more than the cap" if asked["market_max_fee"] is None else _gwei(asked["market_max_fee"])
        out.print(
            f"\nfees now: base {_gwei(asked['next_base_fee'])}, we would offer {market}, cap {_gwei(asked['cap'])}"
        )
    if page["wish"]:
        wish = page["wish"]
        what = f"as attempt {wish['n']}" if wish["n"] is not None else wish["code"] or ""
        out.print(f"wish: {wish['kind']} by {wish['asked_by']} ({wish['reason']}), {wish['state']} {what}".rstrip())
    if page["next"]:
        told = [f"{name} {_shown(name, value)}" for name, value in page["next"].items() if value is not None]
        out.print("next: " + ", ".join(told))


def _print_transfer(page: dict[str, Any]) -> None:
    """The call for it, and the custodian's words, then and now."""
    call, transfer, says = page["call"], page["transfer"], page["custodian_says"]
    if call:
        error = f", {call['error']}" if call["error"] else ""
        out.print(f"call {call['id'] or 'not made yet'} {call['state']}{error}, {call['attempts']} without an answer")
        if call["idempotency_key"]:
            out.print(f"idempotency key {call['idempotency_key']}")
    if transfer:
        reason = f" ({transfer['reason']})" if transfer["reason"] else ""
        wallet = transfer["wallet_address"] or "an address not looked up yet"
        told = transfer["transfer_id"] or "no id told yet"
        out.print(f"transfer at {transfer['custodian']} {told}: {transfer['state']}{reason}")
        out.print(f"from wallet {transfer['wallet_id']}, {wallet}")
    for one in page["later"]:
        out.print(
            f"comes again at {one['available_at']}: {one['said'] or one['stage']}, {one['code']}, attempt {one['attempt']}"
        )
    if says:
        out.print(f"{transfer['custodian']} says now: " + ", ".join(f"{name} {value}" for name, value in says.items()))


def _shown(name: str, value: Any) -> str:
    return _gwei(value) if name.endswith("_fee") else str(value)


def _table(title: str, columns: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    out.print(f"\n{title}")
    show_table(columns, ([_cell(name, row[name]) for name in columns] for row in rows))


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    is_time = name == "at" or name.endswith("_at")
    return f"{datetime.fromisoformat(value):%Y-%m-%d %H:%M:%S}" if is_time else str(value)


def _gwei(wei: str) -> str:
    return f"{int(wei) / GWEI:,.3f} gwei"
