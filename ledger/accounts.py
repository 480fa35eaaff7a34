"""The chart of accounts.

Balance = debits − credits. A customer's accounts never go below zero; the system's may. A hot system account can have
shards: its balance is their sum. The chart says for each type who may own it and in which asset it is kept; an account
that is not on it can be named, and every posting to it is refused.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum
from functools import lru_cache
from typing import Final
from weakref import WeakValueDictionary

from ledger.errors import PostingRefused, UnknownAccount, WrongAsset
from topics.partitioner import partition_of

SYSTEM: Final = "system"
"""The owner of the company's own accounts. Customers' ids are refused when they equal it (`may_own`)."""
USDC: Final = "USDC"
COIN: Final = "COIN"
"""What gas is paid with, of any chain, kept with 6 decimals; the account's shard says of which chain."""
USD: Final = "USD"
"""Kept with 6 decimals as USDC is; banks see cents."""
AMOUNT_MAX: Final = 10**38 - 1
"""Of an amount, and of a balance on either side of zero: NUMERIC(38, 0)."""

OUT_OF_REACH: Final = AMOUNT_MAX + 1
"""The floor of what is not on the chart: the check of every posting, whether a balance stays in bounds, then fails."""


class AccountType(StrEnum):
    USDC_BALANCE = "usdc_balance"
    """Customer: spendable USDC."""
    PENDING_WITHDRAWAL = "pending_withdrawal"
    """Customer: USDC held for a withdrawal in flight."""
    PENDING_INVESTMENT = "pending_investment"
    """Customer: USDC reserved for an order."""
    FIAT_EXPOSURE = "fiat_exposure"
    """Customer: USD working at the broker."""
    SYSTEM_BUFFER_USDC = "system_buffer_usdc"
    """What the company can still extend at once. Shards: one per source partition where it is hot."""
    SYSTEM_BUFFER_FIAT = "system_buffer_fiat"
    BROKER_OPERATIONAL = "broker_operational"
    """USD at the broker's firm account."""
    TREASURY_CAPITAL_USDC = "treasury_capital_usdc"
    """The company's own funding (negative side)."""
    TREASURY_CAPITAL_FIAT = "treasury_capital_fiat"
    CUSTODY_USDC = "custody_usdc"
    """Mirror of what our wallets hold on chain at finality. Shard: the chain."""
    WORLD_USDC = "world_usdc"
    """The mirror's contra."""
    SUSPENSE_USDC = "suspense_usdc"
    """Money on our wallets whose owner is not known, or that waits for a person."""
    SHORTFALL_USDC = "shortfall_usdc"
    """What was reversed after its owner had spent it: owed to us."""
    GAS_COINS = "gas_coins"
    """Coins for gas that were moved between our signers. Shard: <chain>:<signer>; negative: it gave them."""


CUSTOMERS: Final = frozenset(
    {
        AccountType.USDC_BALANCE,
        AccountType.PENDING_WITHDRAWAL,
        AccountType.PENDING_INVESTMENT,
        AccountType.FIAT_EXPOSURE,
    }
)
"""The types a customer owns; the system owns the others."""

_IN_USD: Final = frozenset(
    {
        AccountType.FIAT_EXPOSURE,
        AccountType.SYSTEM_BUFFER_FIAT,
        AccountType.BROKER_OPERATIONAL,
        AccountType.TREASURY_CAPITAL_FIAT,
    }
)


def asset_of(type: AccountType) -> str:
    """The asset that accounts of the type are kept in."""
    if type is AccountType.GAS_COINS:
        return COIN
    return USD if type in _IN_USD else USDC


def account_id(owner: str, type: str, asset: str, shard: str) -> str:
    """The id, 32 hex digits, that the account has, or would have (docs/adr/0009)."""
    name = "\0".join((owner, type, asset, shard))
    return hashlib.blake2b(name.encode(), digest_size=16, person=b"account").hexdigest()


