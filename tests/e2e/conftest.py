"""Fixtures of the end-to-end tests."""

from __future__ import annotations

from tests.support.story import story

__all__ = ["story"]
