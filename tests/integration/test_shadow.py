"""The ledger beside a legacy table on a real PostgreSQL: both move together, every edit is found, no phase loses a posting."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

from ledger import funds, shadow_phases
from ledger.accounts import AccountType
from ledger.errors import BalancesDisagree, LegacyAway, LegacyUnusable, PhaseRefused
from ledger.legacy import Legacy
from ledger.rows import Connection
from ledger.shadow import Mirror, Phase, mirrored
from ledger.shadow_backfill import backfill
from stablerail.metrics import Metrics
from tests.support import ledger_rig
from tests.support.ledger_rig import connect_to, owner
from tests.support.proxies import PostgresProxy
from tests.support.proxies.hold import Hold, Where

databases, dsn = ledger_rig.databases, ledger_rig.dsn

AT = datetime(2026, 7, 1, 12, tzinfo=UTC)
COLUMNS = {
    AccountType.USDC_BALANCE: "usdc",
    AccountType.PENDING_INVESTMENT: "reserved",
    AccountType.FIAT_EXPOSURE: "power",
}
MAKE = """
CREATE TABLE public.balances (
    user_id text PRIMARY KEY, usdc numeric, reserved numeric DEFAULT 0, power numeric NOT NULL DEFAULT 0 CHECK (power >= 0)
);
GRANT SELECT, INSERT, UPDATE ON public.balances TO stablerail_app
"""


def legacy_of(**other: Any) -> Legacy:
    given: dict[str, Any] = {
        "table": "public.balances", "user_column": "user_id", "user_type": "text", "columns": COLUMNS, "integer": False,
        "digits": 6,
    } | other  # fmt: skip
    return Legacy(**given)


class Beside:
    """A ledger with a legacy table, two connections: the product's, and that of whoever owns everything."""

    def __init__(self, dsn: str, admin: Connection, plain: Connection, product: Connection, mirror: Mirror) -> None:
        self.dsn, self.admin, self.plain, self.product, self.mirror = dsn, admin, plain, product, mirror

    async def begin(self, phase: Phase) -> None:
        await shadow_phases.begin(self.plain, phase, AT, "tests")

    async def move(self, by: int, at: datetime = AT, force: str | None = None) -> Phase:
        state, _ = await shadow_phases.move(self.plain, self.mirror, by, at, actor="ann", force=force)
        return state.phase

    async def until_waiting(self, count: int) -> None:
        """Until so many connections to this database wait for a lock."""
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        async with asyncio.timeout(100):
            while await self.admin.fetchval(waiting) < count:
                await self.admin.execute("SELECT pg_stat_clear_snapshot()")
                await asyncio.sleep(0.01)

    async def row(self, user: str = "ada") -> list[Decimal] | None:
        found = await self.admin.fetchrow("SELECT usdc, reserved, power FROM public.balances WHERE user_id = $1", user)
        return None if found is None else list(found)

    async def differences(self) -> list[tuple[str, str, int, Decimal]]:
        return [tuple(one) async for one in shadow_phases.scan(self.plain, self.mirror)]  # type: ignore[misc]


async def product_of(dsn: str, mirror: Mirror) -> Connection:
    made: Connection = await asyncpg.connect(
        dsn,
        connection_class=mirrored(mirror),
        server_settings={
            "search_path": "stablerail",
            "role": "stablerail_app",
            "plan_cache_mode": "force_generic_plan",
        },
    )
    return made


@pytest.fixture
async def beside(dsn: str) -> AsyncIterator[Beside]:
    admin = await owner(dsn)
    await admin.execute(MAKE)
    plain, mirror = await connect_to(dsn)(), Mirror(legacy_of(), Metrics())
    product = await product_of(dsn, mirror)
    yield Beside(dsn, admin, plain, product, mirror)
    for one in (admin, plain, product):
        await one.close()


async def test_what_is_posted_is_in_the_legacy_row_of_the_same_commit(beside: Beside) -> None:
    await beside.begin(Phase.SHADOW)
    await funds.credit_usdc(beside.product, "w", "ada", 1_500_000, AT, reference="d1")
    await funds.credit_usdc(beside.product, "w", "ada", 1_500_000, AT, reference="d1")
    await funds.reserve(beside.product, "w", "ada", 500_000, AT, order_id="o1")
    await funds.execute_investment(beside.product, "w", 200_000, AT, order_id="o1", fill_id="f1")
    assert await beside.row() == [Decimal(1), Decimal("0.3"), Decimal("0.2")]
    assert await beside.differences() == []


