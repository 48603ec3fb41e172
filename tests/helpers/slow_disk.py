"""`python -m stages` in which each file of a checkpoint takes half a second to write."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from pipeline.training import checkpoint
from stages.cli import main

WRITE = checkpoint.write_staged


def slow(file: Path, parts: Iterable[bytes | bytearray | memoryview]) -> str:
    time.sleep(0.5)
    return WRITE(file, parts)


checkpoint.write_staged = slow
main()
