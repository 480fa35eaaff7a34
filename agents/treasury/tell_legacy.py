"""Gives a legacy table in another server what waits for it in the outbox, in one worker of the deployment.

Who leads holds a lock of the ledger's database. Who lost it, and does not know yet, is stopped by the epoch in the table's own
server (ledger/shadow_elsewhere.py).
"""

from __future__ import annotations

import asyncio
from typing import Final

import asyncpg
import structlog

from agents.lone_writer import STANDBY_S, LoneWriter
from agents.services import Services
from ledger.commit import TRANSIENT
from ledger.errors import LegacyAway
from ledger.shadow_elsewhere import Elsewhere

_log = structlog.get_logger()
_AGAIN: Final[tuple[type[Exception], ...]] = (*TRANSIENT, asyncpg.InterfaceError, LegacyAway)

NAME: Final = "tell_legacy"
LOOK_S: Final = 0.2
"""Between two looks at an empty outbox."""
AWAY_S: Final = 2.0


class TellLegacy:
    """`work` never returns."""

    def __init__(self, services: Services, elsewhere: Elsewhere) -> None:
        self._services, self._elsewhere = services, elsewhere
        self._writer = LoneWriter(NAME, services)

    async def work(self) -> None:
        while True:
            pause_s = LOOK_S
            try:
                connection = await self._writer.lead()
                if connection is None:
                    pause_s = STANDBY_S
                elif await self._elsewhere.give(connection):
                    pause_s = 0.0
            except _AGAIN as error:
                pause_s = AWAY_S
                _log.warning("shadow.waits", error=type(error).__name__, reason=str(error))
            except Exception as error:
                self._services.stop(f"{NAME}: {error!r}", error)
                raise
            await asyncio.sleep(pause_s)
