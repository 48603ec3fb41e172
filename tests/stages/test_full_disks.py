"""Disks that are really full, by their size and by a limit on files: one line with a name, nothing lost, and the same
command goes on once there is room."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import Result

from tests.helpers.world import World, log_of, run_stage, tree

STAGES = ("encode", "train", "sample", "decode", "evaluate")
STEPS = (0, 3, 10, 40, 100)  # pages of 4096 bytes that are free
EVALUATE = ("evaluate.images=4", "evaluate.network=effnet_lite0")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory that holds what it is told to."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system may be mounted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def leave_free(disk: Path, pages: int) -> None:
    """A size that leaves so much room; a tmpfs without a size would have no limit."""
    state = os.statvfs(disk)
    used = (state.f_blocks - state.f_bfree) * state.f_frsize
    size = max(used + pages * 4096, 4096)
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def run_on(disk: Path, stage: str, world: World) -> Result:
    """A stage whose cache and run are on `disk`; sample leaves the images to decode."""
    overrides = (f"cache.path={disk / 'cache'}", *(EVALUATE if stage == "evaluate" else ()))
    more = ("--latents",) if stage == "sample" else ()
    return run_stage(stage, world.config, disk / "run", *overrides, more=more)


def test_a_disk_that_is_full_ends_each_stage_in_one_line_and_it_goes_on_when_there_is_room(
    world: World, small_disk: Path
) -> None:
    run = small_disk / "run"
    for stage in STAGES:
        failed = 0
        for pages in STEPS:
            leave_free(small_disk, pages)
            result = run_on(small_disk, stage, world)
            if result.exit_code == 0:
                break
            failed += 1
            last = result.stderr.strip().splitlines()[-1]
            assert last.startswith("error: "), last
            assert str(small_disk) in last, last
            assert "No space left" in last or "are free" in last, last
        assert failed, stage
        leave_free(small_disk, 10_000)
        result = run_on(small_disk, stage, world)
        assert result.exit_code == 0, result.output
    assert tree(small_disk / "cache") == tree(world.cache)
    assert tree(run / "checkpoints") == tree(world.run / "checkpoints")
    assert log_of(run) == log_of(world.run)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A block in which no file may grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_limit_on_the_size_of_files_is_told_with_the_file(world: World, tmp_path: Path) -> None:
    for stage, size in (("encode", 1000), ("train", 10_000), ("sample", 700), ("decode", 100)):
        before = tree(tmp_path)
        with largest_file(size):
            result = run_on(tmp_path, stage, world)
        assert result.exit_code == 1, (stage, result.output)
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith("error: OSError: "), last
        assert os.strerror(errno.EFBIG) in last
        assert str(tmp_path) in last
        after = tree(tmp_path)
        assert {name: after[name] for name in before} == before
        assert run_on(tmp_path, stage, world).exit_code == 0
