"""Files that are there whole or not at all, and what a disk says when it can't."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from discovery.errors import Refused

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
TEMPORARY = ".tmp"


def refused(why: OSError, what: str) -> Refused:
    """The refusal that an error of the disk comes to: `disk_full`, or `disk` for anything else."""
    if why.errno in FULL:
        return Refused("disk_full", f"{what}: {why.strerror}; it goes on when there is room")
    return Refused("disk", f"{what}: {why.strerror or why}; look at the disk")


def free_bytes(place: Path) -> int:
    """What the disk below a folder has left for this user."""
    return shutil.disk_usage(place).free


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file at one stroke: after a power cut it is the old one or the new one. OSError leaves the old."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes what was renamed in a folder outlive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
