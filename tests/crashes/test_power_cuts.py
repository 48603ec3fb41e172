"""A machine that loses its power in any operation of the disk: what a command said was done is there.

The disk that is simulated keeps a file's bytes from the flush of the file on, and a name from the flush of its folder
on. Of the changes of names since then any may have reached it, in any order: a rename is two of them. So a crash leaves
one of many states, and before each operation those are tried in which none, one, all but one and all of the changes
that are pending have survived.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

import data.storage
from benchmarks.fuzz import run_state
from data.cache.reader import LatentCache
from pipeline.training.checkpoint import newest_checkpoint, prune_checkpoints, save_checkpoint, set_aside_newer
from tests.helpers.checkpoints import trained
from tests.helpers.disks import Encode, entries, use_disk

Tree = tuple[tuple[str, bytes | None], ...]  # every file with its bytes, every folder with None; sorted
Change = tuple[int, str]  # of the entry of a name in a folder


class Machine:
    """What is in a folder now and what of it is on the disk, by inode; `hear` is told of all operations beforehand."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: dict[int, bytes] = {}  # flushed
        self.folders: dict[int, dict[str, int]] = {}  # flushed
        self._now: dict[int, dict[str, int]] = {}
        self._handles: dict[int, int] = {}  # of everything that was ever seen: its inode is given to nobody else
        self.states: dict[Tree, int] = {}  # that a crash may have left, and how many promises had been made by then
        self.promises = 0
        self._look()
        for inode, handle in list(self._handles.items()):
            self._flush(inode, handle)

    def hear(self, name: str, argument: object, half: Callable[[], object]) -> None:
        """Called before each operation: the power may go now."""
        self.cut()
        if name == "fsync":
            assert isinstance(argument, int)
            self._flush(os.fstat(argument).st_ino, argument)

    def promise(self) -> None:
        """What was done so far is said to be done."""
        self.promises += 1
        self.cut()

    def cut(self) -> None:
        """Note what may be on the disk if the power goes now."""
        self._look()
        pending = self._pending()
        ones = [{change} for change in pending]
        for survivors in (set(), set(pending), *ones, *(set(pending) - one for one in ones)):
            found = dict(self._built(os.stat(self.root).st_ino, "", survivors))
            self.states[tuple(sorted(found.items()))] = self.promises  # the last one that may come to this

    def close(self) -> None:
        for handle in self._handles.values():
            os.close(handle)

    def _look(self) -> None:
        self._now = {}
        for folder, folders, files in os.walk(self.root):
            for name in (".", *folders, *files):
                path = os.path.join(folder, name)
                inode = os.lstat(path).st_ino
                if inode not in self._handles:
                    self._handles[inode] = os.open(path, os.O_RDONLY)
            self._now[os.stat(folder).st_ino] = _listing(folder)

    def _flush(self, inode: int, handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            self.folders[inode] = _listing(handle)
        else:
            self.files[inode] = os.pread(self._handles[inode], os.fstat(handle).st_size, 0)

    def _pending(self) -> list[Change]:
        """Entries of names that are not on the disk as they are now."""
        return [
            (inode, name)
            for inode in sorted(self._now.keys() | self.folders.keys())
            for name in sorted(self._now.get(inode, {}).keys() | self.folders.get(inode, {}).keys())
            if self._now.get(inode, {}).get(name) != self.folders.get(inode, {}).get(name)
        ]

    def _built(self, folder: int, path: str, survivors: set[Change]) -> Iterator[tuple[str, bytes | None]]:
        """What the disk holds of a folder, and below it."""
        for name in sorted(self._now.get(folder, {}).keys() | self.folders.get(folder, {}).keys()):
            entries_ = self._now if (folder, name) in survivors else self.folders
            inode = entries_.get(folder, {}).get(name)
            if inode is None:
                continue
            if stat.S_ISDIR(os.fstat(self._handles[inode]).st_mode):
                yield path + name, None
                yield from self._built(inode, f"{path}{name}/", survivors)
            else:
                yield path + name, self.files.get(inode, b"")


def _listing(folder: int | str) -> dict[str, int]:
    with os.scandir(folder) as found:
        return {entry.name: entry.inode() for entry in found}


def states_of(work: Callable[[Machine], object], root: Path, monkeypatch: pytest.MonkeyPatch) -> Mapping[Tree, int]:
    """All states that a power cut in `work` may leave of the folder `root`, and what had been promised by then."""
    machine = Machine(root)
    try:
        with monkeypatch.context() as patch:
            use_disk(patch, machine.hear)
            work(machine)
            machine.promise()
    finally:
        machine.close()
    return machine.states


def restore(state: Tree, root: Path) -> Path:
    """A folder with the contents of `state`, on a machine that has just been started."""
    root.mkdir()
    data.storage._flushed_folders.clear()
    for name, content in state:
        if content is None:
            (root / name).mkdir()
        else:
            (root / name).write_bytes(content)
    return root


class Outcome(NamedTuple):
    """How many states there were, and what went wrong in which."""

    tried: int
    bad: list[str]


def replay(states: Mapping[Tree, int], check: Callable[[Path, int], object], tmp_path: Path) -> Outcome:
    """`check` every state, given its folder and the promises that had been made."""
    bad = []
    for number, (state, promises) in enumerate(states.items()):
        try:
            check(restore(state, tmp_path / f"state {number}"), promises)
        except (AssertionError, OSError, ValueError) as error:
            bad.append(f"state {number}, {promises} promises: {error}")
    return Outcome(len(states), bad)


@pytest.mark.parametrize("change", [False, True], ids=["encode", "a change"])
def test_a_finished_cache_outlasts_a_power_cut_and_an_unfinished_one_can_be_finished(
    first: Encode,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: bool,
) -> None:
    """In folders that are new, or a change of what was there: each kind of change in one format."""
    command = {"zarr": "extend", "webdataset": "retry"}[first.plan.format] if change else "encode"
    where, disk, whole = Path("new/caches/cache"), tmp_path / "disk", tmp_path / "whole"
    disk.mkdir()
    grown = first.plan.changed(rows=24, data_fingerprint="0" * 64, data_bytes=24_000)
    work = {
        "encode": first,
        "extend": Encode(grown, {20: "unreadable"}, change=True),
        "retry": Encode(first.plan, {18: "still unreadable"}, change=True, retry=True),
    }[command]
    for path in (whole, *([disk / where] if command != "encode" else [])):
        if command != "encode":
            first.run(path)
    work.run(whole)
    data.storage._flushed_folders.clear()
    states = states_of(lambda machine: work.run(disk / where), disk, monkeypatch)

    def check(root: Path, promises: int) -> None:
        if promises:
            LatentCache(root / where).verify()
            assert entries(root / where) == entries(whole), "not what was finished"
        work.run(root / where)
        assert entries(root / where) == entries(whole)

    tried, bad = replay(states, check, tmp_path)
    assert tried > 100
    assert bad == []


def test_once_a_checkpoint_was_saved_there_is_always_one_that_is_whole(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of two that are saved one after the other, with only the newest kept; over one that is damaged."""
    made = trained(1)
    disk = tmp_path / "disk"
    disk.mkdir()

    def saved(run: Path, images_seen: int) -> None:
        set_aside_newer(run, images_seen)
        save_checkpoint(run, **made._asdict(), state=run_state(images_seen))
        prune_checkpoints(run, keep=1, keep_every=0, interval=100, batch_size=1)

    def work(machine: Machine) -> None:
        for images_seen in (100, 200, 300):
            saved(disk / "runs" / "run", images_seen)
            machine.promise()

    states = states_of(work, disk, monkeypatch)

    def check(root: Path, promises: int) -> None:
        checkpoint, _ = newest_checkpoint(root / "runs" / "run")
        seen = checkpoint.images_seen if checkpoint else 0
        assert seen >= 100 * min(promises, 3), f"the newest is of {seen} images"

    tried, bad = replay(states, check, tmp_path)
    assert tried > 50
    assert bad == []
