"""Where every hash chain ended when the ledger was last verified: a small file, best kept where the database's owner
cannot write.

Later runs look only at what was committed since, and that what was there has not been rewritten: whoever forges the past
together with its hashes cannot forge the copy of the heads. What was changed under unchanged heads, only a run over all
data finds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson

OwnerKey = tuple[str, str, int]
"""stage, topic, partition"""
Heads = dict[OwnerKey, tuple[int, bytes]]
"""Owner -> position, head."""

_VERSION = 1


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The chains' ends in one snapshot. `batch`: the highest number that any row had."""

    batch: int
    heads: Heads

    def dump(self) -> bytes:
        owners = [[*key, position, head.hex()] for key, (position, head) in sorted(self.heads.items())]
        plain: dict[str, Any] = {"checkpoint": _VERSION, "batch": self.batch, "owners": owners}
        return orjson.dumps(plain, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)

    @classmethod
    def load(cls, text: bytes) -> Checkpoint:
        """Raises ValueError for what `dump` did not write."""
        try:
            plain = orjson.loads(text)
            if plain["checkpoint"] != _VERSION:
                raise ValueError
            heads = {
                (str(stage), str(topic), int(partition)): (int(position), bytes.fromhex(head))
                for stage, topic, partition, position, head in plain["owners"]
            }
            return cls(int(plain["batch"]), heads)
        except (ValueError, TypeError, KeyError):
            raise ValueError("not a checkpoint of `stablerail verify ledger --checkpoint`") from None


BEGINNING = Checkpoint(0, {})
"""Before anything was committed: verifying since then is verifying all data."""
