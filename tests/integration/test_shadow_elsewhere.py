"""A legacy table in another server: every difference comes there once, whoever dies wherever; what is on its way is no discrepancy."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID

import httpx
import pytest
from structlog.testing import capture_logs

from agents import lone_writer
from agents.crash import Stop
from agents.lone_writer import LoneWriter
from agents.treasury import tell_legacy
from agents.treasury.tell_legacy import TellLegacy
from ledger import funds, shadow_elsewhere, shadow_phases
from ledger.errors import BalancesDisagree, LegacyAway, LegacyUnusable
from ledger.rows import Connection
from ledger.shadow import SAMPLE_EVERY, Phase
from ledger.shadow_backfill import backfill
from ledger.shadow_elsewhere import Elsewhere
from stablerail import shadow
from stablerail.config import load_settings
from stablerail.dev.fetch import Tools
from stablerail.dev.kafka import Kafka
from stablerail.keys import Scope, create_key
from stablerail.metrics import Metrics
from stablerail.rebuild import rebuild_database
from stablerail.servers import api_app, reach
from tests.integration.test_rebuild_kafka import postgres_tool
from tests.integration.test_shadow import (
    AT,
    MAKE,
    REFUSALS,
    REFUSED_BY,
    legacy_of,
    product_of,
    through,
    until_hit_or_done,
)
from tests.support import ledger_rig
from tests.support.in_process import SCHEMA, ground, until
from tests.support.ledger_rig import connect_to, owner
from tests.support.proxies import PostgresProxy
from tests.support.rebuild import differences, empty_database, rebuild

databases, dsn = ledger_rig.databases, ledger_rig.dsn

TABLE = {
    "legacy_table": "public.balances",
    "legacy_columns": '{"usdc_balance": "usdc", "pending_investment": "reserved", "fiat_exposure": "power"}',
}
NOWHERE = "postgresql://x:a-secret@127.0.0.1:9/x"


@dataclass
class Apart:
    """Two databases, each of which stands for a server."""

    dsn: str
    dsn_there: str
    there: Connection
    """The legacy table's owner."""
    plain: Connection
    product: Connection
    elsewhere: Elsewhere
    metrics: Metrics

    async def credit(self, user: str, amount: int, reference: str, connection: Connection | None = None) -> None:
        await funds.credit_usdc(connection or self.product, "w", user, amount, AT, reference=reference)

    async def row(self, user: str = "ada") -> list[Decimal] | None:
        found = await self.there.fetchrow("SELECT usdc, reserved, power FROM public.balances WHERE user_id = $1", user)
        return None if found is None else list(found)

    async def waiting(self) -> int:
        return int(await self.plain.fetchval("SELECT count(*) FROM shadow_outbox"))

    async def differences(self) -> list[tuple[str, str, int, Decimal]]:
        return [tuple(one) async for one in shadow_phases.scan(self.plain, self.elsewhere)]  # type: ignore[misc]

    def another(self, dsn: str | None = None, metrics: Metrics | None = None) -> Elsewhere:
        return Elsewhere(legacy_of(), dsn or self.dsn_there, metrics)


@pytest.fixture
async def apart(databases: Callable[[], str], dsn: str) -> AsyncIterator[Apart]:
    metrics, dsn_there = Metrics(), databases()
    there = await owner(dsn_there)
    await there.execute(MAKE)
    elsewhere = Elsewhere(legacy_of(), dsn_there, metrics)
    plain, product = await connect_to(dsn)(), await product_of(dsn, elsewhere)
    yield Apart(dsn, dsn_there, there, plain, product, elsewhere, metrics)
    await elsewhere.close()
    for one in (there, plain, product):
        await one.close()


