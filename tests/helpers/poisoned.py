"""`python -m stages` in which the second process of two reads NaN for one image of step 6."""

from __future__ import annotations

from data.loader import LatentBatch, LatentLoader
from stages.cli import main

BATCH = LatentLoader.batch


def poisoned(self: LatentLoader, step: int) -> LatentBatch:
    batch = BATCH(self, step)
    if step == 5 and self.part.start:
        batch.moments[0] = float("nan")
    return batch


LatentLoader.batch = poisoned  # type: ignore[method-assign]
main()
