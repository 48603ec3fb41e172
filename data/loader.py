"""Batches of cached moments in an order that is a function of (seed, epoch) alone.

Training reads one endless stream of positions: epoch after epoch, each a permutation of all images. Step s takes the
positions from s * batch_size on, so a last partial batch is filled from the next epoch and no image is left out.
Processes share a batch in equal, adjacent parts: the stream is the same for every number of them.
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

# images that a streamed epoch shuffles together, at most; of two such windows all processes hold their shares
WINDOW_ROWS, WINDOW_BYTES = 65_536, 2**30
Item = TypeVar("Item")
_SLICE_BYTES = 2**26  # copied at a time: all that is held twice


@dataclass(frozen=True)
class LatentBatch:
    """One process's part of a batch."""

    indices: NDArray[np.int64]  # B, into the cache
    moments: Tensor  # B V 2C h w, in the cache's type
    labels: Tensor  # B int64; below 0 where an image has no class


@functools.lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The permutation of `count` images in which epoch number `epoch` reads them."""
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)
    order.setflags(write=False)  # the cached array itself is handed out
    return order


@functools.lru_cache(maxsize=2)
def streamed_order(count: int, seed: int, epoch: int, shard_rows: int, window_rows: int) -> NDArray[np.int64]:
    """A permutation of `count` images that reads whole shards: shards in random order are laid end to end, and what
    they hold is shuffled within windows of `window_rows` images.
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

    `access` is where batches come from: `resident` on the device, in `memory`, `mapped` from disk, or `streamed` from
    disk window by window, in an order of its own; a window is never longer than an epoch. `auto` takes the first of
    them for which there is room beside the `reserved` bytes that training takes on a GPU, and with `streamed` one that
    has the order of a run that was streamed, or was not. `sharing` processes of this machine have its memory in common.
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
        # of the cache alone: the order must not depend on the memory of a machine
        self.window_rows = min(len(cache), WINDOW_ROWS, max(WINDOW_BYTES // row_bytes, 1))
        self._slice_rows = max(_SLICE_BYTES // row_bytes, 1)
        self.access = _choose(self.size, device, sharing, reserved, streamed) if access == "auto" else access
        held = {"resident": device, "memory": torch.device("cpu")}.get(self.access)
        self._moments = None if held is None else self._load(held)
        self._batches = _Ahead(self._read)
        self._windows = _Ahead(self._read_window)
        self._window_steps = max(self.window_rows // batch_size, 1)

    def describe(self) -> str:
        """How latents are read, for people."""
        size = f"{human_bytes(self.size)} of latents"
        return {
            "resident": f"{size} held on {self.device}",
            "memory": f"{size} held in memory",
            "mapped": f"{size} read from disk, memory-mapped",
            "streamed": f"{size} streamed from disk, shuffled by shard and within {self.window_rows:,} images",
        }[self.access]

    def batch(self, step: int) -> LatentBatch:
        """This process's part of batch number `step`."""
        if self.access == "resident":
            return self._read(step)
        return self._batches.get(step)

    def indices(self, step: int) -> NDArray[np.int64]:
        """The images of this process's part of batch number `step`."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)[self.part]
        epochs, places = np.divmod(positions, len(self.cache))
        return np.concatenate([self.order(int(e))[places[epochs == e]] for e in np.unique(epochs)])

    def order(self, epoch: int) -> NDArray[np.int64]:
        """All images in the order of epoch number `epoch`."""
        if self.access == "streamed":
            shard_rows = self.cache.manifest.shard_rows
            return streamed_order(len(self.cache), self.seed, epoch, shard_rows, self.window_rows)
        return epoch_order(len(self.cache), self.seed, epoch)

    def _read(self, step: int) -> LatentBatch:
        indices = self.indices(step)
        places = _sent(indices, self.device)
        if self._moments is not None and self._moments.device.type != "cpu":
            moments = self._moments[places]
        elif self._moments is not None:  # numpy's gather is the quicker one
            moments = _sent(self._moments.numpy().take(indices, axis=0), self.device)
        elif self.access == "streamed":
            window, place = divmod(step, self._window_steps)
            rows = slice(place * len(indices), (place + 1) * len(indices))
            # a copy, or a batch that is still in use would keep a window from being freed
            moments = _sent(self._windows.get(window)[rows].copy(), self.device)
        else:
            moments = _sent(self.cache.read(indices), self.device)
        return LatentBatch(indices, moments, self.labels[places])

    def _read_window(self, number: int) -> NDArray[np.floating]:
        """This process's moments of the next steps, in their order; read from disk in the order in which they lie."""
        first = number * self._window_steps
        indices = np.concatenate([self.indices(step) for step in range(first, first + self._window_steps)])
        lying = np.argsort(indices)
        moments = np.empty((len(indices), *self.cache.manifest.row_shape), self.cache.manifest.dtype)
        for start in range(0, len(indices), self._slice_rows):
            part = lying[start : start + self._slice_rows]
            moments[part] = self.cache.load(indices[part])
        return moments

    def _load(self, device: torch.device) -> Tensor:
        """All moments on a device, copied slice by slice."""
        manifest = self.cache.manifest
        shape = (len(self.cache), *manifest.row_shape)
        moments = torch.empty(shape, dtype=getattr(torch, manifest.dtype), device=device)
        for start in range(0, shape[0], self._slice_rows):
            rows = np.arange(start, min(start + self._slice_rows, shape[0]))
            moments[rows[0] : rows[-1] + 1] = torch.from_numpy(self.cache.load(rows))
        return moments


class _Ahead(Generic[Item]):
    """The items number n, n + 1, ... of a function; the next one is made in a thread while the last one is used."""

    def __init__(self, make: Callable[[int], Item]) -> None:
        self._make, self._thread = make, ThreadPoolExecutor(1)
        self._items: dict[int, Future[Item]] = {}

    def get(self, number: int) -> Item:
        """Item `number`, and a start of the one after it; others are let go first."""
        wanted = (number, number + 1)
        self._items = {n: item for n, item in self._items.items() if n in wanted}
        for n in wanted:
            if n not in self._items:
                self._items[n] = self._thread.submit(self._make, n)
        return self._items[number].result()


def _sent(array: NDArray, device: torch.device) -> Tensor:
    """A copy on the device. A GPU fetches it from pinned memory when it comes to that, and nobody waits for it."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    with torch.cuda.device(device):  # a thread begins on the first one, and would take memory of it
        return tensor.pin_memory().to(device, non_blocking=True)


def _choose(size: int, device: torch.device, sharing: int, reserved: int, streamed: bool | None) -> str:
    """The first way of reading `size` bytes for which there is room: half of what is free, and on a GPU what is left of
    it beside the `reserved` bytes. Processes that share a machine map the files, which it then holds once for all."""
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
