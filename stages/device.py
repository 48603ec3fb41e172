"""The device that a stage runs on."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

_MAX_PROCESSES = 32
_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")  # a container's share of the machine, in microseconds a period


def process_count(asked: int | str) -> int:
    """How many processes work beside this one: `asked` or, if that is auto, one for each core of this process."""
    if asked != "auto":
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if _CPU_LIMIT.is_file() and (quota := _CPU_LIMIT.read_text(encoding="ascii").split())[0] != "max":
        cores = min(cores, math.ceil(int(quota[0]) / int(quota[1])))
    return max(1, min(cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), _MAX_PROCESSES))


def pick_device() -> torch.device:
    """The GPU of this process, Apple's included, or the CPU; ACCELERATE_USE_CPU=true asks for that, as in training."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
