"""Asks Circle for wallets, and looks for those it may have made already."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from typing import Any, Final

from opentelemetry.trace import Link

from agents.intents import StoredCall, idempotency_key
from agents.onboarding import spans
from connectors.circle.chains import Network, from_circle, to_circle
from connectors.circle.client import WALLET_SET, CircleClient, CircleWallet
from connectors.errors import KEY_USED, ConnectorError, Refused, Unavailable, of_a_look
from ledger.commit import TRANSIENT, lost_not_cancelled
from ledger.rows import Connection
from ledger.sql import load
from topics.events import Chain

_sql = load("agents.onboarding", "onboarding.sql")


WALLET_SET_NAME: Final = "customers"
LOOKUP_PAUSE_S: Final = 0.055
"""Circle answers 20 look-ups a second: 200 of them take 11 s of a call's time-out, however long Circle thinks about each."""
NO_SUCH_SET: Final = 404
"""Status of a refusal of wallets: of all that is asked for only the set has an id of Circle's. One that is no id it calls wrong."""
Found = dict[tuple[str, str], dict[str, Any]]
"""(refId, our chain) -> wallet."""


class CircleWallets:
    """Performs calls whose request is {"user_ids": […], "chains": […]}."""

    def __init__(
        self,
        client: CircleClient,
        network: Network,
        wallet_set_id: str | None,
        connect: Callable[[], Awaitable[Connection]],
        clock: Callable[[], datetime],
    ) -> None:
        self._client = client
        self._network: Network = network
        self._wallet_set_id = wallet_set_id
        self._made: str | None = None
        self._connect = connect
        self._clock = clock
        self._once = asyncio.Lock()

    async def perform(self, call: StoredCall) -> dict[str, Any]:
        """One create-wallets request with the call's key: {"wallets": […], "refused": why, "wallet_set_made": id}. What is not
        in the answer, or was refused when Circle may have acted before, is looked up. Raises connectors.errors."""
        with spans.performing(call) as links:
            return await self._perform(call, links)

    async def _perform(self, call: StoredCall, links: list[Link]) -> dict[str, Any]:
        users, chains = users_of(call), [Chain(chain) for chain in call.request["chains"]]
        found: Found = {}
        refused: Refused | None = None
        now = self._clock()
        if call.outlived_its_key(now):
            await self._look_up(users, chains, found, links)
        if not found:
            wallet_set_id = await self._wallet_set(links)
            try:
                with spans.request("CreateWallets", links):
                    made = await self._client.create_wallets(
                        str(call.idempotency_key),
                        wallet_set_id,
                        [to_circle(chain, self._network) for chain in chains],
                        [(user, user) for user in users],
                    )
                self._add(found, made)
            except Refused as error:
                if error.status == NO_SUCH_SET:
                    raise _ours(error) from None
                known = call.may_be_known(now) or error.status == KEY_USED
                if not known or error.ours:
                    raise
                refused = error
            await self._look_up(users, chains, found, links)
        if refused is not None and not found:
            raise refused
        return {
            "wallets": list(found.values()),
            "refused": refused and str(refused),
            "wallet_set_made": self._made,
            "network": self._network,
        }

    async def _look_up(self, users: Sequence[str], chains: Sequence[Chain], found: Found, links: list[Link]) -> None:
        """The wallets of customers who lack one."""
        lacking = [user for user in users if any((user, chain.value) not in found for chain in chains)]
        try:
            async with asyncio.TaskGroup() as group:
                for user in lacking:
                    group.create_task(self._look_up_one(user, found, links))
                    await asyncio.sleep(LOOKUP_PAUSE_S)
        except* ConnectorError as errors:
            failed = errors.exceptions[0]
        else:
            return
        raise of_a_look(failed)

    async def _look_up_one(self, user: str, found: Found, links: list[Link]) -> None:
        with spans.request("ListWallets", links):
            listed = await self._client.list_wallets(user)
        self._add(found, list(reversed(listed)))  # where there are two, always the older

    def _add(self, found: Found, wallets: Sequence[CircleWallet]) -> None:
        for w in wallets:
            chain = from_circle(w.blockchain, self._network)
            if chain is not None and w.ref_id is not None:
                wallet = {"id": w.id, "address": w.address, "ref_id": w.ref_id, "chain": chain.value}
                found.setdefault((w.ref_id, chain.value), wallet)

    async def _wallet_set(self, links: list[Link]) -> str:
        """The one of the settings, else the one that was made before, else a new one."""
        async with self._once:
            if self._wallet_set_id is None:
                self._wallet_set_id = await self._stored_wallet_set()
            if self._wallet_set_id is None:
                # the same key whoever asks, so that an environment has one until the first conclusion stores it
                key = idempotency_key(f"wallet set {WALLET_SET_NAME} {self._network}")
                with spans.request("CreateWalletSet", links):
                    try:
                        self._made = await self._client.create_wallet_set(str(key), WALLET_SET_NAME)
                    except Refused as error:
                        raise _ours(error) from None
                self._wallet_set_id = self._made
            return self._wallet_set_id

    async def _stored_wallet_set(self) -> str | None:
        try:
            with lost_not_cancelled():
                connection = await self._connect()
                try:
                    found: str | None = await connection.fetchval(_sql.wallet_set, self._network)
                finally:
                    await connection.close()
        except TRANSIENT as error:
            raise Unavailable(f"no database: {type(error).__name__}", sent=False) from None
        return found


def _ours(error: Refused) -> Refused:
    """No customer's affair, and no reason to fail any: whoever waits for a wallet waits until people have put the set right."""
    return Refused(error.status, error.partner_code, error.message, ours=error.ours or WALLET_SET)


def users_of(call: StoredCall) -> list[str]:
    """The customers of a call; one that an older release made has one."""
    users: list[str] = call.request.get("user_ids") or [call.request["user_id"]]
    return users
