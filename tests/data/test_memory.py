"""How much memory a process may have, in control groups of either version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest

import data.memory
from data.memory import Memory, host_memory

GB = 10**9
VERSION_2 = {"memory.max": 8 * GB, "memory.current": 6 * GB, "memory.stat": f"anon 1\ninactive_file {2 * GB}\n"}
VERSION_1 = {
    "memory.limit_in_bytes": 8 * GB,
    "memory.usage_in_bytes": 6 * GB,
    "memory.stat": f"inactive_file 1\ntotal_inactive_file {2 * GB}\n",
}
CASES: dict[str, tuple[str, dict[str, dict[str, Any]], Memory]] = {
    "none": ("0::/\n", {}, Memory(64 * GB, 32 * GB)),
    "a container": ("0::/\n", {"": VERSION_2}, Memory(8 * GB, 4 * GB)),
    "a job": (
        "0::/job/step\n",
        {"job": VERSION_2, "job/step": VERSION_2 | {"memory.max": "max"}},
        Memory(8 * GB, 4 * GB),
    ),
    "the smallest counts": (
        "0::/job/step\n",
        {"job": VERSION_2, "job/step": VERSION_2 | {"memory.max": 7 * GB}},
        Memory(7 * GB, 3 * GB),
    ),
    "no limit": ("0::/\n", {"": VERSION_2 | {"memory.max": "max"}}, Memory(64 * GB, 32 * GB)),
    "a group of another root": ("0::/docker/0123\n", {"": VERSION_2}, Memory(8 * GB, 4 * GB)),
    "version 1": ("5:cpu,cpuacct:/\n3:memory:/job\n", {"memory/job": VERSION_1}, Memory(8 * GB, 4 * GB)),
    "version 1 without a limit": (
        "3:memory:/\n",
        {"memory": VERSION_1 | {"memory.limit_in_bytes": 2**63 - 4096}},
        Memory(64 * GB, 32 * GB),
    ),
    "more is used than allowed": ("0::/\n", {"": VERSION_2 | {"memory.current": 99 * GB}}, Memory(8 * GB, 0)),
}


@pytest.mark.parametrize("case", CASES)
def test_memory_is_what_the_smallest_control_group_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    mine, groups, expected = CASES[case]
    for folder, files in groups.items():
        for name, content in files.items():
            file = tmp_path / "cgroup" / folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{content}\n", encoding="ascii")
    (tmp_path / "mine").write_text(mine, encoding="ascii")
    monkeypatch.setattr(data.memory, "_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(data.memory, "_MINE", tmp_path / "mine")
    machine = psutil.virtual_memory()._replace(total=64 * GB, available=32 * GB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    assert host_memory() == expected


def test_a_system_without_control_groups_has_the_memory_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data.memory, "_MINE", tmp_path / "none")
    machine = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    assert host_memory() == (machine.total, machine.available)
