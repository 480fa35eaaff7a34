"""Calls to a partner under a lease, on real PostgreSQL and Kafka, with a partner whose answers the test gives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import asyncpg
import pytest

from agents.acting import Acting, CallPolicy
from agents.intents import Again, Conclusion, StoredCall
from agents.onboarding import provision_wallets
from agents.onboarding.wallet_calls import WalletDeeds
from agents.onboarding.wallet_requests import Facts
from agents.services import Services
from connectors.errors import RateLimited, Refused, Unknown
from ledger.roles import ROLE
from ledger.rows import Connection
from ledger.verify import verify
from stablerail.dev.kafka import Kafka
from stablerail.metrics import Metrics
from tests.support.in_process import SCHEMA, Ground, ground, running, until
from tests.support.rebuild import differences, empty_database, rebuild
from topics.catalog import WALLETS_PROVISIONED, WALLETS_REQUESTED
from topics.envelope import value_of
from topics.events import Chain, WalletsProvisioned, WalletsRequested

POLICY = CallPolicy(timeout_s=20, lease_s=60, rate_per_s=100, poll_s=0.05)
METRICS = Metrics()
WHILE_COMPARED_S = 3_600.0
"""How much later nothing is due, and so nothing committed, while the database is compared with its journal."""


class Partner(WalletDeeds):
    """Answers from a list; the last one for ever. An event is waited for before the answer after it."""

    def __init__(self, *answers: Any) -> None:
        super().__init__(None, POLICY.members_max, POLICY.attempts_max, METRICS)
        self.answers = list(answers)
        self.heard: list[StoredCall] = []

    async def perform(self, call: StoredCall) -> dict[str, Any]:
        self.heard.append(call)
        while isinstance(self.answers[0], asyncio.Event):
            await self.answers.pop(0).wait()
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return {
            "wallets": [
                {
                    "id": f"id-{chain}",
                    "address": address(user),
                    "ref_id": user,
                    "chain": chain,
                }
                for chain in answer
                for user in call.request["user_ids"]
            ]
        }


def address(user: str) -> str:
    return "0x" + user.encode().hex().ljust(40, "0")


BOTH = ("ETH", "MATIC")


@pytest.fixture
async def at(database: str, kafka: Kafka, topic_prefix: str) -> AsyncIterator[Ground]:
    async with ground(database, kafka.bootstrap, topic_prefix, [WALLETS_REQUESTED, WALLETS_PROVISIONED]) as it:
        yield it


@asynccontextmanager
async def performing(services: Services, partner: Partner) -> AsyncIterator[None]:
    """A process's performers."""
    acting = Acting(provision_wallets.stage(), partner, services, asyncio.Event(), POLICY)
    task = asyncio.create_task(acting.work())
    try:
        yield
        assert services.stop.reason is None, services.stop.reason
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def intend(at: Ground, user: str = "kim") -> None:
    """One call, intended by the stage."""
    event = WalletsRequested(user_id=user, chains=(Chain.ETH, Chain.MATIC))
    async with at.process() as services, running(provision_wallets.stage(), services, at):
        await at.send(WALLETS_REQUESTED, user.encode(), value_of(event))
        await until(
            lambda: at.observer.fetchval("SELECT count(*) FROM call_members WHERE request ->> 'user_id' = $1", user),
            "the intent",
        )


async def concluded(at: Ground, user: str = "kim") -> bool:
    query = "SELECT count(*) FROM calls WHERE state = 'concluded' AND request -> 'user_ids' ? $1"
    count: int = await at.observer.fetchval(query, user)
    return count == 1


