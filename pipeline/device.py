"""The device that a stage runs on."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

_MAX_PROCESSES = 32
_DRIVER = Path("/proc/driver/nvidia/version")
_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")  # a container's share of the machine, in microseconds a period


def process_count(asked: int | str) -> int:
    """How many processes work beside this one: `asked` or, if that is auto, one for each core of this process."""
    if asked != "auto":
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if _CPU_LIMIT.is_file() and (quota := _CPU_LIMIT.read_text(encoding="ascii").split())[0] != "max":
        cores = min(cores, math.ceil(int(quota[0]) / int(quota[1])))
    return max(1, min(cores // local_processes(), _MAX_PROCESSES))


def local_processes() -> int:
    """How many processes were started together on this machine, as torchrun says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def gains_from_bf16(device: torch.device) -> bool:
    """Whether bf16 is quicker than float32 on `device`."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    # an Intel core multiplies float32 in two units and AVX512-BF16 in one, so that only AMX makes bf16 worth its casts
    intel = str(has.get("cpu_name", "")).startswith("Intel")
    return bool(has.get("amx_bf16") or (has.get("avx512_bf16") and not intel))


def sampling_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """What a model runs under autocast to when samples are drawn; None for float32."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and gains_from_bf16(device) else "fp32"
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def pick_device() -> torch.device:
    """The GPU of this process, Apple's included, or the CPU; ACCELERATE_USE_CPU=true asks for that, as in training.

    On a GPU, float32 is multiplied in TensorFloat-32 where it has that, as cuDNN's convolutions are by themselves.
    ValueError where there is an NVIDIA GPU that this build of torch cannot use: on the CPU all would take days.
    """
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return torch.device("cpu")
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    if _DRIVER.exists() and os.environ.get("CUDA_VISIBLE_DEVICES", "all") not in ("", "-1"):
        build = (
            f"is built for CUDA {torch.version.cuda}, for which the driver may be too old"
            if torch.version.cuda
            else ("is a build without CUDA")
        )
        raise ValueError(
            f"this machine has an NVIDIA driver, but torch {torch.__version__} sees no GPU; it {build}: install another"
            " one, as `rm -r .venv; make setup TORCH=cu126`, or set ACCELERATE_USE_CPU=true to use the CPU"
        )
    return torch.device("cpu")
