"""What a report of a transfer proves, and of which one it is. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from agents.deposits.deposit import CUSTODIAN, SCANNER, Deposit, Report, Status
from agents.deposits.facts import Facts, Named
from agents.deposits.policy import DepositPolicy
from agents.outcome import Alert, Retry
from topics.envelope import Received
from topics.events import DepositNotified, Evidence

TAKEN_BACK: Final = frozenset({Status.REVERSED, Status.VANISHED})
LOOK_S, LOOK_S_MAX = 10.0, 600.0
"""Until the custodian is asked again: times the attempts, and at most."""
LOOKS_MAX: Final = 20
"""Looks, over half an hour, after which a person hears of it. It goes on: a custodian that was away for longer may still list it."""


_SURE: Final = {Evidence.SEEN: 0, Evidence.CONFIRMED: 1, Evidence.COMPLETE: 2, Evidence.FAILED: 2}


def is_news(said: Evidence, known: Evidence) -> bool:
    """Whether it is better evidence than what is known of the same transfer; another end than the known one is news too."""
    return said is not known and _SURE[said] >= _SURE[known]


def is_final(event: DepositNotified, policy: DepositPolicy) -> bool:
    """Whether this is the end: the custodian's last word on a chain that we do not read."""
    return event.evidence is Evidence.COMPLETE and event.chain not in policy.chains_read


def proven(event: DepositNotified, deposit: Deposit, names: Named, facts: Facts) -> bool:
    """The first of a group is believed on anyone's word, at once. A further one needs the chain's own logs; where we cannot
    read the chain, the custodian's COMPLETE and its list. One that was taken back needs our reader to have seen it again."""
    if event.source == SCANNER:
        return True
    if deposit.status in TAKEN_BACK:
        return False
    return deposit.n == 0 or (is_final(event, facts.policy) and listed(event, deposit.n, names, facts))


def listed(event: DepositNotified, n: int, names: Named, facts: Facts) -> bool:
    """Whether the custodian's list has that many equal transfers, this one complete. Another source's transfer has no id there
    (Circle Mint's are others than those of Circle's wallets): then that many are complete. What failed is none, and what was
    taken back for it, before this one, needs none."""
    said = _said(names, facts)
    ids = {report.deposit_id for report in facts.groups.get(names.group_id, ())}
    before = [d for id in ids if (d := facts.deposits.get(id)) is not None and d.n < n and d.status in TAKEN_BACK]
    if event.source == CUSTODIAN:
        there = sum(evidence is not Evidence.FAILED for evidence in said.values())
        return there > n - len(before) and said.get(event.transfer_id) is Evidence.COMPLETE
    return list(said.values()).count(Evidence.COMPLETE) > n - len(before)


def has_failed(event: DepositNotified, names: Named, facts: Facts) -> bool:
    """Whether the custodian's list says so too; where there is nobody to ask, its notification is believed."""
    return facts.looked is None or _said(names, facts).get(event.transfer_id) is Evidence.FAILED


def _said(names: Named, facts: Facts) -> Mapping[str, Evidence]:
    return (facts.looked or {}).get(names.group_id, {})


def look_again(received: Received, event: DepositNotified) -> Retry:
    """The custodian did not answer, or its list lags behind what was said."""
    alerts: tuple[Alert, ...] = ()
    if received.attempt == LOOKS_MAX:
        about = {name: str(getattr(event, name)) for name in ("chain", "tx_hash", "source", "transfer_id")}
        alerts = (Alert("deposit_not_listed", about),)
    return Retry("not_looked_up", min(LOOK_S * received.attempt, LOOK_S_MAX), alerts)


def rank(event: DepositNotified, reports: Sequence[Report]) -> int:
    """Which of the group's transfers a new report is: the source's next one. The reader counts within one block's hash,
    because a transaction that is mined again is reported anew."""
    return sum(
        1
        for report in reports
        if report.source == event.source and (event.source != SCANNER or report.block_hash == event.block_hash)
    )
