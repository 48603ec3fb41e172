"""Loads batches of cached moments in an order that depends on (seed, epoch) alone.

Training reads one endless stream of positions: epoch after epoch, each a permutation of all images. Step s takes
batch_size positions from s * batch_size, so the next epoch fills a last partial batch and no image is left out.
Processes split a batch into equal, adjacent parts, so the stream is the same for any number of processes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.cache.reader import LatentCache
from data.memory import host_memory
from data.text import human_bytes

# largest shuffle window of a streamed epoch; each process holds its share of two windows
WINDOW_ROWS, WINDOW_BYTES = 65_536, 2**30
Item = TypeVar("Item")
_SLICE_BYTES = 2**26  # copied at a time, which bounds the extra memory


@dataclass(frozen=True)
class LatentBatch:
    """Holds one process's part of a batch."""

    indices: NDArray[np.int64]  # B, into the cache
    moments: Tensor  # B V 2C h w, in the cache's dtype
    labels: Tensor  # B int64; negative if an image has no class


@functools.lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the permutation of `count` images for epoch number `epoch`."""
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)
    order.setflags(write=False)  # lru_cache returns the same array to every caller
    return order


@functools.lru_cache(maxsize=2)
def streamed_order(count: int, seed: int, epoch: int, shard_rows: int, window_rows: int) -> NDArray[np.int64]:
    """Return a permutation of `count` images that reads whole shards: it concatenates the shards in random order and
    shuffles within windows of `window_rows` images.
    """
    random = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    shards = random.permutation(-(-count // shard_rows))
    order = (shards[:, None] * shard_rows + np.arange(shard_rows)).ravel()
    order = order[order < count]
    for start in range(0, count, window_rows):
        order[start : start + window_rows] = random.permutation(order[start : start + window_rows])
    order.setflags(write=False)
    return order


class LatentLoader:
    """Reads batch number `step` of a cache for process `rank` of `world_size`.

    `access` says where batches come from: `resident` on the device, in host `memory`, memory-`mapped` from disk, or
    `streamed` from disk window by window, in a different order; a window is never longer than an epoch. `auto` takes
    the first of them that fits beside the `reserved` bytes that training needs on a GPU. To resume a run, `streamed`
    says whether the run was streamed, and `auto` keeps its order. `sharing` processes share the memory of this machine.
    """

    def __init__(
        self,
        cache: LatentCache,
        *,
        seed: int,
        batch_size: int,
        rank: int,
        world_size: int,
        device: torch.device,
        access: str = "auto",
        streamed: bool | None = None,
        sharing: int = 1,
        reserved: int = 0,
    ) -> None:
        assert batch_size % world_size == 0
        self.cache, self.seed, self.batch_size, self.device = cache, seed, batch_size, device
        self.part = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self.labels = torch.from_numpy(cache.labels).to(device)
        row_bytes = cache.manifest.row_bytes
        self.size = len(cache) * row_bytes
        # from the cache alone: the order must not depend on the memory of a machine
        self.window_rows = min(len(cache), WINDOW_ROWS, max(WINDOW_BYTES // row_bytes, 1))
        self._slice_rows = max(_SLICE_BYTES // row_bytes, 1)
        self.access = _choose_access(self.size, device, sharing, reserved, streamed) if access == "auto" else access
        held = {"resident": device, "memory": torch.device("cpu")}.get(self.access)
        self._moments = None if held is None else self._load(held)
        self._batches = _Prefetcher(self._read)
        self._windows = _Prefetcher(self._read_window)
        self._window_steps = max(self.window_rows // batch_size, 1)

    def describe(self) -> str:
        """Describe in words how latents are read."""
        size = f"{human_bytes(self.size)} of latents"
        return {
            "resident": f"{size} held on {self.device}",
            "memory": f"{size} held in memory",
            "mapped": f"{size} read from disk, memory-mapped",
            "streamed": f"{size} streamed from disk, shuffled by shard and within {self.window_rows:,} images",
        }[self.access]

    def batch(self, step: int) -> LatentBatch:
        """Return this process's part of batch number `step`."""
        if self.access == "resident":
            return self._read(step)
        return self._batches.get(step)

    def indices(self, step: int) -> NDArray[np.int64]:
        """Return the indices of the images in this process's part of batch number `step`."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)[self.part]
        epochs, places = np.divmod(positions, len(self.cache))
        return np.concatenate([self.order(int(e))[places[epochs == e]] for e in np.unique(epochs)])

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Return all images in the order of epoch number `epoch`."""
        if self.access == "streamed":
            shard_rows = self.cache.manifest.shard_rows
            return streamed_order(len(self.cache), self.seed, epoch, shard_rows, self.window_rows)
        return epoch_order(len(self.cache), self.seed, epoch)

    def _read(self, step: int) -> LatentBatch:
        indices = self.indices(step)
        places = _to_device(indices, self.device)
        if self._moments is not None and self._moments.device.type != "cpu":
            moments = self._moments[places]
        elif self._moments is not None:  # numpy gathers faster than torch
            moments = _to_device(self._moments.numpy().take(indices, axis=0), self.device)
        elif self.access == "streamed":
            window, place = divmod(step, self._window_steps)
            rows = slice(place * len(indices), (place + 1) * len(indices))
            # copied: a view that is still in use would keep the whole window in memory
            moments = _to_device(self._windows.get(window)[rows].copy(), self.device)
        else:
            moments = _to_device(self.cache.read(indices), self.device)
        return LatentBatch(indices, moments, self.labels[places])

    def _read_window(self, number: int) -> NDArray[np.floating]:
        """Read this process's moments for the steps of a window, in step order; the disk is read sequentially."""
        first = number * self._window_steps
        indices = np.concatenate([self.indices(step) for step in range(first, first + self._window_steps)])
        disk_order = np.argsort(indices)
        moments = np.empty((len(indices), *self.cache.manifest.row_shape), self.cache.manifest.dtype)
        for start in range(0, len(indices), self._slice_rows):
            part = disk_order[start : start + self._slice_rows]
            moments[part] = self.cache.load(indices[part])
        return moments

    def _load(self, device: torch.device) -> Tensor:
        """Load all moments to a device, copied slice by slice."""
        manifest = self.cache.manifest
        shape = (len(self.cache), *manifest.row_shape)
        moments = torch.empty(shape, dtype=getattr(torch, manifest.dtype), device=device)
        for start in range(0, shape[0], self._slice_rows):
            rows = np.arange(start, min(start + self._slice_rows, shape[0]))
            moments[rows[0] : rows[-1] + 1] = torch.from_numpy(self.cache.load(rows))
        return moments


