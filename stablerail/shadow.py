"""Settings in, the legacy table beside the ledger out; what is done with it when a process starts."""

from __future__ import annotations

from datetime import UTC, datetime

import structlog

from ledger.errors import LegacyAway
from ledger.rows import Connection
from ledger.shadow import Mirror, Watcher
from ledger.shadow_elsewhere import Elsewhere
from ledger.shadow_phases import begin, first_phase
from stablerail.config import Settings

_log = structlog.get_logger()


def mirror_for(settings: Settings, watcher: Watcher | None = None) -> Mirror | None:
    """None where no legacy table is configured, or it is in another server and only reconciled."""
    if settings.legacy is None:
        return None
    if settings.legacy_url is None:
        return Mirror(settings.legacy, watcher)
    return elsewhere_for(settings, watcher)


def elsewhere_for(settings: Settings, watcher: Watcher | None = None) -> Elsewhere | None:
    """None where the table is not in another server, or not written there."""
    if settings.legacy is None or settings.legacy_url is None or not settings.ledger_shadow_mode:
        return None
    return Elsewhere(settings.legacy, settings.secret("legacy_url"), watcher)


async def start(settings: Settings, connection: Connection) -> None:
    """Looks at the table and stores the first phase where there is none. Raises LegacyUnusable."""
    mirror = mirror_for(settings)
    if mirror is None:
        return
    try:
        await mirror.check(connection)
    except LegacyAway as error:  # it is given what waits when it is back
        _log.warning("shadow.unchecked", reason=str(error))
    finally:
        await mirror.close()
    first = first_phase(
        shadow=settings.ledger_shadow_mode, strict=settings.ledger_strict_mode, source=settings.balance_source
    )
    await begin(connection, first, datetime.now(UTC), "settings")
