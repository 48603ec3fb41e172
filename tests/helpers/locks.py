"""Another process that holds a lock, and nothing else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.helpers.imports import ROOT

HOLD = """
import sys
from pathlib import Path
from data.locks import claim

with claim(Path(sys.argv[1]), "job 1/2"):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_process_holding(lock: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds `lock`, for job 1/2, until its input ends."""
    command, pipe = [sys.executable, "-c", HOLD, str(lock)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
