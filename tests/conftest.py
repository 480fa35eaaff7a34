"""Fixtures every test may ask for, and which tests share a process.

The suite runs in a few processes (`make test`), each with a broker, a database server and a chain of its own. A file's
tests stay together; so do all that share the product of the `story` fixture.
"""

from __future__ import annotations

import pytest

from tests.support.parts import anvil, database, kafka, postgres, scratch, tools, topic_prefix, usdc

__all__ = ["anvil", "database", "kafka", "postgres", "scratch", "tools", "topic_prefix", "usdc"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        shared = "story" if "story" in getattr(item, "fixturenames", ()) else item.location[0]
        item.add_marker(pytest.mark.xdist_group(shared))