async def test_what_is_posted_is_given_to_the_table_once_and_is_no_discrepancy_meanwhile(apart: Apart) -> None:
    await shadow_phases.begin(apart.plain, Phase.SHADOW, AT, "tests")
    await apart.credit("ada", 1_500_000, "d1")
    await apart.credit("ada", 1_500_000, "d1")
    await funds.reserve(apart.product, "w", "ada", 500_000, AT, order_id="o1")
    await funds.execute_investment(apart.product, "w", 200_000, AT, order_id="o1", fill_id="f1")
    assert (await apart.row(), await apart.differences()) == (None, [])
    found, _, differences = await apart.elsewhere.balances(apart.plain, "ada")
    assert (found["USDC"].by_type["usdc_balance"], differences) == (1_000_000, [])
    assert [await apart.elsewhere.give(apart.plain) for _ in range(2)] == [5, 0]
    assert (await apart.row(), await apart.waiting()) == ([Decimal(1), Decimal("0.3"), Decimal("0.2")], 0)
    assert await apart.differences() == []
    assert "stablerail_shadow_waiting 0" in apart.metrics.render().decode()
    await apart.credit("bob", 7, "d2")
    await apart.elsewhere.give(apart.plain)
    assert await apart.row("bob") == [Decimal("0.000007"), 0, 0]


async def test_an_edit_behind_our_back_is_found_whatever_is_on_its_way(apart: Apart) -> None:
    await shadow_phases.begin(apart.plain, Phase.STRICT, AT, "tests")
    await apart.credit("ada", 2_000_000, "d1")
    await apart.elsewhere.give(apart.plain)
    await apart.credit("ada", 1_000_000, "d2")
    assert await funds.check_available(apart.product, "ada", 3_000_000, at=AT)
    await apart.there.execute("UPDATE public.balances SET usdc = usdc + 5")
    assert await apart.differences() == [("ada", "usdc_balance", 3_000_000, Decimal(8_000_000))]
    with pytest.raises(BalancesDisagree):
        await funds.check_available(apart.product, "ada", 1, at=AT)
    await apart.elsewhere.give(apart.plain)
    assert await apart.row() == [8, 0, 0], "an edit is not overwritten"
    assert await apart.differences() == [("ada", "usdc_balance", 3_000_000, Decimal(8_000_000))]


async def test_phases_lose_nothing_and_a_backfill_opens_what_the_table_has(apart: Apart) -> None:
    await shadow_phases.begin(apart.plain, Phase.OFF, AT, "tests")
    await apart.there.execute("INSERT INTO public.balances (user_id, usdc) VALUES ('old', 7)")
    await apart.credit("ada", 1_000_000, "d1")
    assert await apart.waiting() == 0
    await shadow_phases.move(apart.plain, apart.elsewhere, 1, AT, actor="ann")
    assert await apart.waiting() == 1
    totals = await backfill(apart.plain, apart.elsewhere, AT, actor="ann")
    assert (totals.opened, totals.refused) == (1, 0)
    await apart.credit("old", 1_000_000, "d2")
    assert await apart.differences() == []
    while await apart.elsewhere.give(apart.plain):
        pass
    assert (await apart.row(), await apart.row("old")) == ([1, 0, 0], [8, 0, 0])
    await shadow_phases.move(apart.plain, apart.elsewhere, -1, AT, actor="ann", force="a drill")
    await apart.credit("ada", 1_000_000, "d3")
    await shadow_phases.move(apart.plain, apart.elsewhere, 1, AT, actor="ann")
    await apart.elsewhere.give(apart.plain)
    assert (await apart.row(), await apart.differences()) == ([2, 0, 0], [])


async def test_who_is_overtaken_stops_and_nothing_is_given_twice(apart: Apart) -> None:
    await shadow_phases.begin(apart.plain, Phase.SHADOW, AT, "tests")
    first, second = apart.elsewhere, apart.another()
    await apart.credit("ada", 1_000_000, "d1")
    assert await first.give(apart.plain) == 1
    await apart.credit("ada", 1_000_000, "d2")
    assert await second.give(apart.plain) == 1
    await apart.credit("ada", 1_000_000, "d3")
    with capture_logs() as logs:
        assert await first.give(apart.plain) == 0
    assert [line["event"] for line in logs] == ["shadow.overtaken"]
    assert await first.give(apart.plain) == 1, "it takes over in its turn"
    assert (await apart.row(), await apart.waiting()) == ([3, 0, 0], 0)
    await second.close()


