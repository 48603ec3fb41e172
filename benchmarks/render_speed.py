"""How fast are solids drawn?

python -m benchmarks.render_speed
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ProcessPoolExecutor

from data.sources.solids import render

SIZE, BATCH, BATCHES = 64, 64, 24


def _render(start: int) -> int:
    return len(render(range(start, start + BATCH), seed=0, size=SIZE))


def main() -> None:
    """Images/s at 64x64 on one process and on one for every core, in one run."""
    for processes in sorted({1, os.cpu_count() or 1}):
        with ProcessPoolExecutor(processes) as pool:
            list(pool.map(_render, range(processes)))  # the processes have started when the clock does
            started = time.monotonic()
            count = sum(pool.map(_render, range(0, BATCH * BATCHES, BATCH)))
            seconds = time.monotonic() - started
        print(f"{processes} processes: {count / seconds:.0f} images/s at {SIZE}x{SIZE}")


if __name__ == "__main__":
    main()
