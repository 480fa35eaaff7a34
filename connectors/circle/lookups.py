"""How often strangers may make us ask for a key that we do not know: so many a minute, and some more for ids that come again.

Whoever invents ids has no use for one twice; a vendor comes again with its own until we have answered. So a flood of invented ids
makes us ask little, and keeps no vendor's own out.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Final

REPEATS_PER_MIN: Final = 5
PUT_OFF_MAX: Final = 50_000  # 10 MB; a flood of a thousand a second forgets none for most of a minute


class Lookups:
    """`clock` in seconds."""

    def __init__(self, per_min: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._first_at: deque[float] = deque(maxlen=per_min)
        self._repeats_at: deque[float] = deque(maxlen=REPEATS_PER_MIN)
        self._put_off: OrderedDict[bytes, None] = OrderedDict()
        """Digests of ids, which may be long, that came when nothing was left to spend, latest last."""

    def spend(self, id: str) -> bool:
        """Whether this one may be asked for now; it is spent then."""
        now = self._clock()
        if _spent(self._first_at, now):
            return True
        digest = hashlib.blake2b(id.encode(), digest_size=16).digest()
        if digest in self._put_off and _spent(self._repeats_at, now):
            del self._put_off[digest]
            return True
        self._put_off[digest] = None
        if len(self._put_off) > PUT_OFF_MAX:
            self._put_off.popitem(last=False)
        return False


def _spent(at: deque[float], now: float) -> bool:
    """Whether one more within this minute was left, and is spent now."""
    if len(at) == at.maxlen and now - at[0] < 60.0:
        return False
    at.append(now)
    return True
