"""A customer's withdrawal through the processes as they run: asked for by HTTP, decided by the worker, cancelled, read; sent by
Circle, whose signed notifications the bridge hears.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

from chain.rpc import Rpc
from tests.support.story import Story, message, report, until
from topics.catalog import DEPOSITS_NOTIFIED, TRANSFERS_NOTIFIED, WITHDRAWALS_SETTLED

TRANSFERS = "/v1/w3s/developer/transactions/transfer"


@dataclass
class Api:
    """Our HTTP API, as a customer's application uses it."""

    story: Story
    user: str
    http: aiohttp.ClientSession
    url: str

    async def ask(self, key: str, **fields: Any) -> str:
        """For 10 USDC on MATIC, unless told otherwise; the withdrawal's id."""
        body = {"user_id": self.user, "chain": "MATIC", "asset": "USDC", "amount": "10", "to": address(), **fields}
        async with self.http.post(self.url, json=body, headers={"Idempotency-Key": key}) as answer:
            assert answer.status == 202, await answer.text()
            return str((await answer.json())["id"])

    async def until(self, id: str, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The withdrawal, once it is as wanted. Blocks come meanwhile."""

        async def look() -> dict[str, Any] | None:
            await self.story.usdc.anvil.mine()
            async with self.http.get(f"{self.url}/{id}") as answer:
                found: dict[str, Any] = await answer.json()
                return found if wanted(found) else None

        return await until(look, f"withdrawal {id}", pause_s=0.2)


@asynccontextmanager
async def customers(story: Story, user: str) -> AsyncIterator[Api]:
    headers = {"Authorization": f"Bearer {await story.api_key('read', 'withdraw')}"}
    async with aiohttp.ClientSession(headers=headers) as http:
        yield Api(story, user, http, f"{story.stack.url('api')}/v1/withdrawals")


def address() -> str:
    return "0x" + secrets.token_hex(20)


async def test_a_withdrawal_is_asked_for_held_or_refused_cancelled_and_read(story: Story) -> None:
    user, wallets = await story.customer()
    deposit = report(wallets["APTOS"], chain="APTOS")
    await story.produce(DEPOSITS_NOTIFIED, message(deposit["to"], deposit))

    async def credited() -> bool:
        return await story.balance(user) == 25_000_000

    await until(credited, "the deposit")
    async with customers(story, user) as api:

        async def end(key: str, **fields: Any) -> dict[str, Any]:
            return await api.until(await api.ask(key, **fields), lambda found: found["status"] != "pending")

        ends = [await end("1"), await end("2", amount="15.000001"), await end("3", to=wallets["MATIC"])]
        held, refused, own = (found["id"] for found in ends)
        assert [[step["status"] for step in found["history"][:2]] for found in ends] == [
            ["pending", "signing"], ["pending", "failed"], ["pending", "failed"],
        ]  # fmt: skip
        assert [found["code"] for found in ends[1:]] == ["insufficient_funds", "own_wallet"]
        async with api.http.get(api.url, params={"user_id": user, "status": "failed"}) as answer:
            assert [one["id"] for one in (await answer.json())["withdrawals"]] == [own, refused]
        assert await story.balance(user, "pending_withdrawal") == 10_000_000
        async with api.http.post(f"{api.url}/{held}/cancel") as answer:
            assert (answer.status, (await answer.json())["status"]) == (200, "cancelled")
    assert await story.balance(user) == 25_000_000
    assert await story.balance(user, "pending_withdrawal") == 0


async def test_a_withdrawal_by_circle_ends_by_the_signed_notification_that_the_bridge_heard(story: Story) -> None:
    """Whatever becomes of the reply, and whatever Circle says that the chain does not: nobody polls in this story."""
    user, wallets = await story.customer()
    deposit = report(wallets["APTOS"], chain="APTOS", amount="100")
    await story.produce(DEPOSITS_NOTIFIED, message(deposit["to"], deposit))
    await story.usdc.anvil.wait_mined(await story.usdc.transfer(story.stack.treasury, 100_000_000))
    faults: dict[str, dict[str, Any] | None] = {
        "answered": None,
        "told before the reply": {"path": TRANSFERS, "kind": "hang", "acts": True},
        "the reply lost": {"path": TRANSFERS, "kind": "lost_reply"},
        "failed after it was sent, and paid": None,
        "denied": None,
    }
    to = {name: address() for name in faults}
    await story.control("plans", {"of": to["failed after it was sent, and paid"], "until": "SENT", "end": "FAILED"})
    await story.control("plans", {"of": to["denied"], "until": "QUEUED", "end": "DENIED"})

    async def credited() -> bool:
        return await story.balance(user) == 100_000_000

    async def heard() -> list[dict[str, Any]]:
        """Circle's own record of our transfers."""
        made = (await story.look("created"))["transactions"]
        return [one for one in made if one.get("refId") in ids.values()]

    await until(credited, "the deposit")
    ids: dict[str, str] = {}
    ended: dict[str, dict[str, Any]] = {}
    async with customers(story, user) as api:
        for name, fault in faults.items():
            if fault is not None:
                await story.control("faults", fault)
            ids[name] = id = await api.ask(name, rail="circle", to=to[name])

            async def taken(id: str = id) -> bool:
                return id in [one["refId"] for one in await heard()]

            await until(taken, f"Circle has {name}")
        for name, id in ids.items():
            ended[name] = await api.until(id, lambda found: found["status"] in ("completed", "failed"))
    assert {name: (found["status"], found["code"]) for name, found in ended.items()} == {
        **dict.fromkeys(faults, ("completed", None)),
        "denied": ("failed", "custodian_denied"),
    }
    made = await heard()
    assert Counter(one["refId"] for one in made) == Counter(ids.values()), "one transfer each"
    at_circle = {one["refId"]: one for one in made}
    paid = [name for name in faults if name != "denied"]
    for name in paid:
        assert ended[name]["transfer"]["tx_hashes"] == [at_circle[ids[name]]["txHash"]]
    async with Rpc(story.usdc.anvil.rpc_url, story.usdc.anvil.chain_id) as rpc:
        logs = await rpc.logs(story.usdc.address.lower(), set(to.values()), 0, (await rpc.head()).number)
    assert sorted((log.sender, log.to, log.amount) for log in logs) == sorted(
        (story.stack.treasury, to[name], 10_000_000) for name in paid
    )
    assert (await story.balance(user), await story.balance(user, "pending_withdrawal")) == (60_000_000, 0)

    async def all_taken() -> list[dict[str, Any]]:
        """Circle hears that the bridge took one a moment after it was published."""
        every = (await story.look("deliveries"))["deliveries"]
        sent = [one for one in every if one["resourceId"] in {each["id"] for each in made}]
        return sent if all(one["delivered"] for one in sent) else []

    sent = await until(all_taken, "the bridge took each")
    assert {one["attempts"][-1] for one in sent} == {200}
    assert {status for one in sent for status in one["attempts"]} <= {200, "TimeoutError"}, "a busy machine may be late"
    told = [
        record for record, event in await story.events(TRANSFERS_NOTIFIED) if event.get("reference") in ids.values()
    ]
    heard_ids = {dict(record.headers)["ce_id"].decode() for record in told}
    assert heard_ids == {one["notificationId"] for one in sent}, "and nobody else told of them"

    async def all_settled() -> list[dict[str, Any]]:
        told = [event for _, event in await story.events(WITHDRAWALS_SETTLED) if event.get("user_id") == user]
        return told if len(told) >= len(ids) else []

    settled = await until(all_settled, "every end is told")
    assert sorted((event["withdrawal_id"], event["outcome"]) for event in settled) == sorted(
        (id, ended[name]["status"]) for name, id in ids.items()
    )
