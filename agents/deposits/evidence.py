"""What a report of a transfer proves, and of which one it is. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from agents.deposits.deposit import CUSTODIAN, SCANNER, Deposit, Report, Status
from agents.deposits.facts import Facts, Named
from agents.deposits.policy import DepositPolicy
from topics.envelope import Received
from topics.events import DepositNotified, Evidence

TAKEN_BACK: Final = frozenset({Status.REVERSED, Status.VANISHED})
LOOKS_MAX: Final = 20
"""How often the custodian's list may lack what the custodian said itself."""


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
    """Whether the custodian's list has that many equal transfers, this one complete."""
    listed = (facts.looked or {}).get(names.group_id, {})
    return len(listed) > n and listed.get(event.transfer_id) is Evidence.COMPLETE


def must_look(received: Received, event: DepositNotified, n: int, names: Named, facts: Facts) -> bool:
    """Whether the custodian has to be asked (again) before this can be decided: it did not answer, or its list lags behind its
    own words."""
    assert facts.looked is not None
    if names.group_id not in facts.looked:
        return True
    lags = event.source == CUSTODIAN and not listed(event, n, names, facts)
    return lags and received.attempt < LOOKS_MAX


def rank(event: DepositNotified, reports: Sequence[Report]) -> int:
    """Which of the group's transfers a new report is: the source's next one. The reader counts within one block's hash,
    because a transaction that is mined again is reported anew."""
    return sum(
        1
        for report in reports
        if report.source == event.source and (event.source != SCANNER or report.block_hash == event.block_hash)
    )
