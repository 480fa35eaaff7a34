"""What the documents name exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from stablerail.cli import app
from stablerail.config import PREFIX, Settings

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def test_every_test_that_the_readme_calls_a_proof_exists() -> None:
    text = (ROOT / "README.md").read_text()
    path = Path()
    named = re.findall(r"`(tests/[\w/]+\.py|…)::(test_\w+)`", text)
    assert len(named) > 15
    for file, name in named:
        path = path if file == "…" else ROOT / file
        assert re.search(rf"^(async )?def {name}\(", path.read_text(), re.MULTILINE), f"{path}::{name}"


def headings(document: Path) -> set[str]:
    """As links name them."""
    titles = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@each_document
def test_every_link_file_and_setting_exists(document: Path) -> None:
    text = document.read_text()
    for link, heading in re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", text):
        target = document.parent / link if link else document
        assert target.exists(), link
        assert not heading or heading in headings(target), f"{link}#{heading}"
    for path in re.findall(
        r"`((?:agents|topics|ledger|chain|connectors|stablerail|tests|docs|deploy)/[\w./*]+)`", text
    ):
        assert list(ROOT.glob(path)), path
    for name in re.findall(rf"{PREFIX}([A-Z_]*[A-Z])\b", text):
        assert name.lower() in Settings.model_fields or name.startswith(("DEV_", "TEST_")), name


@each_document
def test_every_command_exists_with_its_options(document: Path) -> None:
    for text in re.findall(
        r"(?:`|^\s*(?:\$ )?(?:\S+=\S+ )*)stablerail ([a-z][^`\n#]+)", document.read_text(), re.MULTILINE
    ):
        command: Any = typer.main.get_command(app)
        words = [word for word in shlex.split(text) if word != "…"]
        while words and hasattr(command, "commands") and not words[0].startswith("--"):
            named = re.split(r"\\?\|", words.pop(0))  # one, or several: balance|statement
            assert set(named) <= command.commands.keys(), f"stablerail {text}"
            command = command.commands[named[0]]
        options = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
        used = {word.split("=")[0] for word in words if word.startswith("--")}
        assert used <= options, f"stablerail {text}"
