"""Equal transfers on a chain that we do not read: the custodian's list is asked before they are credited, and only then."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from agents.deposits import credit_deposits, lookups
from agents.deposits.facts import Facts
from agents.deposits.lookups import Lookups
from agents.outcome import Stage
from agents.withdrawals.withdrawal import Status
from connectors.errors import Unavailable
from ledger.accounts import SHORTFALL, pending_withdrawal, spendable
from ledger.rows import Connection
from tests.support import ledger_rig
from tests.support.deposit_rig import USDC, Till, policy
from tests.support.ledger_rig import assert_holds, connect_to
from topics.catalog import DEPOSITS_FINALIZED, WITHDRAWALS_SETTLED
from topics.events import DepositNotified

databases, dsn = ledger_rig.databases, ledger_rig.dsn

ADDRESS = "So11111111111111111111111111111111111111112"
TX = "5VERv8NMvzbJMEkV8xnrLkEaWRtSz9CosKDYjCJjBRnbJLgp8uirBgmQpjKhoR4tjF3ZpRzrFmBV6UjKdiSZkQUW"


def told(transfer_id: str, evidence: str, amount: int = 5 * USDC) -> DepositNotified:
    body = {
        "source": "circle", "transfer_id": transfer_id, "chain": "SOL", "tx_hash": TX, "to": ADDRESS, "asset": "USDC",
        "amount": amount, "evidence": evidence,
    }  # fmt: skip
    return DepositNotified.model_validate(body)


class Circle:
    """Its list, as far as it answers."""

    def __init__(self) -> None:
        self.listed: list[DepositNotified] = []
        self.asked: list[tuple[str, str, str]] = []
        self.answers = True
        self.slow = False

    async def __call__(self, chain: str, tx_hash: str, address: str) -> Sequence[DepositNotified]:
        self.asked.append((chain, tx_hash, address))
        if self.slow:
            await asyncio.Event().wait()
        if not self.answers:
            raise Unavailable("Circle is down", sent=False)
        return self.listed


@pytest.fixture
async def till(dsn: str) -> AsyncIterator[Till]:
    connection = await connect_to(dsn)()
    till = Till(connection)
    await till.wallet("SOL", ADDRESS)
    yield till
    await connection.close()


@pytest.fixture
def circle() -> Circle:
    return Circle()


@pytest.fixture
async def stage(till: Till, circle: Circle, dsn: str) -> AsyncIterator[Stage[Facts]]:
    made: list[Connection] = []

    async def connect() -> Connection:
        made.append(await connect_to(dsn)())
        return made[-1]

    yield credit_deposits.stage(policy(), Lookups(circle, frozenset({"MATIC"}), connect))
    for connection in made:
        await connection.close()


async def statuses(till: Till) -> list[str]:
    return [status for status, _ in await till.statuses(ADDRESS)]


async def balance(till: Till) -> int:
    ((user,),) = await till.rows("SELECT user_id FROM wallets")
    return await till.balance(spendable(user))


async def test_a_single_transfer_is_credited_without_asking_anybody(
    till: Till, circle: Circle, stage: Stage[Facts]
) -> None:
    for evidence in ("confirmed", "complete"):
        await till.settle(stage, told("t1", evidence))
    await till.settle(stage, told("t2", "complete", 9 * USDC), told("t3", "complete", 8 * USDC))
    assert circle.asked == []
    assert await statuses(till) == ["finalized"] * 3
    assert await balance(till) == 22 * USDC
    await assert_holds(till.connection)


async def test_two_equal_transfers_in_one_batch_are_both_credited_when_the_list_has_both(
    till: Till, circle: Circle, stage: Stage[Facts]
) -> None:
    circle.listed = [told("t1", "complete"), told("t2", "complete"), told("t9", "complete", 9 * USDC)]
    await till.settle(stage, told("t1", "complete"), told("t2", "complete"))
    assert circle.asked == [("SOL", TX, ADDRESS)]
    assert await statuses(till) == ["finalized"] * 2
    assert await balance(till) == 10 * USDC
    await assert_holds(till.connection)


async def test_while_circle_does_not_answer_the_second_waits_and_the_first_does_not(
    till: Till, circle: Circle, stage: Stage[Facts], monkeypatch: pytest.MonkeyPatch
) -> None:
    await till.settle(stage, told("t1", "complete"))
    circle.answers = False
    settled = await till.settle(stage, told("t2", "complete"), told("t3", "complete", 7 * USDC))
    assert settled.outcomes == {("done", ""): 1, ("retry", "not_looked_up"): 1, ("repeat", ""): 0}
    circle.slow = True
    monkeypatch.setattr(lookups, "ANSWER_S_MAX", 0.05)
    settled = await till.settle(stage, told("t2", "complete"), attempt=2)
    assert settled.outcomes == {("retry", "not_looked_up"): 1, ("repeat", ""): 0}
    assert await balance(till) == 12 * USDC
    circle.slow, circle.answers = False, True
    circle.listed = [told("t1", "complete"), told("t2", "complete")]
    await till.settle(stage, told("t2", "complete"), attempt=3)
    assert await statuses(till) == ["finalized"] * 3
    assert await balance(till) == 17 * USDC
    await assert_holds(till.connection)


async def test_what_circles_list_never_has_is_never_credited_and_a_person_is_told_once(
    till: Till, circle: Circle, stage: Stage[Facts]
) -> None:
    circle.listed = [told("t1", "complete")]
    await till.settle(stage, told("t1", "complete"))
    await till.settle(stage, told("t2", "confirmed"))
    for attempt in range(1, 41):
        settled = await till.settle(stage, told("t2", "complete"), attempt=attempt)
        assert settled.outcomes == {("retry", "not_looked_up"): 1, ("repeat", ""): 0}
        assert till.alerts == ({"deposit_not_listed": 1} if attempt >= 20 else {})
    assert await till.rows("SELECT status, held FROM deposits ORDER BY n") == [
        ("finalized", None),
        ("pending", "unproven"),
    ]
    assert await balance(till) == 5 * USDC
    await assert_holds(till.connection)


async def test_a_transfer_that_circles_list_has_an_hour_later_is_credited(
    till: Till, circle: Circle, stage: Stage[Facts]
) -> None:
    """Away for all the looks of the first half hour, and behind its own words when it is back."""
    await till.settle(stage, told("t1", "complete"))
    circle.answers = False
    for attempt in range(1, 21):
        await till.settle(stage, told("t2", "complete"), attempt=attempt)
    circle.answers = True
    circle.listed = [told("t1", "complete")]
    await till.settle(stage, told("t2", "complete"), attempt=21)
    assert await statuses(till) == ["finalized"]
    circle.listed = [told("t1", "complete"), told("t2", "complete")]
    await till.settle(stage, told("t2", "complete"), attempt=22)
    assert await statuses(till) == ["finalized"] * 2
    assert await balance(till) == 10 * USDC
    await assert_holds(till.connection)


async def test_a_transfer_that_mint_reports_is_credited_when_circles_list_has_as_many(
    till: Till, circle: Circle, stage: Stage[Facts]
) -> None:
    """Its ids are others than those of the list."""
    circle.listed = [told("t1", "complete"), told("t2", "confirmed")]
    first, second = (told(id, "complete").model_copy(update={"source": "circle_mint"}) for id in ("m1", "m2"))
    await till.settle(stage, first, second)
    assert await statuses(till) == ["finalized"]
    circle.listed = [told("t1", "complete"), told("t2", "complete")]
    await till.settle(stage, second, attempt=2)
    await till.settle(stage, told("t1", "complete"), told("t2", "complete"))
    assert await statuses(till) == ["finalized"] * 2
    assert await balance(till) == 10 * USDC
    await assert_holds(till.connection)


# -- what the custodian says will never come -------------------------------------------------------------------------------


async def test_what_is_taken_back_is_paid_by_the_balance_then_by_withdrawals_that_are_not_signed_and_the_rest_is_owed(
    till: Till, circle: Circle, stage: Stage[Facts]
) -> None:
    await till.settle(stage, told("t1", "confirmed", 25 * USDC))
    ((user,),) = await till.rows("SELECT user_id FROM wallets")
    await till.spend(user, 10 * USDC)
    await till.withdrawal(user, 8 * USDC)
    circle.listed = [told("t1", "failed", 25 * USDC)]
    await till.settle(stage, told("t1", "failed", 25 * USDC))
    assert await statuses(till) == ["reversed"]
    assert (await balance(till), await till.balance(pending_withdrawal(user))) == (0, 0)
    assert await till.balance(SHORTFALL) == -10 * USDC
    (end,) = till.said(DEPOSITS_FINALIZED.name)
    assert (end["outcome"], end["shortfall"]) == ("reversed", "10.000000")
    (cancelled,) = till.said(WITHDRAWALS_SETTLED.name)
    assert (cancelled["outcome"], cancelled["code"]) == ("cancelled", "deposit_reversed")
    assert till.alerts == {"deposit_shortfall": 1}
    await assert_holds(till.connection)


async def test_a_withdrawal_that_is_signed_stays_and_its_amount_is_owed(
    till: Till, circle: Circle, stage: Stage[Facts]
) -> None:
    await till.settle(stage, told("t1", "confirmed", 25 * USDC))
    ((user,),) = await till.rows("SELECT user_id FROM wallets")
    await till.withdrawal(user, 8 * USDC, Status.BROADCASTING)
    circle.listed = [told("t1", "failed", 25 * USDC)]
    await till.settle(stage, told("t1", "failed", 25 * USDC))
    assert await till.balance(pending_withdrawal(user)) == 8 * USDC == -await till.balance(SHORTFALL)
    assert till.said(WITHDRAWALS_SETTLED.name) == []
    await assert_holds(till.connection)


async def test_credit_and_end_in_one_batch_with_other_credits_of_the_same_customer(
    till: Till, circle: Circle, stage: Stage[Facts]
) -> None:
    circle.listed = [told("t1", "failed"), told("t2", "failed", 9 * USDC)]
    await till.settle(
        stage,
        told("t1", "confirmed"),
        told("t3", "confirmed", 2 * USDC),
        told("t1", "failed"),
        told("t2", "confirmed", 9 * USDC),
        told("t2", "failed", 9 * USDC),
    )
    assert await statuses(till) == ["credited", "reversed", "reversed"]
    assert await balance(till) == 2 * USDC
    assert [end["shortfall"] for end in till.said(DEPOSITS_FINALIZED.name)] == [None, None]
    await assert_holds(till.connection)


async def test_nothing_is_taken_back_before_circles_list_says_so_too(
    till: Till, circle: Circle, stage: Stage[Facts]
) -> None:
    await till.settle(stage, told("t1", "confirmed"))
    for attempt, circle.listed in enumerate(([], [told("t1", "confirmed")], [told("t1", "complete")]), 1):
        settled = await till.settle(stage, told("t1", "failed"), attempt=attempt)
        assert settled.outcomes == {("retry", "not_looked_up"): 1, ("repeat", ""): 0}
    circle.answers = False
    await till.settle(stage, told("t1", "failed"), attempt=20)
    assert till.alerts == {"deposit_not_listed": 1}
    assert await statuses(till) == ["credited"]
    circle.answers = True
    circle.listed = [told("t1", "failed")]
    await till.settle(stage, told("t1", "failed"), attempt=21)
    assert await statuses(till) == ["reversed"]
    await assert_holds(till.connection)


@pytest.mark.parametrize("ends", [("complete", "failed"), ("failed", "complete")])
async def test_of_two_ends_of_one_transfer_the_first_stands_and_a_person_is_told(
    till: Till, circle: Circle, stage: Stage[Facts], ends: tuple[str, str]
) -> None:
    await till.settle(stage, told("t1", "confirmed"))
    for end in ends:
        circle.listed = [told("t1", end)]
        await till.settle(stage, told("t1", end))
    assert await statuses(till) == ["finalized" if ends[0] == "complete" else "reversed"]
    assert await balance(till) == (5 * USDC if ends[0] == "complete" else 0)
    assert till.alerts == {"deposit_contradicted": 1}
    await assert_holds(till.connection)


async def test_a_transaction_that_circle_tells_under_a_new_id_after_it_failed_is_credited_when_it_is_complete(
    till: Till, circle: Circle, stage: Stage[Facts]
) -> None:
    await till.settle(stage, told("t1", "confirmed"))
    circle.listed = [told("t1", "failed")]
    await till.settle(stage, told("t1", "failed"))
    await till.settle(stage, told("t2", "confirmed"))
    assert await statuses(till) == ["reversed", "pending"]
    circle.listed = [told("t1", "failed"), told("t2", "complete")]
    await till.settle(stage, told("t2", "complete"))
    assert await statuses(till) == ["reversed", "finalized"]
    # a failed one in the list is no transfer
    await till.settle(stage, told("t3", "complete"))
    assert await balance(till) == 5 * USDC
    await assert_holds(till.connection)


async def test_what_waits_for_finality_has_vanished_when_it_fails(till: Till, circle: Circle, dsn: str) -> None:
    careful = credit_deposits.stage(policy(at_finality=frozenset({"SOL"})))
    await till.settle(careful, told("t1", "confirmed"))
    assert await statuses(till) == ["pending"]
    await till.settle(careful, told("t1", "failed"))
    await till.settle(careful, told("t1", "confirmed"))
    assert await statuses(till) == ["vanished"]
    assert (await balance(till), till.told) == (0, [])
    await assert_holds(till.connection)


async def test_nobody_elses_word_takes_back_and_none_where_we_read_the_chain(
    till: Till, circle: Circle, stage: Stage[Facts]
) -> None:
    _, address = await till.wallet("MATIC")
    read = {"chain": "MATIC", "tx_hash": "0x" + "a" * 64, "to": address}
    for changes in ({"source": "partner"}, read):
        for evidence in ("failed", "confirmed", "failed"):
            await till.settle(stage, told("t1", evidence).model_copy(update=changes))
    assert await statuses(till) == ["credited"]
    assert await till.statuses(address) == [("credited", 1)]
    assert circle.asked == []
    await assert_holds(till.connection)
