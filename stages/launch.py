"""How processes start and end: connected to each other, alone on their run, with a save when they are told to go."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# how many copies the launchers torchrun and accelerate, Open MPI and MPICH, and srun say that they started
_COPIES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")


def connect(precision: str) -> Accelerator:
    """Join the processes that were started together. ValueError when they are copies that know nothing of each other,
    or when this device cannot compute in `precision`."""
    parallel = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=[parallel])
    for name in _COPIES:
        if int(os.environ.get(name, "1")) > accelerator.num_processes:
            raise ValueError(
                f"{name} = {os.environ[name]}, but {accelerator.num_processes} process(es) are connected: start them"
                " with torchrun or accelerate launch and, without a GPU, with ACCELERATE_USE_CPU=true"
            )
    plugin = accelerator.state.fsdp_plugin if accelerator.distributed_type == "FSDP" else None
    if plugin and plugin.fsdp_version != 2:
        raise ValueError("fsdp_version: 1 in accelerate's config file: use 2, as in configs/accelerate/fsdp.yaml")
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("train.precision = fp16: a CPU computes it in float32 all the same: use no or bf16")
    return accelerator


class Preemption:
    """Within its block, SIGTERM and SIGUSR1 no longer end the process but ask for a save, of all processes alike."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._received = 0
        # over the network and not the devices: to agree, none of them has to be waited for
        self._group = dist.new_group(backend="gloo") if accelerator.num_processes > 1 else None

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
        self._received = number
