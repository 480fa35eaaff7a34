"""Settings in, the legacy table beside the ledger out; what is done with it when a process starts."""

from __future__ import annotations

from datetime import UTC, datetime

from ledger.rows import Connection
from ledger.shadow import Mirror, Watcher
from ledger.shadow_phases import begin, first_phase
from stablerail.config import Settings


def mirror_for(settings: Settings, watcher: Watcher | None = None) -> Mirror | None:
    """None where no legacy table is configured, or it is in another database: there it is reconciled only."""
    if settings.legacy is None or settings.legacy_url is not None:
        return None
    return Mirror(settings.legacy, watcher)


async def start(settings: Settings, connection: Connection) -> None:
    """Looks at the table and stores the first phase where there is none. Raises LegacyUnusable."""
    mirror = mirror_for(settings)
    if mirror is None:
        return
    await mirror.legacy.check(connection)
    first = first_phase(
        shadow=settings.ledger_shadow_mode, strict=settings.ledger_strict_mode, source=settings.balance_source
    )
    await begin(connection, first, datetime.now(UTC), "settings")
