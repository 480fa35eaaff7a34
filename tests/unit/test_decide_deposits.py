"""What the deposit agents decide, for any reports in any order: total, and each transfer credited once."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.deposits import credit_deposits, finalize_deposits
from agents.deposits.deposit import EQUAL_MAX, Deposit, deposit_id, group_of
from agents.deposits.facts import named
from agents.deposits.finalize_deposits import Look
from agents.deposits.policy import DepositPolicy, outstanding_of
from agents.deposits.reversal import Purse
from agents.outcome import Done, Outcome, Rejected, Retry
from chain.errors import ChainError
from chain.evidence import Canonical, Doubt, Finding, Missing, Moved, Undecided
from ledger.accounts import SHORTFALL, SUSPENSE, SYSTEM, Account, spendable
from ledger.counters import COUNTERS
from ledger.counters import Counter as Row
from ledger.groups import try_post
from ledger.posting import Balance, Fold, accounts_of
from ledger.tables import DEPOSITS
from topics.envelope import Received, value_of
from topics.events import Chain, DepositCredited, DepositFinalized, DepositNotified, Evidence, HeadSeen

NOW = datetime(2026, 7, 1, tzinfo=UTC)
USDC = 10**6
ADA, BOB, NOBODY = ("0x" + digit * 40 for digit in "123")
TXS = ("0x" + "a" * 64, "0x" + "b" * 64)
BLOCKS = ("0x" + "1" * 64, "0x" + "2" * 64)
SOL_ADDRESS = "So11111111111111111111111111111111111111112"
OWNERS = {("MATIC", ADA): "ada", ("ETH", ADA): "ada", ("MATIC", BOB): "bob", ("SOL", SOL_ADDRESS): "ada"}
READ = frozenset({"MATIC"})
POLICY = DepositPolicy(minimum=USDC, chains_read=READ)
CREDITED = ("credited", "orphaned", "finalized")
EVE = "0x" + "e" * 40


def received(event: Any) -> Received:
    return Received(event.identity(), "test", event, 1, None)


def note(**changed: Any) -> DepositNotified:
    body = {
        "source": "circle", "transfer_id": "t1", "chain": "MATIC", "tx_hash": TXS[0], "to": ADA, "asset": "USDC",
        "amount": 25 * USDC, "evidence": "seen",
    }  # fmt: skip
    return DepositNotified.model_validate({**body, **changed})


def head(chain: str = "MATIC", number: int = 100) -> HeadSeen:
    return HeadSeen(chain=Chain(chain), chain_id=137, number=number, block_hash=BLOCKS[0], timestamp_s=1)


@dataclass
class Books:
    """Everything that was decided, folded: facts, ledger, what was said."""

    policy: DepositPolicy = POLICY
    facts: credit_deposits.Facts = field(init=False)
    balances: defaultdict[Account, Balance] = field(default_factory=lambda: defaultdict(Balance))
    posted: Counter[tuple[str, str]] = field(default_factory=Counter)
    ids: set[str] = field(default_factory=set)
    counters: dict[Any, Any] = field(default_factory=dict)
    now_denied: frozenset[tuple[str, str]] = frozenset()

    def __post_init__(self) -> None:
        self.facts = credit_deposits.Facts(NOW, self.policy, dict(OWNERS))

    def report(self, event: DepositNotified) -> Outcome:
        self.facts.denied = self.now_denied
        self.facts.purses = {user: Purse(self.balances[spendable(user)].balance) for user in ("ada", "bob")}
        self.listed(event)
        outcome = credit_deposits.decide(received(event), self.facts)
        if isinstance(outcome, Done):
            self.take(outcome)
            for user, purse in self.facts.purses.items():
                assert purse.spendable == self.balances[spendable(user)].balance, "what is folded is what was posted"
        return outcome

    def listed(self, event: DepositNotified) -> None:
        """The custodian's list has what the custodian said, and has been looked up."""
        names = named(event)
        if not isinstance(names, ChainError):
            assert isinstance(self.facts.looked, dict)
            group = self.facts.looked.setdefault(names.group_id, {})
            if event.source == "circle":
                group[event.transfer_id] = event.evidence

    def ask(self, chain: str, findings: dict[str, Finding], before: Mapping[str, Deposit] | None = None) -> Done:
        """`before`: the deposits as they were when the endpoints were asked; else nothing has changed since."""
        asked = self.facts.deposits if before is None else before
        looks = {key: Look(finding, asked[key].block_hash) for key, finding in findings.items()}
        due = [d for d in self.facts.deposits.values() if d.id in findings and d.chain == chain]
        purses = {d.user_id: Purse(self.balances[spendable(d.user_id)].balance) for d in due if d.user_id}
        facts = finalize_deposits.Facts(
            NOW, looks, self.policy, {chain: due}, self.facts.owners, self.now_denied, purses=purses
        )
        done = finalize_deposits.decide(received(head(chain)), facts)
        assert isinstance(done, Done)
        finalize_deposits.fold(facts, done)
        assert finalize_deposits.decide(received(head(chain)), facts) == Done(), "the next head of the batch"
        self.take(done)
        for user, purse in purses.items():
            assert purse.spendable == self.balances[spendable(user)].balance, (
                "what the decision knew is what was posted"
            )
        return done

    def take(self, done: Done) -> None:
        credit_deposits.fold(self.facts, done)
        for account in accounts_of(done.postings):
            self.balances[account]
        fold = Fold(dict(self.balances), NOW, dict(self.counters))
        assert try_post(fold, done.postings) is None, "no rule of ours is refused by the ledger"
        self.counters = fold.states
        for transaction in done.postings:
            assert transaction.id not in self.ids, "money ids are unique for ever"
            self.ids.add(transaction.id)
            self.posted[(transaction.reference, transaction.kind)] += 1
        assert [e.event.identity().replace("-", "") for e in done.emits] == [t.id for t in done.postings]

    def deposit(self, n: int = 0, **changed: Any) -> Deposit:
        event = note(**changed)
        return self.facts.deposits[
            deposit_id(group_of(event.chain, event.tx_hash, event.to, event.asset, event.amount), n)
        ]

    def check(self) -> None:
        """Invariant 5, as ledger/sql/verify.sql has it."""
        for deposit in self.facts.deposits.values():
            credits_ = self.posted[(deposit.id, "deposit")]
            reversals = self.posted[(deposit.id, "deposit_reversed")]
            finals = self.posted[(deposit.id, "deposit_final")]
            assert credits_ == deposit.generation
            assert credits_ - reversals == (deposit.status in ("credited", "orphaned", "finalized"))
            assert finals == (deposit.status == "finalized")
            assert self.posted[(deposit.id, "deposit_parked")] == (deposit.status == "parked")
            assert (deposit.held is None) <= (deposit.status not in ("pending", "parked"))
        assert sum(b.balance for b in self.balances.values()) == 0
        owed = sum(d.amount for d in self.facts.deposits.values() if d.status in CREDITED)
        customers = sum(b.balance for a, b in self.balances.items() if a.owner != SYSTEM)
        assert customers + self.balances[SHORTFALL].balance == owed
        parked = sum(d.amount for d in self.facts.deposits.values() if d.status == "parked")
        assert self.balances[SUSPENSE].balance == parked
        mirrored = sum(d.amount for d in self.facts.deposits.values() if d.status in ("parked", "finalized"))
        assert sum(b.balance for a, b in self.balances.items() if a.type == "custody_usdc") == mirrored
        for user in ("ada", "bob"):
            counted = [d for d in self.facts.deposits.values() if d.user_id == user and d.counted]
            assert all(d.status in ("credited", "orphaned") and d.counted == d.amount for d in counted)
            name = outstanding_of(user)
            assert self.counters.get((COUNTERS, name), Row(name)).value == sum(d.amount for d in counted)
            assert self.facts.outstanding.get(user, 0) == sum(d.amount for d in counted)


