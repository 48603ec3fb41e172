"""Measures memory: of this machine or, in a container or cluster job, what its control group (cgroup) allows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

_GROUPS, _MINE = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_FILES = {  # by cgroup version: limit, usage, and the part of the usage that the kernel can reclaim
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


class Memory(NamedTuple):
    """Holds bytes: the total for this process and others beside it, and what is available of it."""

    total: int
    available: int


def host_memory() -> Memory:
    """Return the memory of the machine, or of the smallest control group that this process is in."""
    machine = psutil.virtual_memory()
    limits = [Memory(machine.total, machine.available), *_groups()]
    return Memory(min(each.total for each in limits), max(min(each.available for each in limits), 0))


def _groups() -> Iterator[Memory]:
    if not _MINE.is_file():  # not Linux
        return
    for line in _MINE.read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, files = (_GROUPS / "memory", _FILES[1]) if controllers else (_GROUPS, _FILES[2])
        folder = root / path.lstrip("/")
        for place in (folder, *folder.parents):
            if place.is_relative_to(root) and (found := _group(place, *files)):
                yield found


def _group(folder: Path, limit: str, used: str, reclaimable: str) -> Memory | None:
    """Return a group's memory; None without a limit or folder: a container sees its own group at the root."""
    try:
        total, current = ((folder / name).read_text(encoding="ascii").strip() for name in (limit, used))
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    if total == "max":
        return None
    free = sum(int(line.split()[1]) for line in lines if line.startswith(f"{reclaimable} "))
    return Memory(int(total), int(total) - int(current) + free)
