"""How much memory of its machine a process may use: what the machine has, within the limits of control groups."""

import os
from collections.abc import Iterator
from pathlib import Path

_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")
_MACHINE = Path("/proc/meminfo")
_FILES = {"": ("memory.max", "memory.current"), "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes")}
"""Name of the tree of groups, of version 2 and 1 -> the files of a group's limit and use."""


def memory_limit() -> int | None:
    """Returns the bytes that this process and its page cache may take together; None where that is not known."""
    found = [limit for limit, _ in _groups()]
    if {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= getattr(os, "sysconf_names", {}).keys():  # not on Windows
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found) if found else None


def free_memory() -> int | None:
    """Returns the bytes that are left: of the machine, or of what the groups of this process may have, if less.

    Pages of files that were not used of late are given back at need, and count as left.
    """
    found = [limit - used for limit, used in _groups()]
    try:
        lines = dict(line.split(":", 1) for line in _MACHINE.read_text("ascii").splitlines())
        found.append(1024 * int(lines["MemAvailable"].split()[0]))
    except (OSError, LookupError, ValueError):
        pass  # no Linux
    return min(found) if found else None


def _groups() -> Iterator[tuple[int, int]]:
    """Yields limit and lasting use, in bytes, of each control group that this process is in and that has a limit."""
    for tree, (limit, used) in _FILES.items():
        root = _GROUPS / tree
        own = root / _path_in(tree)
        for group in dict.fromkeys((own, *own.parents, root)):  # in a container the path may be one of its host
            if group == root or root in group.parents:
                try:
                    taken = int((group / used).read_text("ascii"))
                    yield int((group / limit).read_text("ascii")), taken - _reclaimable(group)
                except (OSError, ValueError):
                    continue  # no such group, or no limit


def _reclaimable(group: Path) -> int:
    """Returns the bytes of files that a group's use counts and that can be given back; 0 where that is not known."""
    try:
        facts = dict(line.split() for line in (group / "memory.stat").read_text("ascii").splitlines())
    except (OSError, ValueError):
        return 0
    return int(facts.get("total_inactive_file", facts.get("inactive_file", 0)))


def _path_in(tree: str) -> str:
    """Returns the path of this process's group in a tree; that of the root where it is not known."""
    try:
        lines = [line.split(":", 2) for line in _OWN_GROUPS.read_text("utf-8").splitlines()]
        return next(path.lstrip("/") for _, names, path in lines if tree in names.split(","))
    except (OSError, StopIteration, ValueError):
        return ""
