"""How long tests wait for what must come, and let stand what stands still."""

from __future__ import annotations

from typing import Final

PATIENCE_S: Final = 100.0

ENVIRONMENT: Final = {"STABLERAIL_DATABASE_IDLE_TIMEOUT_S": f"{PATIENCE_S:g}"}
"""Of whatever runs in a test's own process: an open transaction is not ended because that process stands still."""
