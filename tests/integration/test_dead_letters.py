"""Dead letters on real PostgreSQL and Kafka: stored, healed by time, redriven and discarded by people, by API and by CLI."""

from __future__ import annotations

import asyncio
import base64
import json
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import asyncpg
import httpx
import pytest
from typer.testing import CliRunner

from agents import item
from agents.deposits import credit_deposits
from agents.deposits.policy import DepositPolicy
from agents.outcome import Stage
from agents.recovery import redrive_dead_letters as letters
from agents.recovery.letters import Letter, State
from agents.recovery.redrive_dead_letters import Filter, RedriveDeadLetters
from agents.recovery.store_dead_letters import stage as storing
from agents.services import Services
from agents.sweeper import Sweeper
from ledger.commit import lock_writer, seal
from ledger.roles import ROLE
from ledger.rows import Changes
from ledger.tables import WALLETS
from stablerail.api import create_api
from stablerail.cli import app
from stablerail.config import load_settings
from stablerail.dev.kafka import Kafka
from stablerail.keys import Scope, create_key
from stablerail.topics_admin import admin, create_missing
from tests.support.in_process import SCHEMA, Ground, ground, running, until
from tests.support.ledger_rig import assert_holds
from tests.support.rebuild import differences, empty_database, rebuild
from topics.catalog import DEPOSITS_CREDITED, DEPOSITS_NOTIFIED, WEBHOOKS_DLQ, Topic
from topics.envelope import headers_of, value_of
from topics.errors import EventCode, EventRefused
from topics.events import Chain, DepositNotified, Evidence

WALLET = "0x" + "ab" * 20


def deposits() -> Stage[Any]:
    return credit_deposits.stage(DepositPolicy(minimum=1, chains_read=frozenset({"MATIC"})))


@pytest.fixture
async def at(database: str, kafka: Kafka, topic_prefix: str) -> AsyncIterator[Ground]:
    async with ground(
        database, kafka.bootstrap, topic_prefix, [DEPOSITS_NOTIFIED], [WEBHOOKS_DLQ, DEPOSITS_CREDITED]
    ) as it:
        yield it


@asynccontextmanager
async def worker(at: Ground, *, stages: bool = True) -> AsyncIterator[Services]:
    """The stage of deposits and the one that stores what it refuses."""
    async with AsyncExitStack() as stack:
        services = await stack.enter_async_context(at.process())
        if stages:
            for one in (deposits(), storing(DEPOSITS_NOTIFIED.dlq), storing(WEBHOOKS_DLQ)):
                await stack.enter_async_context(running(one, services, at))
        yield services


def deposit(transfer: str, **changes: Any) -> DepositNotified:
    return DepositNotified(
        **{
            "source": "outside", "transfer_id": transfer, "chain": Chain.MATIC, "tx_hash": "0x" + "cd" * 32, "to": WALLET,
            "asset": "USDC", "amount": "25", "evidence": Evidence.CONFIRMED, **changes,
        }
    )  # fmt: skip


async def tell(at: Ground, event: DepositNotified, name: str = "one") -> None:
    headers = headers_of(event.ce_type(), event_id=name, source="test", time=at.clock())
    await at.send(DEPOSITS_NOTIFIED, event.to.encode(), value_of(event), [*headers, ("odd", b"\xff\x00")])


async def provision(at: Ground) -> None:
    connection = await at.connect()
    changes = Changes()
    changes.insert(WALLETS, ("MATIC", WALLET, "ada", "w-1", at.clock()))
    async with connection.transaction():
        owners = await lock_writer(connection, "test")
        await seal(
            connection, "test", owners, blocks=changes.blocks(), messages=[], at=at.clock(), actor="t", summary={}
        )
    await connection.close()


async def stored(at: Ground, **wanted: Any) -> list[Letter]:
    """All of them, once they are as wanted."""

    async def found() -> list[Letter]:
        some = await letters.page(at.observer, Filter(), 100)
        return some if some and all(getattr(one, k) == v for one in some for k, v in wanted.items()) else []

    result: list[Letter] = await until(found, f"letters with {wanted}")
    return result


async def credited(at: Ground) -> list[Any]:
    return [tuple(row) for row in await at.observer.fetch("SELECT user_id, amount::text FROM deposits")]


