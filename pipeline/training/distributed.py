"""Connect the processes of a run, describe the machine, and save on a signal before they end."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from importlib.metadata import version
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch.distributed.fsdp import MixedPrecisionPolicy

from pipeline.device import bf16_is_faster, pick_device

_TIMEOUT = timedelta(hours=2)  # while one process verifies a large cache, or saves
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# the variables in which torchrun and accelerate, Open MPI, MPICH and srun report how many processes they started
_COUNT_VARIABLES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")

_DISTRIBUTED_TYPES = ("NO", "MULTI_GPU", "MULTI_CPU", "FSDP")  # supported ones of accelerate


def connect(precision: str) -> Accelerator:
    """Connect the processes that were started together; `precision` auto is bf16 if `bf16_is_faster`, else fp32.

    ValueError if a launcher started processes that are not connected, or if this device cannot compute in `precision`.
    """
    device = pick_device()
    if precision == "auto":
        precision = "bf16" if bf16_is_faster(device) else "fp32"
    # large buckets, because a compiled backward pass is split at each of them
    parallel = DistributedDataParallelKwargs(gradient_as_bucket_view=True, bucket_cap_mb=100)
    timeout = InitProcessGroupKwargs(timeout=_TIMEOUT)
    mixed = "no" if precision == "fp32" else precision
    accelerator = Accelerator(mixed_precision=mixed, kwargs_handlers=[parallel, timeout])
    for name in _COUNT_VARIABLES:
        if int(os.environ.get(name) or 1) > accelerator.num_processes:
            raise ValueError(
                f"{name} = {os.environ[name]}, but {accelerator.num_processes} process(es) are connected: start them"
                " with torchrun or accelerate launch and, without a GPU, with ACCELERATE_USE_CPU=true"
            )
    kind = accelerator.distributed_type.value
    if kind not in _DISTRIBUTED_TYPES:
        raise ValueError(f"accelerate's config file: distributed_type {kind}: use {', '.join(_DISTRIBUTED_TYPES)}")
    if kind == "FSDP":
        _check_fsdp(accelerator.state.fsdp_plugin)
    elif os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise ValueError("accelerate's config file: FSDP shards weights across GPUs, but no GPU was found")
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("train.precision = fp16: a CPU would compute in float32 anyway: use fp32 or bf16")
    return accelerator


def computer(accelerator: Accelerator) -> dict[str, str | int]:
    """Return everything about the machine and the versions that the exact bits of a run may depend on."""
    return {
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "device": _device_name(accelerator),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "precision": _precision(accelerator),
        "torch": torch.__version__,
        "numpy": np.__version__,
        **{name: version(name) for name in ("diffusers", "accelerate")},
    }


def describe(accelerator: Accelerator) -> str:
    """Describe processes, device and precision in words."""
    count = accelerator.num_processes
    return f"{count} process{'es' if count > 1 else ''} ({_device_name(accelerator)}, {_precision(accelerator)})"


def _device_name(accelerator: Accelerator) -> str:
    device = accelerator.device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _precision(accelerator: Accelerator) -> str:
    kind = accelerator.mixed_precision
    return "fp32" if kind == "no" else kind


def _check_fsdp(plugin: Any) -> None:
    if plugin.fsdp_version != 2:
        raise ValueError("fsdp_version: 1 in accelerate's config file: use 2, as in configs/accelerate/fsdp.yaml")
    # the default policy casts the inputs and outputs of every block: leave that to autocast, as without FSDP
    plugin.mixed_precision_policy = MixedPrecisionPolicy()


class Preemption:
    """Turns SIGINT (Ctrl-C), SIGTERM and SIGUSR1, within its block, into a request to all processes to save and exit.

    After a SIGINT, a second one, or a SIGTERM (which torchrun sends instead), ends the process at once."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._received, self._main = 0, accelerator.is_main_process
        # over the network, not the devices, so that agreeing on a signal does not wait for a device
        self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT) if accelerator.num_processes > 1 else None

    def __enter__(self) -> Preemption:
        self._before: dict[int, Any] = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed_signal(self) -> int:
        """Return the number of the signal that any process has received, the same in all processes; 0 if none has."""
        if self._group is None:
            return self._received
        number = torch.tensor(self._received)
        dist.all_reduce(number, dist.ReduceOp.MAX, self._group)
        return int(number)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received == signal.SIGINT and number in (signal.SIGINT, signal.SIGTERM):
            self._print("stopped at once: nothing was saved since the last checkpoint")
            os._exit(128 + signal.SIGINT)  # not an exception: the running code might catch it, or wait first
        self._received = number
        if number == signal.SIGINT:
            self._print("finishing this step and saving; press Ctrl-C again to stop at once")

    def _print(self, text: str) -> None:
        """Write to stderr, not through Python's buffers: the signal may have interrupted a write to them."""
        if self._main:
            with contextlib.suppress(OSError):  # stderr is closed
                os.write(2, f"train: SIGINT: {text}\n".encode())


def in_background(work: Callable[[], None]) -> Future[None]:
    """Run `work` in a daemon thread, which cannot keep the process alive as an executor's would; return its future."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
        except BaseException as error:  # of any kind: it is raised where the future's result is requested
            future.set_exception(error)
        else:
            future.set_result(None)

    threading.Thread(target=run, daemon=True).start()
    return future