async def test_an_edit_behind_our_back_is_found_and_stays_found(beside: Beside) -> None:
    await beside.begin(Phase.SHADOW)
    await funds.credit_usdc(beside.product, "w", "ada", 1_000_000, AT, reference="d1")
    await beside.admin.execute("UPDATE public.balances SET usdc = usdc + 7.0000005")
    await funds.credit_usdc(beside.product, "w", "ada", 1_000_000, AT, reference="d2")
    ada = ("ada", AccountType.USDC_BALANCE, 2_000_000, Decimal("9000000.5"))
    assert await beside.differences() == [ada]


async def test_phases_come_and_go_and_the_table_misses_nothing(beside: Beside) -> None:
    await beside.begin(Phase.OFF)
    await funds.credit_usdc(beside.product, "w", "ada", 1_000_000, AT, reference="d0")
    assert await beside.row() is None
    assert await beside.move(1) is Phase.SHADOW
    assert await beside.row() == [Decimal(1), 0, 0]
    for phase in (Phase.LEDGER, Phase.STRICT, Phase.CUT_OVER):
        assert await beside.move(1, force="a drill") is phase
    await funds.credit_usdc(beside.product, "w", "ada", 2_000_000, AT, reference="d2")
    await funds.credit_usdc(beside.product, "w", "bob", 4_000_000, AT, reference="d3")
    await beside.admin.execute("UPDATE public.balances SET usdc = usdc + 100 WHERE user_id = 'ada'")
    assert await beside.row() == [Decimal(101), 0, 0]
    assert await beside.move(-1) is Phase.STRICT
    assert await beside.row() == [Decimal(103), 0, 0]
    assert await beside.row("bob") == [Decimal(4), 0, 0]
    assert [one[0] for one in await beside.differences()] == ["ada"]


async def test_every_phase_waits_until_its_time_has_been_clean(beside: Beside) -> None:
    with pytest.raises(PhaseRefused, match="no phase yet"):
        await beside.move(1)
    await beside.begin(Phase.SHADOW)
    await beside.begin(Phase.STRICT)  # another process is later: the first phase stays
    at = AT
    for days, phase in ((7, Phase.LEDGER), (2, Phase.STRICT), (3, Phase.CUT_OVER)):
        with pytest.raises(PhaseRefused, match="clean since"):
            await beside.move(1, at + timedelta(days=days, seconds=-1))
        at += timedelta(days=days)
        assert await beside.move(1, at) is phase
    with pytest.raises(PhaseRefused, match="no phase after"):
        await beside.move(1, at, force="more")
    moves = await beside.plain.fetch("SELECT actor, after FROM audit_logs WHERE action = 'shadow.moved' ORDER BY batch")
    assert len(moves) == 4


async def test_a_difference_stands_in_the_way_and_force_is_logged(beside: Beside) -> None:
    await beside.begin(Phase.SHADOW)
    await beside.admin.execute("INSERT INTO public.balances (user_id, usdc) VALUES ('ada', 5)")
    at = AT + timedelta(days=8)
    with pytest.raises(PhaseRefused, match=r"differ now: ada\.usdc_balance"):
        await beside.move(1, at)
    await beside.admin.execute("DELETE FROM public.balances")
    with pytest.raises(PhaseRefused, match="clean since 2026-07-09"):
        await beside.move(1, at + timedelta(days=6))
    assert await beside.move(1, at, force="known") is Phase.LEDGER
    (log,) = await beside.plain.fetch("SELECT after FROM audit_logs WHERE action = 'shadow.moved' AND actor = 'ann'")
    assert "known" in log[0] and "clean since" in log[0]  # noqa: PT018
    for phase in (Phase.SHADOW, Phase.OFF):
        assert await beside.move(-1) is phase
    with pytest.raises(PhaseRefused, match="no phase before"):
        await beside.move(-1)


