"""The API as `stablerail api` serves it, but for where balances come from: a company's own table alone, in one select by its key."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

from ledger.accounts import USD, USDC, AccountType
from ledger.reading import OwnerBalance
from stablerail.api.compared import Compared
from stablerail.cli import app

SELECT = "SELECT usdc, reserved, power FROM public.balances WHERE user_id = $1"
UNIT = 10**6


async def balances(_compared: Compared, connection: Any, user_id: str) -> dict[str, OwnerBalance]:
    usdc, reserved, power = await connection.fetchrow(SELECT, user_id)
    return {
        USD: OwnerBalance(USD, {AccountType.FIAT_EXPOSURE.value: int(power * UNIT)}),
        USDC: OwnerBalance(
            USDC,
            {
                AccountType.PENDING_INVESTMENT.value: int(reserved * UNIT),
                AccountType.USDC_BALANCE.value: int(usdc * UNIT),
            },
        ),
    }


if __name__ == "__main__":
    with patch.object(Compared, "balances", balances):
        app(["api"])
