"""Why the embedded parts are not there.

DevError (code, remedy)
 ├── ToolsMissing   tools_missing   the machine lacks something that neither it nor a wheel has
 ├── FetchFailed    fetch_failed    a file could not be got, or is not the one in the lock file
 ├── PartFailed     part_failed     a part did not start, or ended by itself
 └── NotRunning     not_running     there is no `dev up` to stop
"""

from __future__ import annotations


class DevError(Exception):
    """What happened, and in `remedy` what the reader can do about it."""

    code = "dev_error"

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(f"{reason} ({remedy})" if remedy else reason)
        self.reason = reason
        self.remedy = remedy


class ToolsMissing(DevError):
    code = "tools_missing"


class FetchFailed(DevError):
    code = "fetch_failed"


class PartFailed(DevError):
    code = "part_failed"


class NotRunning(DevError):
    code = "not_running"