async def test_strict_refuses_what_differs_and_the_others_tell_it(beside: Beside) -> None:
    await beside.begin(Phase.STRICT)
    await funds.credit_usdc(beside.product, "w", "ada", 1_000_000, AT, reference="d1")
    assert await funds.check_available(beside.product, "ada", 1_000_000)
    await beside.admin.execute("UPDATE public.balances SET usdc = 3")
    with pytest.raises(BalancesDisagree, match="usdc_balance"):
        await funds.check_available(beside.product, "ada", 1, at=AT)
    await beside.move(-1)
    assert not await funds.check_available(beside.product, "ada", 2_000_000, at=AT + timedelta(seconds=10))
    await beside.move(-1)
    # it reads legacy
    assert await funds.check_available(beside.product, "ada", 2_000_000, at=AT + timedelta(seconds=90))
    (found,) = await shadow_phases.discrepancies(beside.plain, AT)
    assert (found.user_id, found.type, found.ledger, found.first_seen) == ("ada", "usdc_balance", 1_000_000, AT)
    assert Decimal(found.legacy) == 3_000_000
    assert found.last_seen == AT + timedelta(seconds=90)
    assert await shadow_phases.discrepancies(beside.plain, AT + timedelta(days=1)) == []


async def test_a_table_that_does_not_take_it_stops_no_posting_and_gets_it_with_the_next(beside: Beside) -> None:
    await beside.begin(Phase.SHADOW)
    await beside.admin.execute("ALTER TABLE public.balances RENAME TO elsewhere")
    await funds.credit_usdc(beside.product, "w", "ada", 1_000_000, AT, reference="d1")
    await beside.admin.execute("ALTER TABLE public.elsewhere RENAME TO balances")
    assert [one[0] for one in await beside.differences()] == ["ada"]
    await funds.credit_usdc(beside.product, "w", "ada", 500_000, AT, reference="d2")
    assert await beside.row() == [Decimal("1.5"), 0, 0]
    assert await beside.differences() == []


PUT_OFF = """
CREATE TABLE public.users (id text PRIMARY KEY);
ALTER TABLE public.balances ADD FOREIGN KEY (user_id) REFERENCES public.users DEFERRABLE INITIALLY DEFERRED
"""
"""As Django makes it."""
TRIGGER = """
CREATE FUNCTION public.refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {} END $$;
CREATE TRIGGER refuse BEFORE INSERT OR UPDATE ON public.balances FOR EACH ROW EXECUTE FUNCTION public.refuse()
"""
REFUSALS = [
    PUT_OFF,
    TRIGGER.format("RAISE 'no' USING ERRCODE = '45000';"),
    TRIGGER.format("RAISE 'no' USING ERRCODE = '40002';"),
    TRIGGER.format("ASSERT false;"),
]
REFUSED_BY = ["at_the_commit", "a_code_of_its_own", "a_code_of_the_servers", "assert"]


@pytest.mark.parametrize("refusal", REFUSALS, ids=REFUSED_BY)
async def test_nothing_that_the_table_refuses_by_refuses_a_posting(beside: Beside, refusal: str) -> None:
    await beside.begin(Phase.SHADOW)
    await beside.admin.execute(refusal)
    await funds.credit_usdc(beside.product, "w", "ada", 1_000_000, AT, reference="d1")
    assert await beside.row() is None
    assert [one[0] for one in await beside.differences()] == ["ada"]


async def test_another_rule_of_the_table_is_not_mistaken_for_another_writer(beside: Beside) -> None:
    await beside.begin(Phase.SHADOW)
    await beside.admin.execute("CREATE UNIQUE INDEX ON public.balances (power)")
    await beside.admin.execute("INSERT INTO public.balances (user_id) VALUES ('bob')")
    await funds.credit_usdc(beside.product, "w", "ada", 1_000_000, AT, reference="d1")
    assert await beside.row() is None
    async with beside.admin.transaction():
        await beside.admin.execute("INSERT INTO public.balances (user_id, power) VALUES ('ada', 1)")
        posting = asyncio.create_task(funds.credit_usdc(beside.product, "w", "ada", 1_000_000, AT, reference="d2"))
        await beside.until_waiting(1)
    await posting  # its row was there first
    assert await beside.row() == [Decimal(2), 0, 1]


