"""The movements: which there are, and what each cannot start without."""

from __future__ import annotations

from typing import Final

MOVEMENTS: Final = ("onboarding", "deposits", "chains", "withdrawals", "investing", "treasury", "recovery")
"""Each is one Faust app with a consumer group of its own, and one Deployment in production."""

NEEDS: Final[dict[str, tuple[str, ...]]] = {
    "onboarding": ("database_url", "circle_api_key", "circle_entity_secret"),
    "deposits": ("database_url",),
    "chains": ("database_url",),
    "withdrawals": ("database_url",),
    "investing": ("database_url",),
    "treasury": ("database_url",),
    "recovery": ("database_url",),
}
