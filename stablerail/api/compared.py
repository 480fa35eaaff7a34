"""What a read of balances found beside the ledger: stored once the read's own snapshot is over; in the strict phase refused."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, cast

from fastapi import Request
from fastapi.responses import JSONResponse

from ledger.errors import BalancesDisagree, LegacyAway
from ledger.reading import OwnerBalance, owner_balances
from ledger.shadow import Difference, Phase, mirror_of
from ledger.shadow_phases import store_differences
from stablerail.api import reads
from stablerail.keys import Connection
from stablerail.problems import Problem


class Compared:
    """Of one request."""

    def __init__(self) -> None:
        self._differences: list[Difference] = []
        self._strict = False

    async def balances(self, connection: Connection, user_id: str) -> dict[str, OwnerBalance]:
        """By asset, from where the phase says."""
        mirror = mirror_of(connection)
        if mirror is None:
            return await owner_balances(connection, user_id)
        found, look, self._differences = await mirror.balances(connection, user_id)
        self._strict = look.phase is Phase.STRICT
        return found

    async def settle(self, pool: reads.Pool) -> None:
        """Raises BalancesDisagree."""
        if not self._differences:
            return
        async with pool.acquire(timeout=reads.ACQUIRE_TIMEOUT_S) as connection:
            mirror = mirror_of(connection)
            assert mirror is not None
            differences = await mirror.confirmed(cast(Any, connection), self._differences)
            mirror.tell(differences)
            await store_differences(cast(Any, connection), differences, datetime.now(UTC))
        if differences and self._strict:
            raise BalancesDisagree([one.type.value for one in differences])


async def on_disagree(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, BalancesDisagree)
    return Problem(409, error.code, str(error)).response()


async def on_away(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, LegacyAway)
    return Problem(503, error.code, str(error)).response()