async def test_of_two_who_move_the_phase_one_is_told(beside: Beside) -> None:
    await beside.begin(Phase.SHADOW)
    await beside.admin.execute(
        "INSERT INTO public.balances (user_id, usdc) SELECT n::text, 1 FROM generate_series(1, 9) n"
    )
    other = await connect_to(beside.dsn)()
    async with beside.admin.transaction():
        await beside.admin.execute("SELECT FROM owners WHERE stage = 'shadow' FOR UPDATE")
        both = [
            asyncio.create_task(shadow_phases.move(one, beside.mirror, -1, AT, actor="ann"))
            for one in (beside.plain, other)
        ]
        await beside.until_waiting(2)
    done = await asyncio.gather(*both, return_exceptions=True)
    assert sorted(type(one).__name__ for one in done) == ["PhaseRefused", "tuple"]
    await beside.move(1)
    with pytest.raises(PhaseRefused, match=r"5\.usdc_balance and more"):
        await beside.move(1, AT + timedelta(days=8))
    await other.close()


async def test_two_backfills_at_once_open_an_account_once(beside: Beside, monkeypatch: pytest.MonkeyPatch) -> None:
    await beside.begin(Phase.OFF)
    other = await connect_to(beside.dsn)()
    await beside.admin.execute("INSERT INTO public.balances (user_id, usdc) VALUES ('first', 1)")
    await backfill(beside.plain, beside.mirror, AT, actor="ann")

    async def both(user: str) -> list[Any]:
        await beside.admin.execute("INSERT INTO public.balances (user_id, usdc) VALUES ($1, 5)", user)
        async with beside.admin.transaction():
            await beside.admin.execute("SELECT FROM owners WHERE stage = 'backfill' FOR UPDATE")
            running = [
                asyncio.create_task(backfill(one, beside.mirror, AT, actor="ann")) for one in (beside.plain, other)
            ]
            await beside.until_waiting(2)
        return await asyncio.gather(*running, return_exceptions=True)

    assert sorted(one.opened for one in await both("ada")) == [0, 1]
    monkeypatch.setattr("ledger.book.TRIES_MAX", 1)
    assert {type(one).__name__ for one in await both("bob")} == {"Totals", "UniqueViolationError"}
    assert await beside.differences() == []
    await other.close()


async def test_backfill_opens_every_account_once(beside: Beside) -> None:
    await beside.begin(Phase.OFF)
    await funds.credit_usdc(beside.product, "w", "c0007", 3_000_000, AT, reference="d1")  # the table has it already
    await funds.credit_usdc(beside.product, "w", "rich", 9_000_000, AT, reference="d1")
    await beside.admin.execute(
        "INSERT INTO public.balances (user_id, usdc, power)"
        " SELECT 'c' || lpad(n::text, 4, '0'), 10, n % 2 FROM generate_series(1, 1100) n;"
        " INSERT INTO public.balances (user_id, usdc) VALUES ('odd', 0.0000005), ('rich', 1), ('none', NULL), ('nan', 'NaN')"
    )
    told: list[int] = []
    first = await backfill(beside.plain, beside.mirror, AT, actor="ann", progress=told.append)
    assert (first.customers, first.opened, sum(told)) == (1_104, 1_650, 1_104)
    assert sorted(one.user_id for one in first.examples) == ["nan", "odd", "rich"]
    again = await backfill(beside.plain, beside.mirror, AT, actor="ann")
    assert (again.opened, again.refused) == (0, 3)
    assert sorted(one[0] for one in await beside.differences()) == ["nan", "odd", "rich"]
    capital = await beside.plain.fetchval("SELECT balance FROM accounts WHERE type = 'treasury_capital_usdc'")
    assert capital == -(1_100 * 10_000_000 - 3_000_000)
    await beside.move(1)
    await funds.credit_usdc(beside.product, "w", "c0007", 1_000_000, AT, reference="d2")
    assert (await beside.row("c0007")) == [Decimal(11), 0, 1]


async def test_a_number_of_more_digits_than_decimals_have_stops_no_read_and_no_backfill(beside: Beside) -> None:
    await beside.begin(Phase.OFF)
    await beside.admin.execute("INSERT INTO public.balances (user_id, usdc) VALUES ('ada', 7), ('odd', 1e40 + 0.5)")
    found, _, _ = await beside.mirror.balances(beside.plain, "odd")
    assert found["USDC"].by_type["usdc_balance"] == 10**46 + 500_000
    first = await backfill(beside.plain, beside.mirror, AT, actor="ann")
    assert (first.customers, first.opened, [one.user_id for one in first.examples]) == (2, 1, ["odd"])


