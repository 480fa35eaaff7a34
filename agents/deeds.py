"""What is particular to one acting stage: how wishes become calls, how one is performed, and what its end means."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Generic, TypeVar

from agents.intents import Again, Conclusion, Ended, Member, StoredCall
from agents.outcome import Done, Rejected
from connectors.errors import Refused
from ledger.rows import Connection

F = TypeVar("F")


class Deeds(Generic[F]):
    """Pure but for `perform` and `load`. As it stands: every member a call of its own, and no rows but the calls'."""

    def group(self, members: Sequence[Member]) -> list[Sequence[Member]]:
        """Which of the waiting members go into one call each, in their order."""
        return [[member] for member in members]

    def request(self, members: Sequence[Member]) -> dict[str, Any]:
        """What is asked for these."""
        (member,) = members
        return member.request

    async def perform(self, call: StoredCall) -> dict[str, Any]:
        """Asks the partner. Raises connectors.errors; a reply is JSON-able."""
        raise NotImplementedError

    async def load(self, connection: Connection, ended: Sequence[Ended], at: datetime) -> F:
        """The state rows that the calls' members change, locked. A call that begins has an empty answer."""
        raise NotImplementedError

    def fold(self, facts: F, done: Done) -> None:
        """Makes what one call changes visible to the next of the same commit."""

    def began(self, call: StoredCall, facts: F) -> Done:
        """The call was made of its members."""
        return Done()

    def put_off(self, call: StoredCall, again: Again, due: datetime, facts: F) -> Done:
        """An attempt failed; the next is at `due`."""
        return Done()

    def conclude(self, call: StoredCall, reply: dict[str, Any] | Refused, facts: F) -> Conclusion | Again:
        """What the partner's answer means for each member. An exception says that it cannot be read: an attempt."""
        raise NotImplementedError

    def give_up(self, call: StoredCall, code: str, facts: F) -> Conclusion:
        """The attempts are used up. What the partner did is not known: only the same call may be made again."""
        refused = Rejected(code, f"no answer at {call.attempts} attempts")
        return Conclusion(letters=tuple((member, refused) for member in call.members), failed=True)

    def committed(self, done: Done) -> None:
        """For figures: this is in the database now."""

    def performing(self, calls: int, members: int) -> None:
        """For figures: so many are with the partner now."""

    def stopped(self) -> None:
        """For figures: this process takes no more calls."""
