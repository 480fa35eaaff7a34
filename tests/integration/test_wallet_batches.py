"""One call for many customers: split where it is refused, repeated as it was where it is not answered."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from uuid import uuid4

import pytest

from agents.services import Services
from connectors.circle.sandbox.gate import Fault, Weather
from ledger.verify import verify
from stablerail.dev.kafka import Kafka
from stablerail.metrics import Metrics
from tests.support.in_process import SCHEMA, until
from tests.support.rebuild import differences, empty_database, rebuild
from tests.support.wallet_rig import CHAINS, Rig, wallet_rig, with_policy
from topics.catalog import WALLETS_PROVISIONED

PATH = "/v1/w3s/developer/wallets"
MINUTE_S = 60.0


@pytest.fixture
async def rig(database: str, kafka: Kafka, topic_prefix: str) -> AsyncIterator[Rig]:
    async with wallet_rig(database, kafka.bootstrap, topic_prefix) as it:
        yield it


def users(number: int, name: str = "user") -> list[str]:
    return [f"{name}-{n:03}" for n in range(number)]


async def queued(rig: Rig, number: int) -> None:
    """So many customers wait for a performer, as after a rush."""
    await rig.approve(*users(number))
    wanted = f"SELECT count(*) = {number} FROM call_members WHERE call_id IS NULL"
    async with rig.worker(with_policy(concurrency_max=0)):
        await until(lambda: rig.at.observer.fetchval(wanted), "all wait")


async def check_whole(rig: Rig) -> None:
    await rig.at.journaled()
    assert not [result for result in await verify(rig.at.observer) if not result.holds]
    async with empty_database(rig.at.dsn) as empty:
        await rebuild(rig.at.bootstrap, rig.at.prefix, empty, SCHEMA)
        assert await differences(rig.at.dsn, empty) == {}


async def test_a_rush_of_customers_is_one_call_and_each_gets_their_own_wallets(rig: Rig) -> None:
    await queued(rig, 150)
    async with rig.at.process() as services, rig.performing(services):
        await rig.ended(Counter(completed=150), "all have wallets")
        await until(lambda: rig.at.told(WALLETS_PROVISIONED), "it is told, and counted before")
        created = {chain: figure(services, "wallets_created_total", chain=chain) for chain in CHAINS}
        assert created == dict.fromkeys(CHAINS, 150)
        assert figure(services, "jobs_processed_total", status="success") == 150
        assert figure(services, "job_duration_seconds_count", status="success") == 150
        assert figure(services, "scheduler_running") == 1
        assert figure(services, "active_jobs") == 0
    assert rig.calls == 1
    each = Counter({(user, chain.value): 1 for user in users(150) for chain in CHAINS})
    assert rig.at_circle() == each == await rig.in_database()
    rows = await rig.at.observer.fetch("SELECT wallet_id, user_id FROM wallets")
    owners = {wallet.id: wallet.ref_id for wallet in rig.circle.sandbox.state.wallets.values()}
    assert dict(tuple(row) for row in rows) == owners
    await check_whole(rig)


async def told_of_all(rig: Rig) -> bool:
    """The dead letters of one customer, one of each chain, which may be in several partitions."""
    return len(await rig.letters()) >= len(CHAINS)


async def test_a_customer_circle_refuses_stands_alone_at_last_and_the_others_are_served(rig: Rig) -> None:
    await queued(rig, 40)
    rig.circle.sandbox.state.refused = {"user-013"}
    async with rig.at.process() as services, rig.performing(services):
        await rig.ended(Counter(completed=39, failed=1), "all but one")
        await until(lambda: told_of_all(rig), "the dead letters")
    assert await rig.chains("user-013") == {chain.value: "partner_refused" for chain in CHAINS}
    assert Counter(await rig.letters()) == Counter({(chain.value, "partner_refused"): 1 for chain in CHAINS})
    assert rig.at_circle() == Counter({(u, c.value): 1 for u in users(40) if u != "user-013" for c in CHAINS})
    states = await rig.at.observer.fetch("SELECT state, count(*) FROM calls GROUP BY state")
    assert {state for state, _ in states} == {"concluded", "split"}
    await check_whole(rig)


async def test_a_chain_circle_refuses_fails_alone_and_the_job_says_so(rig: Rig) -> None:
    await queued(rig, 3)
    rig.circle.sandbox.state.refused = {"APTOS-TESTNET"}
    async with rig.at.process() as services, rig.performing(services):
        await rig.ended(Counter(failed=3), "the jobs have ended")
    assert await rig.chains("user-001") == {
        "ETH": "ready",
        "SOL": "ready",
        "APTOS": "partner_refused",
        "MATIC": "ready",
    }
    job = await rig.job("user-001")
    assert (job["state"], job["error"]) == ("failed", "partner_refused")
    assert set(rig.at_circle().values()) == {1}


async def test_a_wallet_set_that_circle_does_not_know_or_does_not_make_fails_no_customer(rig: Rig) -> None:
    """The set is ours: it waits for people, who are told, and goes on when they have put it right."""
    await queued(rig, 3)
    for wrong in ("a typo", str(uuid4())):
        await rig.at.observer.execute("INSERT INTO wallet_sets VALUES ('testnet', $1, now())", wrong)
        async with rig.at.process() as services, rig.performing(services):
            await told_of_our_set(rig, services)
        await rig.at.observer.execute("DELETE FROM wallet_sets")
    fault = Fault("/v1/w3s/developer/walletSets", "status", status=400, times=10**6)
    rig.circle.sandbox.gate.faults.append(fault)
    async with rig.at.process() as services, rig.performing(services):
        await told_of_our_set(rig, services)
        fault.times = 0
        await rig.ended(Counter(completed=3), "it goes on by itself", step_s=MINUTE_S)
        assert services.unready == {}
    assert await rig.letters() == []
    assert set((await rig.in_database()).values()) == {1} == set(rig.at_circle().values())
    await check_whole(rig)


async def told_of_our_set(rig: Rig, services: Services) -> None:
    metrics = services.observer
    assert isinstance(metrics, Metrics)
    labels = {"stage": "provision_wallets", "code": "partner_refuses_us"}

    async def told() -> bool:
        rig.at.clock.forward(MINUTE_S)
        return (metrics.registry.get_sample_value("stablerail_stage_alerts_total", labels) or 0) >= 2

    await until(told, "people are told, again and again")
    assert services.unready == {"provision_wallets": "circle refuses our wallet set"}
    assert set(await rig.jobs()) <= {"retry", "in_progress"}


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "status", "status": 500},
        {"kind": "status", "status": 500, "acts": True},
        {"kind": "page", "status": 404},
        {"kind": "lost_reply"},
    ],
)
async def test_a_batch_that_was_not_answered_is_asked_again_as_it_was_a_minute_later(
    rig: Rig, fault: dict[str, object]
) -> None:
    await queued(rig, 20)
    rig.circle.sandbox.gate.faults.append(Fault(path=PATH, **fault))  # type: ignore[arg-type]
    async with rig.at.process() as services, rig.performing(services):
        await rig.ended(Counter(retry=20), "the attempt is counted")
        job = await rig.job("user-007")
        assert (job["attempts"], job["finished_at"]) == (1, None)
        assert 0.9 * MINUTE_S <= (job["next_attempt_at"] - job["updated_at"]).total_seconds() <= 1.1 * MINUTE_S
        await rig.approve(*users(5, "later"))  # others come meanwhile and are not put into the call
        rig.at.clock.forward(1.2 * MINUTE_S)
        await rig.ended(Counter(completed=20), "all have wallets")
    assert rig.calls == 2
    assert set(rig.at_circle().values()) == {1}
    calls = await rig.at.observer.fetch("SELECT attempts, jsonb_array_length(request -> 'user_ids') FROM calls")
    assert [tuple(call) for call in calls] == [(1, 20)]


async def test_five_attempts_without_an_answer_are_the_end_with_growing_pauses_and_dead_letters(rig: Rig) -> None:
    await queued(rig, 2)
    rig.circle.sandbox.gate.faults.append(Fault(path=PATH, kind="status", status=500, times=100))
    waits: list[float] = []
    async with rig.at.process() as services, rig.performing(services):
        for attempt in range(1, 5):
            await until(lambda n=attempt: counted(rig, n), f"attempt {attempt}")  # type: ignore[misc]
            job = await rig.job("user-000")
            waits.append((job["next_attempt_at"] - job["updated_at"]).total_seconds() / MINUTE_S)
            rig.at.clock.forward(MINUTE_S * 1.15 * 2 ** (attempt - 1))
        await rig.ended(Counter(failed=2), "the jobs are failed")
        await until(lambda: rig.letters(), "the dead letters, and what is counted before")
        assert figure(services, "jobs_processed_total", status="failed") == 2
        assert figure(services, "job_errors_total", error_type="partner_unavailable") == 2 * 5
        assert figure(services, "job_retries_total") == 2 * 4
    for wait, minutes in zip(waits, (1, 2, 4, 8), strict=True):
        assert 0.9 * minutes <= wait <= 1.1 * minutes
    assert rig.calls == 5
    assert set(await rig.letters()) == {("ETH,SOL,APTOS,MATIC", "partner_unavailable")}
    assert await rig.at.observer.fetchval("SELECT state FROM calls") == "failed"


def figure(services: Services, name: str, **labels: str) -> float | None:
    metrics = services.observer
    assert isinstance(metrics, Metrics)
    return metrics.registry.get_sample_value(f"wallet_provisioning_{name}", labels)


async def counted(rig: Rig, attempts: int) -> bool:
    job = await rig.job("user-000")
    return job is not None and job["attempts"] == attempts and job["state"] == "retry"


async def test_wallets_that_circle_does_not_name_are_looked_up_and_not_made_again(rig: Rig) -> None:
    await queued(rig, 10)
    rig.circle.sandbox.state.hidden = {"user-003", "user-004"}
    async with rig.at.process() as services, rig.performing(services):
        await rig.ended(Counter(completed=10), "all have wallets")
    assert rig.calls == 1
    assert set(rig.at_circle().values()) == {1}


async def test_wallets_that_circle_never_made_are_asked_for_in_a_call_of_their_own(rig: Rig) -> None:
    await queued(rig, 5)
    state = rig.circle.sandbox.state
    real = state.of_reference
    lost = {"user-002"}
    state.hidden = set(lost)
    state.of_reference = lambda ref: [] if ref in lost else real(ref)  # type: ignore[method-assign]
    async with rig.at.process() as services, rig.performing(services):
        await rig.ended(Counter(retry=5), "the first answer is judged")
        for wallet in [w for w in state.wallets.values() if w.ref_id in lost]:
            del state.wallets[wallet.id]  # Circle had not made them after all
        rig.at.clock.forward(1.2 * MINUTE_S)
        await rig.ended(Counter({"completed": 4, "retry": 1}), "the others")
        lost.clear()
        state.hidden = set()
        await rig.ended(Counter(completed=5), "the last", step_s=5)
    assert set(rig.at_circle().values()) == {1}
    calls = await rig.at.observer.fetch("SELECT state, jsonb_array_length(request -> 'user_ids') FROM calls ORDER BY 2")
    assert [tuple(call) for call in calls] == [("concluded", 1), ("split", 5)]


async def test_the_partners_rate_is_kept_by_all_workers_together(rig: Rig) -> None:
    await queued(rig, 12)
    slow = with_policy(rate_per_s=20, members_max=1)
    async with (
        rig.at.process() as one,
        rig.at.process() as two,
        rig.performing(one, slow),
        rig.performing(two, slow),
    ):
        await rig.ended(Counter(completed=12), "all have wallets")
    times = [row[0] for row in await rig.at.observer.fetch("SELECT next_at FROM rate_limits")]
    first = await rig.at.observer.fetchval("SELECT min(created_at) FROM calls")
    assert (times[0] - first).total_seconds() >= 12 / 20


async def test_while_circle_is_down_the_breaker_rests_nothing_is_failed_and_all_completes_after(rig: Rig) -> None:
    await queued(rig, 30)
    rig.circle.sandbox.gate.weather = Weather(unavailable=1.0)
    policy = with_policy(members_max=1, breaker_failures_max=5, breaker_open_s=30.0)
    async with rig.at.process() as services, rig.performing(services, policy):
        metrics = services.observer
        assert isinstance(metrics, Metrics)
        await until(lambda: breaker(metrics, 2), "the breaker opens")
        for _ in range(40):  # an outage of twenty minutes
            heard = rig.calls
            rig.at.clock.forward(31)
            await until(lambda heard=heard: heard_more(rig, heard), "one request tries")  # type: ignore[misc]
            await until(lambda: breaker(metrics, 2), "and opens it again")
        assert await rig.at.observer.fetchval("SELECT max(attempts) FROM wallet_provisioning_jobs") <= 2
        assert (await rig.jobs())["failed"] == 0
        assert await rig.letters() == []
        rig.circle.sandbox.gate.weather = Weather()
        await rig.ended(Counter(completed=30), "all have wallets", step_s=20)
        assert await breaker(metrics, 0)
    assert set(rig.at_circle().values()) == {1}


async def breaker(metrics: Metrics, state: int) -> bool:
    return metrics.registry.get_sample_value("stablerail_breaker_state", {"partner": "circle"}) == state


async def heard_more(rig: Rig, before: int) -> bool:
    return rig.calls > before
