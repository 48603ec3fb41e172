"""Reads that fail: of a disk with bad blocks, of a file that may not be read, of a server that went away, of a process
that has no handle left. The file is named in one line, nothing is lost, and the same command goes on."""

from __future__ import annotations

import builtins
import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import data.storage
from tests.helpers.world import World, run_stage, succeed, tree

ERRORS = (errno.EIO, errno.EACCES, errno.ESTALE, errno.EMFILE)
STAGES = {  # and what of the run is taken away, so that there is something to do
    "encode": (),
    "train": ("checkpoints/000000048", "previews/000000048.png"),
    "sample": ("samples",),
    "decode": ("samples/{name}/grid.png",),
    "verify": (),
}


class Reads:
    """`open` as `data.storage` has it, of which the n-th that is for reading fails."""

    def __init__(self, n: int) -> None:
        self.n, self.count, self.failed = n, 0, ""

    def __call__(self, file: Any, mode: str = "r", **options: Any) -> Any:
        if "r" in mode and not str(file).endswith("/config.yaml"):
            self.count += 1
            number = ERRORS[self.n % len(ERRORS)]
            stale = number == errno.ESTALE and str(file) == self.failed  # again, or it would be read at once
            if self.count == self.n or stale:
                self.failed = str(file)
                raise OSError(number, os.strerror(number), str(file))
        return builtins.open(file, mode, **options)


def kept(root: Path) -> dict[str, bytes]:
    """What was finished: shards, checkpoints, pictures; not the marker, logs and locks of a run that begins."""
    begun = (".jsonl", "curves.png", "run/config.yaml")
    return {name: content for name, content in tree(root).items() if not name.endswith(begun)}


@pytest.mark.parametrize("stage", STAGES)
def test_a_read_that_fails_is_named_and_costs_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    cache, run = tmp_path / "cache", tmp_path / "run"
    shutil.copytree(world.cache, cache)
    shutil.copytree(world.run, run)
    for name in STAGES[stage]:
        path = run / name.format(name=world.samples.name)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    before, setting = kept(tmp_path), f"cache.path={cache}"
    for n in range(1, 1000):
        with monkeypatch.context() as patch:
            reads = Reads(n)
            patch.setattr(data.storage, "open", reads, raising=False)
            result = run_stage(stage, world.config, run, setting)
        if not reads.failed:
            break
        said = result.output.replace("\r", "\n")
        assert result.exit_code, said
        assert reads.failed in said
        assert "Traceback" not in said
        after = kept(tmp_path)
        assert {name: after.get(name) for name in before} == before, f"{reads.failed} could not be read"
    assert n > 3
    assert result.exit_code == 0, result.output


def test_a_file_that_was_replaced_on_a_network_disk_is_looked_up_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"content")
    errors = [errno.ESTALE, None, errno.ESTALE, errno.ESTALE]

    def stale(file: Any, mode: str = "r", **options: Any) -> Any:
        if number := errors.pop(0):
            raise OSError(number, os.strerror(number), str(file))
        return builtins.open(file, mode, **options)

    monkeypatch.setattr(data.storage, "open", stale, raising=False)
    assert data.storage.read(tmp_path / "file") == b"content"
    with pytest.raises(OSError, match="Stale file handle"):
        data.storage.read(tmp_path / "file")


def test_verify_goes_on_after_a_file_that_cannot_be_read_and_repair_writes_it_anew(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(world.cache, cache)
    shard, labels = (next(cache.rglob(name)) for name in ("moments/c/0/0/0/0/0", "label/c/0"))
    labels.write_bytes(labels.read_bytes()[::-1])

    def fail(file: Any, mode: str = "r", **options: Any) -> Any:
        if str(file) == str(shard) and mode == "rb":
            raise OSError(errno.EIO, "Input/output error", str(file))
        return builtins.open(file, mode, **options)

    more = ("--cache", str(cache))
    with monkeypatch.context() as patch:
        patch.setattr(data.storage, "open", fail, raising=False)
        said = run_stage("verify", world.config, tmp_path / "run", more=more).output
        assert f"{shard}: cannot be read: Input/output error" in said
        assert f"{labels}: damaged" in said
        assert "2 of" in said
    succeed("verify", world.config, tmp_path / "run", f"cache.path={cache}", more=("--repair",))
    assert tree(cache) == tree(world.cache)
