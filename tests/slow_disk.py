"""`python -m stages` in which each file of tensors takes half a second to write."""

from __future__ import annotations

import time
from pathlib import Path

from torch import Tensor

from pipeline import checkpoint
from stages.cli import main

SAVE_FILE = checkpoint.save_file


def slow(tensors: dict[str, Tensor], file: Path) -> None:
    time.sleep(0.5)
    SAVE_FILE(tensors, file)


checkpoint.save_file = slow
main()
