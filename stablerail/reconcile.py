"""One reconciliation: everything that has two sides, compared. `stablerail reconcile` and the worker of `treasury` run it.

| comparison | sides | in flight |
| --- | --- | --- |
| legacy | the ledger and a legacy table, by customer (ledger/reconciling_legacy.py) | one snapshot of both; elsewhere: looked at again |
| mirror | the ledger's own identities (ledger/reconciling.py) | one snapshot |
| chain | the mirror and our wallets at a final block (custody.py) | looked at again: what is on its way is there by then |
| circle | the mirror and Circle's word (reconcile_circle.py) | looked at again |

Who does not answer leaves a gap that is named, and the rest is compared. Raises asyncpg's errors: without the database there is nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import Final

import asyncpg

from chain.errors import ChainError
from chain.rpc import Rpc
from connectors.circle.client import CircleClient
from connectors.errors import ConnectorError
from ledger.accounts import custody as custody_account
from ledger.commit import lost_not_cancelled
from ledger.errors import LegacyUnusable
from ledger.reconciling import Comparison, Difference, Found, Gap, GapCode, compare_mirror
from ledger.reconciling_legacy import compare_legacy
from ledger.rows import Connection
from ledger.shadow import Phase
from ledger.shadow_phases import state
from ledger.sql import load
from stablerail.config import PREFIX, Settings
from stablerail.connections import connector, rpcs
from stablerail.custody import Custody, custody_of
from stablerail.reconcile_circle import LOOK_PAUSE_S, LOOKS, CircleWord
from topics.events import Chain

_sql = load("stablerail", "custody.sql")

SNAPSHOT_IDLE: Final = "10min"
"""It holds no lock that anybody waits for, and reading a chain or Circle may take longer than a stage's transaction."""

CONNECT_S: Final = 10.0
ANSWER_S: Final = 60.0
"""For a page of a legacy table elsewhere: from a server that hangs, or a host that is gone, no answer comes for ever."""
REASON_MAX: Final = 300

Progress = Callable[[str, int, int], None]


async def reconcile(settings: Settings, found: Found, progress: Progress = lambda *_: None) -> None:
    """Compares everything; what it finds goes to `found`."""
    connection = await connector(settings, idle_in_transaction_session_timeout=SNAPSHOT_IDLE)()
    try:
        progress("the ledger and its mirror", 0, 0)
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            await compare_mirror(connection, found)
            if settings.legacy_url is None:  # last: an error of that table ends the snapshot
                await _compare_legacy(settings, connection, None, found, progress)
        if settings.legacy_url is not None:
            await _compare_elsewhere(settings, connection, found, progress)
        rows = await connection.fetch(_sql.chains, [chain.value for chain in Chain])
        async with AsyncExitStack() as stack:
            circle = await _circle(settings, stack)
            for name, at_circle in rows:
                chain = Chain(name)
                endpoints = await _endpoints(settings, chain, stack)
                custody = custody_of(settings, chain, endpoints) if endpoints else None
                if custody is not None:
                    progress(f"{chain}: the mirror and the chain", 0, 0)
                    await _compare_chain(connection, custody, found)
                if at_circle:
                    progress(f"{chain}: wallets at Circle", 0, 0)
                    await _compare_circle(settings, connection, chain, circle, custody, found, progress)
                elif custody is None:
                    found.gaps.append(Gap(Comparison.CHAIN, name, GapCode.NOT_CONFIGURED, _unset("rpc_urls")))
    finally:
        await connection.close()


