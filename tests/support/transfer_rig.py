"""A rig for crash tests of the rail `circle`: the withdrawals' worker behind proxies, Circle's sandbox behind one more, and the
bridge, a process of its own, which Circle's signed notifications come to.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Final
from urllib.parse import urlsplit
from uuid import uuid4

from pydantic import SecretStr

from connectors.circle.client import CircleClient
from connectors.circle.sandbox import CircleSandbox, SandboxConfig
from connectors.circle.sandbox.config import TEST_API_KEY, TEST_ENTITY_SECRET
from connectors.circle.sandbox.state import Plan, Transaction
from tests.support.proxies import HttpProxy
from tests.support.withdrawal_rig import CHAIN, DEPTH, FUNDS, Asked, WithdrawalRig
from tests.support.worker_rig import PATIENCE_S
from topics.events import Rail

PATH: Final = "/v1/w3s/developer/transactions/transfer"
PAID: Final = "paid"
REFUSED: Final = "refused"
_PLANS: Final[dict[str, tuple[Plan | None, str]]] = {
    PAID: (None, "completed"),
    "failed after it was sent, and paid": (Plan("CONFIRMED", "FAILED"), "completed"),
    "denied": (Plan("QUEUED", "DENIED"), "failed"),
    REFUSED: (None, "failed"),
}
"""What Circle makes of a transfer -> how the withdrawal ends."""


class TransferRig(WithdrawalRig):
    rail = Rail.CIRCLE.value
    circle: CircleSandbox
    api: HttpProxy
    """Before Circle's API; notifications go past it."""
    polls = False
    """Whether the next worker asks Circle how transfers stand; else all that is known comes by webhooks."""

    async def open(self) -> None:
        await super().open()
        self._open = AsyncExitStack()
        environment = self._stack.environment
        config = SandboxConfig(
            rsa_bits=2048, rate_limits=False, rpc_url=self.anvil.rpc_url, usdc_address=self.usdc.address, poll_s=0.05,
            confirmations=DEPTH + 1, retry_delays_s=(0.2,) * 100, endpoint=f"{self._stack.url('bridge')}/webhooks/circle",
        )  # fmt: skip
        self.circle = await self._open.enter_async_context(CircleSandbox(config))
        port = urlsplit(self.circle.base_url).port
        assert port
        self.api = self._open.enter_context(HttpProxy("127.0.0.1", port))
        environment["STABLERAIL_CIRCLE_API_URL"] = self.circle.base_url
        key, secret = SecretStr(TEST_API_KEY), SecretStr(TEST_ENTITY_SECRET)
        async with CircleClient(self.circle.base_url, key, secret) as client:
            within = await client.create_wallet_set(str(uuid4()), "treasury")
            (self._wallet,) = await client.create_wallets(str(uuid4()), within, ["MATIC-AMOY"], [("out", "treasury")])
        environment["STABLERAIL_CIRCLE_WITHDRAWAL_WALLETS"] = json.dumps({CHAIN: self._wallet.id})
        await self.usdc.transfer(self._wallet.address, FUNDS)
        self._stack.start(("bridge",), self.settings)
        await self._stack.wait_ready(("bridge",), PATIENCE_S)

    async def close(self) -> None:
        self._stack.stop()
        await super().close()
        await self._open.aclose()

    def worker_environment(self) -> dict[str, str]:
        poll = {"STABLERAIL_CIRCLE_TRANSFER_POLL_S": "200ms" if self.polls else "1h"}
        return {**super().worker_environment(), "STABLERAIL_CIRCLE_API_URL": self.api.url, **poll}

    async def ask_for(self, *kinds: str) -> Sequence[Asked]:
        """A withdrawal of each kind, as one record batch."""
        made = []
        for number, kind in enumerate(kinds):
            plan, outcome = _PLANS[kind]
            one = self.wanted(number, outcome)
            if plan is not None:
                self.circle.sandbox.state.plans[one.to] = plan
            if kind == REFUSED:
                self.circle.sandbox.state.refused.add(one.to)
            made.append(one)
        return await self.send(made)

    async def until_under_way(self) -> None:
        """Until Circle has all that was asked for, nothing more happens without a block, and the journal has everything."""

        async def under_way() -> bool:
            waits = await self.database.fetchval(
                "SELECT count(*) FROM withdrawals w LEFT JOIN custodian_transfers t ON t.withdrawal_id = w.id"
                " WHERE w.status NOT IN ('completed', 'failed') AND t.state IS DISTINCT FROM 'CONFIRMED'"
            )
            decided = await self.database.fetchval("SELECT count(*) FROM withdrawals") == len(self.asked)
            calls = await self.database.fetchval("SELECT count(*) FROM calls WHERE state = 'open'")
            return decided and not waits and not calls and await self.is_idle()

        await self.until(under_way, "Circle has sent every transfer")

    def at_circle(self) -> list[Transaction]:
        return [one for one in self.circle.sandbox.state.transactions.values() if one.transaction_type == "OUTBOUND"]

    @property
    def payer(self) -> str:
        return self._wallet.address

    async def check_sender(self) -> None:
        """Circle's own record, our row of each transfer, and our calls agree: one each."""
        rows = await self.database.fetch(
            "SELECT replace(w.id::text, '-', ''), w.recipient, t.transfer_id, t.state"
            " FROM withdrawals w JOIN custodian_transfers t ON t.withdrawal_id = w.id"
        )
        assert Counter(to for _, to, _, _ in rows) == Counter(one.to for one in self.asked)
        taken = {(id, transfer, state) for id, _, transfer, state in rows if state != "REFUSED"}
        assert sorted((one.ref_id, one.id, one.state) for one in self.at_circle()) == sorted(taken)
        calls = await self.database.fetch("SELECT request ->> 'withdrawal_id', array_agg(state) FROM calls GROUP BY 1")
        assert dict(tuple(row) for row in calls) == {id: ["concluded"] for id, *_ in rows}
        assert await self.database.fetchval("SELECT count(*) FROM leases") == 0
