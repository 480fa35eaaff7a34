"""python -m tests.chaos.apart OFFSET_S …: `stablerail …` in a process whose clock is so many seconds ahead (or behind)."""

from __future__ import annotations

import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from stablerail import wiring


def main() -> None:
    """Every decision of a worker takes its time from its services: theirs is the clock to move."""
    offset = timedelta(seconds=float(sys.argv.pop(1)))
    honest = wiring.services

    def services(*arguments: Any, **named: Any) -> Any:
        return replace(honest(*arguments, **named), clock=lambda: datetime.now(UTC) + offset)

    wiring.services = services

    from stablerail.cli import app as run  # after the change: the worker takes the function by its name

    run()


if __name__ == "__main__":
    main()
