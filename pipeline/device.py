"""Choose the device, its number types, and the number of worker processes."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

_MAX_PROCESSES = 32
_DRIVER = Path("/proc/driver/nvidia/version")
_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")  # a container's CPU limit: microseconds of CPU time, and of the period
Result = TypeVar("Result")


def process_count(requested: int | str) -> int:
    """Return the number of worker processes: `requested` or, for auto, one per core available to this process."""
    if requested != "auto":
        return int(requested)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if _CPU_LIMIT.is_file() and (quota := _CPU_LIMIT.read_text(encoding="ascii").split())[0] != "max":
        cores = min(cores, math.ceil(int(quota[0]) / int(quota[1])))
    return max(1, min(cores // local_processes(), _MAX_PROCESSES))


def local_processes() -> int:
    """Return how many processes torchrun started on this machine (LOCAL_WORLD_SIZE)."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def bf16_is_faster(device: torch.device) -> bool:
    """Return whether bf16 is faster than float32 on `device`."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    has = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    # an Intel core has two units for float32 and one for AVX512-BF16, so bf16 pays for its casts only with AMX
    intel = str(has.get("cpu_name", "")).startswith("Intel")
    return bool(has.get("amx_bf16") or (has.get("avx512_bf16") and not intel))


def sampling_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the autocast type of the model during sampling; None for float32."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and bf16_is_faster(device) else "fp32"
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def halving(call: Callable[[Any], Result], items: Any, batch_size: int, stage: str) -> Iterator[Result]:
    """Yield `call(batch)` for successive slices of `items`, such as a range or an array, of `batch_size` items each.

    When a GPU has too little memory for a batch, its size is halved for the rest, with a printed line that begins with
    `stage`. torch.OutOfMemoryError if a single item does not fit.
    """
    start = 0
    while start < len(items):
        batch = items[start : start + batch_size]
        try:
            result = call(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            batch_size = len(batch) // 2
            print(f"{stage}: out of memory with batches of {len(batch)}: going on with {batch_size}", flush=True)
            continue  # outside of this clause, no traceback refers to the tensors of the failed call
        start += len(batch)
        yield result


def in_threads(call: Callable[[Any], Result], batches: Iterable[Any], workers: int) -> Iterator[Result]:
    """Yield `call(batch)` of each batch, in order; `workers` batches are computed at once, each on one core.

    On a CPU this is faster than threads that share a batch, because these wait for each other at every layer; and the
    bits of a result do not depend on the number of cores.
    """
    threads, pending = torch.get_num_threads(), deque[Future[Result]]()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for batch in batches:
                pending.append(pool.submit(call, batch))
                if len(pending) > workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
    finally:
        torch.set_num_threads(threads)  # the setting is partly global to the process


def pick_device() -> torch.device:
    """Return this process's GPU (CUDA or Apple's MPS), or the CPU; ACCELERATE_USE_CPU=true forces the CPU.

    On an NVIDIA GPU this turns on TensorFloat-32 for float32 matrix products, as it is by default for convolutions.
    ValueError if there is an NVIDIA GPU that this build of torch cannot use: on the CPU everything would take days.
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
            else "is a build without CUDA"
        )
        raise ValueError(
            f"this machine has an NVIDIA driver, but torch {torch.__version__} sees no GPU; it {build}: install another"
            " build, such as `rm -r .venv; make setup TORCH=cu126`, or set ACCELERATE_USE_CPU=true to use the CPU"
        )
    return torch.device("cpu")