# -- any reports ------------------------------------------------------------------------------------------------------

reports = st.builds(
    note,
    source=st.sampled_from(["circle", "scanner", "other"]),
    transfer_id=st.sampled_from(["t1", "t2", "t3", "t4"]),
    chain=st.sampled_from(["MATIC", "MATIC", "ETH"]),
    tx_hash=st.sampled_from(TXS),
    to=st.sampled_from([ADA, BOB, NOBODY]),
    amount=st.sampled_from([25 * USDC, 25 * USDC, 30 * USDC, USDC - 1]),
    evidence=st.sampled_from(Evidence),
    block_hash=st.sampled_from([*BLOCKS, None]),
    block_number=st.sampled_from([5, None]),
    log_index=st.sampled_from([0, 1, None]),
    sender=st.sampled_from([EVE, BOB, None]),
)
policies = st.builds(
    DepositPolicy,
    minimum=st.just(USDC),
    chains_read=st.just(READ),
    at_finality=st.sampled_from([frozenset(), frozenset({"MATIC"}), frozenset({"ETH"})]),
    instant_max=st.sampled_from([{}, {"MATIC": 28 * USDC}]),
    outstanding_max=st.sampled_from([{}, {"MATIC": 60 * USDC}, {"MATIC": 60 * USDC, "ETH": 30 * USDC}]),
)
findings = st.one_of(
    st.builds(Canonical, st.sampled_from(BLOCKS), st.just(5), st.sampled_from([(0,), (0, 1), ()])),
    st.builds(Moved, st.sampled_from(BLOCKS), st.just(6), st.sampled_from([(0,), (0, 1), ()])),
    st.just(Missing()),
    st.just(Undecided(Doubt.BEHIND)),
)


