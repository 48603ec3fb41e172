"""Batches of cached moments in an order that is a function of (seed, epoch) alone.

Training reads one endless stream of positions: epoch after epoch, each a permutation of all images. Step s takes the
positions from s * batch_size on, so a last partial batch is filled from the next epoch and no image is left out.
Processes share a batch in equal, adjacent parts: the stream is the same for every number of them.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.cache import LatentCache

_SLICE = 4096  # rows copied at a time: all that is held twice


@dataclass(frozen=True)
class LatentBatch:
    """One process's part of a batch."""

    indices: NDArray[np.int64]  # B, into the cache
    moments: Tensor  # B V 2C h w, in the cache's type
    labels: Tensor  # B int64


@functools.lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The permutation of `count` images in which epoch number `epoch` reads them."""
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)
    order.setflags(write=False)  # the cached array itself is handed out
    return order


def batch_indices(count: int, *, seed: int, step: int, batch_size: int) -> NDArray[np.int64]:
    """The images of the whole batch number `step`, over all processes."""
    epochs, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), count)
    return np.concatenate([epoch_order(count, seed, int(e))[places[epochs == e]] for e in np.unique(epochs)])


class LatentLoader:
    """Reads batch number `step` of a cache for process `rank` of `world_size`.

    A cache that fits into half of the free memory of `device` is held there, and a batch is one gather; a larger one
    stays on disk, memory-mapped. `resident` says which.
    """

    def __init__(
        self, cache: LatentCache, *, seed: int, batch_size: int, rank: int, world_size: int, device: torch.device
    ) -> None:
        if batch_size % world_size:
            raise ValueError(f"train.batch_size = {batch_size} is no multiple of the {world_size} processes")
        self.cache, self.seed, self.batch_size, self.device = cache, seed, batch_size, device
        self.part = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self.labels = torch.from_numpy(cache.labels).to(device)
        self._moments = self._load(world_size)
        self.resident = self._moments is not None

    def batch(self, step: int) -> LatentBatch:
        """This process's part of batch number `step`."""
        indices = batch_indices(len(self.cache), seed=self.seed, step=step, batch_size=self.batch_size)[self.part]
        on_device = torch.from_numpy(indices).to(self.device)
        if self._moments is not None:
            moments = self._moments[on_device]
        else:
            moments = torch.from_numpy(self.cache.read(indices)).to(self.device)
        return LatentBatch(indices, moments, self.labels[on_device])

    def _load(self, world_size: int) -> Tensor | None:
        """All moments on the device, copied slice by slice; None when they take over half of its free memory."""
        manifest = self.cache.manifest
        shape = (len(self.cache), len(manifest.views), *manifest.shape)
        dtype = getattr(torch, manifest.dtype)
        sharing = 1 if self.device.type == "cuda" else world_size  # processes without a GPU of their own
        if math.prod(shape) * dtype.itemsize * sharing > _free_memory(self.device) / 2:
            return None
        moments = torch.empty(shape, dtype=dtype, device=self.device)
        for rows in np.array_split(np.arange(shape[0]), -(-shape[0] // _SLICE)):
            moments[rows[0] : rows[-1] + 1] = torch.from_numpy(self.cache.read(rows))
        return moments


def _free_memory(device: torch.device) -> int:
    """Bytes."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else int(psutil.virtual_memory().available)
