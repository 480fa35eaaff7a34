"""The chart of accounts (DESIGN §4).

Balance = debits − credits. A customer's accounts never go below zero; the system's may. A hot system account can have
shards: its balance is their sum.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum
from functools import lru_cache
from typing import Final, NamedTuple

SYSTEM: Final = "system"
"""The owner of the company's own accounts. Customers' ids are refused when they equal it (`may_own`)."""
USDC: Final = "USDC"


class AccountType(StrEnum):
    USDC_BALANCE = "usdc_balance"
    """Customer: spendable USDC."""
    SYSTEM_BUFFER_USDC = "system_buffer_usdc"
    """What the company can still extend at once. Shards: one per source partition where it is hot."""
    CUSTODY_USDC = "custody_usdc"
    """Mirror of what our wallets hold on chain at finality. Shard: the chain."""
    WORLD_USDC = "world_usdc"
    """The mirror's contra."""
    SUSPENSE_USDC = "suspense_usdc"
    """Money on our wallets whose owner is not known, or that waits for a person."""
    SHORTFALL_USDC = "shortfall_usdc"
    """What was reversed after its owner had spent it: owed to us."""


class Account(NamedTuple):
    """One account's name. Its id is derived from it, so a rebuilt database has the same ids."""

    owner: str
    type: AccountType
    asset: str = USDC
    shard: str = ""

    @property
    def id(self) -> str:
        """32 hex digits; PostgreSQL's uuid reads them."""
        return _account_id(self)

    @property
    def floor(self) -> int | None:
        """The lowest balance it may have; None = none."""
        return None if self.owner == SYSTEM else 0

    def __str__(self) -> str:
        shard = f"[{self.shard}]" if self.shard else ""
        return f"{self.owner}.{self.type.value}{shard}:{self.asset}"


@lru_cache(maxsize=200_000)
def _account_id(account: Account) -> str:
    name = "\0".join((account.owner, account.type.value, account.asset, account.shard))
    return hashlib.blake2b(name.encode(), digest_size=16, person=b"account").hexdigest()


def may_own(owner: str) -> bool:
    """Whether a customer may have this id."""
    return owner != SYSTEM


def spendable(user_id: str) -> Account:
    return Account(user_id, AccountType.USDC_BALANCE)


def buffer(shard: str = "") -> Account:
    return Account(SYSTEM, AccountType.SYSTEM_BUFFER_USDC, shard=shard)


def custody(chain: str) -> Account:
    return Account(SYSTEM, AccountType.CUSTODY_USDC, shard=chain)


WORLD: Final = Account(SYSTEM, AccountType.WORLD_USDC)
SHORTFALL: Final = Account(SYSTEM, AccountType.SHORTFALL_USDC)
