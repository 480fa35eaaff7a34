"""How endpoints' words become a finding: every combination of up to four words, in every order of arrival."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import permutations, product
from typing import Any

import pytest

from chain import evidence
from chain.endpoints import votes
from chain.errors import RpcUnavailable
from chain.evidence import Canonical, Doubt, Finding, Missing, Moved, Undecided, find_transfer
from chain.health import OK, OUTVOTED, Health
from chain.rpc import Rpc

HERE, ELSEWHERE = "0x" + "a" * 64, "0x" + "b" * 64
WORDS: dict[str, Any] = {
    "final": evidence._Place(HERE, 7, (0,), True),
    "seen": evidence._Place(HERE, 7, (0,), False),
    "elsewhere": evidence._Place(ELSEWHERE, 8, (0,), True),
    "missing": Missing(),
    "silent": Undecided(Doubt.FAILED),
}


@dataclass(eq=False)
class Teller:
    word: str
    health: Health = field(default_factory=Health)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Any:
    async def find(*words: str) -> Finding:
        async def ask(rpc: Any, *_: Any) -> Any:
            return [WORDS[rpc.word]]

        monkeypatch.setattr(evidence, "_ask", ask)
        rpcs: Any = [Teller(word) for word in words]
        endpoints: list[Rpc] = rpcs
        return await find_transfer(endpoints, "0x1", HERE, "0x2", "0x3", 5, 10, 3)

    return find


@pytest.mark.parametrize("endpoints", [1, 2, 3, 4])
async def test_nothing_is_final_or_gone_on_fewer_than_two_words_or_against_as_many(said: Any, endpoints: int) -> None:
    needed = min(2, endpoints)
    for words in product(WORDS, repeat=endpoints):
        count = Counter(words)
        here, rest = count["final"] + count["seen"], (count["elsewhere"], count["missing"])
        found = await said(*words)
        if isinstance(found, Canonical):
            assert count["final"] >= needed
            assert here > max(rest)
        elif isinstance(found, Moved):
            assert count["elsewhere"] >= needed
            assert count["elsewhere"] > max(here, count["missing"])
        elif isinstance(found, Missing):
            assert count["missing"] >= needed
            assert count["missing"] > max(here, count["elsewhere"])
        else:
            enough = [n for n in (here, *rest) if n >= needed and [here, *rest].count(n) == 1 and n == max(here, *rest)]
            assert not enough or found == Undecided(Doubt.NOT_FINAL)


@pytest.mark.parametrize(
    ("words", "finding"),
    [
        (("final", "final", "missing"), Canonical),
        (("final", "final", "silent"), Canonical),
        (("missing", "missing", "final"), Missing),
        (("elsewhere", "elsewhere", "final"), Moved),
        (("final", "missing", "silent"), Undecided),
        (("final", "final", "missing", "missing"), Undecided),
        (("final", "silent", "silent"), Undecided),
    ],
)
async def test_who_answers_first_has_no_advantage(said: Any, words: tuple[str, ...], finding: type[Any]) -> None:
    assert {type(await said(*order)) for order in permutations(words)} == {finding}


@pytest.mark.parametrize("endpoints", [1, 2, 3, 4])
async def test_a_transaction_ends_on_two_words_against_fewer_and_who_said_otherwise_is_known_for_it(
    endpoints: int,
) -> None:
    async def ask(rpc: Any) -> dict[str, str]:
        if rpc.word == "fails":
            raise RpcUnavailable("it", "down")
        return {"tx": rpc.word} if rpc.word != "silent" else {}

    agree = min(2, endpoints)
    for words in product(("paid", "gone", "silent", "fails"), repeat=endpoints):
        rpcs: Any = [Teller(word) for word in words]
        found = (await votes(rpcs, agree, ["tx"], ask)).get("tx")
        paid, gone = words.count("paid"), words.count("gone")
        if found is None:
            assert max(paid, gone) < agree or paid == gone
        else:
            assert (max(paid, gone), found) == (words.count(found), "paid" if paid > gone else "gone")
            assert words.count(found) >= agree
        liars = {rpc.word for rpc in rpcs if rpc.health.state == OUTVOTED}
        assert liars <= {"paid", "gone"} - {found}
        assert all(rpc.health.state == OK for rpc in rpcs if rpc.word in (found, "silent"))
