"""What people may not ask for or decide."""

from __future__ import annotations

from collections.abc import Sequence

from ledger.errors.base import LedgerError


class CorrectionRefused(LedgerError):
    """Base of what people may not ask for or decide; nothing moved."""

    code = "correction_refused"


class SameActor(CorrectionRefused):
    """Whoever asked cannot approve."""

    code = "same_actor"

    def __init__(self, actor: str) -> None:
        super().__init__(f"{actor} asked for it; somebody else must approve it")
        self.actor = actor


class CorrectionDecided(CorrectionRefused):
    """It was approved or rejected before; what is posted is undone by another correction."""

    code = "correction_decided"

    def __init__(self, correction_id: str, state: str, decided_by: str | None) -> None:
        super().__init__(f"correction {correction_id} is {state} by {decided_by}; ask for another")
        self.correction_id, self.state, self.decided_by = correction_id, state, decided_by


class CorrectionReused(CorrectionRefused):
    """The id was used to ask for something else."""

    code = "correction_reused"

    def __init__(self, correction_id: str) -> None:
        super().__init__(f"correction {correction_id} exists with other contents")
        self.correction_id = correction_id


class UnknownCorrection(CorrectionRefused):
    """Nobody asked for a correction with this id."""

    code = "unknown_correction"

    def __init__(self, correction_id: str) -> None:
        super().__init__(f"there is no correction {correction_id}")
        self.correction_id = correction_id


class UnknownUser(CorrectionRefused):
    """No account and no wallet belongs to these customers."""

    code = "unknown_user"

    def __init__(self, users: Sequence[str]) -> None:
        super().__init__(f"no account and no wallet belongs to {', '.join(users)}")
        self.users = tuple(users)


class ReasonMissing(CorrectionRefused):
    """Nobody can approve what has no reason."""

    code = "reason_missing"

    def __init__(self, length_max: int) -> None:
        super().__init__(f"say why, in at most {length_max} characters")
        self.length_max = length_max


class ActorMissing(CorrectionRefused):
    """Nobody said who acts."""

    code = "actor_missing"

    def __init__(self) -> None:
        super().__init__("say who you are")


class MoneyHeld(CorrectionRefused):
    """It would take what open holds still hold: whoever captures one of them would find nothing."""

    code = "money_held"

    def __init__(self, account: str, held: int, left: int) -> None:
        super().__init__(f"{account} would have {left}, and open holds need {held}")
        self.account, self.held, self.left = account, held, left


class NothingLeft(CorrectionRefused):
    """More than is left of what it is about, less what others asked for."""

    code = "nothing_left"

    def __init__(self, reference: str, left: int, wanted: int) -> None:
        super().__init__(f"of {reference} {left} is left to correct, and {wanted} is asked for")
        self.reference, self.left, self.wanted = reference, left, wanted


class OtherCommand(CorrectionRefused):
    """It ends something as well; that is not done by posting its legs."""

    code = "other_command"

    def __init__(self, correction_id: str, kind: str) -> None:
        super().__init__(
            f"{correction_id} is a {kind}: `stablerail withdrawals approve`; any other: `ledger correct approve`"
        )
        self.correction_id, self.kind = correction_id, kind


class BadLegs(CorrectionRefused):
    """Too few legs to move anything, or too many for a person to look through."""

    code = "bad_legs"

    def __init__(self, count: int, count_max: int) -> None:
        super().__init__(f"a correction has 2 to {count_max} legs, not {count}")
        self.count, self.count_max = count, count_max
