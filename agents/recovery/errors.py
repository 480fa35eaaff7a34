"""Why a dead letter stays as it is."""

from __future__ import annotations


class LetterRefused(Exception):
    """What was asked of a dead letter cannot be done; nothing was."""

    code = "letter_refused"

    def __init__(self, id: str, text: str) -> None:
        super().__init__(text)
        self.id = id


class UnknownLetter(LetterRefused):
    code = "unknown_letter"


class NotRedrivable(LetterRefused):
    """Its code says that the same event cannot be settled, or its event has no topic to go to."""

    code = "not_redrivable"


class LetterEnded(LetterRefused):
    """Discarded, or settled by its stage meanwhile."""

    code = "letter_ended"


class BadReason(LetterRefused):
    code = "bad_reason"
