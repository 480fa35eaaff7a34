"""Fixtures every test may ask for, and the coverage floor."""

from __future__ import annotations

from tests.support.coverage_floor import pytest_sessionfinish, pytest_terminal_summary
from tests.support.parts import anvil, database, kafka, postgres, scratch, tools, topic_prefix, usdc

__all__ = [
    "anvil",
    "database",
    "kafka",
    "postgres",
    "pytest_sessionfinish",
    "pytest_terminal_summary",
    "scratch",
    "tools",
    "topic_prefix",
    "usdc",
]
