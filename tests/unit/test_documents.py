"""What the documents name exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stablerail.config import PREFIX, Settings

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_every_test_that_the_readme_calls_a_proof_exists() -> None:
    text = (ROOT / "README.md").read_text()
    path = Path()
    named = re.findall(r"`(tests/[\w/]+\.py|…)::(test_\w+)`", text)
    assert len(named) > 15
    for file, name in named:
        path = path if file == "…" else ROOT / file
        assert re.search(rf"^(async )?def {name}\(", path.read_text(), re.MULTILINE), f"{path}::{name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_file_and_setting_exists(document: Path) -> None:
    text = document.read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (document.parent / link).exists(), link
    for path in re.findall(r"`((?:agents|topics|ledger|chain|connectors|stablerail|tests)/[\w/]+\.\w+)", text):
        assert (ROOT / path).exists(), path
    for name in re.findall(rf"{PREFIX}([A-Z_]*[A-Z])\b", text):
        assert name.lower() in Settings.model_fields or name.startswith(("DEV_", "TEST_")), name
