"""The reference under docs/, made from the program itself: `make docs` writes it, the tests compare it byte for byte.

| file | made from |
| --- | --- |
| configuration.md | stablerail/config.py |
| dead-letters.md | topics/codes.py |
| events/<type>.v<n>.json | topics/events.py, one JSON Schema for each version of an event |
| asyncapi.yaml | topics/catalog.py, and the stages and producers that stablerail/wiring.py runs |
| openapi.json | the API's routes |

What is committed there is what was promised: `refusals` names every field that would be lost or narrowed, and then
nothing is written. An event gets a new version instead, a path goes under /v2.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stablerail.docs.compatibility import broken_event, broken_paths

OPENAPI = "openapi.json"
EVENTS = "events"


async def documents() -> dict[str, str]:
    """Every generated file: its path under docs/ and its text. The same wherever and however it is called."""
    from stablerail.docs import asyncapi, codes, configuration, events, openapi

    return {
        "configuration.md": configuration.document(),
        "dead-letters.md": codes.document(),
        OPENAPI: _json(await openapi.document()),
        "asyncapi.yaml": await asyncapi.document(),
        **{f"{EVENTS}/{name}.json": _json(schema) for name, schema in events.schemas().items()},
    }


def refusals(docs: Path, made: Mapping[str, str]) -> list[str]:
    """What the files under `docs` promise and `made` would not keep, a line each."""
    found = []
    for file in sorted((docs / EVENTS).glob("*.json")):
        name = f"{EVENTS}/{file.name}"
        if name in made:
            found += broken_event(file.stem, json.loads(file.read_text()), json.loads(made[name]))
        else:
            found.append(f"{file.stem}: no event of this type and version is declared any more")
    if (docs / OPENAPI).exists():
        found += broken_paths(json.loads((docs / OPENAPI).read_text()), json.loads(made[OPENAPI]))
    return found


def _json(document: Any) -> str:
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