async def _compare_legacy(
    settings: Settings, connection: Connection, elsewhere: Connection | None, found: Found, progress: Progress
) -> None:
    legacy = settings.legacy
    if legacy is None or (await state(connection)).phase is Phase.CUT_OVER:  # nothing is written there any more
        return
    looks = 1 if elsewhere is None else LOOKS
    try:
        await legacy.check(elsewhere or connection)
        customers = compare_legacy(
            connection, legacy, found, elsewhere=elsewhere, looks=looks, pause_s=LOOK_PAUSE_S
        )  # fmt: skip
        async for done in customers:
            progress("customers, in the ledger and the legacy table", done, 0)
    except (LegacyUnusable, asyncpg.InsufficientPrivilegeError) as error:
        found.gaps.append(Gap(Comparison.LEGACY, "", GapCode.NOT_CONFIGURED, f"{error}"[:REASON_MAX]))


async def _compare_elsewhere(settings: Settings, connection: Connection, found: Found, progress: Progress) -> None:
    elsewhere: Connection | None = None
    try:
        with lost_not_cancelled():
            elsewhere = await asyncpg.connect(
                settings.secret("legacy_url"), timeout=CONNECT_S, command_timeout=ANSWER_S
            )
        await _compare_legacy(settings, connection, elsewhere, found, progress)
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
        if connection.is_closed():
            raise
        reason = f"{type(error).__name__}: {error}"[:REASON_MAX]
        found.gaps.append(Gap(Comparison.LEGACY, "", GapCode.AWAY, reason))
    finally:
        if elsewhere is not None:
            elsewhere.terminate()


async def _compare_chain(connection: Connection, custody: Custody, found: Found) -> None:
    try:
        for look in range(LOOKS):
            if look:
                await asyncio.sleep(LOOK_PAUSE_S)
            seen = await custody.look(connection)
            if not seen.difference:
                break
    except ChainError as error:
        found.gaps.append(_away(Comparison.CHAIN, custody.chain, error))
        return
    found.compared(Comparison.CHAIN, seen.wallets)
    if seen.difference:
        account = str(custody_account(custody.chain.value))
        found.differ(Difference(Comparison.CHAIN, "", account, seen.held - seen.difference, seen.held))


async def _compare_circle(
    settings: Settings,
    connection: Connection,
    chain: Chain,
    circle: CircleClient | None,
    custody: Custody | None,
    found: Found,
    progress: Progress,
) -> None:
    token_id = settings.circle_usdc_token_ids.get(chain)
    if circle is None or token_id is None:
        reason = (
            _unset("circle_usdc_token_ids") if circle is not None else _unset("circle_api_key", "circle_entity_secret")
        )
        found.gaps.append(Gap(Comparison.CIRCLE, chain.value, GapCode.NOT_CONFIGURED, reason))
        return
    sets = {row[0] for row in await connection.fetch(_sql.wallet_sets)} | {settings.circle_wallet_set_id or ""}
    word = CircleWord(circle, settings.network, chain, token_id, frozenset(sets), custody, progress)
    try:
        await word.compare(connection, found)
    except (ConnectorError, ChainError) as error:
        found.gaps.append(_away(Comparison.CIRCLE, chain, error))


async def _circle(settings: Settings, stack: AsyncExitStack) -> CircleClient | None:
    if settings.circle_api_key is None or settings.circle_entity_secret is None:
        return None
    return await stack.enter_async_context(
        CircleClient(
            settings.circle_api_url, settings.circle_api_key, settings.circle_entity_secret, settings.call_timeout_s
        )
    )


async def _endpoints(settings: Settings, chain: Chain, stack: AsyncExitStack) -> Sequence[Rpc]:
    if chain not in settings.read_chains:
        return ()
    endpoints = rpcs(settings, chain)
    for rpc in endpoints:
        stack.push_async_callback(rpc.close)
    return endpoints


def _away(comparison: Comparison, chain: Chain, error: ChainError | ConnectorError) -> Gap:
    said = f"{error.code}: {error}".replace("\0", "")  # of somebody else's, and PostgreSQL's texts hold no NUL
    return Gap(comparison, chain.value, GapCode.AWAY, said[:REASON_MAX])


def _unset(*fields: str) -> str:
    return "needs " + " and ".join(PREFIX + field.upper() for field in fields)
