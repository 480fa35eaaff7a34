"""What every balance and every payment must be, by those who know: the chain's logs, the sandbox's records, and what was asked.

It shares no code with the product and imports none of it (tests/chaos/test_oracle.py checks that): a mistake that both made would
be seen by neither. `judge` is pure; `witness.py` brings what it judges.

| promise | rule |
| --- | --- |
| a deposit is credited once | each transfer of the chain (and of Circle, where nobody reads the chain) has one final row; nothing else has |
| nothing but deposits makes money | a customer has what came in, less what was paid and what orders cost; nothing stays held |
| a withdrawal is paid once or not at all | payments to its address: one of its amount when it completed, none when it ended otherwise |
| nonces | the hot wallet has used as many as were signed for, each for one withdrawal |
| everything ends | each withdrawal and order stands where its kind ends |
| everything is told | each credit, each end is in its topic, and nothing that is not so |
| who was replaced does nothing more | no commit of a partition has an epoch that is over, none is missing, each is in its place |
| nothing is dropped | each message that nobody can read is a dead letter with its bytes |
| the books | every transaction sums to zero, every balance is the sum of its entries, the mirror is what our wallets hold |
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from tests.chaos.inputs import Input

MINIMUM = 1_000_000
"""A smaller deposit is nobody's: it is put into suspense."""


@dataclass(frozen=True)
class Transfer:
    """Of USDC, as somebody who saw it move says. Amounts in base units; addresses of the chain we read in lower case."""

    chain: str
    tx_hash: str
    sender: str
    to: str
    amount: int


@dataclass
class World:
    """What happened outside."""

    inbound: list[Transfer]
    """To wallets of customers."""
    outbound: list[Transfer]
    """From wallets of ours."""
    owners: dict[str, str]
    """Address -> customer."""
    holdings: int
    """What all our wallets on the chain that we read have, by balanceOf."""
    signer_nonce: int
    """How many transactions of the hot wallet the chain has."""


@dataclass
class Told:
    """What the product says."""

    balances: dict[str, dict[str, int]]
    """By customer: `available`, `held` (all of it), `exposure` (USD at the broker)."""
    deposits: list[tuple[str, str, int, str]]
    """(tx hash, to, amount, status)"""
    withdrawals: list[tuple[str, str, str, str, int, str]]
    """(id, customer, idempotency key, status, amount, to)"""
    orders: dict[str, tuple[str, int]]
    """(status, filled) by order id"""
    nonces: list[tuple[int, str | None]]
    """Of the hot wallet: (nonce, withdrawal), once for each that was signed."""
    custody: int
    """The mirror of the chain that we read."""
    books: list[str]
    """What does not add up, by plain SQL over entries and accounts."""
    credits: set[tuple[str, int]]
    """(ledger transaction, amount) of each deposit that was credited"""
    said_credits: set[tuple[str, int]]
    """The same, by the topic."""
    said_ends: dict[str, set[str]]
    """By withdrawal, the outcomes that were told."""
    said_orders: dict[str, set[str]]
    """By order, what was told of its end."""
    letters: Counter[tuple[str, int, int, bytes]]
    """(topic, partition, offset, value) of the dead letters"""
    journal: list[tuple[int, str, str, int, int, int]] = field(default_factory=list)
    """(number, stage, topic, partition, epoch, position) of each commit, in the topic's order, the first time that it is there"""
    left: dict[str, int] = field(default_factory=dict)
    """What still waits where nothing must: rows to be journaled, events to be acknowledged."""


@dataclass(frozen=True)
class Difference:
    """`keys`: the inputs that it is about. `user`: whose money."""

    rule: str
    text: str
    keys: frozenset[str] = frozenset()
    user: str = ""


def judge(inputs: Iterable[Input], world: World, told: Told) -> list[Difference]:
    """Every difference, the most telling first."""
    inputs = list(inputs)
    return [
        *_payments(inputs, world, told),
        *_deposits(inputs, world, told),
        *_orders(inputs, told),
        *_balances(inputs, world, told),
        *_nonces(world, told),
        *_said(told),
        *_letters(inputs, told),
        *_journal(told),
        *_books(world, told),
    ]


