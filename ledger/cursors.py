"""Cursors as callers see them: opaque, so that what is in them may change."""

from __future__ import annotations

import base64


def opaque(place: bytes) -> str:
    """The text of a cursor, safe in an URL."""
    return base64.urlsafe_b64encode(place).decode().rstrip("=")


def opened(cursor: str) -> bytes:
    """What `opaque` was given. Raises ValueError for what it did not make."""
    return base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
