"""Fixtures every test may ask for."""

from __future__ import annotations

from tests.support.parts import anvil, database, kafka, postgres, scratch, tools, topic_prefix, usdc

__all__ = ["anvil", "database", "kafka", "postgres", "scratch", "tools", "topic_prefix", "usdc"]
