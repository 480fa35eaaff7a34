"""The journal topic's messages as records: parts put together, and which rebuilds it tells of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from ledger.errors import JournalBroken, NoRecord
from ledger.folding import rows_of
from ledger.rebuild import GAP, Restore
from ledger.rebuild_batch import Journaled
from ledger.record import proof_of, unpack
from ledger.tables import RESTORES

JUMP: Final = GAP // 2
"""More than a journal's numbers leave out at once, and less than a rebuild does, also when late records came just before."""


class Assembly:
    """Messages in, whole records out, in the order in which each was first whole."""

    def __init__(self) -> None:
        self._parts: dict[int, dict[int, bytes]] = {}
        self._whole: set[int] = set()
        """Of the records in parts."""
        self._seq_last = 0
        self._ends: list[int] = []
        """The highest number before each rebuild."""

    def take(
        self, offset: int, key: bytes | None, value: bytes | None, headers: Iterable[tuple[str, bytes]]
    ) -> Journaled | None:
        """The record that is whole with this message. Raises NoRecord, and JournalBroken."""
        if key is None or len(key) != 8 or value is None:
            raise NoRecord(f"offset {offset} is not a record of ours")
        seq, told = int.from_bytes(key, "big"), dict(headers)
        try:
            number, count = int(told.get("part", b"0")), int(told.get("parts", b"1"))
            open = int(told["open"]) if "open" in told else None
        except (TypeError, ValueError):  # no number, or a header without a value
            raise NoRecord(f"record {seq} at offset {offset}: its headers are not ours") from None
        if count > 1:
            parts = self._parts.setdefault(seq, {})
            if parts.setdefault(number, value) != value:
                raise JournalBroken(
                    f"record {seq} at offset {offset}: part {number} is there twice, with other contents"
                )
            if len(parts) < count:
                return None
            del self._parts[seq]
            self._whole.add(seq)
            try:
                value = b"".join(parts[place] for place in range(count))
            except KeyError:
                raise JournalBroken(f"record {seq} at offset {offset}: its parts do not belong together") from None
        if seq > self._seq_last + 2 * GAP and not _is_record(value):
            raise NoRecord(f"offset {offset}: a number that no record of ours has, and no record")
        if self._seq_last and seq >= self._seq_last + JUMP:
            self._ends.append(self._seq_last)
        self._seq_last = max(self._seq_last, seq)
        return Journaled(seq, value, offset, open)

    def check_end(self) -> None:
        """Raises JournalBroken when a record lacks a part and higher ones follow: a relay that dies within a record leaves it to
        the next, which sends it again before them. At the journal's end it is a commit that never got there, and so it is at the end
        of a database that was lost, before the numbers of the one that was rebuilt."""
        for seq in sorted(self._parts.keys() - self._whole):
            if seq < self._seq_last and not any(end < seq < end + JUMP for end in self._ends):
                raise JournalBroken(f"record {seq} lacks a part")


def _is_record(packed: bytes) -> bool:
    """Also of a newer program."""
    try:
        proof_of(packed)
    except JournalBroken:
        return False
    return True


class RestoreScan:
    """Finds the rebuilds that the journal tells of: the first record after each gap in the numbers."""

    def __init__(self) -> None:
        self.found: list[Restore] = []
        self._seq_last = 0

    def take(self, one: Journaled) -> None:
        if one.seq >= self._seq_last + JUMP:
            for block in unpack(one.packed).blocks:
                if block.table is RESTORES:
                    names = block.table.written(block.op)
                    for row in (dict(zip(names, values, strict=True)) for values in rows_of(block)):
                        self.found.append(Restore(row["first_seq"], row["records"]))
        self._seq_last = max(self._seq_last, one.seq)