@pytest.mark.parametrize("side", ["ledger", "legacy"])
@pytest.mark.parametrize("where", ["request", "reply"])
async def test_a_death_between_any_two_statements_gives_nothing_twice_and_loses_nothing(
    apart: Apart, side: str, where: Any
) -> None:
    await shadow_phases.begin(apart.plain, Phase.SHADOW, AT, "tests")
    credited, hits, server = 0, 0, urlsplit(apart.dsn)
    assert server.hostname
    assert server.port
    with PostgresProxy(server.hostname, server.port) as proxy:
        for nth in range(1, 40):
            credited += 1
            await apart.credit("ada", 1_000_000, f"d{credited}")
            dying = apart.another(through(apart.dsn_there, proxy) if side == "legacy" else None)
            connection = await connect_to(through(apart.dsn, proxy) if side == "ledger" else apart.dsn)()
            is_ours = {"ledger": "shadow_outbox", "legacy": ""}[side]
            hold = proxy.hold(lambda frame, part=is_ours: part in frame.name.lower(), where, nth)  # type: ignore[misc]
            giving = asyncio.create_task(dying.give(connection))
            await until_hit_or_done(hold, giving)
            if hold.is_hit:
                hits += 1
                hold.drop()
                await asyncio.gather(giving, return_exceptions=True)
            await dying.close()
            connection.terminate()
            alive = apart.another()
            while await alive.give(apart.plain):
                pass
            await alive.close()
            assert (await apart.row(), await apart.waiting()) == ([credited, 0, 0], 0)
            if not hold.is_hit:
                proxy.cut()
                break
    assert hits >= {"ledger": 3, "legacy": 8}[side]
    assert await apart.differences() == []


async def test_a_server_that_is_away_stops_no_posting_and_a_ledger_read_and_gets_all_when_it_is_back(
    apart: Apart,
) -> None:
    await shadow_phases.begin(apart.plain, Phase.SHADOW, AT, "tests")
    server = urlsplit(apart.dsn_there)
    with PostgresProxy(server.hostname or "", server.port or 0) as proxy:
        far = apart.another(through(apart.dsn_there, proxy), apart.metrics)
        await far.read(apart.plain, ["ada"])
        proxy.refuse(True)
        await apart.credit("ada", 1_000_000, "d1")
        with pytest.raises(LegacyAway, match="Connection"):
            await far.give(apart.plain)
        assert "stablerail_shadow_waiting 1" in apart.metrics.render().decode()
        with pytest.raises(LegacyAway):
            await far.balances(apart.plain, "ada")
        await shadow_phases.move(apart.plain, apart.elsewhere, 1, AT, actor="ann", force="a drill")
        with capture_logs() as logs:
            found, _, differences = await far.balances(apart.plain, "ada")
        assert (found["USDC"].by_type, differences) == ({"usdc_balance": 1_000_000}, [])
        assert "shadow.not_compared" in [line["event"] for line in logs]
        proxy.refuse(False)
        assert await far.give(apart.plain) == 1
        assert await apart.row() == [1, 0, 0]
        await far.close()


async def test_what_the_table_does_not_take_holds_up_nobody_else_and_is_offered_again(
    apart: Apart, monkeypatch: pytest.MonkeyPatch
) -> None:
    await shadow_phases.begin(apart.plain, Phase.SHADOW, AT, "tests")
    await apart.there.execute("ALTER TABLE public.balances ADD CHECK (user_id <> 'eve' OR usdc < 2)")
    for number, user in enumerate(("ada", "eve", "eve", "bob")):
        await apart.credit(user, 1_000_000, f"d{number}")
    with capture_logs() as logs:
        assert await apart.elsewhere.give(apart.plain) == 2
    assert [line["user_id"] for line in logs if line["event"] == "shadow.not_written"] == ["eve"]
    assert (await apart.row(), await apart.row("eve"), await apart.row("bob")) == ([1, 0, 0], None, [1, 0, 0])
    assert await apart.elsewhere.give(apart.plain) == 0
    assert await apart.differences() == [], "it waits, and is counted"
    await apart.there.execute("ALTER TABLE public.balances DROP CONSTRAINT balances_check")
    monkeypatch.setattr(shadow_elsewhere, "REFUSED_S", 0.0)
    apart.elsewhere._refused = dict.fromkeys(apart.elsewhere._refused, 0.0)
    assert await apart.elsewhere.give(apart.plain) == 2
    assert await apart.row("eve") == [2, 0, 0]


