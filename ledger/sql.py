"""SQL lives in files; each statement starts with `-- name: xyz`."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from types import SimpleNamespace

_NAME = re.compile(r"^-- name: (\w+)\s*$", re.MULTILINE)


@cache
def load(package: str, file: str) -> SimpleNamespace:
    """The statements of `file` in `package` as attributes. FileNotFoundError when there is no such file."""
    parts = _NAME.split(files(package).joinpath(file).read_text(encoding="utf-8"))
    return SimpleNamespace(**{name: text.strip() for name, text in zip(parts[1::2], parts[2::2], strict=True)})
