"""Two users of one group who share a data set, a cache and a run, each with a user id and a umask of their own."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.world import World, run_stage, tree

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]
GROUP, ANNA, BORIS = 7000, 7001, 7002


@pytest.fixture
def shared(world: World) -> Iterator[Path]:
    """A folder in which a group may write, and new folders are the group's."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in ("images", "vae", "config.yaml"):
            source = world.config.parent / part
            (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / part)
        for path in (folder, *folder.rglob("*")):
            os.chown(path, 0, GROUP)
            path.chmod(0o2775 if path.is_dir() else 0o664)
        yield folder


def as_user(uid: int, umask: int, stage: str, shared: Path, *overrides: str) -> tuple[int, str]:
    """Exit status and output of a stage that a user runs."""

    def work(answer: Any) -> None:
        os.setgroups([])
        os.setgid(GROUP)
        os.setuid(uid)
        os.umask(umask)
        own = [f"{key}={shared / name}" for key, name in (("data.source", "images"), ("vae.source", "vae"))]
        result = run_stage(
            stage, shared / "config.yaml", shared / "run", *own, f"cache.path={shared / 'cache'}", *overrides
        )
        answer.send((result.exit_code, result.output))

    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=work, args=(there,))
    process.start()
    assert here.poll(100)
    process.join()
    return here.recv()


def test_where_the_umask_lets_the_group_write_one_goes_on_where_the_other_stopped(world: World, shared: Path) -> None:
    for uid, stage, overrides in (
        (ANNA, "encode", ()),
        (BORIS, "encode", ()),
        (ANNA, "train", ("train.images=32",)),
        (BORIS, "train", ()),
        (ANNA, "sample", ()),
        (BORIS, "decode", ()),
        (ANNA, "train", ("train.images=64",)),
    ):
        status, output = as_user(uid, 0o002, stage, shared, *overrides)
        assert status == 0, (stage, output)
    assert {path.stat().st_gid for path in (shared / "run").rglob("*")} == {GROUP}


def test_where_it_does_not_the_other_may_look_and_is_refused_before_anything_changes(shared: Path) -> None:
    for stage, overrides in (("encode", ()), ("train", ("train.images=32",)), ("sample", ("sample.per_class=1",))):
        assert as_user(ANNA, 0o022, stage, shared, *overrides)[0] == 0
    before = tree(shared)
    refused = rf"error: --run: cannot write to {shared / 'run'}[^\n]*: Permission denied\n\Z"
    for stage, overrides in (("train", ()), ("sample", ())):
        status, output = as_user(BORIS, 0o022, stage, shared, *overrides)
        assert status == 2
        assert re.search(refused, output), output
    for stage, overrides in (("encode", ()), ("verify", ()), ("sample", ("sample.per_class=1",))):
        status, output = as_user(BORIS, 0o022, stage, shared, *overrides)
        assert status == 0, output
    assert tree(shared) == before