@st.composite
def stories(draw: st.DrawFn) -> list[Any]:
    """Reports, repeats of them, and heads (None)."""
    told: list[DepositNotified] = []
    story: list[Any] = []
    for _ in range(draw(st.integers(1, 20))):
        kind = draw(st.integers(0, 4))
        if kind == 0:
            story.append(None)
        elif kind == 1 and told:
            story.append(draw(st.sampled_from(told)))
        else:
            told.append(draw(reports))
            story.append(told[-1])
    return story


@given(stories(), policies, st.booleans(), st.data())
def test_no_story_credits_a_transfer_twice_or_reverses_what_was_not_credited(
    story: list[Any], policy: DepositPolicy, denies: bool, data: st.DataObject
) -> None:
    books = Books(policy)
    for event in story:
        if event is None:
            if denies:
                books.now_denied = data.draw(st.sampled_from([frozenset(), frozenset({("MATIC", EVE), ("ETH", EVE)})]))
            due = [d.id for d in books.facts.deposits.values() if d.status in ("pending", "credited", "orphaned")]
            books.ask("MATIC", {key: data.draw(findings) for key in due if books.facts.deposits[key].chain == "MATIC"})
        else:
            outcome = books.report(event)
            if (event.chain, event.to) not in OWNERS and event.source == "other":
                assert isinstance(outcome, Rejected)
            elif isinstance(outcome, Rejected):
                assert outcome.code == "transfer_changed"
        books.check()
    paid = {a.owner for a in books.balances if a.owner != SYSTEM}
    assert paid <= {"ada", "bob"}
    for deposit in books.facts.deposits.values():
        if deposit.status in CREDITED:
            assert deposit.amount >= USDC


@given(st.lists(reports.filter(lambda r: r.source != "scanner"), max_size=15))
def test_on_a_chain_we_read_a_vendors_word_credits_the_first_equal_transfer_only(story: list[DepositNotified]) -> None:
    books = Books()
    for event in story:
        books.report(event)
    credited = [d for d in books.facts.deposits.values() if d.generation and d.chain in READ]
    assert all(d.n == 0 for d in credited)
    assert not any(d.status == "finalized" for d in credited)


@given(st.permutations([("circle", 0), ("circle", 1), ("scanner", 0), ("scanner", 1), ("circle", 0), ("scanner", 1)]))
def test_two_equal_transfers_reported_by_two_sources_in_any_order_are_two_credits(story: list[tuple[str, int]]) -> None:
    books = Books()
    for source, i in story:
        scanner = {"block_hash": BLOCKS[0], "block_number": 5, "log_index": i} if source == "scanner" else {}
        books.report(note(source=source, transfer_id=f"{source}{i}", evidence="confirmed", **scanner))
        books.check()
    assert sorted(d.n for d in books.facts.deposits.values()) == [0, 1]
    assert [d.status for d in books.facts.deposits.values()] == ["credited"] * 2
    assert sum(books.posted.values()) == 2