class _Prefetcher(Generic[Item]):
    """Computes items n, n + 1, ... of a function; a thread computes the next one while the current one is used."""

    def __init__(self, make: Callable[[int], Item]) -> None:
        self._make, self._thread = make, ThreadPoolExecutor(1)
        self._items: dict[int, Future[Item]] = {}

    def get(self, number: int) -> Item:
        """Return item `number` and start computing the next one; other items are dropped first."""
        wanted = (number, number + 1)
        self._items = {n: item for n, item in self._items.items() if n in wanted}
        for n in wanted:
            if n not in self._items:
                self._items[n] = self._thread.submit(self._make, n)
        return self._items[number].result()


def _to_device(array: NDArray, device: torch.device) -> Tensor:
    """Copy an array to the device; to a GPU asynchronously, from pinned memory."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    with torch.cuda.device(device):  # a new thread starts on GPU 0 and would allocate memory there
        return tensor.pin_memory().to(device, non_blocking=True)


def _choose_access(size: int, device: torch.device, sharing: int, reserved: int, streamed: bool | None) -> str:
    """Return the first way of reading for which `size` bytes fit: into half of the free memory and, on a GPU, beside
    the `reserved` bytes. Processes that share a machine map the files, so that it holds them once for all."""
    if streamed:
        return "streamed"
    host = host_memory()
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        if size <= min(free / 2, 0.9 * free - reserved):
            return "resident"
        here = "memory"
    else:
        here = "resident"
    if size <= host.available / 2:
        return here if sharing == 1 else "mapped"
    # pages of a larger cache would not stay in memory
    return "mapped" if size <= host.total or streamed is False else "streamed"