async def look(services: Services) -> None:
    """One round of the loop that redrives, at the clock's time."""
    loop = RedriveDeadLetters(services, lambda _open: None)
    connection = await services.connect()
    while await loop.look(connection):
        pass


async def test_a_deposit_to_a_wallet_that_is_provisioned_a_minute_later_is_credited_once_by_itself(at: Ground) -> None:
    async with worker(at) as services:
        await tell(at, deposit("t1"))
        (letter,) = await stored(at, state="open")
        assert (letter.stage, letter.code, letter.origin, letter.attempts) == (
            "credit_deposits", "unknown_wallet", "deposits.notified", 1,
        )  # fmt: skip
        await look(services)
        assert (await stored(at))[0].redrives == 0, "it is not due"
        at.clock.forward(61)
        await look(services)
        (letter,) = await stored(at, state="open", redrives=1)  # refused once more
        assert letter.attempts == 2
        assert letter.due_at is not None
        assert (letter.due_at - letter.updated_at).total_seconds() == 120
        await provision(at)
        at.clock.forward(121)
        await look(services)

        async def done() -> bool:
            await look(services)
            return (await stored(at))[0].state == State.RESOLVED

        await until(done, "the letter is resolved")
        assert await credited(at) == [("ada", "25000000")]
        at.clock.forward(10_000)
        await look(services)
        rows = await at.observer.fetch("SELECT attempt, outcome FROM inbox WHERE stage = 'credit_deposits'")
        assert [tuple(row) for row in rows] == [(3, "done")]
    await assert_holds(at.observer)
    async with empty_database(at.dsn) as dsn:
        await rebuild(at.bootstrap, at.prefix, dsn, SCHEMA)
        assert await differences(at.dsn, dsn) == {}


async def test_redriven_by_ten_at_once_and_once_more_it_is_credited_once(at: Ground) -> None:
    async with worker(at) as services:
        await tell(at, deposit("t1"))
        (letter,) = await stored(at, state="open")
        await provision(at)

        async def ask(number: int) -> None:
            connection = await at.connect()
            done = await letters.redrive(connection, [letter.id], f"person {number}", at.clock())
            if done.sealed is not None:
                await services.relay.journal([(done.sealed.seq, done.sealed.record)])
                await services.emitter.emit(done.sealed.messages, done.sealed.stage, done.sealed.at)
            await connection.close()

        await asyncio.gather(*(ask(number) for number in range(10)))
        await until(lambda: credited(at), "the deposit is credited")
        await ask(11)
        await stored(at)
        logs = await at.observer.fetch("SELECT actor FROM audit_logs WHERE action = 'dead_letter.redriven'")
        assert logs
        assert await credited(at) == [("ada", "25000000")]
    await assert_holds(at.observer)


async def test_a_redriving_that_was_cut_off_after_its_commit_leaves_by_the_sweeper(at: Ground) -> None:
    async with worker(at) as services:
        await tell(at, deposit("t1"))
        (letter,) = await stored(at, state="open")
        await provision(at)
        connection = await at.connect()
        await letters.redrive(connection, [letter.id], "ann", at.clock())  # and here whoever asked dies
        await connection.close()
        at.clock.forward(60)
        await Sweeper(services).sweep(await services.connect())
        await until(lambda: credited(at), "the deposit is credited")


class Died(Exception):
    """Whoever redrove or discarded is gone."""


