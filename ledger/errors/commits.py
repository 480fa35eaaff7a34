"""What stops a commit, or a reader of the journal."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from ledger.errors.base import LedgerError


class Fenced(LedgerError):
    """Another worker owns the partition: an owner row is not at our epoch."""

    code = "fenced"

    def __init__(self, stage: str, lost: tuple[tuple[str, int], ...]) -> None:
        super().__init__(f"{stage} does not own {', '.join(f'{topic}[{partition}]' for topic, partition in lost)}")
        self.stage, self.lost = stage, lost


class RoleRefused(LedgerError):
    """The application's database role is missing, or our login may not act as it; the text says the remedy."""

    code = "role_refused"


class RecordTooLarge(LedgerError):
    """The commit record is over what the journal takes even in parts; the batch must be split."""

    code = "record_too_large"


class JournalBroken(LedgerError):
    """A journal record is edited, missing, incomplete or of an unknown version."""

    code = "journal_broken"


class NoRecord(JournalBroken):
    """A message of the journal that is no record of ours. Where one is missing, the chains of the others say so."""

    code = "no_record"


class ACopy(LedgerError):
    """The database was rebuilt as a copy: nothing of it goes to the journal, so nobody is told anything and nothing is done."""

    code = "a_copy"

    def __init__(self) -> None:
        super().__init__(
            "this database is a copy, and nothing is done in it; if the deployment's own is lost, stop workers, API and bridge and"
            " run: stablerail rebuild --take-over; if it is not, STABLERAIL_DATABASE_URL names the wrong one"
        )


class DatabaseBehind(LedgerError):
    """The journal has a record that the database has not: an old backup, or another deployment's. Nothing may be done with it."""

    code = "database_behind"

    def __init__(self, seq: int, at: datetime) -> None:
        super().__init__(
            f"the journal has record {seq}, of {at:%Y-%m-%d %H:%M:%S} UTC, and this database has not: it is an old backup, one that"
            " another has replaced, or another deployment's; if STABLERAIL_DATABASE_URL names the right one, stop workers, API and"
            " bridge and run: stablerail rebuild --take-over"
        )


class HistoriesDiffer(LedgerError):
    """A database has another commit at a place than the journal has; neither can be made the other."""

    code = "histories_differ"


class DatabaseAhead(LedgerError):
    """A database has commits that are not in the journal yet; the text says who takes them there."""

    code = "database_ahead"

    def __init__(self, seqs: Sequence[int], *, is_copy: bool) -> None:
        which = f"{len(seqs)} commits (records {seqs[0]} to {seqs[-1]})"
        super().__init__(
            f"this copy has {which} of its own that are not in the journal; to go on with it and with them run: stablerail rebuild"
            " --take-over --publish; to be rid of them rebuild an empty database"
            if is_copy
            else f"the database has {which} that are not in the journal yet; if it was never lost, or has taken over already, start"
            " its workers: they journal them; if it is a backup, run: stablerail rebuild --take-over --publish"
        )
        self.is_copy = is_copy


class DatabaseBusy(LedgerError):
    """Somebody works in the database that is to be rebuilt."""

    code = "database_busy"


class SchemaOutdated(LedgerError):
    """The database's schema is not the program's; the text says the remedy."""

    code = "schema_outdated"
