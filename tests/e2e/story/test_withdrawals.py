"""A customer's withdrawal through the processes as they run: asked for by HTTP, decided by the worker, cancelled, read."""

from __future__ import annotations

from typing import Any

import aiohttp
import pytest

from tests.support.story import Story, message, report, until
from topics.catalog import DEPOSITS_NOTIFIED

pytestmark = pytest.mark.timeout(240)


async def test_a_withdrawal_is_asked_for_held_or_refused_cancelled_and_read(story: Story) -> None:
    user, wallets = await story.customer()
    deposit = report(wallets["APTOS"], chain="APTOS")
    await story.produce(DEPOSITS_NOTIFIED, message(deposit["to"], deposit))

    async def credited() -> bool:
        return await story.balance(user) == 25_000_000

    await until(credited, "the deposit")
    headers = {"Authorization": f"Bearer {await story.api_key('read', 'withdraw')}"}
    url = f"{story.stack.url('api')}/v1/withdrawals"
    async with aiohttp.ClientSession(headers=headers) as http:

        async def ask(key: str, **fields: Any) -> str:
            body = {
                "user_id": user,
                "chain": "MATIC",
                "asset": "USDC",
                "amount": "10",
                "to": "0x" + "5a" * 20,
                **fields,
            }
            async with http.post(url, json=body, headers={"Idempotency-Key": key}) as answer:
                assert answer.status == 202, await answer.text()
                return str((await answer.json())["id"])

        async def decided(id: str) -> dict[str, Any] | None:
            async with http.get(f"{url}/{id}") as answer:
                found: dict[str, Any] = await answer.json()
                return found if found["status"] != "pending" else None

        async def end(key: str, **fields: Any) -> dict[str, Any]:
            id = await ask(key, **fields)
            return await until(lambda: decided(id), "the decision")

        ends = [await end("1"), await end("2", amount="15.000001"), await end("3", to=wallets["MATIC"])]
        held, refused, own = (found["id"] for found in ends)
        assert [[step["status"] for step in found["history"][:2]] for found in ends] == [
            ["pending", "signing"], ["pending", "failed"], ["pending", "failed"],
        ]  # fmt: skip
        assert [found["code"] for found in ends[1:]] == ["insufficient_funds", "own_wallet"]
        async with http.get(url, params={"user_id": user, "status": "failed"}) as answer:
            assert [one["id"] for one in (await answer.json())["withdrawals"]] == [own, refused]
        assert await story.balance(user, "pending_withdrawal") == 10_000_000
        async with http.post(f"{url}/{held}/cancel") as answer:
            assert (answer.status, (await answer.json())["status"]) == (200, "cancelled")
    assert await story.balance(user) == 25_000_000
    assert await story.balance(user, "pending_withdrawal") == 0
