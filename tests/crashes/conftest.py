"""Tests that die a thousand times do so quickly."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from data.cache.formats import FORMATS
from data.cache.manifest import Plan
from tests.helpers.disks import (
    Encode,
    remembering,
)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory, where the system has such a folder: a test makes ten thousand files."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same shards are made a thousand times here: each is encoded once, and nothing is flushed to the disk."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    for module in FORMATS.values():
        for name in ("encode_shard", "other_files"):
            monkeypatch.setattr(module, name, remembering(getattr(module, name)))


@pytest.fixture
def small(plan: Plan) -> Plan:
    """Shards of 16 and 4 rows."""
    return plan.changed(rows=20, shard_rows=16)


@pytest.fixture
def first(small: Plan) -> Encode:
    return Encode(small, {17: "unreadable", 18: "unreadable"})
