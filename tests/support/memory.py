"""Where the tests' temporary files are: in memory, where there is plenty.

A broker that makes a topic syncs several files for each of its partitions, and a product has a hundred of them: on a disk that is most
of the time that a test takes to start. Tests kill processes, never the machine, so what a file system in memory keeps is enough.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

MEMORY = Path("/dev/shm")
ROOM_BYTES_MIN = 10 * 1024**3
"""A whole run was seen to take 1.4 GB; the rest is for what else the machine does."""


def keep_files_in_memory() -> None:
    """Of this process and of those that it starts, unless TMPDIR says where or there is little room."""
    if "TMPDIR" not in os.environ and _room() >= ROOM_BYTES_MIN:
        os.environ["TMPDIR"] = str(MEMORY)
        tempfile.tempdir = None


def _room() -> int:
    try:
        free = shutil.disk_usage(MEMORY).free
        available = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return min(free, int(available[1]) * 1024) if available else 0