class Account:
    """One account's name. Its id is derived from it, so a rebuilt database has the same ids.

    Interned: equal names are the same object, so that a fold finds an account by identity and the chart is asked once.
    """

    __slots__ = ("__weakref__", "asset", "floor", "id", "owner", "shard", "type")

    id: str
    """32 hex digits; PostgreSQL's uuid reads them."""
    owner: str
    type: str
    """An AccountType when it is on the chart."""
    asset: str
    shard: str
    floor: int
    """The lowest balance it may have; OUT_OF_REACH where the account is not on the chart."""

    def __new__(cls, owner: str, type: str, asset: str = "", shard: str = "") -> Account:
        """`asset`: the chart's own when it is left out."""
        name = (owner, type, asset or _asset_of_any(type), shard)
        found = _interned.get(name)
        if found is None:
            found = _interned[name] = super().__new__(cls)
            found.owner, found.type, found.asset, found.shard = name
            found.id = account_id(*name)
            found.floor = OUT_OF_REACH if refusal_of(found) else -AMOUNT_MAX if owner == SYSTEM else 0
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


_interned: WeakValueDictionary[tuple[str, str, str, str], Account] = WeakValueDictionary()


def _asset_of_any(type: str) -> str:
    try:
        return asset_of(AccountType(type))
    except ValueError:
        return USDC


def refusal_of(account: Account) -> PostingRefused | None:
    """What the chart has to say against postings to an account."""
    try:
        type = AccountType(account.type)
    except ValueError:
        return UnknownAccount(str(account))
    customers = type in CUSTOMERS
    named = account.owner and "\0" not in account.owner + account.shard  # PostgreSQL keeps no NUL
    if customers == (account.owner == SYSTEM) or not named or (customers and account.shard):
        return UnknownAccount(str(account))
    return None if account.asset == asset_of(type) else WrongAsset(str(account), account.asset)


def may_own(owner: str) -> bool:
    """Whether a customer may have this id."""
    return owner != SYSTEM


@lru_cache(maxsize=200_000)
def spendable(user_id: str) -> Account:
    return Account(user_id, AccountType.USDC_BALANCE)


@lru_cache(maxsize=200_000)
def pending_withdrawal(user_id: str) -> Account:
    return Account(user_id, AccountType.PENDING_WITHDRAWAL)


@lru_cache(maxsize=200_000)
def pending_investment(user_id: str) -> Account:
    return Account(user_id, AccountType.PENDING_INVESTMENT)


@lru_cache(maxsize=200_000)
def fiat_exposure(user_id: str) -> Account:
    return Account(user_id, AccountType.FIAT_EXPOSURE)


@lru_cache(maxsize=1_000)
def buffer(shard: str = "") -> Account:
    return Account(SYSTEM, AccountType.SYSTEM_BUFFER_USDC, shard=shard)


@lru_cache(maxsize=1_000)
def fiat_buffer(shard: str = "") -> Account:
    return Account(SYSTEM, AccountType.SYSTEM_BUFFER_FIAT, shard=shard)


@lru_cache(maxsize=100)
def custody(chain: str) -> Account:
    return Account(SYSTEM, AccountType.CUSTODY_USDC, shard=chain)


def gas_coins(lane: str) -> Account:
    """`lane`: <chain>:<signer>."""
    return Account(SYSTEM, AccountType.GAS_COINS, shard=lane)


def shard_of(key: str, count: int) -> str:
    """Which of an account's `count` shards takes what belongs to `key` (a wallet's address, a customer's id). The same
    key has the same shard, and what belongs to one Kafka partition of that key and count meets in one."""
    return str(partition_of(key.encode(), count)) if count > 1 else ""


WORLD: Final = Account(SYSTEM, AccountType.WORLD_USDC)
SHORTFALL: Final = Account(SYSTEM, AccountType.SHORTFALL_USDC)
SUSPENSE: Final = Account(SYSTEM, AccountType.SUSPENSE_USDC)