any_note = st.builds(
    note,
    source=st.from_regex(r"\A[\x21-\x7e][\x20-\x7e]{0,30}\Z"),
    transfer_id=st.from_regex(r"\A[\x21-\x7e][\x20-\x7e]{0,30}\Z"),
    chain=st.one_of(st.sampled_from(Chain), st.sampled_from(["BTC", "eth"])),
    tx_hash=st.one_of(st.sampled_from(TXS), st.from_regex(r"\A[0-9A-Za-z]{1,128}\Z")),
    to=st.one_of(st.sampled_from([ADA, ADA.upper(), SOL_ADDRESS]), st.from_regex(r"\A[0-9A-Za-z_.:-]{1,128}\Z")),
    asset=st.sampled_from(["USDC", "USDT", "usdc"]),
    amount=st.integers(1, 2**96),
    evidence=st.sampled_from(Evidence),
    block_hash=st.sampled_from([*BLOCKS, None]),
    block_number=st.one_of(st.none(), st.integers(0, 2**63 - 1)),
    log_index=st.one_of(st.none(), st.integers(0, 2**31 - 1)),
)


@given(st.lists(any_note, max_size=6))
def test_every_event_that_may_be_said_is_decided(story: list[DepositNotified]) -> None:
    books = Books(DepositPolicy(minimum=USDC, chains_read=READ, buffer_shards=4))
    for event in story:
        outcome = books.report(event)
        if isinstance(outcome, Rejected):
            assert outcome.code in {
                "unknown_wallet", "unsupported_token", "unknown_chain", "bad_address", "bad_tx_hash", "transfer_changed",
            }  # fmt: skip
        books.check()


# -- the rules, one by one --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"to": NOBODY, "source": "other"}, "unknown_wallet"),
        ({"to": "bc1q"}, "bad_address"),
        ({"chain": "BTC"}, "unknown_chain"),
        ({"tx_hash": "abc"}, "bad_tx_hash"),
        ({"asset": "USDT"}, "unsupported_token"),
        ({"chain": "SOL"}, "bad_address"),
    ],
)
def test_what_is_refused_and_why(changed: dict[str, Any], code: str) -> None:
    outcome = Books().report(note(**changed))
    assert isinstance(outcome, Rejected)
    assert outcome.code == code


def test_a_transfer_that_changes_its_contents_is_refused() -> None:
    books = Books()
    books.report(note())
    outcome = books.report(note(amount=26 * USDC))
    assert isinstance(outcome, Rejected)
    assert outcome.code == "transfer_changed"
    books.check()


def test_of_two_logs_that_endpoints_have_in_one_place_neither_keeps_the_other_out() -> None:
    books = Books()
    place = {
        "source": "scanner",
        "transfer_id": f"{'0x' + 'a' * 64}:3",
        "block_hash": "0x" + "a" * 64,
        "block_number": 7,
    }
    for _ in range(2):
        for amount in (25 * USDC, 26 * USDC):
            assert isinstance(books.report(note(amount=amount, **place)), Done)
    assert sorted((d.amount, d.n, d.status) for d in books.facts.deposits.values()) == [
        (25 * USDC, 0, "credited"), (26 * USDC, 0, "credited")
    ]  # fmt: skip
    books.check()


def test_more_equal_transfers_than_have_ids_are_refused_and_never_another_deposit() -> None:
    """No block has room for them: a producer that says so is wrong, and must not stop the stage."""
    books = Books()
    books.report(note())
    (first,) = books.facts.reports.values()
    books.facts.groups[first.group_id] += [first] * (EQUAL_MAX - 1)
    outcome = books.report(note(transfer_id="one more"))
    assert isinstance(outcome, Rejected)
    assert outcome.code == "too_many_transfers"
    ids = {deposit_id(first.group_id, n) for n in range(EQUAL_MAX)}
    assert (len(ids), {len(one) for one in ids}) == (EQUAL_MAX, {32})


def test_what_is_said_of_a_credit_is_valid_by_its_own_model() -> None:
    """Events of our own making are not validated when they are made."""
    done = Books().report(note())
    assert isinstance(done, Done)
    (emit,) = done.emits
    assert DepositCredited.model_validate_json(value_of(emit.event)) == emit.event