# -- what must be ----------------------------------------------------------------------------------------------------


def balances(inputs: Iterable[Input], world: World) -> dict[str, dict[str, int]]:
    """What each customer must have."""
    found: defaultdict[str, dict[str, int]] = defaultdict(lambda: {"available": 0, "held": 0, "exposure": 0})
    for one in world.inbound:
        if one.amount >= MINIMUM:
            found[world.owners[one.to]]["available"] += one.amount
    payer = {}
    for one in inputs:
        found[one.user]  # who only asked for something has nothing
        if one.kind == "withdraw":
            payer[_plain(one.about["to"])] = one.user
        elif one.kind == "order" and one.about["end"] != "rejected":
            spent = sum(one.about["fills"])
            found[one.user]["available"] -= spent
            found[one.user]["exposure"] += spent
    for one in world.outbound:
        if (user := payer.get(one.to)) is not None:
            found[user]["available"] -= one.amount
    found.pop("", None)
    return dict(found)


# -- the rules -------------------------------------------------------------------------------------------------------

ENDS = {
    "paid": {"completed"},
    "either": {"completed", "cancelled"},
    "refused": {"failed"},
    "unpaid": {"failed"},
}


def _payments(inputs: list[Input], world: World, told: Told) -> Iterator[Difference]:
    paid: defaultdict[str, list[int]] = defaultdict(list)
    for one in world.outbound:
        paid[one.to].append(one.amount)
    rows: defaultdict[tuple[str, str], list[tuple[str, int, str]]] = defaultdict(list)
    for _, user, key, status, amount, to in told.withdrawals:
        rows[user, key].append((status, amount, to))
    asked = [one for one in inputs if one.kind == "withdraw" and one.about["expect"] != "unasked"]
    for one in asked:
        about, found = one.about, rows.pop((one.user, one.key), [])
        payments = paid.pop(_plain(about["to"]), [])
        who = {"keys": frozenset({one.key}), "user": one.user}
        if len(found) != 1:
            yield Difference("a withdrawal is one", f"{one.key} has {len(found)} rows", **who)
            continue
        ((status, _, _),) = found
        if status not in ENDS[about["expect"]]:
            ends = " or ".join(sorted(ENDS[about["expect"]]))
            yield Difference("a withdrawal ends", f"{one.key} is {status}; it must be {ends}", **who)
        due = [about["amount"]] if status == "completed" else []
        if payments != due:
            yield Difference(
                "paid once or not at all", f"{one.key} is {status}, and was paid {payments}, not {due}", **who
            )
    for (user, key), _ in rows.items():
        yield Difference("a withdrawal was asked for", f"nobody asked for {key}", frozenset({key}), user)
    for to, amounts in paid.items():
        yield Difference("a payment was asked for", f"{amounts} went to {to}, and nobody asked for that")


def _deposits(inputs: list[Input], world: World, told: Told) -> Iterator[Difference]:
    due: Counter[tuple[str, str, int, str]] = Counter()
    for one in world.inbound:
        due[one.tx_hash, one.to, one.amount, "finalized" if one.amount >= MINIMUM else "parked"] += 1
    kept = [(tx, to, amount, status) for tx, to, amount, status in told.deposits if to in world.owners]
    found = Counter(row for row in kept if row[3] not in ("reversed", "vanished"))
    for row in (due - found) + (found - due):
        tx_hash, to, amount, status = row
        text = f"{amount} to {to} in {tx_hash}: {found[row]} {status}, not {due[row]}"
        others = sorted({other[3] for other in kept if other[:3] == row[:3]})
        keys = frozenset({tx_hash})
        yield Difference("credited once", f"{text} (it has {others})", keys, world.owners.get(to, ""))


def _orders(inputs: list[Input], told: Told) -> Iterator[Difference]:
    known = dict(told.orders)
    for one in inputs:
        if one.kind == "order":
            due = (one.about["end"], sum(one.about["fills"]))
            found = known.pop(one.key, None)
            if found != due:
                text = f"{one.key} is {found}; it must be {due}"
                yield Difference("an order ends", text, frozenset({one.key}), one.user)
    for key in known:
        yield Difference("an order was placed", f"nobody placed {key}", frozenset({key}))