@pytest.mark.parametrize("refusal", REFUSALS, ids=REFUSED_BY)
async def test_whatever_the_table_refuses_one_customer_by_the_next_is_given(apart: Apart, refusal: str) -> None:
    await shadow_phases.begin(apart.plain, Phase.SHADOW, AT, "tests")
    await apart.there.execute(refusal.replace("BEGIN", "BEGIN IF NEW.user_id = 'bob' THEN RETURN NEW; END IF;"))
    if "users" in refusal:
        await apart.there.execute(
            "INSERT INTO public.users VALUES ('bob'); GRANT SELECT ON public.users TO stablerail_app"
        )
    await apart.credit("ada", 1_000_000, "d1")
    await apart.credit("bob", 1_000_000, "d2")
    assert await apart.elsewhere.give(apart.plain) == 1
    assert (await apart.row(), await apart.row("bob")) == (None, [1, 0, 0])
    assert await apart.waiting() == 1


@pytest.mark.parametrize("state", ["SET default_transaction_read_only = on", "CONNECTION LIMIT 0"])
async def test_a_server_that_takes_no_writes_or_no_connections_is_away(apart: Apart, state: str) -> None:
    """A standby at its address; a server that is full."""
    await shadow_phases.begin(apart.plain, Phase.SHADOW, AT, "tests")
    await apart.elsewhere.read(apart.plain, ["ada"])
    await apart.elsewhere.close()
    await apart.credit("ada", 1_000_000, "d1")
    name = urlsplit(apart.dsn_there).path[1:]
    parts = urlsplit(apart.dsn_there)
    far = apart.another(urlunsplit(parts._replace(netloc=f"far_{name}:far@{parts.hostname}:{parts.port}")))
    await apart.there.execute(
        f"CREATE ROLE far_{name} LOGIN PASSWORD 'far';"
        f" GRANT SELECT, INSERT, UPDATE ON public.balances, public.stablerail_shadow TO far_{name};"
        f' ALTER DATABASE "{name}" {state}'
    )
    try:
        with pytest.raises(LegacyAway):
            await far.give(apart.plain)
    finally:
        await far.close()
        await apart.there.execute(f'ALTER DATABASE "{name}" RESET ALL; ALTER DATABASE "{name}" CONNECTION LIMIT -1')
        await apart.there.execute(f"DROP OWNED BY far_{name}; DROP ROLE far_{name}")
    assert await apart.elsewhere.give(apart.plain) == 1


