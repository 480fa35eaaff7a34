"""What the onboarding agents decide: total, one request per chain, wallets matched by reference."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.acting import StoredCall
from agents.intents import call_id, idempotency_key
from agents.onboarding import provision_wallets, request_wallets
from agents.onboarding.wallet_requests import READY, Facts, fold
from agents.outcome import Done, Rejected, Retry
from connectors.errors import Refused
from ledger.tables import WALLET_REQUESTS, WALLETS
from topics.envelope import Received
from topics.events import Chain, Event, KycApproved, WalletsProvisioned, WalletsRequested

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


def stored(user_id: str, chains: list[str]) -> StoredCall:
    request = {"user_id": user_id, "chains": chains}
    return StoredCall("c" * 32, UUID(int=1), request, {}, {}, None, 1)


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


@given(st.lists(wallets, max_size=6), st.sets(st.sampled_from(["ETH", "SOL", "APTOS", "MATIC"]), min_size=1))
def test_whatever_circle_answers_is_concluded_and_no_other_customers_wallet_is_taken(
    found: list[dict[str, str]], chains: set[str]
) -> None:
    outcome = provision_wallets.conclude(stored("ada", sorted(chains)), {"wallets": found}, NOW)
    assert isinstance(outcome, Done | Retry | Rejected)
    if isinstance(outcome, Done):
        taken = [row for table, row in outcome.upserts if table is WALLETS]
        ours = {(w["chain"], w["id"]) for w in found if w["ref_id"] == "ada"}
        assert {chain for chain, *_ in taken} == chains
        assert all((chain, wallet_id) in ours for chain, _, _, wallet_id, _ in taken)


def test_wallets_are_matched_by_reference_and_chain_not_by_position() -> None:
    call = stored("ada", ["ETH", "SOL"])
    mixed = [*reply("bob", ["ETH", "SOL"])["wallets"], *reversed(reply("ada", ["ETH", "SOL"])["wallets"])]
    outcome = provision_wallets.conclude(call, {"wallets": mixed}, NOW)
    assert isinstance(outcome, Done)
    event = outcome.emits[0].event
    assert isinstance(event, WalletsProvisioned)
    assert [(w.chain, w.address) for w in event.wallets] == [("ETH", ADDRESSES["ETH"]), ("SOL", ADDRESSES["SOL"])]
    assert (outcome.emits[0].key, outcome.emits[0].id) == ("ada", call.id)
    rows = [row for table, row in outcome.upserts if table is WALLET_REQUESTS]
    assert [(row[1], row[2]) for row in rows] == [("ETH", "ready"), ("SOL", "ready")]


def test_a_wallet_that_is_not_there_yet_is_asked_for_again() -> None:
    outcome = provision_wallets.conclude(stored("ada", ["ETH", "SOL"]), reply("ada", ["ETH"]), NOW)
    assert isinstance(outcome, Retry)


def test_a_definite_refusal_and_an_impossible_address_are_dead_letters() -> None:
    refused = provision_wallets.conclude(stored("ada", ["ETH"]), Refused(400, "155101", "no"), NOW)
    assert isinstance(refused, Rejected)
    assert refused.code == "partner_refused"
    wrong = reply("ada", ["ETH"])
    wrong["wallets"][0]["address"] = "0x12"
    outcome = provision_wallets.conclude(stored("ada", ["ETH"]), wrong, NOW)
    assert isinstance(outcome, Rejected)
    assert outcome.code == "bad_address"


def test_a_call_keeps_its_id_and_key_for_life_and_other_calls_have_others() -> None:
    same = {call_id("provision_wallets", "e" * 32, "ETH") for _ in range(3)}
    others = {
        call_id("provision_wallets", "e" * 32, "ETH", 2),
        call_id("provision_wallets", "e" * 32, "SOL"),
        call_id("provision_wallets", "f" * 32, "ETH"),
        call_id("other", "e" * 32, "ETH"),
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
