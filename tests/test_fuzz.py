"""Some hundreds of damaged and hostile files of each kind: `python -m benchmarks.fuzz` tries thousands."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.fuzz import OK, fuzz, kinds


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited as Linux does it")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_damaged_and_hostile_files_are_refused_or_read_within_limits(tmp_path: Path) -> None:
    for kind in kinds(tmp_path):
        outcomes, faults = fuzz(kind, 100, seed=7)
        assert not faults, (kind.name, faults)
        assert sum(outcomes[name] for name in OK) == 100
        assert outcomes["refused"] > 10
