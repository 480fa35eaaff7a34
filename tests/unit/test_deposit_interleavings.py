"""Identity under every interleaving of reports: decide and fold alone, on facts that hypothesis orders."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from itertools import count
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from agents.deposits.credit_deposits import DepositPolicy, Facts, decide, fold
from agents.deposits.deposit import SCANNER, Status
from agents.deposits.facts import named
from agents.outcome import Done, Rejected
from chain.errors import ChainError
from topics.catalog import DEPOSITS_CREDITED, DEPOSITS_FINALIZED
from topics.envelope import Received
from topics.events import DepositCredited, DepositFinalized, DepositNotified, Evidence

NOW = datetime(2026, 1, 1, tzinfo=UTC)
WALLET = "0x" + "ab" * 20
TX = "0x" + "cd" * 32
BLOCKS = ("0x" + "01" * 32, "0x" + "02" * 32)
UNREAD_WALLET = "0x" + "ef" * 32
MINIMUM = 1_000_000

amounts = st.lists(st.sampled_from([5_000_000, 5_000_000, 9_000_000, 2**96]), min_size=1, max_size=5)
"""The transfers of one transaction, in log order; equal ones are likely."""


def facts() -> Facts:
    owners = {("MATIC", WALLET): "alice", ("APTOS", UNREAD_WALLET): "bob"}
    return Facts(NOW, DepositPolicy(MINIMUM, frozenset({"MATIC"})), owners)


def reported(
    source: str, transfer_id: str, amount: int, evidence: Evidence, *, chain: str = "MATIC", block: str | None = None
) -> DepositNotified:
    return DepositNotified(
        source=source,
        transfer_id=transfer_id,
        chain=chain,
        tx_hash=TX,
        to=WALLET if chain == "MATIC" else UNREAD_WALLET,
        asset="USDC",
        amount=amount,
        evidence=evidence,
        block_hash=block,
        block_number=7 if block else None,
        log_index=int(transfer_id.rpartition(":")[2]) if source == SCANNER else None,
    )


def by_scanner(transfers: list[int], block: str = BLOCKS[0]) -> list[DepositNotified]:
    return [
        reported(SCANNER, f"{block}:{place}", amount, Evidence.CONFIRMED, block=block)
        for place, amount in enumerate(transfers)
    ]


def by_vendor(transfers: list[int], source: str = "circle", chain: str = "MATIC") -> list[DepositNotified]:
    """Each transfer confirmed and complete, with an id of the vendor's."""
    return [
        reported(source, f"{source}-{place}", amount, evidence, chain=chain)
        for place, amount in enumerate(transfers)
        for evidence in (Evidence.CONFIRMED, Evidence.COMPLETE)
    ]


class Ledger:
    """Folds outcomes and keeps what they moved."""

    def __init__(self) -> None:
        self.facts = facts()
        self.credited: list[int] = []
        self.finalized: list[int] = []
        self.moved: set[str] = set()
        self._ids = count()

    def _look(self, event: DepositNotified) -> None:
        """The vendor's own list has what it will ever say."""
        names = named(event)
        assert not isinstance(names, ChainError)
        assert isinstance(self.facts.looked, dict)
        known = self.facts.looked.setdefault(names.group_id, {})
        known[event.transfer_id] = event.evidence

    def take(self, event: DepositNotified) -> None:
        self._look(event)
        outcome = decide(Received(str(next(self._ids)), "test", event, 1, None), self.facts)
        assert isinstance(outcome, Done), outcome
        fold(self.facts, outcome)
        for transaction in outcome.postings:
            assert transaction.id not in self.moved
            self.moved.add(transaction.id)
        for emit in outcome.emits:
            assert isinstance(emit.event, DepositCredited | DepositFinalized)
            (self.credited if emit.topic is DEPOSITS_CREDITED else self.finalized).append(emit.event.amount)
            assert emit.topic in (DEPOSITS_CREDITED, DEPOSITS_FINALIZED)


@given(amounts, st.randoms(use_true_random=False))
def test_every_transfer_is_credited_once_in_any_order_of_any_reports(transfers: list[int], random: Random) -> None:
    events = [*by_scanner(transfers), *by_vendor(transfers), *by_vendor(transfers, "partner")]
    events += events[:: random.randint(1, 3)]
    random.shuffle(events)
    ledger = Ledger()
    for event in events:
        ledger.take(event)
    assert Counter(ledger.credited) == Counter(transfers)
    assert ledger.finalized == []
    assert {d.status for d in ledger.facts.deposits.values()} == {Status.CREDITED}


@given(amounts, st.randoms(use_true_random=False))
def test_a_vendors_count_alone_credits_one_of_each_amount_on_a_chain_we_read(
    transfers: list[int], random: Random
) -> None:
    events = by_vendor(transfers)
    random.shuffle(events)
    ledger = Ledger()
    for event in events:
        ledger.take(event)
    assert Counter(ledger.credited) == Counter(set(transfers))
    for event in by_scanner(transfers):
        ledger.take(event)
    assert Counter(ledger.credited) == Counter(transfers)


@given(amounts, st.randoms(use_true_random=False))
def test_completion_credits_and_ends_each_transfer_where_we_do_not_read(transfers: list[int], random: Random) -> None:
    events = by_vendor(transfers, chain="APTOS")
    random.shuffle(events)
    ledger = Ledger()
    for event in events:
        ledger.take(event)
    assert Counter(ledger.credited) == Counter(transfers)
    assert Counter(ledger.finalized) == Counter(transfers)


@given(amounts, st.randoms(use_true_random=False))
def test_a_transaction_that_moved_to_another_block_is_still_one_credit_each(
    transfers: list[int], random: Random
) -> None:
    events = by_vendor(transfers)
    random.shuffle(events)
    seen = [*by_scanner(transfers), *by_scanner(transfers, BLOCKS[1])]
    places = sorted(random.randint(0, len(seen)) for _ in events)
    for shift, (place, event) in enumerate(zip(places, events, strict=True)):
        seen.insert(place + shift, event)
    ledger = Ledger()
    for event in seen:
        ledger.take(event)
    assert Counter(ledger.credited) == Counter(transfers)
    assert {d.block_hash for d in ledger.facts.deposits.values()} == {BLOCKS[1]}


@given(amounts, st.data())
def test_a_known_transfer_id_with_other_contents_changes_nothing(transfers: list[int], data: st.DataObject) -> None:
    ledger = Ledger()
    for event in by_vendor(transfers):
        ledger.take(event)
    before = dict(ledger.facts.deposits)
    changed = data.draw(st.sampled_from(by_vendor(transfers))).model_copy(update={"amount": 77_000_000})
    outcome = decide(Received("x", "test", changed, 1, None), ledger.facts)
    assert isinstance(outcome, Rejected)
    assert outcome.code == "transfer_changed"
    assert ledger.facts.deposits == before


@given(
    st.text(max_size=20),
    st.text(max_size=60),
    st.text(max_size=60),
    st.text(max_size=10),
    st.integers(1, 2**96),
    st.sampled_from(Evidence),
)
def test_any_report_has_an_outcome(
    chain: str, to: str, tx_hash: str, asset: str, amount: int, evidence: Evidence
) -> None:
    event = DepositNotified.model_construct(
        version=1, source="partner", transfer_id="1", chain=chain, tx_hash=tx_hash, to=to, asset=asset, amount=amount,
        evidence=evidence, block_hash=None, block_number=None, log_index=None,
    )  # fmt: skip
    outcome = decide(Received("x", "test", event, 1, None), facts())
    assert isinstance(outcome, Rejected)
