"""What a commit tells of the buffers it moved: the level of each, for whoever watches them.

A fold touches one or a few buffer accounts whatever the number of its transactions, so this is one message per commit, not
one per movement. The entries stay the truth; a level is taken by its version, so one that is late or repeated does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from ledger.accounts import AccountType
from ledger.posting import Fold
from ledger.record import Message
from topics.catalog import BUFFERS_LEVELS
from topics.envelope import value_of
from topics.events import BufferLevel

BUFFERS: Final = frozenset({AccountType.SYSTEM_BUFFER_USDC.value, AccountType.SYSTEM_BUFFER_FIAT.value})
"""What the company can still extend at once."""


def buffer_levels(fold: Fold) -> Iterator[Message]:
    """The level of each buffer account as the fold leaves it. Take it when everything is posted."""
    for account in sorted(account for account in fold.touched if account.type in BUFFERS):
        held = fold.balances[account]
        event = BufferLevel.known(
            account=str(account),
            account_type=str(account.type),
            asset=account.asset,
            shard=account.shard,
            balance=held.balance,
            account_version=held.version,
        )
        yield Message(BUFFERS_LEVELS.name, event.account.encode(), value_of(event), event.identity(), event.ce_type())