async def test_a_row_of_nobody_is_passed_over(beside: Beside) -> None:
    """A unique index lets in as many without a customer as come."""
    await beside.begin(Phase.OFF)
    await beside.admin.execute(
        "ALTER TABLE public.balances DROP CONSTRAINT balances_pkey, ALTER user_id DROP NOT NULL, ADD UNIQUE (user_id);"
        " INSERT INTO public.balances (user_id, usdc) VALUES (NULL, 5), ('ada', 7), (NULL, 9)"
    )
    await beside.mirror.legacy.check(beside.admin)
    first = await backfill(beside.plain, beside.mirror, AT, actor="ann")
    assert (first.customers, first.opened, first.refused) == (1, 1, 0)
    await beside.move(1)
    await funds.credit_usdc(beside.product, "w", "ada", 1_000_000, AT, reference="d1")
    assert await beside.differences() == []
    rows = await beside.admin.fetch("SELECT user_id, usdc::int FROM public.balances ORDER BY 2")
    assert list(map(tuple, rows)) == [(None, 5), ("ada", 8), (None, 9)]


async def test_postings_while_phases_move_and_a_backfill_runs_are_in_both(beside: Beside) -> None:
    await beside.begin(Phase.OFF)
    await beside.admin.execute(
        "INSERT INTO public.balances (user_id, usdc) SELECT 'u' || n, 5 FROM generate_series(0, 4) n"
    )
    await backfill(beside.plain, beside.mirror, AT, actor="ann")
    writers = [await product_of(beside.dsn, beside.mirror) for _ in range(3)]
    busy, posted = True, 0

    async def post(connection: Connection, writer: int) -> None:
        nonlocal posted
        n = 0
        while busy:
            await funds.credit_usdc(connection, f"w{writer}", f"u{n % 7}", 1_000_000, AT, reference=f"{writer} {n}")
            n, posted = n + 1, posted + 1

    posting = [asyncio.create_task(post(one, n)) for n, one in enumerate(writers)]
    for by in (1, 1, 1, 1, -1, -1, -1, -1, 1):
        await beside.move(by, force="a drill")
        before = posted
        async with asyncio.timeout(100):
            while posted < before + 6 and not any(task.done() for task in posting):
                await asyncio.sleep(0.01)
    busy = False
    await asyncio.gather(*posting)
    await beside.move(1, force="a drill")
    await shadow_phases.catch_up(beside.plain, beside.mirror)
    assert await beside.differences() == []
    total = await beside.admin.fetchval("SELECT sum(usdc) FROM public.balances")
    assert total == 5 * 5 + posted
    for one in writers:
        await one.close()


@pytest.mark.parametrize(
    ("user_type", "sql_type", "user", "foreign"),
    [
        ("uuid", "uuid", "7f1c2f6f-0d0c-4c38-a3c1-f0c4a6a8d7e1", "ada"),
        ("bigint", "integer", "42", "042"),
        ("bigint", "bigint", "1900000000000000001", "9300000000000000001"),
    ],
)
async def test_cents_and_other_keys(dsn: str, user_type: str, sql_type: str, user: str, foreign: str) -> None:
    admin = await owner(dsn)
    await admin.execute(
        f"CREATE TABLE public.money (id {sql_type} PRIMARY KEY, cents bigint NOT NULL DEFAULT 0);"
        "GRANT SELECT, INSERT, UPDATE ON public.money TO stablerail_app"
    )
    legacy = legacy_of(
        table="public.money", user_column="id", user_type=user_type, columns={AccountType.USDC_BALANCE: "cents"},
        integer=True, digits=2,
    )  # fmt: skip
    await legacy.check(admin)
    mirror = Mirror(legacy)
    product = await product_of(dsn, mirror)
    await shadow_phases.begin(product, Phase.SHADOW, AT, "tests")
    for n in range(3):
        await funds.credit_usdc(product, "w", user, 5_000, AT, reference=f"d{n}")
    assert await funds.check_available(product, user, 10_000)
    assert not await funds.check_available(product, user, 10_001)
    await funds.credit_usdc(product, "w", foreign, 10_000, AT, reference="d")
    assert await admin.fetchval("SELECT cents FROM public.money") == 1  # 0.015 USDC
    plain = await connect_to(dsn)()
    assert [one.user_id async for one in shadow_phases.scan(plain, mirror)] == [foreign]
    for one in (plain, product, admin):
        await one.close()


