"""The running product that the tests of this folder share; the processes of a run keep them together."""

from __future__ import annotations

from tests.support.story import story

__all__ = ["story"]