@pytest.mark.parametrize("what", ["redriven", "discarded"])
async def test_who_dies_before_the_commit_or_after_it_leaves_a_letter_that_can_be_asked_for_again(
    at: Ground, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    async def ask() -> Any:
        connection = await at.connect()
        try:
            if what == "redriven":
                return (await letters.redrive(connection, [letter.id], "ann", at.clock())).sealed
            return (await letters.discard(connection, letter.id, "no use", "ann", at.clock()))[1]
        finally:
            await connection.close()

    async def sealed_and_died(connection: Any, *given: Any, **more: Any) -> Any:
        await seal(connection, *given, **more)
        connection.terminate()  # before COMMIT
        raise Died

    async with worker(at) as services:
        await tell(at, deposit("t1"))
        (letter,) = await stored(at, state="open")
        with monkeypatch.context() as dying:
            dying.setattr(letters, "seal", sealed_and_died)
            with pytest.raises((Died, asyncpg.InterfaceError, asyncpg.PostgresError, ConnectionError)):
                await ask()
        assert await stored(at) == [letter], "nothing of it"
        assert await ask() is not None  # committed, and died before it said so
        again = await ask()
        assert (again is None) == (what == "discarded"), "sent again is harmless"
        at.clock.forward(60)
        await provision(at)
        await Sweeper(services).sweep(await services.connect())
        logs = await at.observer.fetchval("SELECT count(*) FROM audit_logs WHERE action = 'dead_letter.' || $1", what)
        if what == "discarded":
            await stored(at, state="discarded")
            assert (await credited(at), logs) == ([], 1)
        else:
            await until(lambda: credited(at), "the deposit is credited")
            assert (await credited(at), logs) == ([("ada", "25000000")], 2)
    await assert_holds(at.observer)


async def test_what_was_never_an_event_is_one_letter_however_often_it_is_redriven(at: Ground) -> None:
    raw = b"\xff\x00 {not json}"
    async with worker(at) as services:
        await at.send(DEPOSITS_NOTIFIED, b"\x00\xffk", raw, [("odd", b"\xfe\x00"), ("dlq_letter", b"f" * 32)])
        await at.producer.send_and_wait(DEPOSITS_NOTIFIED.dlq.named(at.prefix), None, key=b"\xff")  # by whomever
        await at.producer.send_and_wait(
            WEBHOOKS_DLQ.named(at.prefix), raw, key=b"circle", headers=[("code", b"unknown_type")]
        )
        found = {one.code: one for one in await stored_all(at, 3)}
        letter = found["not_json"]
        assert (letter.key, letter.value) == (b"\x00\xffk", raw)
        connection = await at.connect()
        refused = (await letters.redrive(connection, [one.id for one in found.values()], "ann", at.clock())).refused
        assert sorted(one.code for one in refused) == ["not_redrivable", "not_redrivable"]
        done = await letters.redrive(connection, [letter.id], "ann", at.clock(), force=True)
        assert done.sealed is not None
        await services.relay.journal([(done.sealed.seq, done.sealed.record)])
        await services.emitter.emit(done.sealed.messages, done.sealed.stage, done.sealed.at)
        await connection.close()

        async def back() -> bool:
            same = [one for one in await letters.page(at.observer, Filter(code="not_json"), 10) if one.state == "open"]
            return [one.redrives for one in same if one.id == letter.id] == [1]

        await until(back, "it is refused again, and is the same letter")
        assert len(await letters.page(at.observer, Filter(code="not_json"), 10)) == 1
    await assert_holds(at.observer)


async def made_anew(at: Ground) -> None:
    """The topics of deposits and of their dead letters: deleted, and there again, empty."""
    names = [topic.named(at.prefix) for topic in (DEPOSITS_NOTIFIED, DEPOSITS_NOTIFIED.dlq)]
    async with admin(at.bootstrap) as client:
        await client.delete_topics(names)

        async def gone() -> bool:
            return not set(names) & set(await client.list_topics())

        await until(gone, "the topics are gone")
        await create_missing(client, at.prefix, 1, [DEPOSITS_NOTIFIED, DEPOSITS_NOTIFIED.dlq])


async def places(at: Ground, topic: Topic) -> list[tuple[int, int]]:
    return [(one.partition, one.offset) for one in await at.told(topic)]


async def test_letters_of_topics_that_were_made_anew_are_taken_for_none_that_stood_there_before(at: Ground) -> None:
    """Every place of theirs was another's, and what is refused again there has the same bytes but for its headers."""
    async with worker(at):
        await at.send(DEPOSITS_NOTIFIED, b"k", b"{one")
        (one,) = await stored(at, state="open", value=b"{one")
        stood = [await places(at, topic) for topic in (DEPOSITS_NOTIFIED, DEPOSITS_NOTIFIED.dlq)]
    await made_anew(at)
    async with worker(at) as services:
        connection = await at.connect()
        done = await letters.redrive(connection, [one.id], "ann", at.clock(), force=True)
        assert done.sealed is not None
        await stored(at, state="redriven")
        await services.relay.journal([(done.sealed.seq, done.sealed.record)])
        await services.emitter.emit(done.sealed.messages, done.sealed.stage, done.sealed.at)
        await connection.close()
        await stored(at, id=one.id, state="open", redrives=1)
        assert await places(at, DEPOSITS_NOTIFIED.dlq) == stood[1]
    await made_anew(at)
    async with worker(at):
        await at.send(DEPOSITS_NOTIFIED, b"k", b"{two")
        two = next(letter for letter in await stored_all(at, 2) if letter.id != one.id)
        assert (two.value, two.state) == (b"{two", "open")
        assert [await places(at, topic) for topic in (DEPOSITS_NOTIFIED, DEPOSITS_NOTIFIED.dlq)] == stood
    async with worker(at):  # reads both topics again
        await at.send(DEPOSITS_NOTIFIED, b"k", b"{three")
        await stored_all(at, 3)
        assert len(await at.told(DEPOSITS_NOTIFIED.dlq)) == 2, "one of each"
    await assert_holds(at.observer)
    async with empty_database(at.dsn) as dsn:
        await rebuild(at.bootstrap, at.prefix, dsn, SCHEMA)
        assert await differences(at.dsn, dsn) == {}


async def test_what_an_older_release_could_not_read_is_resolved_by_whatever_its_stage_makes_of_it_now(
    at: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The inbox knew it by its place, and now by its own id: refused once more, and credited at last, it is one letter."""

    def unread(*_: Any) -> Any:
        raise EventRefused(EventCode.UNSUPPORTED_VERSION, "version 2")

    async def redriven(services: Services, id: str) -> None:
        connection = await at.connect()
        done = await letters.redrive(connection, [id], "ann", at.clock())
        assert done.sealed is not None
        await connection.close()
        at.clock.forward(60)
        await Sweeper(services).sweep(await services.connect())

    async with worker(at) as services:
        with monkeypatch.context() as older:
            older.setattr(item, "read", unread)
            await tell(at, deposit("t1"))
            (letter,) = await stored(at, state="open", code="unsupported_version")
        await redriven(services, letter.id)
        (again,) = await stored(at, state="open", code="unknown_wallet")
        assert (again.id, again.event_id, again.redrives) == (letter.id, letter.event_id, 1)
        assert await at.observer.fetchval("SELECT count(*) FROM dead_letter_events") == 2
        await provision(at)
        await redriven(services, letter.id)
        await until(lambda: credited(at), "the deposit is credited")

        async def resolved() -> bool:
            await look(services)
            return (await stored(at))[0].state == State.RESOLVED

        await until(resolved, "the letter is resolved")
    assert await credited(at) == [("ada", "25000000")]
    await assert_holds(at.observer)


async def test_more_than_a_commit_may_hold_is_redriven_by_several(at: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(letters, "BYTES_AT_ONCE", 1_500)
    async with worker(at) as services:
        for number in range(5):
            await tell(at, deposit(f"t{number}"), f"event {number}")
        found = await stored_all(at, 5)
        await provision(at)
        connection = await at.connect()
        done = await letters.redrive(connection, [one.id for one in found], "ann", at.clock())
        assert done.left
        assert len(done.left) + len(done.sent) == 5
        await connection.close()
        at.clock.forward(61)
        await Sweeper(services).sweep(await services.connect())
        await look(services)

        async def all_credited() -> bool:
            return len(await credited(at)) == 5

        await until(all_credited, "the five are credited")
        told = (await at.told(DEPOSITS_NOTIFIED.dlq))[0]
        await at.producer.send_and_wait(
            DEPOSITS_NOTIFIED.dlq.named(at.prefix), told.value, key=told.key, headers=list(told.headers)
        )  # a refusal that is told twice

        async def resolved() -> bool:
            await look(services)
            return all(one.state == State.RESOLVED for one in await stored_all(at, 5))

        await until(resolved, "all are resolved, and stay so")


async def stored_all(at: Ground, count: int) -> list[Letter]:
    async def found() -> list[Letter]:
        some = await letters.page(at.observer, Filter(), 100)
        return some if len(some) == count else []

    result: list[Letter] = await until(found, f"{count} letters")
    return result


async def test_an_event_that_its_stage_took_is_never_settled_again(at: Ground) -> None:
    """A letter of another deployment's making, for an event that was done."""
    async with worker(at) as services:
        await provision(at)
        await tell(at, deposit("t1"))
        await until(lambda: credited(at), "the deposit is credited")
        (record,) = await at.told(DEPOSITS_NOTIFIED)
        uid = await at.observer.fetchval("SELECT replace(event_id::text, '-', '') FROM inbox")
        ours = {
            "stage": "credit_deposits",
            "event": uid,
            "code": "unknown_wallet",
            "topic": "deposits.notified",
            "attempts": "4",
        }
        headers = [*record.headers, *((f"dlq_{name}", text.encode()) for name, text in ours.items())]
        await at.producer.send_and_wait(
            DEPOSITS_NOTIFIED.dlq.named(at.prefix), record.value, key=record.key, headers=headers
        )
        (letter,) = await stored(at)
        at.clock.forward(61)
        await look(services)
        connection = await at.connect()
        (why,) = (await letters.redrive(connection, [letter.id], "ann", at.clock(), force=True)).refused
        await connection.close()
        assert why.code == "letter_ended"
        (letter,) = await stored(at, state="open")
        assert letter.due_at is None
        assert await credited(at) == [("ada", "25000000")]


@pytest.fixture
async def api(at: Ground, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Callable[..., Any]]:
    """With an admin's key, or none of its scope."""
    settings = {"search_path": SCHEMA, "role": ROLE}
    monkeypatch.setenv("STABLERAIL_KAFKA_BOOTSTRAP", at.bootstrap)
    monkeypatch.setenv("STABLERAIL_TOPIC_PREFIX", at.prefix)
    monkeypatch.setenv("STABLERAIL_DATABASE_URL", at.dsn)
    async with asyncpg.create_pool(at.dsn, min_size=1, max_size=3, server_settings=settings) as pool:
        created = create_api(load_settings(env_file=None), pool)
        await created.state.journal.start()
        transport = httpx.ASGITransport(created)
        clients: list[httpx.AsyncClient] = []

        async def client(scope: Scope) -> httpx.AsyncClient:
            async with pool.acquire() as connection:
                made = await create_key(connection, [scope], "the tests")
            headers = {"Authorization": f"Bearer {made.token.get_secret_value()}"}
            clients.append(httpx.AsyncClient(transport=transport, base_url="http://api", headers=headers))
            return clients[-1]

        yield client
        for one in clients:
            await one.aclose()
        await created.state.journal.stop()


async def test_people_see_redrive_and_discard_them_by_the_api(at: Ground, api: Any) -> None:
    admin, reader = await api(Scope.ADMIN), await api(Scope.READ)
    async with worker(at):
        for number in range(3):
            await tell(at, deposit(f"t{number}"), f"event {number}")
        await tell(at, deposit("t9", to="0x12"), "event 9")
        await stored_all(at, 4)
        assert (await reader.get("/v1/admin/dlq")).status_code == 403
        first = (await admin.get("/v1/admin/dlq", params={"limit": 2, "class": "producer"})).json()
        second = (await admin.get("/v1/admin/dlq", params={"limit": 2, "after": first["next"]})).json()
        assert second["next"] is None
        shown = {one["id"]: one for one in (*first["dead_letters"], *second["dead_letters"])}
        assert len(shown) == 4
        bad = next(one for one in shown.values() if one["code"] == "bad_address")
        assert (bad["redrivable"], bad["class"], bad["origin"]) == (False, "producer", "deposits.notified")
        whole = (await admin.get(f"/v1/admin/dlq/{bad['id']}")).json()
        assert json.loads(base64.b64decode(whole["value"]))["to"] == "0x12"
        assert ["odd", "0xff00"] in whole["headers"]
        assert (await admin.post(f"/v1/admin/dlq/{bad['id']}/redrive")).json()["code"] == "not_redrivable"
        gone = await admin.delete(f"/v1/admin/dlq/{bad['id']}", params={"reason": "a typing error"})
        assert (gone.status_code, gone.json()["state"]) == (200, "discarded")
        assert (await admin.post(f"/v1/admin/dlq/{bad['id']}/redrive")).json()["code"] == "letter_ended"
        log = await at.observer.fetchrow("SELECT * FROM audit_logs WHERE action = 'dead_letter.discarded'")
        assert json.loads(log["after"]) == {"reason": "a typing error"}
        assert json.loads(base64.b64decode(json.loads(log["before"])["value"]))["to"] == "0x12"
        await provision(at)
        redriven = await admin.post("/v1/admin/dlq/redrive", json={"code": "unknown_wallet"})
        assert (redriven.status_code, len(redriven.json()["redriven"])) == (202, 3)

        async def all_credited() -> bool:
            return len(await credited(at)) == 3

        await until(all_credited, "the three are credited")
    for status, code, asked in (
        (404, "unknown_letter", admin.get(f"/v1/admin/dlq/{uuid.uuid4().hex}")),
        (404, "unknown_letter", admin.delete(f"/v1/admin/dlq/{uuid.uuid4().hex}", params={"reason": "r"})),
        (404, "unknown_letter", admin.post(f"/v1/admin/dlq/{uuid.uuid4().hex}/redrive")),
        (422, "invalid_request", admin.post("/v1/admin/dlq/redrive", json={"codes": "unknown_wallet"})),
        (422, "invalid_request", admin.get("/v1/admin/dlq/nothing")),
        (422, "invalid_request", admin.get("/v1/admin/dlq", params={"state": "lost"})),
        (422, "invalid_request", admin.delete(f"/v1/admin/dlq/{bad['id']}")),
        (400, "bad_cursor", admin.get("/v1/admin/dlq", params={"after": "x"})),
    ):
        answer = await asked
        assert (answer.status_code, answer.json()["code"]) == (status, code)


async def test_people_see_redrive_and_discard_them_by_the_command_line(at: Ground, api: Any) -> None:
    def run(*arguments: str) -> Any:
        return asyncio.to_thread(CliRunner().invoke, app, ["dlq", *arguments])

    async with worker(at) as services:
        await tell(at, deposit("t1"), "event 1")
        await tell(at, deposit("t9", to="0x12"), "event 9")
        found = {one.code: one for one in await stored_all(at, 2)}
        oldest = await letters.eligible(at.observer, Filter(), 1)
        assert [one.code for one in oldest] == ["unknown_wallet"], "newer ones that nothing helps do not hide it"
        listed = await run("list")
        assert "unknown_wallet" in listed.output
        assert "producer" in listed.output
        lines = (await run("list", "--format", "json", "--code", "bad_address")).output.splitlines()
        assert [json.loads(line)["id"] for line in lines] == [found["bad_address"].id]
        first = (await run("list", "--limit", "1", "--format", "json")).output.splitlines()
        assert (len(first), first[1].startswith("more: --after ")) == (2, True)
        second = (
            await run("list", "--limit", "1", "--format", "json", "--after", first[1].split()[-1])
        ).output.splitlines()
        assert {json.loads(line)["code"] for line in (first[0], *second)} == {"unknown_wallet", "bad_address"}
        shown = await run("show", found["bad_address"].id)
        assert '"to":"0x12"' in shown.output
        assert "0xff00" in shown.output
        asked = await run("redrive", "--eligible")
        assert (asked.exit_code, asked.output.splitlines()[-1]) == (0, "1 would be redriven; say --yes")
        refused = await run("redrive", found["bad_address"].id)
        assert refused.exit_code == 1
        assert "not_redrivable" in refused.output
        await provision(at)
        redriven = await run("redrive", "--eligible", "--yes", "--actor", "ann")
        assert redriven.exit_code == 0, redriven.output
        at.clock.forward(60)
        await Sweeper(services).sweep(await services.connect())
        await until(lambda: credited(at), "the deposit is credited")
        assert (await run("discard", found["bad_address"].id, "--reason", "typing error")).exit_code == 0
    for code, said, arguments in (
        (2, "an id is 32 hex digits", ("show", "x")),
        (1, "unknown_letter", ("show", uuid.uuid4().hex)),
        (2, "bad_reason", ("discard", found["bad_address"].id, "--reason", " ")),
        (2, "name the letters", ("redrive",)),
        (2, "not what a page ended with", ("list", "--after", "x")),
        (2, "a time is RFC 3339", ("list", "--since", "noon")),
    ):
        wrong = await run(*arguments)
        assert (wrong.exit_code, said in wrong.output) == (code, True), wrong.output
