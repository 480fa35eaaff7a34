"""`make docs`: writes docs/, or names what it would break and ends with exit code 1."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Annotated

import typer

from stablerail.docs import documents, refusals

DOCS = Path(__file__).parents[2] / "docs"
REMEDY = """\
A reader of what was published would fail: give the event a new version (a new model; the old one stays until its topic's
retention has passed), put the path under /v2. What was never released may be deleted by hand and made anew."""


def main(directory: Annotated[Path, typer.Option(help="where the documents are")] = DOCS) -> None:
    """Make the documents that are made from the program."""
    made = asyncio.run(documents())
    if broken := refusals(directory, made):
        sys.exit("\n".join(["docs: nothing written; these promises would be broken:", *broken, REMEDY]))
    for name, text in made.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
