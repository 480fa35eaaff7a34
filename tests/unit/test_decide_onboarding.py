"""What the onboarding agents decide: total, one request per chain, wallets matched by reference."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.intents import Again, Conclusion, Member, StoredCall, call_id, idempotency_key
from agents.onboarding import freeze_wallets, provision_wallets, request_wallets
from agents.onboarding.wallet_calls import MISSING, WalletDeeds
from agents.onboarding.wallet_requests import PENDING, READY, Facts, WalletRequest, fold
from agents.outcome import Done, Rejected
from connectors.errors import Refused
from ledger.tables import WALLET_JOBS, WALLET_REQUESTS, WALLETS
from stablerail.metrics import Metrics
from topics.envelope import Received
from topics.events import Chain, Event, KycApproved, KycRejected, WalletsFrozen, WalletsProvisioned, WalletsRequested

NOW = datetime(2026, 7, 1, tzinfo=UTC)
ADDRESSES = {
    "ETH": "0x" + "1" * 40,
    "MATIC": "0x" + "2" * 40,
    "AVAX": "0x" + "4" * 40,
    "APTOS": "0x" + "3" * 64,
    "SOL": "So11111111111111111111111111111111111111112",
}


def received(event: Event) -> Received:
    return Received(event.identity(), "test", event, 1, None)


def approved(user_id: str, vendor: str = "sumsub") -> KycApproved:
    return KycApproved(user_id=user_id, vendor=vendor, applicant_id="a", vendor_event_id="e", approved_at="now")


def stored(users: list[str], chains: list[str], **fields: Any) -> StoredCall:
    members = tuple(
        Member(f"{n:032x}", ",".join(chains), {"user_id": user, "chains": chains}, {}, {}, None, NOW)
        for n, user in enumerate(users)
    )
    request = {"user_ids": users, "chains": chains}
    return StoredCall("c" * 32, UUID(int=1), request, members, NOW, **fields)


def facts_of(users: list[str], chains: list[str]) -> Facts:
    requests = {(u, c): WalletRequest(u, c, PENDING, NOW, None) for u in users for c in chains}
    return Facts(NOW, requests)


def conclude(call: StoredCall, answer: Any, facts: Facts | None = None) -> Conclusion | Again:
    deeds = WalletDeeds(None, 200, 5, Metrics())
    return deeds.conclude(call, answer, facts or facts_of(call.request["user_ids"], call.request["chains"]))


def reply(user_id: str, chains: list[str]) -> dict[str, Any]:
    return {
        "wallets": [{"id": f"w-{c}", "address": ADDRESSES[c], "ref_id": user_id, "chain": c} for c in chains],
    }


users = st.sampled_from(["ada", "bob", "system", "System"])
some_chains = st.lists(st.sampled_from(Chain), min_size=1, max_size=6)


@given(st.lists(users, max_size=12), some_chains)
def test_each_customer_is_promised_each_wallet_once(story: list[str], chains: list[Chain]) -> None:
    stage = request_wallets.stage(tuple(dict.fromkeys(chains)))
    facts = Facts(NOW)
    said: list[tuple[str, Chain]] = []
    for user_id in story:
        outcome = stage.decide(received(approved(user_id)), facts)
        if user_id == "system":
            assert outcome == Rejected("reserved_user", "'system' is the company's own")
            continue
        assert isinstance(outcome, Done)
        fold(facts, outcome)
        for emit in outcome.emits:
            assert isinstance(emit.event, WalletsRequested)
            assert emit.key == user_id
            said += [(user_id, chain) for chain in emit.event.chains]
    assert len(said) == len(set(said))
    assert {user_id for user_id, _ in said} == set(story) - {"system"}


@given(users, some_chains, st.sets(st.sampled_from(Chain)))
def test_a_call_asks_for_what_is_missing_and_for_each_chain_once(
    user_id: str, chains: list[Chain], ready: set[Chain]
) -> None:
    facts = Facts(NOW)
    rows = tuple((WALLET_REQUESTS, (user_id, chain.value, READY, NOW, NOW)) for chain in ready)
    fold(facts, Done(upserts=rows))
    outcome = provision_wallets.decide(received(WalletsRequested(user_id=user_id, chains=tuple(chains))), facts)
    if user_id == "system":
        assert isinstance(outcome, Rejected)
        return
    assert isinstance(outcome, Done)
    asked = [chain for call in outcome.calls for chain in call.request["chains"]]
    assert asked == [chain.value for chain in dict.fromkeys(chains) if chain not in ready]
    assert len(outcome.calls) == (1 if asked else 0)


wallets = st.fixed_dictionaries(
    {
        "id": st.sampled_from(["w1", "w2"]),
        "address": st.one_of(st.sampled_from(list(ADDRESSES.values())), st.text(max_size=50)),
        "ref_id": st.sampled_from(["ada", "bob", ""]),
        "chain": st.sampled_from([chain.value for chain in Chain]),
    }
)


@given(
    st.lists(wallets, max_size=6), st.sets(st.sampled_from(["ETH", "SOL", "APTOS", "MATIC"]), min_size=1), st.booleans()
)
def test_whatever_circle_answers_is_concluded_and_no_other_customers_wallet_is_taken(
    found: list[dict[str, str]], chains: set[str], before: bool
) -> None:
    call = stored(["ada", "bob"], sorted(chains), error=MISSING if before else None)
    outcome = conclude(call, {"wallets": found})
    if isinstance(outcome, Again):
        assert not before
        return
    given = {(w["chain"], w["ref_id"], w["id"]) for w in found}
    taken = {(row[0], row[2], row[3]) for table, row in outcome.done.upserts if table is WALLETS}
    assert taken <= given
    ended = {(row[0], row[1]) for table, row in outcome.done.upserts if table is WALLET_REQUESTS}
    on = {(m.request["user_id"], c) for part in outcome.parts for m in part.members for c in m.request["chains"]}
    assert not ended & on
    assert ended | on == {(user, chain) for user in ("ada", "bob") for chain in chains}


def test_wallets_are_matched_by_reference_and_chain_not_by_position() -> None:
    call = stored(["ada"], ["ETH", "SOL"])
    mixed = [*reply("bob", ["ETH", "SOL"])["wallets"], *reversed(reply("ada", ["ETH", "SOL"])["wallets"])]
    outcome = conclude(call, {"wallets": mixed})
    assert isinstance(outcome, Conclusion)
    event = outcome.done.emits[0].event
    assert isinstance(event, WalletsProvisioned)
    assert [(w.chain, w.address) for w in event.wallets] == [("ETH", ADDRESSES["ETH"]), ("SOL", ADDRESSES["SOL"])]
    assert outcome.done.emits[0].key == "ada"
    rows = [row for table, row in outcome.done.upserts if table is WALLET_REQUESTS]
    assert [(row[1], row[2]) for row in rows] == [("ETH", "ready"), ("SOL", "ready")]
    (job,) = [row for table, row in outcome.done.upserts if table is WALLET_JOBS]
    assert job[1] == "completed"


def test_a_wallet_that_is_not_there_yet_is_waited_for_once_and_then_asked_for_alone() -> None:
    assert conclude(stored(["ada"], ["ETH", "SOL"]), reply("ada", ["ETH"])) == Again(MISSING)
    outcome = conclude(stored(["ada"], ["ETH", "SOL"], attempts=1, error=MISSING), reply("ada", ["ETH"]))
    assert isinstance(outcome, Conclusion)
    ((part,),) = [outcome.parts]
    assert [(m.request, m.item) for m in part.members] == [({"user_id": "ada", "chains": ["SOL"]}, "SOL")]
    last = conclude(stored(["ada"], ["SOL"], attempts=4, error=MISSING), {"wallets": []})
    assert isinstance(last, Conclusion)
    assert [why.code for _, why in last.letters] == [MISSING]


def test_a_definite_refusal_an_impossible_address_and_another_customers_address_are_dead_letters() -> None:
    refused = conclude(stored(["ada"], ["ETH"]), Refused(400, "155101", "no"))
    wrong = reply("ada", ["ETH"])
    wrong["wallets"][0]["address"] = "0x12"
    bad = conclude(stored(["ada"], ["ETH"]), wrong)
    facts = facts_of(["ada"], ["ETH"])
    facts.owners["ETH", ADDRESSES["ETH"]] = "bob"
    taken = conclude(stored(["ada"], ["ETH"]), reply("ada", ["ETH"]), facts)
    for outcome, code in ((refused, "partner_refused"), (bad, "bad_address"), (taken, "address_taken")):
        assert isinstance(outcome, Conclusion)
        assert [why.code for _, why in outcome.letters] == [code]
        assert not [row for table, row in outcome.done.upserts if table is WALLETS]
        assert [row[1] for table, row in outcome.done.upserts if table is WALLET_JOBS] == ["failed"]


@given(st.integers(1, 40), st.sets(st.sampled_from(["ETH", "SOL", "APTOS", "MATIC"]), min_size=1), st.data())
def test_a_refusal_is_halved_until_what_is_at_fault_stands_alone(number: int, chains: set[str], data: Any) -> None:
    users = [f"u{n}" for n in range(number)]
    bad_users = data.draw(st.sets(st.sampled_from(users), max_size=2))
    bad_chains = data.draw(st.sets(st.sampled_from(sorted(chains)), max_size=1))
    deeds = WalletDeeds(None, 200, 5, Metrics())
    waiting, served, failed = [stored(users, sorted(chains))], set(), set()
    while waiting:
        call = waiting.pop()
        asked = {(u, c) for u in call.request["user_ids"] for c in call.request["chains"]}
        if not ({u for u, _ in asked} & bad_users or {c for _, c in asked} & bad_chains):
            served |= asked
            continue
        outcome = conclude(call, Refused(400, "2", "no"))
        assert isinstance(outcome, Conclusion)
        failed |= {(row[0], row[1]) for table, row in outcome.done.upserts if table is WALLET_REQUESTS}
        for part in outcome.parts:
            child = deeds.request(part.members)
            assert len(child["user_ids"]) * len(child["chains"]) < len(asked)
            waiting.append(StoredCall("d" * 32, UUID(int=2), child, part.members, NOW))
    every = {(u, c) for u in users for c in chains}
    assert failed == {(u, c) for u, c in every if u in bad_users or c in bad_chains}
    assert served == every - failed


def test_a_call_keeps_its_id_and_key_for_life_and_other_calls_have_others() -> None:
    both = [("e" * 32, "ETH"), ("f" * 32, "ETH")]
    same = {call_id("provision_wallets", members) for members in (both, both[::-1])}
    others = {
        call_id("provision_wallets", both, 2),
        call_id("provision_wallets", [("e" * 32, "SOL"), both[1]]),
        call_id("provision_wallets", both[:1]),
        call_id("other", both),
    }
    assert len(same) == 1
    assert len(others | same) == 5
    key = idempotency_key(same.pop())
    assert key.version == 4, "Circle takes random UUIDs only"


@pytest.mark.parametrize("user_id", ["system"])
def test_the_companys_own_name_gets_no_wallet(user_id: str) -> None:
    event = WalletsRequested(user_id=user_id, chains=(Chain.ETH,))
    outcome = provision_wallets.decide(received(event), Facts(NOW))
    assert isinstance(outcome, Rejected)
    assert outcome.code == "reserved_user"


def word(day: int, *, approved: bool) -> KycApproved | KycRejected:
    at = f"2026-11-{day:02} 02:00:00.704"
    if approved:
        return KycApproved(user_id="ada", vendor="sumsub", applicant_id="a", vendor_event_id=f"e{day}", approved_at=at)
    return KycRejected(
        user_id="ada", vendor="sumsub", applicant_id="a", vendor_event_id=f"e{day}", rejected_at=at, final=True
    )


@given(st.lists(st.booleans(), min_size=1, max_size=5), st.data())
def test_the_vendors_last_word_counts_in_whatever_order_its_words_arrive(words: list[bool], data: Any) -> None:
    said = [word(day, approved=approved) for day, approved in enumerate(words, 1)]
    stages = {True: request_wallets.stage((Chain.ETH,)), False: freeze_wallets.stage()}
    facts = Facts(NOW)
    frozen = False
    for event in data.draw(st.permutations([*said, *said])):
        outcome = stages[isinstance(event, KycApproved)].decide(received(event), facts)
        assert isinstance(outcome, Done)
        fold(facts, outcome)
        for emit in outcome.emits:
            if isinstance(emit.event, WalletsFrozen):
                assert emit.event.frozen != frozen, "told only when it changes"
                frozen = emit.event.frozen
        assert [log.action for log in outcome.logs] in ([], ["wallets.frozen"], ["wallets.unfrozen"])
    assert facts.standings["ada"].standing == ("approved" if words[-1] else "rejected")


def test_a_customer_who_was_rejected_since_gets_no_wallets_by_an_older_approval() -> None:
    facts = Facts(NOW)
    rejected = freeze_wallets.decide(received(word(2, approved=False)), facts)
    assert isinstance(rejected, Done)
    fold(facts, rejected)
    stage = request_wallets.stage((Chain.ETH,))
    assert stage.decide(received(word(1, approved=True)), facts) == Done()
    again = stage.decide(received(word(3, approved=True)), facts)
    assert isinstance(again, Done)
    assert {emit.topic.name for emit in again.emits} == {"wallets.requested"}