async def test_a_server_that_hangs_holds_up_a_glance_and_then_nobody(
    apart: Apart, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shadow_elsewhere, "GLANCE_S", 0.2)
    await shadow_phases.begin(apart.plain, Phase.LEDGER, AT, "tests")
    await apart.credit("ada", 1_000_000, "d1")
    asked: list[Any] = []

    async def hangs(_reader: Any, writer: Any) -> None:
        asked.append(writer)  # and says nothing

    server = await asyncio.start_server(hangs, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    far = apart.another(f"postgresql://x:x@127.0.0.1:{port}/x")
    readers = [await connect_to(apart.dsn)() for _ in range(3)]
    found = await asyncio.gather(*(far.balances(one, "ada") for one in readers))
    assert [one["USDC"].by_type for one, *_ in found] == [{"usdc_balance": 1_000_000}] * 3
    before = len(asked)
    await far.balances(apart.plain, "ada")
    assert len(asked) == before, "nobody is asked any more"
    monkeypatch.setattr(far, "_dsn", apart.dsn_there)
    far._silent_until = 1e-9  # its time has passed
    await apart.elsewhere.give(apart.plain)
    _, _, differences = await far.balances(apart.plain, "ada")
    assert (differences, far._silent_until) == ([], 0.0), "it answers, and is asked again"
    await far.close()
    for one in (*readers, *asked):
        one.terminate() if hasattr(one, "terminate") else one.close()
    server.close()


async def test_what_a_customer_has_who_is_never_read_twice_alike_is_not_written_again(
    apart: Apart, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Posted to whenever both are read: the table may have all of it."""
    await shadow_phases.begin(apart.plain, Phase.OFF, AT, "tests")
    await apart.credit("ada", 1_000_000, "d1")
    await apart.there.execute("INSERT INTO public.balances (user_id, usdc) VALUES ('ada', 1)")
    monkeypatch.setattr(shadow_elsewhere, "TRIES_MAX", 0)
    assert await shadow_phases.catch_up(apart.plain, apart.elsewhere) == 0
    monkeypatch.undo()
    await apart.elsewhere.give(apart.plain)
    assert await apart.row() == [1, 0, 0]


async def test_a_row_that_is_locked_there_is_waited_for_and_stops_no_more_than_a_turn(apart: Apart) -> None:
    await shadow_phases.begin(apart.plain, Phase.SHADOW, AT, "tests")
    await apart.credit("ada", 1_000_000, "d1")
    await apart.elsewhere.give(apart.plain)
    await apart.credit("ada", 1_000_000, "d2")
    async with apart.there.transaction(), apart.elsewhere.there() as connection:
        await connection.execute("SET lock_timeout = '50ms'")
        await apart.there.execute("UPDATE public.balances SET usdc = usdc")
        apart.elsewhere._turn.release()
        with pytest.raises(LegacyAway, match="LockNotAvailable"):
            await apart.elsewhere.give(apart.plain)
        await apart.elsewhere._turn.acquire()
    assert await apart.elsewhere.give(apart.plain) == 1
    assert await apart.row() == [2, 0, 0]


async def test_a_customer_who_changes_while_both_are_read_is_read_again(
    apart: Apart, monkeypatch: pytest.MonkeyPatch
) -> None:
    await shadow_phases.begin(apart.plain, Phase.LEDGER, AT, "tests")
    await apart.credit("ada", 1_000_000, "d1")
    shown, number = apart.elsewhere._shown, 0

    async def shown_late(users: list[str]) -> Any:
        nonlocal number
        number += 1
        found = await shown(users)
        if number % 2:  # what it saw is not told yet, and what we see next is
            await apart.credit("ada", 1_000_000, f"late-{secrets.token_hex(4)}")
            other = apart.another()
            await other.give(apart.plain)
            await other.close()
        return found

    monkeypatch.setattr(apart.elsewhere, "_shown", shown_late)
    look = await apart.elsewhere.look(apart.plain, ["ada", "bob"])
    assert look.ledger["ada"] == {"usdc_balance": 2_000_000}
    assert look.legacy["ada"]["usdc_balance"] == 2_000_000
    assert number == 2
    number = 0
    _, _, suspects = await apart.elsewhere.balances(apart.plain, "ada")
    assert [one.type.value for one in suspects] == ["usdc_balance"], "of two moments"
    number = 1
    assert await apart.elsewhere.confirmed(apart.plain, suspects) == []
    assert await apart.elsewhere.confirmed(apart.plain, []) == []
    monkeypatch.setattr(shadow_elsewhere, "TRIES_MAX", 1)
    number = 0
    assert (await apart.elsewhere.look(apart.plain, ["ada"])).ledger == {}, "nothing is said of it"


async def test_a_table_that_is_not_there_stops_the_start_and_a_server_that_is_away_does_not(
    apart: Apart, postgres: Any
) -> None:
    def settings(**other: Any) -> Any:
        given = {"database_url": apart.dsn, "legacy_url": apart.dsn_there, "ledger_shadow_mode": True, **TABLE, **other}
        return load_settings(env_file=None, **given)

    await shadow.start(settings(legacy_table=None, ledger_shadow_mode=False), apart.plain)
    with pytest.raises(LegacyUnusable, match="there is no table"):
        await shadow.start(settings(legacy_table="public.balance"), apart.plain)
    with capture_logs() as logs:
        await shadow.start(settings(legacy_url=NOWHERE), apart.plain)
    assert [line["event"] for line in logs] == ["shadow.unchecked"]
    assert "a-secret" not in str(logs)
    assert (await shadow_phases.state(apart.plain)).phase is Phase.SHADOW
    await shadow.start(settings(), apart.plain)
    await shadow.start(settings(), apart.plain)
    await apart.there.execute("DROP TABLE public.stablerail_shadow")
    name = urlsplit(apart.dsn_there).path[1:]
    await apart.there.execute(
        f"CREATE ROLE guest_{name} LOGIN PASSWORD 'guest'; GRANT SELECT ON public.balances TO guest_{name};"
        " REVOKE CREATE ON SCHEMA public FROM PUBLIC"
    )
    try:
        parts = urlsplit(apart.dsn_there)
        guest = urlunsplit(parts._replace(netloc=f"guest_{name}:guest@{parts.hostname}:{parts.port}"))
        with pytest.raises(LegacyUnusable, match="as an owner run: CREATE TABLE IF NOT EXISTS") as refused:
            await shadow.start(settings(legacy_url=guest), apart.plain)
        assert "guest@" not in str(refused.value)
    finally:
        await apart.there.execute(f"DROP OWNED BY guest_{name}; DROP ROLE guest_{name}")


async def test_the_api_tells_both_and_waits_for_a_server_that_is_away_only_where_it_is_the_source(apart: Apart) -> None:
    settings = load_settings(
        env_file=None, database_url=apart.dsn, legacy_url=apart.dsn_there, ledger_shadow_mode=True,
        kafka_bootstrap="127.0.0.1:1", **TABLE,
    )  # fmt: skip
    token = (await create_key(apart.plain, [Scope.READ], "the tests")).token.get_secret_value()
    await reach(settings)
    served: Any = api_app(settings, Metrics())
    headers = {"Authorization": f"Bearer {token}"}
    async with (
        served.router.lifespan_context(served),
        httpx.AsyncClient(transport=httpx.ASGITransport(app=served), base_url="http://api", headers=headers) as client,
    ):
        await apart.credit("ada", 2_000_000, "d1")

        async def available() -> Any:
            answer = await client.get("/v1/users/ada/balances")
            found = answer.json()
            if answer.status_code != 200:
                return found["code"]
            return next(one["available"] for one in found["balances"] if one["asset"] == "USDC")

        assert await available() == "2.000000", "on its way"
        await apart.elsewhere.give(apart.plain)
        await shadow_phases.move(apart.plain, apart.elsewhere, 1, AT, actor="ann", force="a drill")
        await shadow_phases.move(apart.plain, apart.elsewhere, 1, AT, actor="ann", force="a drill")
        assert await available() == "2.000000"
        await apart.there.execute("UPDATE public.balances SET usdc = 3")
        assert await available() == "balance_discrepancy"
        await shadow_phases.move(apart.plain, apart.elsewhere, -1, AT, actor="ann", force="a drill")
        await shadow_phases.move(apart.plain, apart.elsewhere, -1, AT, actor="ann", force="a drill")
        assert await available() == "3.000000"
    away = load_settings(
        env_file=None, database_url=apart.dsn, legacy_url=NOWHERE, ledger_shadow_mode=True,
        kafka_bootstrap="127.0.0.1:1", **TABLE,
    )  # fmt: skip
    served = api_app(away, Metrics())
    async with (
        served.router.lifespan_context(served),
        httpx.AsyncClient(transport=httpx.ASGITransport(app=served), base_url="http://api", headers=headers) as client,
    ):
        answer = await client.get("/v1/users/ada/balances")
        assert (answer.status_code, answer.json()["code"]) == (503, "legacy_away")
        assert "a-secret" not in answer.text


async def test_a_login_that_lost_its_rights_is_as_a_server_that_is_away(apart: Apart) -> None:
    name = f"guest_{urlsplit(apart.dsn_there).path[1:]}"
    await apart.elsewhere.check(apart.plain)
    await apart.there.execute(
        f"CREATE ROLE {name} LOGIN PASSWORD 'guest'; GRANT SELECT ON public.balances, public.stablerail_shadow TO {name};"
        f" GRANT INSERT, UPDATE ON public.stablerail_shadow TO {name}"
    )
    parts = urlsplit(apart.dsn_there)
    settings = load_settings(
        env_file=None, database_url=apart.dsn, ledger_shadow_mode=True, kafka_bootstrap="127.0.0.1:1",
        legacy_url=urlunsplit(parts._replace(netloc=f"{name}:guest@{parts.hostname}:{parts.port}")), **TABLE,
    )  # fmt: skip
    token = (await create_key(apart.plain, [Scope.READ], "the tests")).token.get_secret_value()
    await reach(settings)
    served: Any = api_app(settings, Metrics())
    headers = {"Authorization": f"Bearer {token}"}
    try:
        async with (
            served.router.lifespan_context(served),
            httpx.AsyncClient(
                transport=httpx.ASGITransport(app=served), base_url="http://api", headers=headers
            ) as client,
        ):
            await apart.credit("ada", 2_000_000, "d1")
            assert (await client.get("/v1/users/ada/balances")).status_code == 200
            await apart.there.execute(f"REVOKE ALL ON public.balances, public.stablerail_shadow FROM {name}")
            answer = await client.get("/v1/users/ada/balances")
            assert (answer.status_code, answer.json()["code"]) == (503, "legacy_away")
            assert "permission" not in answer.text
            await shadow_phases.move(apart.plain, apart.elsewhere, 1, AT, actor="ann", force="a drill")
            for _ in range(SAMPLE_EVERY + 1):
                answer = await client.get("/v1/users/ada/balances")
                assert (answer.status_code, answer.json()["balances"][0]["available"]) == (200, "2.000000"), "ours"
        teller = apart.another(settings.secret("legacy_url"))
        with pytest.raises(LegacyAway) as caught:
            await teller.give(apart.plain)
        assert "permission" not in str(caught.value)
        await apart.there.execute(
            f"GRANT SELECT, INSERT, UPDATE ON public.balances TO {name};"
            f" GRANT SELECT, INSERT, UPDATE, DELETE ON public.stablerail_shadow TO {name}"
        )
        assert await teller.give(apart.plain) > 0, "it goes on when they are back"
        assert await apart.waiting() == 0
        await teller.close()
    finally:
        await apart.there.execute(f"DROP OWNED BY {name}; DROP ROLE {name}")


@asynccontextmanager
async def telling(apart: Apart, elsewhere: Any) -> AsyncIterator[tuple[asyncio.Task[None], Stop]]:
    stop = Stop(ends=False)

    async def nothing() -> None: ...

    relay = SimpleNamespace(journal=nothing)
    services: Any = SimpleNamespace(connect=connect_to(apart.dsn), stop=stop, relay=relay)
    teller = TellLegacy(services, elsewhere)
    task = asyncio.create_task(teller.work())
    try:
        yield task, stop
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        if teller._writer._connection is not None:
            teller._writer._connection.terminate()


async def test_one_worker_gives_and_another_takes_over(apart: Apart, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lone_writer, "STANDBY_S", 0.02)
    monkeypatch.setattr(tell_legacy, "AWAY_S", 0.02)
    await shadow_phases.begin(apart.plain, Phase.SHADOW, AT, "tests")
    other, administrator = apart.another(), await owner(apart.dsn)
    lead, stood_by = LoneWriter.lead, 0

    async def counted(writer: LoneWriter) -> Connection | None:
        nonlocal stood_by
        found = await lead(writer)
        stood_by += found is None
        return found

    monkeypatch.setattr(LoneWriter, "lead", counted)

    async def stands_by() -> bool:
        return stood_by > 1

    async def is_given(amount: int) -> bool:
        return await apart.row() == [amount, 0, 0] and not await apart.waiting()

    give, away = apart.elsewhere.give, ["once"]

    async def away_at_first(connection: Connection) -> int:
        if away:
            raise LegacyAway(away.pop())
        return await give(connection)

    monkeypatch.setattr(apart.elsewhere, "give", away_at_first)
    async with telling(apart, apart.elsewhere) as (first, _):
        await apart.credit("ada", 1_000_000, "d1")
        await until(lambda: is_given(1), "the first gives")
        async with telling(apart, other) as (second, _):
            await until(stands_by, "the second stands by")
            await apart.there.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            await apart.credit("ada", 1_000_000, "d2")
            await until(lambda: is_given(2), "it connects again")
            assert not second.done()
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            await administrator.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_locks JOIN pg_stat_activity USING (pid)"
                " WHERE locktype = 'advisory' AND datname = current_database() AND pid <> pg_backend_pid()"
            )
            await apart.credit("ada", 1_000_000, "d3")
            await until(lambda: is_given(3), "the second gives")
    await other.close()
    await administrator.close()


async def test_a_bug_stops_the_worker(apart: Apart) -> None:
    class Broken:
        async def give(self, _connection: Connection) -> int:
            raise ZeroDivisionError

    async with telling(apart, Broken()) as (task, stop):
        with pytest.raises(ZeroDivisionError):
            await task
        assert stop.reason is not None


async def test_a_rebuilt_ledger_knows_its_phase_gives_nothing_twice_and_shows_what_was_not_given(
    apart: Apart, databases: Callable[[], str], kafka: Kafka, topic_prefix: str
) -> None:
    async with ground(databases(), kafka.bootstrap, topic_prefix, ()) as at:
        lost, plain = await product_of(at.dsn, apart.elsewhere), await connect_to(at.dsn)()
        await shadow_phases.begin(plain, Phase.SHADOW, AT, "tests")
        await apart.credit("ada", 1_000_000, "d1", lost)
        assert await apart.elsewhere.give(plain) == 1
        await apart.credit("bob", 1_000_000, "d2", lost)
        async with at.process() as services:
            await services.relay.journal()
        await lost.close()
        await plain.close()
        async with empty_database(at.dsn) as dsn:
            await rebuild(at.bootstrap, at.prefix, dsn, SCHEMA)
            assert await differences(at.dsn, dsn) == {}
            alive = apart.another()
            product, plain = await product_of(dsn, alive), await connect_to(dsn)()
            assert (await shadow_phases.state(plain)).phase is Phase.SHADOW
            assert await alive.give(plain) == 0
            for number, user in enumerate(("ada", "eve")):
                await apart.credit(user, 1_000_000, f"after {number}", product)
            assert await alive.give(plain) == 2
            found = [tuple(one) async for one in shadow_phases.scan(plain, alive)]
            for one in (alive, product, plain):
                await one.close()
    assert [await apart.row(user) for user in ("ada", "bob", "eve")] == [[2, 0, 0], None, [1, 0, 0]]
    assert found == [("bob", "usdc_balance", 1_000_000, 0)]


async def test_a_backup_that_takes_over_gives_nothing_twice_that_was_given_after_it_was_made(
    apart: Apart, databases: Callable[[], str], kafka: Kafka, topic_prefix: str, tools: Tools, tmp_path: Path
) -> None:
    dump, kinds = str(tmp_path / "dump"), {"kafka_bootstrap": kafka.bootstrap, "topic_prefix": topic_prefix}
    async with ground(databases(), kafka.bootstrap, topic_prefix, ()) as at:
        lost, plain = await product_of(at.dsn, apart.elsewhere), await connect_to(at.dsn)()
        await shadow_phases.begin(plain, Phase.SHADOW, AT, "tests")
        await apart.credit("ada", 1_000_000, "d1", lost)
        assert await apart.elsewhere.give(plain) == 1
        await apart.credit("bob", 1_000_000, "d2", lost)
        await asyncio.to_thread(postgres_tool, tools, "pg_dump", at.dsn, "-Fc", "--no-sync", "-f", dump)
        assert await apart.elsewhere.give(plain) == 1
        for number in range(4):
            await apart.credit("ada", 1_000_000, f"late {number}", lost)
            assert await apart.elsewhere.give(plain) == 1
        async with at.process() as services:
            await services.relay.journal()
        await lost.close()
        await plain.close()
        async with empty_database(at.dsn) as backup:
            await asyncio.to_thread(postgres_tool, tools, "pg_restore", backup, "--no-owner", dump)
            settings = load_settings(
                env_file=None,
                database_url=backup,
                legacy_url=apart.dsn_there,
                ledger_shadow_mode=True,
                **TABLE,
                **kinds,
            )
            administrator = await owner(backup)
            assert await administrator.fetchval("SELECT count(*) FROM shadow_outbox") == 1, "told since"
            await administrator.close()
            await rebuild_database(settings, lambda *_: None)
            alive = apart.another()
            product, plain = await product_of(backup, alive), await connect_to(backup)()
            assert await alive.give(plain) == 0
            await apart.credit("ada", 1_000_000, "after", product)
            assert await alive.give(plain) == 1
            found = [one async for one in shadow_phases.scan(plain, alive)]
            for one in (alive, product, plain):
                await one.close()
    assert ([await apart.row(user) for user in ("ada", "bob")], found) == ([[6, 0, 0], [1, 0, 0]], [])


def test_ids_are_what_the_table_of_ours_holds() -> None:
    one = UUID(int=7)
    ours = [("ledger", "usdc_balance", "5", None), ("waiting", "usdc_balance", "2", one)]
    assert shadow_elsewhere._both(ours, [], {"usdc_balance": Decimal(3)})[1] == {"usdc_balance": Decimal(5)}
    assert shadow_elsewhere._both(ours, [one], {"usdc_balance": Decimal(5)})[1] == {"usdc_balance": Decimal(5)}
