"""What a legacy table beside the ledger refuses."""

from __future__ import annotations

from collections.abc import Sequence

from ledger.errors.base import LedgerError


class LegacyUnusable(LedgerError):
    """The legacy table is not as the settings say; the program does not start."""

    code = "legacy_unusable"

    def __init__(self, setting: str, why: str) -> None:
        super().__init__(f"STABLERAIL_{setting}: {why}")
        self.setting = setting


class LegacyAway(LedgerError):
    """The legacy table is in a server that does not answer."""

    code = "legacy_away"


class PhaseRefused(LedgerError):
    """The phase does not move; each reason says what stands in the way."""

    code = "phase_refused"

    def __init__(self, phase: str, reasons: Sequence[str]) -> None:
        super().__init__(f"not {phase}: {'; '.join(reasons)}")
        self.phase, self.reasons = phase, tuple(reasons)


class BalancesDisagree(LedgerError):
    """In the strict phase: ledger and legacy table differ, so neither balance is told."""

    code = "balance_discrepancy"

    def __init__(self, accounts: Sequence[str]) -> None:
        super().__init__(f"ledger and legacy table differ in {', '.join(accounts)}; see `stablerail shadow status`")
        self.accounts = tuple(accounts)