def test_a_deposit_is_credited_at_the_first_word_and_once() -> None:
    books = Books()
    done = books.report(note())
    assert isinstance(done, Done)
    assert [type(emit.event) for emit in done.emits] == [DepositCredited]
    assert done.emits[0].key == ADA
    for repeat in (note(), note(evidence="confirmed"), note(evidence="complete"), note(evidence="seen")):
        assert books.report(repeat).postings == ()  # type: ignore[union-attr]
    scanned = note(source="scanner", transfer_id="s", block_hash=BLOCKS[0], block_number=5, log_index=1)
    done = books.report(scanned)
    assert isinstance(done, Done)
    assert done.postings == ()
    assert books.deposit().block_hash == BLOCKS[0]
    books.check()


def test_where_we_cannot_read_the_custodians_complete_is_finality() -> None:
    books = Books()
    books.report(note(chain="ETH"))
    done = books.report(note(chain="ETH", evidence="complete"))
    assert isinstance(done, Done)
    assert [type(emit.event) for emit in done.emits] == [DepositFinalized]
    done = books.report(note(chain="ETH", transfer_id="t2", evidence="complete"))
    assert isinstance(done, Done)
    assert [p.kind for p in done.postings] == ["deposit", "deposit_final"], "the second equal transfer, at once"
    books.check()


@pytest.mark.parametrize(
    ("looked", "attempt", "outcome"),
    [
        ({"t1": "seen", "t2": "complete"}, 1, "finalized"),
        ({"t2": "complete"}, 1, "retry"),  # its list lacks the other one
        ({"t1": "complete", "t2": "confirmed"}, 1, "retry"),
        ({}, 1, "retry"),
        (None, 1, "retry"),  # Circle did not answer
        ({"t2": "complete"}, 20, "retry"),
        (None, 20, "retry"),
        (None, 1000, "retry"),
    ],
)
def test_where_we_cannot_read_a_further_transfer_is_credited_when_the_custodians_list_has_it(
    looked: dict[str, str] | None, attempt: int, outcome: str
) -> None:
    books = Books()
    books.report(note(chain="ETH"))
    event = note(chain="ETH", transfer_id="t2", evidence="complete")
    names = named(event)
    assert not isinstance(names, ChainError)
    found = None if looked is None else {id: Evidence(evidence) for id, evidence in looked.items()}
    books.facts.looked = {} if found is None else {names.group_id: found}
    done = credit_deposits.decide(received(event)._replace(attempt=attempt), books.facts)
    if outcome == "retry":
        assert isinstance(done, Retry)
        assert (done.code, done.after_s) == ("not_looked_up", min(10.0 * attempt, 600.0))
        assert [alert.code for alert in done.alerts] == ["deposit_not_listed"] * (attempt == 20)
        return
    assert isinstance(done, Done)
    books.take(done)
    assert [d.status for d in books.facts.deposits.values()] == ["credited", outcome]
    books.check()
    # nobody to ask: it waits
    books.facts.looked = None
    third = credit_deposits.decide(received(note(chain="ETH", transfer_id="t3", evidence="complete")), books.facts)
    assert isinstance(third, Done)
    assert third.postings == ()


def test_a_deposit_that_the_chain_dropped_is_orphaned_then_reversed_then_credited_when_mined_again() -> None:
    books = Books()
    books.report(note(source="scanner", block_hash=BLOCKS[0], block_number=5, log_index=0))
    key = books.deposit().id
    assert books.ask("MATIC", {key: Missing()}).postings == ()
    assert books.deposit().status == "orphaned"
    assert [p.kind for p in books.ask("MATIC", {key: Missing()}).postings] == ["deposit_reversed"]
    assert books.deposit().status == "reversed"
    assert books.report(note(transfer_id="t9", evidence="complete")).postings == ()  # type: ignore[union-attr]
    again = note(source="scanner", transfer_id="t10", block_hash=BLOCKS[1], block_number=9, log_index=0)
    assert [p.kind for p in books.report(again).postings] == ["deposit"]  # type: ignore[union-attr]
    assert (books.deposit().status, books.deposit().generation) == ("credited", 2)
    assert [p.kind for p in books.ask("MATIC", {key: Canonical(BLOCKS[1], 9, (0,))}).postings] == ["deposit_final"]
    books.check()


