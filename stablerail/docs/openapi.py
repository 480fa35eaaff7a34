"""docs/openapi.json: what the API serves as /openapi.json."""

from __future__ import annotations

from typing import Any

import asyncpg

from stablerail.api import create_api
from stablerail.docs.configuration import Defaults


async def document() -> dict[str, Any]:
    unopened = asyncpg.create_pool("postgresql://127.0.0.1/none")
    return create_api(Defaults(), unopened).openapi()
