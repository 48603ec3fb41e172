"""Locates rows in shard files: both formats store rows in blocks of one size, so that a cache is one array."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.cache.manifest import Plan


@dataclass(frozen=True)
class Layout:
    """Describes a shard: blocks of `lead` bytes, `rows` rows and `trail` bytes, then what its format appends."""

    rows: int
    lead: int
    trail: int

    def block_bytes(self, plan: Plan) -> int:
        return self.lead + self.rows * plan.row_bytes + self.trail

    def size(self, plan: Plan, places: int) -> int:
        """Return the size in bytes of the blocks that hold that many rows."""
        return -(-places // self.rows) * self.block_bytes(plan)

    def map(self, files: Sequence[Path], plan: Plan) -> NDArray[np.floating]:
        """Memory-map the shard files as one read-only array `shard block row V 2C h w`.

        A shard with fewer rows ends before its part of the array does, and nothing is mapped after its end: check the
        sizes of the files first, and never read past the last row.
        """
        blocks = -(-min(plan.shard_rows, plan.rows) // self.rows)
        page = mmap.ALLOCATIONGRANULARITY
        stride = -(-blocks * self.block_bytes(plan) // page) * page
        return self._view(map_side_by_side(files, stride), plan, (len(files), blocks), (stride, self.block_bytes(plan)))

    def view(self, shard: bytes, plan: Plan, places: int) -> NDArray[np.floating]:
        """View the bytes of a shard with that many rows as an array `block row V 2C h w`."""
        return self._view(shard, plan, (-(-places // self.rows),), (self.block_bytes(plan),))

    def _view(
        self, buffer: bytes | NDArray[np.uint8], plan: Plan, counts: tuple[int, ...], strides: tuple[int, ...]
    ) -> NDArray[np.floating]:
        dtype = np.dtype(plan.dtype).newbyteorder("<")
        row = np.empty(plan.row_shape, dtype).strides
        shape, steps = (*counts, self.rows, *plan.row_shape), (*strides, plan.row_bytes, *row)
        return np.ndarray(shape, dtype, buffer, offset=self.lead, strides=steps)


def map_side_by_side(files: Sequence[Path], stride: int) -> NDArray[np.uint8]:
    """Map files into memory `stride` bytes apart, read-only: in one address range, so that numpy can gather from all
    of them in one call. Bytes of a file beyond `stride` are not mapped.
    """
    reserved = mmap.mmap(-1, stride * len(files), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=0)
    whole = np.frombuffer(reserved, np.uint8)  # keeps `reserved` and all mappings inside it alive
    libc = ctypes.CDLL(None, use_errno=True)
    libc.signal(signal.SIGBUS, _ON_SIGBUS)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64)
    fixed = 0x10  # MAP_FIXED on Linux and macOS: the pages reserved above are replaced
    for number, file in enumerate(files):
        with open(file, "rb") as handle:
            size = min(handle.seek(0, 2), stride)
            start = whole.ctypes.data + number * stride
            if size and libc.mmap(start, size, mmap.PROT_READ, mmap.MAP_SHARED | fixed, handle.fileno(), 0) != start:
                code = ctypes.get_errno()
                raise OSError(code, "cannot be mapped into memory", str(file))
            _mapped[file] = size
    return whole


_mapped: dict[Path, int] = {}  # files that this process has mapped, and how many bytes of each


def _exit_on_sigbus(number: int) -> None:
    """Print which mapped file was truncated and exit: reading the lost bytes has nothing to return."""
    shorter = [file for file, size in _mapped.items() if not file.is_file() or file.stat().st_size < size]
    what = f"{shorter[0]}: shorter than when it was opened" if shorter else "a mapped file: a page cannot be read"
    way = "`latentmill verify` names damaged files; saved work is kept: run the same command again to resume"
    os.write(2, f"\nerror: {what} (SIGBUS: a program changed it, or its disk fails or is gone): {way}\n".encode())
    os._exit(128 + number)


# not signal.signal: its Python handler would run only after the read returns, which it never does
_ON_SIGBUS = ctypes.CFUNCTYPE(None, ctypes.c_int)(_exit_on_sigbus)