async def test_a_table_that_is_not_as_configured_stops_the_start(beside: Beside) -> None:
    await beside.mirror.legacy.check(beside.admin)
    await beside.admin.execute("ALTER TABLE public.balances ALTER power TYPE float8")
    for legacy, setting in (
        (legacy_of(), "LEGACY_COLUMNS"),
        (legacy_of(table="public.nothing"), "LEGACY_TABLE"),
        (legacy_of(user_type="uuid"), "LEGACY_USER_COLUMN"),
        (legacy_of(user_column="reserved_by"), "LEGACY_USER_COLUMN"),
    ):
        with pytest.raises(LegacyUnusable, match=f"STABLERAIL_{setting}"):
            await legacy.check(beside.admin)
    await beside.admin.execute("ALTER TABLE public.balances DROP CONSTRAINT balances_pkey")
    await beside.admin.execute("INSERT INTO public.balances (user_id) VALUES ('ada'), ('ada')")
    with pytest.raises(asyncpg.UniqueViolationError):  # it leaves an index that promises nothing
        await beside.admin.execute("CREATE UNIQUE INDEX CONCURRENTLY ON public.balances (user_id)")
    with pytest.raises(LegacyUnusable, match="unique index"):
        await beside.mirror.legacy.check(beside.admin)


async def test_a_table_that_may_not_be_read_any_more_is_said_to_be_away(beside: Beside) -> None:
    for lost in ("REVOKE SELECT ON public.balances FROM stablerail_app", "DROP TABLE public.balances"):
        await beside.mirror.balances(beside.product, "ada")
        await beside.admin.execute(lost)
        with pytest.raises(LegacyAway, match=r"cannot be read: \w+Error$"):
            await beside.mirror.balances(beside.product, "ada")
        await beside.admin.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO stablerail_app")


@pytest.mark.parametrize("kind", ["text", "uuid", "bigint"])
async def test_a_page_begins_at_its_key_however_many_customers_are_before_it(beside: Beside, kind: str) -> None:
    """A backfill of a million would read each of them for every page."""
    await beside.admin.execute(
        f"CREATE TABLE public.pages (user_id {kind} PRIMARY KEY, usdc numeric, reserved numeric, power numeric)"
    )
    await beside.admin.execute("SET plan_cache_mode = force_generic_plan; SET enable_seqscan = off")
    statement = legacy_of(table="public.pages", user_type=kind)._page
    await beside.admin.execute(f"PREPARE page (bigint, text) AS {statement}")
    plan = "".join(row[0] for row in await beside.admin.fetch("EXPLAIN EXECUTE page(500, '7')"))
    assert "Index Cond: (user_id >" in plan, plan


def through(dsn: str, proxy: PostgresProxy) -> str:
    parts = urlsplit(dsn)
    return urlunsplit(parts._replace(netloc=f"{parts.username}:{parts.password}@{proxy.address}"))


async def until_hit_or_done(hold: Hold, task: asyncio.Task[Any]) -> None:
    async with asyncio.timeout(100):
        while not (hold.is_hit or task.done()):
            await asyncio.sleep(0.002)


@pytest.mark.parametrize("where", ["request", "reply"])
async def test_a_death_between_any_two_statements_of_a_commit_leaves_both_written_or_neither(
    beside: Beside, where: Where
) -> None:
    await beside.begin(Phase.SHADOW)
    server, hits = urlsplit(beside.dsn), 0
    with PostgresProxy(server.hostname or "", server.port or 0) as proxy:
        for nth in range(1, 40):
            dying = await product_of(through(beside.dsn, proxy), beside.mirror)
            hold = proxy.hold(lambda _: True, where, nth)
            dies = asyncio.create_task(funds.credit_usdc(dying, "w", "ada", 1_000_000, AT, reference=f"d{nth}"))
            await until_hit_or_done(hold, dies)
            if hold.is_hit:
                hits += 1
                hold.drop()
            await asyncio.gather(dies, return_exceptions=True)
            dying.terminate()
            assert await beside.differences() == [], nth
            await funds.credit_usdc(beside.product, "w", "ada", 1_000_000, AT, reference=f"d{nth}")
            assert (await beside.row(), await beside.differences()) == ([nth, 0, 0], [])
            if not hold.is_hit:
                break
    assert hits >= 8
    marks = await beside.admin.fetchval(
        "SELECT count(*) FROM shadow_marks m JOIN accounts a ON a.id = m.account_id AND a.balance = m.balance"
    )
    assert marks == 1