def _balances(inputs: list[Input], world: World, told: Told) -> Iterator[Difference]:
    for user, due in sorted(balances(inputs, world).items()):
        found = told.balances.get(user, {"available": 0, "held": 0, "exposure": 0})
        if found != due:
            yield Difference("a balance", f"{user} has {found}; it must be {due}", user=user)


def _nonces(world: World, told: Told) -> Iterator[Difference]:
    used = sorted({nonce for nonce, _ in told.nonces})
    if used != list(range(world.signer_nonce)):
        yield Difference("nonces", f"the chain has used {world.signer_nonce}; signed are {_span(used)}")
    by_withdrawal: defaultdict[str, set[int]] = defaultdict(set)
    by_nonce: defaultdict[int, set[str | None]] = defaultdict(set)
    for nonce, withdrawal in told.nonces:
        by_nonce[nonce].add(withdrawal)
        if withdrawal is not None:
            by_withdrawal[withdrawal].add(nonce)
    keys = {row[0]: (row[2], row[1]) for row in told.withdrawals}
    for withdrawal, nonces in by_withdrawal.items():
        if len(nonces) > 1:
            key, user = keys.get(withdrawal, ("", ""))
            yield Difference("one nonce for life", f"{key} has nonces {sorted(nonces)}", frozenset({key}), user)
    for nonce, withdrawals in by_nonce.items():
        if len(withdrawals) > 1:
            yield Difference("one nonce for life", f"nonce {nonce} is of {len(withdrawals)} withdrawals")


def _said(told: Told) -> Iterator[Difference]:
    for transaction, amount in sorted(told.credits - told.said_credits)[:10]:
        yield Difference("told", f"the credit {transaction} of {amount} is in the ledger and in no topic")
    for transaction, amount in sorted(told.said_credits - told.credits)[:10]:
        yield Difference("told", f"the credit {transaction} of {amount} was told, and the ledger has none")
    for key, user, name, status, *_ in told.withdrawals:
        said = told.said_ends.get(key, set())
        if status in ("completed", "failed", "cancelled") and said != {status}:
            text = f"{name} is {status}, and was told {sorted(said) or 'nowhere'}"
            yield Difference("told", text, frozenset({name}), user)
    for order, (status, _) in told.orders.items():
        said = told.said_orders.get(order, set())
        if said != {status}:
            yield Difference(
                "told", f"{order} is {status}, and was told {sorted(said) or 'nowhere'}", frozenset({order})
            )


def _letters(inputs: list[Input], told: Told) -> Iterator[Difference]:
    for one in inputs:
        if one.kind == "malformed" and "offset" in one.about:
            place = (one.about["topic"], one.about["partition"], one.about["offset"], bytes.fromhex(one.key))
            if not told.letters[place]:
                yield Difference("nothing is dropped", f"no dead letter of {place}", frozenset({one.key}))


def _journal(told: Told) -> Iterator[Difference]:
    last: dict[tuple[str, str, int], tuple[int, int]] = {}
    for number, stage, topic, partition, epoch, position in told.journal:
        known_epoch, known_position = last.get((stage, topic, partition), (0, position - 1))
        where = f"{stage} on {topic}[{partition}]"
        if epoch < known_epoch:
            text = f"{where} committed {number} in epoch {epoch}, after epoch {known_epoch} had begun"
            yield Difference("who was replaced does nothing more", text)
        if position != known_position + 1:
            yield Difference("the journal is whole", f"{where}: {position} came after {known_position}")
        last[stage, topic, partition] = (epoch, position)


def _books(world: World, told: Told) -> Iterator[Difference]:
    for text in told.books:
        yield Difference("the books", text)
    if told.custody != world.holdings:
        yield Difference("the mirror", f"custody_usdc is {told.custody}; our wallets have {world.holdings}")
    for what, number in told.left.items():
        if number:
            yield Difference("everything ends", f"{number} {what}")


def _plain(address: str) -> str:
    return address.lower() if address.startswith("0x") else address


def _span(numbers: list[int]) -> str:
    return f"{len(numbers)} from {numbers[0]} to {numbers[-1]}" if numbers else "none"