def test_an_orphan_that_is_seen_again_is_credited_no_second_time() -> None:
    books = Books()
    books.report(note(source="scanner", block_hash=BLOCKS[0], block_number=5, log_index=0))
    key = books.deposit().id
    books.ask("MATIC", {key: Missing()})
    again = note(source="scanner", transfer_id="t2", block_hash=BLOCKS[1], block_number=6, log_index=3)
    done = books.report(again)
    assert isinstance(done, Done)
    assert done.postings == ()
    assert (books.deposit().status, books.deposit().block_hash) == ("credited", BLOCKS[1])
    books.check()


@pytest.mark.parametrize("finding", [Undecided(doubt) for doubt in Doubt])
def test_doubt_takes_no_money_back(finding: Finding) -> None:
    books = Books()
    books.report(note(source="scanner", block_hash=BLOCKS[0], block_number=5, log_index=0))
    key = books.deposit().id
    books.ask("MATIC", {key: Missing()})
    for _ in range(3):
        assert books.ask("MATIC", {key: finding}) == Done()
    assert books.deposit().status == "orphaned"


def test_a_deposit_in_another_block_waits_for_that_blocks_depth() -> None:
    books = Books()
    books.report(note())
    key = books.deposit().id
    assert books.ask("MATIC", {key: Moved(BLOCKS[1], 7, (4,))}).postings == ()
    assert (books.deposit().block_hash, books.deposit().log_index) == (BLOCKS[1], 4)
    assert [p.kind for p in books.ask("MATIC", {key: Canonical(BLOCKS[1], 7, (4,))}).postings] == ["deposit_final"]
    books.check()


def test_fewer_equal_logs_than_credits_end_in_a_reversal_at_finality_only() -> None:
    books = Books()
    for i in (0, 1):
        scanned = {"block_hash": BLOCKS[0], "block_number": 5, "log_index": i}
        books.report(note(source="scanner", transfer_id=f"s{i}", **scanned))
    second = books.deposit(1).id
    assert books.ask("MATIC", {second: Moved(BLOCKS[1], 6, (0,))}).postings == ()
    orphan = books.deposit(1)
    assert (orphan.status, orphan.block_hash, orphan.block_number, orphan.log_index) == ("orphaned", BLOCKS[1], 6, None)
    assert books.ask("MATIC", {second: Undecided(Doubt.NOT_FINAL)}) == Done()
    assert [p.kind for p in books.ask("MATIC", {second: Canonical(BLOCKS[1], 6, (0,))}).postings] == [
        "deposit_reversed"
    ]
    books.check()


def test_an_orphan_goes_where_its_transaction_goes_and_is_credited_no_second_time_where_that_pays_it_again() -> None:
    books = Books()
    for i in (0, 1):
        scanned = {"block_hash": BLOCKS[0], "block_number": 5, "log_index": i}
        books.report(note(source="scanner", transfer_id=f"s{i}", **scanned))
    second = books.deposit(1).id
    books.ask("MATIC", {second: Moved(BLOCKS[1], 6, (0,))})
    books.ask("MATIC", {second: Moved(BLOCKS[0], 7, (3,))})
    assert (books.deposit(1).status, books.deposit(1).block_number) == ("orphaned", 7)
    assert books.ask("MATIC", {second: Moved(BLOCKS[1], 8, (0, 1))}).postings == ()
    again = books.deposit(1)
    assert (again.status, again.block_hash, again.block_number, again.log_index) == ("credited", BLOCKS[1], 8, 1)
    done = books.ask("MATIC", {second: Canonical(BLOCKS[1], 8, (0, 1))})
    assert [p.kind for p in done.postings] == ["deposit_final"]
    books.check()


def test_a_pending_further_transfer_goes_with_its_transaction_and_vanishes_where_that_is_final_without_it() -> None:
    books = Books(DepositPolicy(minimum=USDC, chains_read=READ, at_finality=frozenset({"MATIC"})))
    for i in (0, 1):
        scanned = {"block_hash": BLOCKS[0], "block_number": 5, "log_index": i}
        books.report(note(source="scanner", transfer_id=f"s{i}", **scanned))
    second = books.deposit(1).id
    books.ask("MATIC", {second: Moved(BLOCKS[1], 6, (0,))})
    moved = books.deposit(1)
    assert (moved.status, moved.block_hash, moved.block_number, moved.log_index) == ("pending", BLOCKS[1], 6, None)
    books.ask("MATIC", {second: Canonical(BLOCKS[1], 6, (0,))})
    assert books.deposit(1).status == "pending"
    books.ask("MATIC", {second: Canonical(BLOCKS[1], 6, (0,))})
    assert books.deposit(1).status == "vanished"
    books.check()