async def check(at: Ground, *partners: Partner) -> None:
    """One conclusion, told once, whatever was heard under one key; and the journal holds it."""
    assert (
        len({(c.idempotency_key, str(sorted(c.request.items()))) for partner in partners for c in partner.heard}) == 1
    )
    rows = await at.observer.fetch("SELECT chain, address FROM wallets WHERE user_id = 'kim' ORDER BY chain")
    assert [tuple(row) for row in rows] == [(chain, address("kim")) for chain in BOTH]
    told = [WalletsProvisioned.model_validate_json(r.value) for r in await at.told(WALLETS_PROVISIONED)]
    (news,) = [event for event in told if event.user_id == "kim"]
    assert [w.wallet_id for w in news.wallets] == ["id-ETH", "id-MATIC"]
    assert await at.observer.fetchval("SELECT count(*) FROM leases") == 0
    assert not [result for result in await verify(at.observer) if not result.holds]


async def lease(at: Ground) -> Any:
    return await at.observer.fetchrow("SELECT until, attempts, last_error FROM leases")


async def test_a_reply_that_lacks_a_chain_is_no_failure_and_asked_for_again(
    at: Ground,
) -> None:
    partner = Partner(["ETH"], BOTH)
    await intend(at)
    async with at.process() as services, performing(services, partner):
        await until(lambda: has_error(at, "wallet_missing"), "the first reply is judged")
        assert await at.observer.fetchval("SELECT count(*) FROM wallets") == 0
        at.clock.forward(-WHILE_COMPARED_S)
        await until(lambda: journaled(at), "the journal has it, a moment after its commit")
        async with empty_database(at.dsn) as empty:
            await rebuild(at.bootstrap, at.prefix, empty, SCHEMA)
            assert await differences(at.dsn, empty) == {}
        at.clock.forward(WHILE_COMPARED_S + 70)
        await until(lambda: concluded(at), "the conclusion")
        await until(lambda: at.told(WALLETS_PROVISIONED), "the news")
    assert len(partner.heard) == 2
    await check(at, partner)


async def journaled(at: Ground) -> bool:
    return bool(await at.observer.fetchval("SELECT count(*) = 0 FROM outbox WHERE NOT journaled"))


async def has_error(at: Ground, error: str) -> bool:
    row = await lease(at)
    return row is not None and row[2] == error


async def test_a_partner_that_says_when_is_not_asked_before(at: Ground) -> None:
    partner = Partner(RateLimited(retry_after_s=1_200.0), BOTH)
    await intend(at)
    async with at.process() as services, performing(services, partner):
        await until(lambda: has_error(at, "partner_rate_limited"), "the refusal is noted")
        due, attempts, _ = await lease(at)
        assert (due - at.clock()).total_seconds() > 1_100
        assert attempts == 1
        at.clock.forward(1_000)  # minutes are left: no stall of ours makes it due
        await asyncio.sleep(4 * POLICY.poll_s)
        assert len(partner.heard) == 1
        at.clock.forward(330)
        await until(lambda: concluded(at), "the conclusion")
        await until(lambda: at.told(WALLETS_PROVISIONED), "the news")
    await check(at, partner)


async def test_two_performers_make_a_call_once(at: Ground) -> None:
    gate = asyncio.Event()
    one, two = Partner(gate, BOTH), Partner(gate, BOTH)
    await intend(at)
    async with at.process() as a, at.process() as b, performing(a, one), performing(b, two):

        async def asked() -> bool:
            return bool(one.heard or two.heard)

        await until(asked, "one of them asks")
        await asyncio.sleep(4 * POLICY.poll_s)
        gate.set()
        await until(lambda: concluded(at), "the conclusion")
        await until(lambda: at.told(WALLETS_PROVISIONED), "the news")
    assert len(one.heard) + len(two.heard) == 1
    await check(at, one, two)


