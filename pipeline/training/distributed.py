"""How processes start and end: connected to each other, alone on their run, with a save when they are told to go."""

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

from pipeline.device import gains_from_bf16, pick_device

_PATIENCE = timedelta(hours=2)  # for one process that compares the hashes of a large cache, or saves
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# how many copies the launchers torchrun and accelerate, Open MPI and MPICH, and srun say that they started
_COPIES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")

_KINDS = ("NO", "MULTI_GPU", "MULTI_CPU", "FSDP")  # of accelerate's ways to use processes


def connect(precision: str) -> Accelerator:
    """Join the processes that were started together; `precision` auto is bf16 where `gains_from_bf16`. ValueError when
    they are copies that know nothing of each other, or when this device cannot compute in `precision`."""
    device = pick_device()
    if precision == "auto":
        precision = "bf16" if gains_from_bf16(device) else "fp32"
    torch.backends.cudnn.benchmark = True  # all steps of a training have the same shapes
    # a bucket is where a compiled backward pass is cut
    parallel = DistributedDataParallelKwargs(gradient_as_bucket_view=True, bucket_cap_mb=100)
    patient = InitProcessGroupKwargs(timeout=_PATIENCE)
    mixed = "no" if precision == "fp32" else precision
    accelerator = Accelerator(mixed_precision=mixed, kwargs_handlers=[parallel, patient])
    for name in _COPIES:
        if int(os.environ.get(name) or 1) > accelerator.num_processes:
            raise ValueError(
                f"{name} = {os.environ[name]}, but {accelerator.num_processes} process(es) are connected: start them"
                " with torchrun or accelerate launch and, without a GPU, with ACCELERATE_USE_CPU=true"
            )
    kind = accelerator.distributed_type.value
    if kind not in _KINDS:
        raise ValueError(f"accelerate's config file: distributed_type {kind}: use {', '.join(_KINDS)}")
    if kind == "FSDP":
        _check_fsdp(accelerator.state.fsdp_plugin)
    elif os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise ValueError("accelerate's config file: FSDP deals weights out among GPUs, and there is none")
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("train.precision = fp16: a CPU computes it in float32 all the same: use fp32 or bf16")
    return accelerator


def computer(accelerator: Accelerator) -> dict[str, str | int]:
    """What the bits of a run may depend on."""
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
    """Processes, device and precision, in words."""
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
    # by itself it would cast what goes into and out of every block: autocast decides, as it does without FSDP
    plugin.mixed_precision_policy = MixedPrecisionPolicy()


class Preemption:
    """Within its block, SIGINT (Ctrl-C), SIGTERM and SIGUSR1 no longer end the process but ask for a save, of all
    processes alike. After a SIGINT, another one or a SIGTERM (as torchrun passes the second one on) ends it at once."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._received, self._main = 0, accelerator.is_main_process
        # over the network and not the devices: to agree, none of them has to be waited for
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE) if accelerator.num_processes > 1 else None

    def __enter__(self) -> Preemption:
        self._before: dict[int, Any] = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self) -> int:
        """The number of the signal that some process has received, the same in all of them; 0 if there was none."""
        if self._group is None:
            return self._received
        number = torch.tensor(self._received)
        dist.all_reduce(number, dist.ReduceOp.MAX, self._group)
        return int(number)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received == signal.SIGINT and number in (signal.SIGINT, signal.SIGTERM):
            self._say("left at once: nothing was saved since the last checkpoint")
            os._exit(128 + signal.SIGINT)  # no exception, which whatever runs now might catch or wait for
        self._received = number
        if number == signal.SIGINT:
            self._say("this step is finished and saved; once more leaves at once")

    def _say(self, text: str) -> None:
        """On stderr, past Python's buffers, in which a signal may have interrupted somebody."""
        if self._main:
            with contextlib.suppress(OSError):  # nobody listens any more
                os.write(2, f"train: SIGINT: {text}\n".encode())


def in_background(work: Callable[[], None]) -> Future[None]:
    """The outcome of `work`, done in a thread that does not keep the process from ending, as an executor's would."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
        except BaseException as error:  # of whatever kind: whoever waits for the future is to have it
            future.set_exception(error)
        else:
            future.set_result(None)

    threading.Thread(target=run, daemon=True).start()
    return future