def _waiting_for_finality(**place: Any) -> Books:
    books = Books(DepositPolicy(minimum=USDC, chains_read=READ, at_finality=frozenset({"MATIC"})))
    books.report(note(**place))
    assert books.deposit().status == "pending"
    return books


SEEN = {"source": "scanner", "block_hash": BLOCKS[0], "block_number": 5, "log_index": 0}
TOLD = {"block_hash": BLOCKS[0], "block_number": 5}
"""By a vendor, who names no log."""


@pytest.mark.parametrize("place", [SEEN, TOLD, {"block_number": 5}, {}])
def test_a_pending_deposit_that_is_missed_once_and_then_found_is_credited_and_final(place: dict[str, Any]) -> None:
    books = _waiting_for_finality(**place)
    key = books.deposit().id
    assert books.ask("MATIC", {key: Missing()}).postings == ()
    missed = books.deposit()
    assert (missed.status, missed.block_hash, missed.block_number, missed.log_index) == ("pending", None, 100, None)
    done = books.ask("MATIC", {key: Canonical(BLOCKS[1], 9, (0,))})
    assert [p.kind for p in done.postings] == ["deposit", "deposit_final"]
    assert (books.deposit().status, books.deposit().block_hash) == ("finalized", BLOCKS[1])
    books.check()


@pytest.mark.parametrize("place", [SEEN, TOLD, {"block_number": 5}, {}])
def test_a_pending_deposit_vanishes_when_it_is_missed_twice(place: dict[str, Any]) -> None:
    books = _waiting_for_finality(**place)
    key = books.deposit().id
    books.ask("MATIC", {key: Missing()})
    assert books.ask("MATIC", {key: Undecided(Doubt.BEHIND)}) == Done()
    assert books.ask("MATIC", {key: Missing()}).postings == ()
    assert books.deposit().status == "vanished"
    books.check()


def test_a_pending_deposit_that_was_missed_and_is_seen_again_is_missed_anew_before_it_vanishes() -> None:
    books = _waiting_for_finality(**SEEN)
    key = books.deposit().id
    books.ask("MATIC", {key: Missing()})
    books.report(note(**SEEN | {"transfer_id": "t2", "block_hash": BLOCKS[1], "block_number": 90}))
    assert (books.deposit().block_hash, books.deposit().block_number) == (BLOCKS[1], 90)
    books.ask("MATIC", {key: Missing()})
    assert books.deposit().status == "pending"
    books.ask("MATIC", {key: Missing()})
    assert books.deposit().status == "vanished"
    books.check()


@pytest.mark.parametrize("finding", [Missing(), Canonical(BLOCKS[0], 5, (0,)), Moved(BLOCKS[0], 7, (0,))])
@pytest.mark.parametrize("at_finality", [frozenset(), frozenset({"MATIC"})])
def test_what_was_found_of_a_deposit_that_was_placed_elsewhere_meanwhile_decides_nothing(
    finding: Finding, at_finality: frozenset[str]
) -> None:
    books = Books(DepositPolicy(minimum=USDC, chains_read=READ, at_finality=at_finality))
    books.report(note(source="scanner", block_hash=BLOCKS[0], block_number=5, log_index=0))
    before = dict(books.facts.deposits)
    books.report(note(source="scanner", transfer_id="t2", block_hash=BLOCKS[1], block_number=90, log_index=0))
    placed = books.deposit()
    assert (placed.status, placed.block_hash) == ("pending" if at_finality else "credited", BLOCKS[1])
    assert books.ask("MATIC", {placed.id: finding}, before) == Done()
    books.ask("MATIC", {placed.id: Canonical(BLOCKS[1], 90, (0,))})
    assert (books.deposit().status, books.deposit().generation) == ("finalized", 1)
    books.check()


def test_a_heads_rows_are_deposits_only() -> None:
    books = Books()
    books.report(note())
    done = books.ask("MATIC", {books.deposit().id: Canonical(BLOCKS[0], 5, (0,))})
    assert [table for table, _ in done.upserts] == [DEPOSITS]
    assert done.inserts == ()
