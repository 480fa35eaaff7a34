"""Which limits can be set while the system runs, and what holds where nobody set one: the settings'."""

from __future__ import annotations

from stablerail.config import Settings
from stablerail.config_values import WITHDRAWAL_CHAINS
from stablerail.policies import withdrawal_policy


def known_limits(settings: Settings) -> dict[str, int]:
    """Name -> default in base units, by name."""
    policy = withdrawal_policy(settings)
    return dict(sorted(policy.limits({*WITHDRAWAL_CHAINS, *policy.chains}).items()))
