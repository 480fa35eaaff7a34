"""What the sandbox's customers hold."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Final

_ASSETS: Final = uuid.UUID("a1fa0000-0000-4000-8000-000000000000")


@dataclass(slots=True)
class Holding:
    symbol: str
    qty: Decimal
    entry: Decimal
    price: Decimal
    asset_class: str = "us_equity"

    @property
    def asset_id(self) -> str:
        return str(uuid.uuid5(_ASSETS, self.symbol))

    def body(self) -> dict[str, Any]:
        """As Alpaca's `Position`."""
        cost, value, yesterday = self.qty * self.entry, self.qty * self.price, self.price
        gain = value - cost
        share = str(gain / cost) if cost else "0"
        return {
            "asset_id": self.asset_id, "symbol": self.symbol, "exchange": "NASDAQ", "asset_class": self.asset_class,
            "asset_marginable": True, "avg_entry_price": str(self.entry), "qty": str(abs(self.qty)),
            "qty_available": str(abs(self.qty)), "side": "long" if self.qty >= 0 else "short", "market_value": str(value),
            "cost_basis": str(cost), "unrealized_pl": str(gain), "unrealized_plpc": share, "unrealized_intraday_pl": "0",
            "unrealized_intraday_plpc": "0", "current_price": str(self.price), "lastday_price": str(yesterday),
            "change_today": "0",
        }  # fmt: skip


@dataclass(slots=True)
class Account:
    id: str
    number: str
    cash: Decimal = Decimal(0)
    holdings: dict[str, Holding] = field(default_factory=dict)
    """By symbol."""

    def body(self) -> dict[str, Any]:
        """As Alpaca's `TradeAccount`."""
        value = sum((one.qty * one.price for one in self.holdings.values()), Decimal(0))
        cash, equity = str(self.cash), str(self.cash + value)
        return {
            "id": self.id, "account_number": self.number, "status": "ACTIVE", "currency": "USD", "cash": cash,
            "cash_withdrawable": cash, "cash_transferable": cash, "pending_transfer_out": "0", "buying_power": cash,
            "regt_buying_power": cash, "daytrading_buying_power": "0", "equity": equity, "last_equity": equity,
            "portfolio_value": equity, "long_market_value": str(value), "short_market_value": "0", "initial_margin": "0",
            "maintenance_margin": "0", "multiplier": "1", "trading_blocked": False, "transfers_blocked": False,
            "account_blocked": False, "trade_suspended_by_user": False, "pattern_day_trader": False,
            "shorting_enabled": False, "previous_close": "2026-01-02T21:00:00Z", "last_long_market_value": str(value),
            "last_short_market_value": "0", "last_cash": cash, "last_initial_margin": "0", "last_maintenance_margin": "0",
            "last_regt_buying_power": cash, "last_buying_power": cash, "last_daytrading_buying_power": "0",
            "last_daytrade_count": 0, "daytrade_count": 0, "sma": "0", "clearing_broker": "VELOX", "created_at": "2026-01-02T15:04:05.678901Z",
        }  # fmt: skip


@dataclass
class State:
    accounts: dict[str, Account] = field(default_factory=dict)
    faults: list[int] = field(default_factory=list)
    """Status of each of the next answers; 0: never answers."""

    def open_account(self, id: str | None = None, cash: str = "0") -> Account:
        """A new account, or the one of this id."""
        key = id or str(uuid.uuid4())
        number = f"9{uuid.UUID(key).int % 10**8:08d}"
        return self.accounts.setdefault(key, Account(key, number, Decimal(cash)))

    def hold(self, account_id: str, symbol: str, qty: str, entry: str, price: str | None = None) -> None:
        """The account holds so much of it; an amount below zero is short."""
        holding = Holding(symbol, Decimal(qty), Decimal(entry), Decimal(price or entry))
        self.open_account(account_id).holdings[symbol] = holding