async def test_a_performer_that_answers_after_its_lease_changes_nothing_twice(at: Ground) -> None:
    gate = asyncio.Event()
    slow, quick = Partner(gate, BOTH), Partner(BOTH)
    await intend(at)
    async with at.process() as frozen, performing(frozen, slow):

        async def asked() -> bool:
            return bool(slow.heard)

        await until(asked, "the first performer asks")
        at.clock.forward(POLICY.lease_s + 1)
        async with at.process() as other, performing(other, quick):
            await until(lambda: concluded(at), "the second performer's conclusion")
            await until(lambda: at.told(WALLETS_PROVISIONED), "the news")
        gate.set()
        await intend(at, "lee")  # taken when the first performer is through with what it had
        await until(lambda: concluded(at, "lee"), "its next call")
    assert ([c.request["user_ids"] for c in slow.heard], len(quick.heard)) == ([["kim"], ["lee"]], 1)
    slow.heard.pop()
    await check(at, slow, quick)


async def test_a_refusal_that_comes_after_another_has_taken_the_call_ends_nothing(at: Ground) -> None:
    """What the other asked for may have been done by now: a transfer would be given back and paid."""
    gate = asyncio.Event()
    slow, quick = Partner(gate, Refused(400, "2", "no"), BOTH), Partner(Unknown("the reply is lost"))
    await intend(at)
    async with at.process() as frozen, performing(frozen, slow):
        await until(lambda: was_asked(slow), "the first performer asks")
        at.clock.forward(POLICY.lease_s + 1)
        async with at.process() as other, performing(other, quick):
            await until(lambda: has_error(at, "partner_outcome_unknown"), "the second performer has no answer")
        gate.set()
        await intend(at, "lee")  # taken when the first performer is through with what it had
        await until(lambda: concluded(at, "lee"), "its next call")
        assert not await concluded(at)
        at.clock.forward(2 * POLICY.retry_first_s)
        await until(lambda: concluded(at), "the conclusion")
        await until(lambda: news(at, 2), "the news")
    assert [c.request["user_ids"] for c in slow.heard] == [["kim"], ["lee"], ["kim"]]
    slow.heard.pop(1)
    await check(at, slow, quick)


async def news(at: Ground, count: int) -> bool:
    return len(await at.told(WALLETS_PROVISIONED)) == count


async def test_a_partner_that_refuses_the_call_has_taken_our_key(at: Ground) -> None:
    partner = Partner(Refused(401, None, "who are you?"), Refused(400, "2", "no"))
    await intend(at)
    async with at.process() as services, performing(services, partner):
        await until(lambda: _is_unready(services), "the key is refused")
        at.clock.forward(2 * POLICY.retry_first_s)
        await until(lambda: _is_ready(services), "the key is taken")


async def _is_unready(services: Services) -> bool:
    return bool(services.unready)


async def _is_ready(services: Services) -> bool:
    return not services.unready


