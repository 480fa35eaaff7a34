"""`stablerail lanes list|add|drain|retire|pause|resume|sync|release|top-ups`: the keys that sign withdrawals, and the coins for gas
that they are given; each change is a log.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal

import typer

from agents.withdrawals import foreign, lanes
from agents.withdrawals.errors import RequestRefused
from agents.withdrawals.sync_lane import Comparison, apply, compare, least_count
from chain.errors import KeystoreError, SignerError
from ledger.commit import Sealed
from ledger.rows import Connection
from ledger.sql import load
from stablerail.cli_base import (
    EXIT_FOUND,
    EXIT_UNAVAILABLE,
    EXIT_USAGE,
    Actor,
    Format,
    changed,
    fail,
    looked_up,
    needed_settings,
    out,
    show,
    show_table,
)
from topics.events import Chain
from topics.money import format_amount

_top_ups = load("agents.withdrawals", "top_ups.sql")

lanes_app = typer.Typer(no_args_is_help=True, help="Keys that sign withdrawals: a lane for each signer on a chain.")

Name = Annotated[str, typer.Argument(metavar="LANE", help="as `lanes list` shows it: MATIC:0x…")]
NONCE_MAX: Final = 2**63 - 1


@lanes_app.command("list")
def lanes_list(format: Format = "table") -> None:
    """Every lane, its nonces, and why it is paused."""
    found = [{"lane": lane.key, **lane._asdict()} for lane in looked_up(lanes.list_lanes)]
    show(format, ("lane", "next_nonce", "chain_nonce", "status", "reason"), found)


@lanes_app.command("add")
def lanes_add(
    chain: Annotated[Chain, typer.Argument(help="the chain", case_sensitive=False)],
    key: Annotated[str, typer.Option(help="where the key is: kms:KEY, secretsmanager:NAME or a keystore's path")],
    signer: Annotated[str | None, typer.Option(help="its address; another key is then refused")] = None,
    actor: Actor = None,
) -> None:
    """Sign with one key more, or with a lane's key from another place; running workers load it within seconds."""
    from stablerail.hot_wallets import load_lane_key

    settings = needed_settings("database_url", logs=False)
    if chain not in settings.withdrawal_chains:
        fail(f"no_such_chain: {chain} is not in STABLERAIL_WITHDRAWAL_CHAINS", EXIT_USAGE)
    try:
        address = load_lane_key(settings, key, signer).address
    except (KeystoreError, SignerError) as error:
        fail(f"{error}; nothing was added")
    lane = (chain.value, address)
    _act(":".join(lane), "added", lambda connection, who, at: lanes.add_lane(connection, lane, key, at, who), actor)


@lanes_app.command("drain")
def lanes_drain(lane: Name, actor: Actor = None) -> None:
    """Sign nothing more with it, on the way to be retired; what is signed goes its way."""
    _act(lane, "draining", lambda connection, who, at: lanes.drain_lane(connection, _key(lane), at, who), actor)


@lanes_app.command("retire")
def lanes_retire(lane: Name, actor: Actor = None) -> None:
    """End a lane for good. Refused while the chain has not ended all its nonces."""
    _act(lane, "retired", lambda connection, who, at: lanes.retire_lane(connection, _key(lane), at, who), actor)


@lanes_app.command("pause")
def lanes_pause(
    lane: Name,
    reason: Annotated[str, typer.Option(help="why; it is shown until the lane is opened")],
    actor: Actor = None,
) -> None:
    """Sign nothing more until the lane is opened; what is signed goes its way."""
    _act(lane, "paused", lambda connection, who, at: lanes.pause_lane(connection, _key(lane), reason, at, who), actor)


@lanes_app.command("open", hidden=True)
@lanes_app.command("resume")
def lanes_open(
    lane: Name,
    force: Annotated[
        bool, typer.Option("--force", help="though it was not compared since a restore, or no endpoint answers")
    ] = False,
    reason: Annotated[str, typer.Option(help="of --force: how you know that nothing is forgotten; for the audit")] = "",
    actor: Actor = None,
) -> None:
    """Sign again. After foreign_nonce and nonce_taken only once it is known who else used the key; after a restore `recovery open` does it."""
    from stablerail.connections import rpcs

    settings = needed_settings("database_url", logs=False)
    key, forced = _key(lane), reason if force else None

    async def open_(connection: Connection, who: str, at: datetime) -> Sealed:
        async with AsyncExitStack() as stack:
            known = key[0] in settings.rpc_urls
            endpoints = [await stack.enter_async_context(rpc) for rpc in rpcs(settings, Chain(key[0]))] if known else []
            counted = await least_count(endpoints, key[1])
        return await lanes.open_lane(connection, key, at, who, forced=forced, counted=counted)

    _act(lane, "open", open_, actor)


