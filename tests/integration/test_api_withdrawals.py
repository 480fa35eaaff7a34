"""Withdrawals over HTTP on real PostgreSQL and Kafka: what is asked for, refused, read, and when it is answered; limits."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import Any

import httpx
import pytest
from click.testing import Result
from typer.testing import CliRunner

from agents.sweeper import Sweeper
from agents.withdrawals import accept_withdrawals
from agents.withdrawals.withdrawal import Attempt, Status, Withdrawal, attempt_row, moved, rows_of, withdrawal_id
from ledger.commit import lock_writer, seal
from ledger.rows import Op, block
from ledger.tables import CHAIN_CURSORS
from stablerail.api import journal
from stablerail.api.models import Problem
from stablerail.cli import app as cli
from stablerail.dev.kafka import Kafka
from stablerail.keys import Scope
from tests.support.in_process import Ground, ground, running, until
from tests.support.invariants import may_break
from tests.support.patience import PATIENCE_S
from tests.support.withdrawals import (
    OUTSIDE,
    TOPICS,
    api_of,
    ask,
    assert_whole,
    decided,
    fund,
    policy_of,
    settings_of,
    statuses,
    wish,
)
from topics.catalog import WITHDRAWALS_REQUESTED

HASH, SIGNER = "0x" + "ab" * 32, "0x" + "17" * 20


@pytest.fixture
async def at(database: str, kafka: Kafka, topic_prefix: str) -> AsyncIterator[Ground]:
    async with ground(database, kafka.bootstrap, topic_prefix, TOPICS) as it:
        yield it


def problem(answer: httpx.Response) -> tuple[int, str]:
    assert answer.headers["content-type"] == "application/problem+json"
    return answer.status_code, Problem.model_validate(answer.json()).code


async def journaled(at: Ground) -> int:
    return int(await at.observer.fetchval("SELECT count(*) FROM outbox WHERE NOT journaled"))


async def test_what_is_no_request_is_refused_before_anything_is_written(at: Ground) -> None:
    async with api_of(at, Scope.WITHDRAW) as client:
        for fields in (
            {"amount": "-1"}, {"amount": "0"}, {"amount": 25}, {"amount": "1.0000001"}, {"to": "a\0b"}, {"chain": ""},
            {"asset": "x" * 201}, {"user_id": "ada\n"}, {"rail": "pigeon"}, {"memo": "no such field"}, {"to": None},
        ):  # fmt: skip
            assert problem(await ask(client, "k", **{"user_id": "ada", **fields})) == (422, "invalid_request")
        assert problem(await ask(client, "k", user_id="system")) == (422, "reserved_user")
        assert problem(await client.post("/v1/withdrawals", json=wish())) == (422, "invalid_request")
        for key in ("", "k" * 201, "a\tb"):
            assert problem(await ask(client, key)) == (422, "invalid_request")
        whole = {"Idempotency-Key": "k", "content-type": "application/json"}
        for body, expected in (
            (b"{", (400, "invalid_request")), (b"[]", (422, "invalid_request")), (b"", (422, "invalid_request")),
            (b" " * 70_000, (413, "body_too_large")),
        ):  # fmt: skip
            assert problem(await client.post("/v1/withdrawals", content=body, headers=whole)) == expected

        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(70):
                yield b" " * 1_000

        slow = await client.post("/v1/withdrawals", content=chunks(), headers=whole)
        assert problem(slow) == (413, "body_too_large")
    assert await statuses(at) == {}
    assert await at.told(WITHDRAWALS_REQUESTED) == []


async def test_only_a_key_with_the_scope_withdraws_and_only_an_admins_changes_limits(at: Ground) -> None:
    changes = {"limits": {"withdrawal.user_day": "1.00"}}
    async with api_of(at, Scope.READ) as client:
        assert problem(await ask(client, "k")) == (403, "insufficient_scope")
        assert problem(await client.post(f"/v1/withdrawals/{'0' * 32}/cancel")) == (403, "insufficient_scope")
        assert (await client.get("/v1/withdrawals")).json() == {"withdrawals": [], "next": None}
    async with api_of(at, Scope.WITHDRAW) as client:
        assert problem(await client.get("/v1/withdrawals")) == (403, "insufficient_scope")
        assert problem(await client.get("/v1/admin/limits")) == (403, "insufficient_scope")
        assert problem(await client.put("/v1/admin/limits", json=changes)) == (403, "insufficient_scope")
        client.headers["Authorization"] = "Bearer sr_0"
        assert problem(await ask(client, "k")) == (401, "invalid_key")
    async with api_of(at, Scope.ADMIN) as client:
        assert (await ask(client, "k")).status_code == 202


async def test_a_request_is_in_the_journal_and_told_with_its_trace_when_it_is_answered(at: Ground) -> None:
    async with api_of(at) as client:
        trace = "1" * 32
        client.headers["traceparent"] = f"00-{trace}-{'2' * 16}-01"
        answer = await ask(client, "k1")
        assert await journaled(at) == 0

        async def told() -> list[Any]:
            return await at.told(WITHDRAWALS_REQUESTED)

        (record,) = await until(told, "it is told")
    assert answer.json()["status"] == "pending"
    headers = dict(record.headers)
    assert (record.key, headers["ce_id"]) == (b"ada", b"3:ada:k1")
    assert headers["traceparent"].decode().split("-")[1] == trace
    assert json.loads(record.value) == {**wish(), "version": 1, "idempotency_key": "k1", "rail": "chain"}
    await assert_whole(at)


async def test_without_kafka_the_caller_is_told_to_ask_again_and_then_gets_the_one_withdrawal(
    at: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "ANSWER_S_MAX", 0.3)
    async with api_of(at, kafka_bootstrap="127.0.0.1:1") as client:
        answer = await ask(client, "k1")
        assert problem(answer) == (503, "journal_unavailable")
        assert answer.headers["retry-after"]
        assert problem(await ask(client, "k1")) == (503, "journal_unavailable")
        monkeypatch.setattr(journal, "WAITING_MAX", 1)
        assert problem(await ask(client, "k2")) == (503, "journal_unavailable")
    id = withdrawal_id("ada", "k1")
    assert await statuses(at) == {id: ("pending", None)}, "the third was not taken at all"
    monkeypatch.setattr(journal, "ANSWER_S_MAX", PATIENCE_S)
    async with api_of(at) as client:
        again = await ask(client, "k1")
        assert (again.status_code, again.json()["id"]) == (202, id)
        assert await journaled(at) == 0
    stage = accept_withdrawals.stage(policy_of(at))
    async with at.process() as services, running(stage, services, at):
        at.clock.forward(60)
        await Sweeper(services).sweep(await services.connect())  # as a worker's would, half a minute later
        assert await decided(at, id) == {id: ("failed", "insufficient_funds")}
    await assert_whole(at)


async def stored(at: Ground, number: int, user_id: str, status: Status, chain: str = "MATIC") -> Withdrawal:
    """A withdrawal in this state, as the stages would leave it; asked for `number` seconds after the others."""
    now = at.clock() + timedelta(seconds=number)
    id = withdrawal_id(user_id, f"k{number}")
    row = Withdrawal(
        id, user_id, f"k{number}", "0" * 32, "chain", chain, "USDC", 5_000_000, OUTSIDE, "pending", None, None, now,
        now, None, 1,
    )  # fmt: skip
    steps = [rows_of(row, "test")]
    path = {
        Status.PENDING: [], Status.SIGNING: [Status.SIGNING], Status.FAILED: [Status.FAILED],
        Status.CONFIRMING: [Status.SIGNING, Status.BROADCASTING, Status.CONFIRMING],
    }[status]  # fmt: skip
    for step in path:
        row, written = moved(row, step, now, "test", "insufficient_funds" if step is Status.FAILED else None)
        steps.append(written)
    blocks = [block(steps[-1][0][0], Op.INSERT, [steps[-1][0][1]])]
    blocks.append(block(steps[0][1][0], Op.INSERT, [line for _, (_, line) in steps]))
    await commit(at, *blocks)
    return row


async def commit(at: Ground, *blocks: Any) -> None:
    connection = await at.connect()
    async with connection.transaction():
        owners = await lock_writer(connection, "tests")
        await seal(connection, "tests", owners, blocks=blocks, messages=[], at=at.clock(), actor="tests", summary={})
    await connection.close()


async def test_withdrawals_are_listed_newest_first_in_pages_that_newcomers_do_not_move(at: Ground) -> None:
    may_break(at.dsn, "withdrawals without holds, to see how they are listed")
    states = [Status.PENDING, Status.SIGNING, Status.FAILED, Status.CONFIRMING]
    made = [await stored(at, n, "ada" if n % 2 else "bob", states[n % 4]) for n in range(12)]
    newest = [row.id for row in reversed(made)]
    async with api_of(at, Scope.READ) as client:

        async def listed(**filters: Any) -> list[str]:
            found: list[str] = []
            after = None
            while True:
                params = {**filters, "limit": 3, **({"after": after} if after else {})}
                page = (await client.get("/v1/withdrawals", params=params)).json()
                found += [one["id"] for one in page["withdrawals"]]
                after = page["next"]
                if after is None:
                    return found
                if not filters:
                    made.append(await stored(at, 100 + len(made), "carol", Status.PENDING))

        assert await listed() == newest
        assert await listed(user_id="ada") == [row.id for row in reversed(made) if row.user_id == "ada"]
        assert await listed(user_id="bob", status="failed") == [newest[i] for i in (1, 5, 9)]
        for status in states:
            assert await listed(status=status.value) == [r.id for r in reversed(made) if r.status == status]
        assert await listed(chain="ETH") == []
        assert len(await listed(chain="MATIC", status="pending")) == 3 + len(made) - 12
        for params, code in (
            ({"after": "!"}, (400, "bad_cursor")), ({"status": "lost"}, (422, "invalid_request")),
            ({"limit": 0}, (422, "invalid_request")), ({"user_id": "a\0"}, (422, "invalid_request")),
        ):  # fmt: skip
            assert problem(await client.get("/v1/withdrawals", params=params)) == code


async def test_a_withdrawal_is_shown_with_its_history_attempts_and_confirmations(at: Ground) -> None:
    may_break(at.dsn, "a withdrawal without a hold, to see how it is shown")
    row = await stored(at, 0, "ada", Status.CONFIRMING)
    now = at.clock()
    fee = 60 * 10**9
    first = Attempt(
        "MATIC", "0x" + "cd" * 32, SIGNER, 7, 1, "payment", row.id, b"raw", 65_000, fee, fee // 2, "replaced", None, None,
        None, now, now, now, 3,
    )  # fmt: skip
    mined = first._replace(
        tx_hash=HASH, n=2, status="mined", block_hash=HASH, block_number=1_000, max_fee=10**30,
        signed_at=now + timedelta(seconds=1),
    )  # fmt: skip
    recent = [{"number": number, "block_hash": HASH} for number in (1_001, 1_012)]
    state = {"start_block": 1, "span_blocks": 1, "recent": recent, "pruned": False}
    await commit(
        at,
        block(first_table(first), Op.INSERT, [first, mined]),
        block(CHAIN_CURSORS, Op.INSERT, [("MATIC", state, now)]),
    )
    async with api_of(at, Scope.READ) as client:
        shown = (await client.get(f"/v1/withdrawals/{row.id}")).json()
        unknown = await client.get(f"/v1/withdrawals/{'0' * 32}")
    assert problem(unknown) == (404, "unknown_withdrawal")
    assert (shown["id"], shown["status"], shown["amount"], shown["to"]) == (row.id, "confirming", "5.000000", OUTSIDE)
    assert [step["status"] for step in shown["history"]] == ["pending", "signing", "broadcasting", "confirming"]
    assert {step["actor"] for step in shown["history"]} == {"test"}
    one, two = shown["attempts"]
    assert (one["n"], one["status"], one["block_number"], one["confirmations"]) == (1, "replaced", None, None)
    assert (two["tx_hash"], two["nonce"], two["n"], two["max_fee_wei"]) == (HASH, 7, 2, str(10**30))
    assert (two["block_number"], two["confirmations"]) == (1_000, 12)
    assert "raw" not in two


def first_table(attempt: Attempt) -> Any:
    return attempt_row(attempt)[0]


@pytest.fixture
def run(at: Ground, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    settings = settings_of(at)
    for name in ("kafka_bootstrap", "topic_prefix"):
        monkeypatch.setenv(f"STABLERAIL_{name.upper()}", getattr(settings, name))
    monkeypatch.setenv("STABLERAIL_DATABASE_URL", at.dsn)
    monkeypatch.setenv("COLUMNS", "250")
    return lambda *arguments: CliRunner().invoke(cli, ["limits", *arguments])


async def test_limits_change_while_the_system_runs_and_each_change_is_audited(at: Ground) -> None:
    await fund(at, "ada", 100_000_000)
    stage = accept_withdrawals.stage(policy_of(at))
    async with at.process() as services, running(stage, services, at), api_of(at) as client:
        before = (await client.get("/v1/admin/limits")).json()["limits"]
        assert {one["name"]: one["value"] for one in before} == {
            "withdrawal.max.MATIC": "1000000.000000", "withdrawal.min.MATIC": "1.000000",
            "withdrawal.network_day.MATIC": "10000000.000000", "withdrawal.user_day": "1000000.000000",
        }  # fmt: skip
        changes = {"withdrawal.max.MATIC": "20", "withdrawal.min.MATIC": "0"}
        changed = await client.put("/v1/admin/limits", json={"limits": changes})
        by_name = {one["name"]: one for one in changed.json()["limits"]}
        assert by_name["withdrawal.max.MATIC"]["value"] == "20.000000"
        assert by_name["withdrawal.max.MATIC"]["default"] == "1000000.000000"
        assert by_name["withdrawal.max.MATIC"]["updated_by"].startswith("key:")
        assert by_name["withdrawal.user_day"]["updated_by"] is None
        dust, over = await ask(client, "k1", amount="0.000001"), await ask(client, "k2", amount="21")
        assert await decided(at, *(answer.json()["id"] for answer in (dust, over))) == {
            dust.json()["id"]: ("signing", None),
            over.json()["id"]: ("failed", "above_maximum"),
        }
        again = await client.put("/v1/admin/limits", json={"limits": changes})
        assert again.json() == changed.json(), "nothing changed, nothing is written"
        agent = {"User-Agent": "ops/1.0 \t" + "x" * 300}
        await client.put("/v1/admin/limits", json={"limits": {"withdrawal.max.MATIC": None}}, headers=agent)
        allowed = await ask(client, "k3", amount="21")
        assert (await decided(at, allowed.json()["id"])).popitem()[1] == ("signing", None)
        for bad, code in (
            ({"withdrawal.max.DOGE": "1"}, "unknown_limit"), ({"withdrawal.user_day": "-1"}, "invalid_request"),
            ({"withdrawal.user_day": 5}, "invalid_request"), ({}, "invalid_request"),
        ):  # fmt: skip
            assert problem(await client.put("/v1/admin/limits", json={"limits": bad})) == (422, code)
    rows = await at.observer.fetch(
        "SELECT action, resource_id, before ->> 'value', after ->> 'value' FROM audit_logs"
        " WHERE resource = 'limit' ORDER BY at, n"
    )
    assert [tuple(row) for row in rows] == [
        ("limit.set", "withdrawal.max.MATIC", None, "20000000"), ("limit.set", "withdrawal.min.MATIC", None, "0"),
        ("limit.unset", "withdrawal.max.MATIC", "20000000", None),
    ]  # fmt: skip
    last = await at.observer.fetchrow("SELECT address, user_agent FROM audit_logs WHERE action = 'limit.unset'")
    assert tuple(last) == ("127.0.0.1", ("ops/1.0 " + "x" * 300)[:200])
    await assert_whole(at)


def test_limits_are_listed_set_and_unset_from_the_command_line(run: Callable[..., Result]) -> None:
    done = run("set", "withdrawal.user_day", "5000", "--actor", "ann")
    assert (done.exit_code, done.output) == (0, "withdrawal.user_day is 5000.000000 USDC\n")
    assert run("set", "withdrawal.user_day", "5000", "--actor", "bob").output.endswith("USDC already\n")
    listed = run("list").output
    (line,) = [line for line in listed.splitlines() if line.startswith("withdrawal.user_day")]
    assert line.split()[:4] == ["withdrawal.user_day", "5000.000000", "1000000.000000", "ann"]
    assert (
        run("unset", "withdrawal.user_day", "--actor", "ann").output == "withdrawal.user_day is 1000000.000000 USDC\n"
    )
    assert run("set", "withdrawal.user_day", "6000").exit_code == 0
    (by_login,) = [line for line in run("list", "--format", "json").output.splitlines() if '"set_by":"os:' in line]
    assert (json.loads(by_login)["name"], json.loads(by_login)["value"]) == ("withdrawal.user_day", "6000.000000")
    for arguments in (("withdrawal.user_dya", "5"), ("withdrawal.user_day", "much"), ("withdrawal.user_day", "-5")):
        assert run("set", *arguments, "--actor", "ann").exit_code == 2