async def test_the_lease_runs_anew_from_when_the_partner_is_asked(at: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, answered, kafka_is_back = asyncio.Event(), asyncio.Event(), asyncio.Event()
    partner = Partner(answered, BOTH)
    await intend(at)
    async with at.process() as services:
        journal = services.relay.journal

        async def journaled_later(*args: Any, **kwargs: Any) -> None:
            taken.set()
            await kafka_is_back.wait()
            await journal(*args, **kwargs)

        monkeypatch.setattr(services.relay, "journal", journaled_later)
        async with performing(services, partner):
            await asyncio.wait_for(taken.wait(), 100)
            at.clock.forward(2 * POLICY.lease_s)  # it has run out, but nobody else has taken the call
            assert (await lease(at))[0] < at.clock()
            kafka_is_back.set()
            await until(lambda: was_asked(partner), "the partner is asked")
            before = at.clock()
            assert 0 < (before - (await lease(at))[0]).total_seconds() + POLICY.lease_s < POLICY.lease_s / 2
            answered.set()
            await until(lambda: concluded(at), "the conclusion")
            await until(lambda: at.told(WALLETS_PROVISIONED), "the news")
    assert [call.takes for call in partner.heard] == [1]
    await check(at, partner)


async def was_asked(partner: Partner) -> bool:
    return bool(partner.heard)


async def test_who_learns_too_late_that_its_lease_was_renewed_does_not_ask(at: Ground) -> None:
    partner = Partner(BOTH)
    await intend(at)

    class Late(asyncpg.Connection):  # type: ignore[type-arg]
        """The machine stands still while the first reply to a renewal is on its way."""

        stood = False

        async def fetchval(self, query: str, *args: Any, **kwargs: Any) -> Any:
            found = await super().fetchval(query, *args, **kwargs)
            if "UPDATE leases" in query and not Late.stood:
                Late.stood = True
                at.clock.forward(POLICY.lease_s + 1)
            return found

    opened: list[Connection] = []

    async def connect() -> Connection:
        settings = {"search_path": SCHEMA, "role": ROLE, "timezone": "UTC"}
        opened.append(await asyncpg.connect(at.dsn, server_settings=settings, connection_class=Late))
        return opened[-1]

    async with at.process() as services, performing(replace(services, connect=connect), partner):
        await until(lambda: concluded(at), "the conclusion")
        await until(lambda: at.told(WALLETS_PROVISIONED), "the news")
    for connection in opened:
        await connection.close()
    assert Late.stood
    assert [call.takes for call in partner.heard] == [2], "what was not asked for is taken again, and is no attempt"
    assert [call.attempts for call in partner.heard] == [0]
    await check(at, partner)


class Odd(Partner):
    """Every customer a call of its own. Lee's wallets have no id, and mo's reply cannot be read; they come with kim's."""

    def __init__(self) -> None:
        super().__init__(BOTH)
        self._members_max = 1
        self.all_asked = asyncio.Event()

    async def perform(self, call: StoredCall) -> dict[str, Any]:
        reply = await super().perform(call)
        if len(self.heard) == 3:
            self.all_asked.set()
        await self.all_asked.wait()
        if call.request["user_ids"] == ["lee"]:
            reply["wallets"] = [{**wallet, "id": ""} for wallet in reply["wallets"]]
        return reply

    def conclude(self, call: StoredCall, reply: dict[str, Any] | Refused, facts: Facts) -> Conclusion | Again:
        if call.request["user_ids"] == ["mo"]:
            raise LookupError("who reads this knows what is in the reply")
        return super().conclude(call, reply, facts)


async def test_a_reply_that_nobody_can_read_is_an_attempt_and_holds_up_nobody_else(
    at: Ground, capsys: pytest.CaptureFixture[str]
) -> None:
    partner = Odd()
    for user in ("lee", "mo", "kim"):
        await intend(at, user)

    async def attempts() -> dict[str, tuple[int, str]]:
        rows = await at.observer.fetch("SELECT request -> 'user_ids' ->> 0, attempts, state FROM calls")
        return {user: (count, state) for user, count, state in rows if user != "kim"}

    async def are(count: int, state: str) -> bool:
        return await attempts() == dict.fromkeys(("lee", "mo"), (count, state))

    async with at.process() as services, performing(services, partner):
        await until(lambda: concluded(at), "the good customer's conclusion")
        for count in range(1, POLICY.attempts_max):
            await until(lambda count=count: are(count, "open"), f"attempts: {count}")  # type: ignore[misc]
            at.clock.forward(2 * POLICY.retry_max_s)
        await until(lambda: are(POLICY.attempts_max, "failed"), "they are given up: the same calls may be opened again")
        await until(lambda: at.told(WALLETS_PROVISIONED), "the news")
    keys = {call.idempotency_key for call in partner.heard if call.request["user_ids"] != ["kim"]}
    assert (len(keys), len(partner.heard)) == (2, 1 + 2 * POLICY.attempts_max)
    letters = await at.told(WALLETS_REQUESTED.dlq)
    assert {WalletsRequested.model_validate_json(one.value).user_id for one in letters} == {"lee", "mo"}
    assert {dict(one.headers)["dlq_code"] for one in letters} == {b"partner_outcome_unknown"}
    assert "LookupError" in (said := capsys.readouterr().out)
    assert "who reads this" not in said
