"""The chart of accounts (DESIGN §4).

Balance = debits − credits. A customer's accounts never go below zero; the system's may. A hot system account can have
shards: its balance is their sum.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum
from functools import lru_cache
from typing import Final
from weakref import WeakValueDictionary

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


class Account:
    """One account's name. Its id is derived from it, so a rebuilt database has the same ids.

    Interned: equal names are the same object, so that a fold finds an account by identity.
    """

    __slots__ = ("__weakref__", "asset", "floor", "id", "owner", "shard", "type")

    id: str
    """32 hex digits; PostgreSQL's uuid reads them."""
    owner: str
    type: AccountType
    asset: str
    shard: str
    floor: int | None
    """The lowest balance it may have; None = none."""

    def __new__(cls, owner: str, type: str, asset: str = USDC, shard: str = "") -> Account:
        name = (owner, AccountType(type), asset, shard)
        found = _interned.get(name)
        if found is None:
            found = _interned[name] = super().__new__(cls)
            found.owner, found.type, found.asset, found.shard = name
            digest = hashlib.blake2b("\0".join(name).encode(), digest_size=16, person=b"account")
            found.id = digest.hexdigest()
            found.floor = None if owner == SYSTEM else 0
        return found

    def __reduce__(self) -> tuple[object, ...]:
        return Account, (self.owner, self.type, self.asset, self.shard)

    def __lt__(self, other: Account) -> bool:
        return self.id < other.id

    def __repr__(self) -> str:
        return f"Account({self})"

    def __str__(self) -> str:
        shard = f"[{self.shard}]" if self.shard else ""
        return f"{self.owner}.{self.type}{shard}:{self.asset}"


_interned: WeakValueDictionary[tuple[str, AccountType, str, str], Account] = WeakValueDictionary()


def may_own(owner: str) -> bool:
    """Whether a customer may have this id."""
    return owner != SYSTEM


@lru_cache(maxsize=200_000)
def spendable(user_id: str) -> Account:
    return Account(user_id, AccountType.USDC_BALANCE)


@lru_cache(maxsize=1_000)
def buffer(shard: str = "") -> Account:
    return Account(SYSTEM, AccountType.SYSTEM_BUFFER_USDC, shard=shard)


@lru_cache(maxsize=100)
def custody(chain: str) -> Account:
    return Account(SYSTEM, AccountType.CUSTODY_USDC, shard=chain)


WORLD: Final = Account(SYSTEM, AccountType.WORLD_USDC)
SHORTFALL: Final = Account(SYSTEM, AccountType.SHORTFALL_USDC)
