"""Gives a legacy table in another server what waits for it in the outbox, in one worker of the deployment.

Who leads holds a lock of the ledger's database. Who lost it, and does not know yet, is stopped by the epoch in the table's own
server (ledger/shadow_elsewhere.py).
"""

from __future__ import annotations

from typing import Final

import structlog

from agents.lone_writer import SILENCE_S, LoneWriter
from agents.services import Services
from ledger.errors import LegacyAway
from ledger.rows import Connection
from ledger.shadow_elsewhere import Elsewhere

_log = structlog.get_logger()

NAME: Final = "tell_legacy"
LOOK_S: Final = 0.2
"""Between two looks at an empty outbox."""
AWAY_S: Final = 2.0


class TellLegacy:
    """`work` never returns."""

    def __init__(self, services: Services, elsewhere: Elsewhere) -> None:
        self._elsewhere = elsewhere
        self._writer = LoneWriter(NAME, services, SILENCE_S)

    async def work(self) -> None:
        await self._writer.rounds(self._give, _failed, (LegacyAway,), lambda: self._elsewhere.stand_by())

    async def _give(self, connection: Connection) -> float:
        return 0.0 if await self._elsewhere.give(connection) else LOOK_S


def _failed(error: Exception) -> float:
    _log.warning("shadow.waits", error=type(error).__name__, reason=str(error))
    return AWAY_S