@lanes_app.command("sync")
def lanes_sync(
    lane: Name,
    apply_: Annotated[bool, typer.Option("--apply", help="store what is found; else nothing changes")] = False,
    actor: Actor = None,
) -> None:
    """Compare a lane's nonces with what each endpoint of its chain counts; exit code 1 when something differs and is not stored."""
    from stablerail.connections import rpcs

    settings = needed_settings("database_url", logs=False)
    key = _key(lane)
    if key[0] not in settings.rpc_urls:
        fail(f"no_such_chain: {key[0]} has no endpoint in STABLERAIL_RPC_URLS", EXIT_USAGE)

    async def look(connection: Connection) -> Comparison:
        async with AsyncExitStack() as stack:
            endpoints = [await stack.enter_async_context(rpc) for rpc in rpcs(settings, Chain(key[0]))]
            return await compare(connection, key, endpoints, datetime.now(UTC))

    async def change(connection: Connection, who: str, at: datetime) -> tuple[Comparison, bool]:
        found = await look(connection)
        return found, found.after is not None and await apply(connection, found, at, who)

    def run() -> tuple[Comparison, bool]:
        if apply_:
            done: tuple[Comparison, bool] = changed(change, actor)
            return done
        return looked_up(look), False

    found, applied = _refusable(lane, run)
    _shown(found, applied)
    if all(one.failure for one in found.counts):
        raise typer.Exit(EXIT_UNAVAILABLE)
    raise typer.Exit(EXIT_FOUND if found.findings and not applied else 0)


@lanes_app.command("release")
def lanes_release(
    lane: Name,
    nonce: Annotated[
        int, typer.Argument(min=0, max=NONCE_MAX, help="that somebody else used; `tx show` and `lanes top-ups` have it")
    ],
    reason: Annotated[str, typer.Option(help="who used it, for the audit")],
    actor: Actor = None,
) -> None:
    """End what a nonce was signed for that somebody else used: a withdrawal fails and its hold goes back, a top-up ends. Refused unless
    two endpoints say so at the chain's depth, and none of ours is mined. The lane stays paused."""
    from stablerail.connections import rpcs

    settings = needed_settings("database_url", logs=False)
    key = _key(lane)
    if key[0] not in settings.rpc_urls:
        fail(f"no_such_chain: {key[0]} has no endpoint in STABLERAIL_RPC_URLS", EXIT_USAGE)

    async def change(connection: Connection, who: str, at: datetime) -> foreign.Released:
        chain = Chain(key[0])
        async with AsyncExitStack() as stack:
            endpoints = [await stack.enter_async_context(rpc) for rpc in rpcs(settings, chain)]
            depth = settings.finality_depths_blocks[chain]
            return await foreign.release(connection, key, nonce, endpoints, depth, reason, at, who)

    try:
        done = changed(change, actor)
    except LookupError:
        fail(f"unknown_nonce: nothing was signed with nonce {nonce} of {lane}")
    except ValueError as error:
        fail(f"bad_reason: {error}", EXIT_USAGE)
    except RequestRefused as error:
        fail(f"{error.code}: {error}; nothing was changed")
    ended = (
        "has failed, its hold is given back" if done.about == "withdrawal" else "has failed, nothing of it was booked"
    )
    out.print(f"{done.about} {done.id} {ended}")


@lanes_app.command("top-ups")
def lanes_top_ups(
    chain: Annotated[Chain | None, typer.Option(help="only these")] = None,
    state: Annotated[Literal["open", "done", "failed"] | None, typer.Option(help="only these")] = None,
    limit: Annotated[int, typer.Option(help="most of them", min=1, max=10_000)] = 50,
    format: Format = "table",
) -> None:
    """Coins for gas that lanes were given, the newest first."""
    rows = looked_up(lambda connection: top_ups_of(connection, chain, state, limit))
    columns = (
        "account", "nonce", "lane", "amount", "state", "signed_at", "ended_at", "block_number", "attempts", "status", "error",
        "tx_hash",
    )  # fmt: skip
    show(format, columns, ({"account": f"{row['chain']}:{row['signer']}", **row} for row in rows))


async def top_ups_of(connection: Connection, chain: str | None, state: str | None, limit: int) -> list[dict[str, Any]]:
    """The newest first; amounts as decimal coins."""
    rows = await connection.fetch(_top_ups.list, chain, state, limit)
    return [{**row, "amount": format_amount(int(row["amount"]))} for row in rows]


def _shown(found: Comparison, applied: bool) -> None:
    lane, after = found.lane, found.after
    rows = [(one.endpoint, *((one.failure, "") if one.failure else (one.latest, one.pending))) for one in found.counts]
    show_table(("who", "in blocks", "with its pool"), [*rows, ("our row", lane.chain_nonce, lane.next_nonce)])
    flying = f"{len(found.open_nonces)} in flight" + (f", {found.open_nonces[0]} on" if found.open_nonces else "")
    lines = [f"{lane.key} is {lane.status}{f' ({lane.reason})' if lane.reason else ''}; {flying}"]
    lines += found.findings or ["nothing differs"]
    if after is not None:
        verb = "set" if applied else "--apply would set"
        lines.append(f"{verb}: chain's count {after.chain_nonce}, {after.status} {after.reason}".rstrip())
    for line in lines:
        out.print(line)


def _act(lane: str, state: str, act: Callable[[Connection, str, datetime], Awaitable[Any]], actor: str | None) -> None:
    _refusable(lane, lambda: changed(act, actor))
    out.print(f"{lane} is {state}")


def _refusable(lane: str, run: Callable[[], Any]) -> Any:
    try:
        return run()
    except LookupError:
        fail(f"unknown_lane: {lane}; `stablerail lanes list` shows them")
    except ValueError as error:
        fail(f"bad_reason: {error}", EXIT_USAGE)
    except RequestRefused as error:
        fail(f"{error.code}: {error}")


def _key(lane: str) -> tuple[str, str]:
    chain, _, signer = lane.partition(":")
    return chain, signer.lower()
