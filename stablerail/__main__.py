"""`stablerail`: the command line. Ctrl-C ends it without a word while it is still being imported, too."""

from __future__ import annotations

import os
import signal
from typing import Final

EXIT_INTERRUPTED: Final = 130
"""As the commands end, and of a program that SIGINT ended."""


def main() -> None:
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # else it is ignored, as of what a shell runs in the background
        signal.signal(signal.SIGINT, lambda *_: os._exit(EXIT_INTERRUPTED))
    from stablerail.cli import app

    try:
        signal.signal(signal.SIGINT, handler)
        app()
    except KeyboardInterrupt:  # before the command begins: Typer makes all of them first
        raise SystemExit(EXIT_INTERRUPTED) from None


if __name__ == "__main__":
    main()
