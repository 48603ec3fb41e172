from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import data.storage
from data.locks import claim, holder
from data.storage import free_bytes, probe, publish, remove, staged_folder
from tests.helpers.locks import HOLD, another_process_holding


class Crash(Exception):  # noqa: N818 - it stands for the end of the process
    pass


def tree(folder: Path) -> dict[str, bytes]:
    """Every file, unfinished ones included."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("operation", ["fsync", "replace"])
@pytest.mark.parametrize("old", [b"old", None])
def test_a_crash_while_publishing_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, old: bytes | None
) -> None:
    file = tmp_path / "folder" / "file"
    if old is not None:
        publish(file, old)

    def crash(*args: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(os, operation, crash)
        with pytest.raises(Crash):
            publish(file, b"new")
    assert (file.read_bytes() if file.exists() else None) == old
    publish(file, b"newer")
    assert file.read_bytes() == b"newer"
    assert list(file.parent.iterdir()) == [file]  # nothing unfinished is left behind


PUBLISH = """
import sys
from pathlib import Path
from data.storage import staged_file

with staged_file(Path(sys.argv[1])) as file:
    file.write(b"the first")
    print("writing", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("killed", [False, True])
def test_a_file_has_one_writer_and_what_a_killed_one_left_is_in_nobodys_way(tmp_path: Path, killed: bool) -> None:
    file = tmp_path / "file"
    command, pipe = [sys.executable, "-c", PUBLISH, str(file)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        with pytest.raises(ValueError, match=rf"^{file}: another process is writing it: wait for it"):
            publish(file, b"the second")
        if killed:
            process.kill()
        else:
            process.communicate("")
    assert not killed or [left.name for left in tmp_path.iterdir()] == [".staged-file"]
    assert killed or file.read_bytes() == b"the first"
    publish(file, b"the third")
    assert tree(tmp_path) == {"file": b"the third"}


def test_a_staged_file_that_was_taken_for_a_leftover_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process deletes it after it was made and before it is locked."""
    taken, lock = [], data.storage.try_lock

    def late(handle: int, *, wait: bool) -> bool:
        if not taken:
            taken.append(handle)
            os.unlink(tmp_path / ".staged-file")
        return lock(handle, wait=wait)

    monkeypatch.setattr(data.storage, "try_lock", late)
    publish(tmp_path / "file", b"content")
    assert tree(tmp_path) == {"file": b"content"}


def test_a_staged_folder_takes_its_name_when_it_is_complete(tmp_path: Path) -> None:
    final = tmp_path / "final"
    for content in ("first", "second"):
        with staged_folder(final) as staged:
            (staged / content).write_text(content)
            (staged / "inner").mkdir()
            (staged / "inner" / "file").write_text(content)
            assert not (final / content).exists()
        assert sorted(p.name for p in final.iterdir()) == sorted([content, "inner"])
        assert (final / "inner" / "file").read_text() == content
        assert list(tmp_path.iterdir()) == [final]


@pytest.mark.parametrize("old", [True, False])
def test_a_staged_folder_that_fails_changes_nothing(tmp_path: Path, old: bool) -> None:
    final = tmp_path / "final"
    if old:
        final.mkdir()
        (final / "file").write_text("old")
    before = tree(tmp_path)

    def fill() -> None:
        with staged_folder(final) as staged:
            (staged / "file").write_text("new")
            raise Crash

    with pytest.raises(Crash):
        fill()
    assert tree(tmp_path) == before
    assert final.exists() == old


def fill(folder: Path, count: int) -> None:
    with staged_folder(folder) as staged:
        for number in range(count):
            (staged / f"{number}").write_text("content")


@pytest.mark.parametrize("error", [0, errno.EIO])
def test_many_files_are_flushed_by_one_flush_of_their_disk_before_they_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    many, final = data.storage._MANY_FILES, tmp_path / "final"
    flushed: list[int] = []

    class Libc:
        def syncfs(self, handle: int) -> int:
            assert not final.exists()
            assert os.path.samestat(os.fstat(handle), (tmp_path / ".staged-final").stat())
            flushed.append(handle)
            ctypes.set_errno(error)
            return -1 if error else 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name, use_errno: Libc())
    fill(tmp_path / "few", many - 1)
    assert flushed == []
    if error:
        with pytest.raises(OSError, match=r"Input/output error.*run the same command again"):
            fill(final, many)
        assert [path.name for path in tmp_path.iterdir()] == ["few"]
    else:
        fill(final, many)
        assert len(tree(final)) == many
    assert len(flushed) == 1


def test_where_the_system_cannot_flush_a_disk_each_of_many_files_is_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(ctypes, "CDLL", lambda name, use_errno: object())
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.fstat(handle).st_ino))
    fill(tmp_path / "final", data.storage._MANY_FILES)
    assert {path.stat().st_ino for path in (tmp_path / "final").iterdir()} < {*flushed}


def test_removing_takes_files_folders_and_links_but_not_what_a_link_shows(tmp_path: Path) -> None:
    target, folder = tmp_path / "target", tmp_path / "folder"
    target.mkdir()
    (target / "file").touch()
    folder.mkdir()
    (folder / "inner link").symlink_to(target)
    (tmp_path / "link").symlink_to(target)
    for name in ("link", "folder", "nothing"):
        remove(tmp_path / name)
        assert not os.path.lexists(tmp_path / name)
    assert list(tmp_path.iterdir()) == [target]
    assert (target / "file").exists()
    remove(target)
    assert not target.exists()


def test_a_lock_keeps_a_second_process_out_and_names_the_first(tmp_path: Path) -> None:
    lock = tmp_path / "cache" / ".locks" / "1-of-2"
    assert holder(lock) is None
    with another_process_holding(lock) as process:
        who = rf"job 1/2, process {process.pid} on \S+ since [-\d]+ [:\d]+,"
        with pytest.raises(ValueError, match=rf"{tmp_path / 'cache'}: {who} is using it"), claim(lock, "job 2/2"):
            pass
        assert str(process.pid) in (holder(lock) or "")
    assert holder(lock) is None
    with claim(lock, "job 2/2"):
        pass


def test_a_killed_process_holds_no_lock(tmp_path: Path) -> None:
    lock = tmp_path / "cache" / ".locks" / "1-of-2"
    with another_process_holding(lock) as process:
        process.kill()
        process.wait()
        assert holder(lock) is None
        with claim(lock, "job 1/2"):
            assert lock.read_text().startswith(f"job 1/2, process {os.getpid()} on ")


def test_a_lock_that_is_waited_for_is_had_once_it_is_free(tmp_path: Path) -> None:
    lock = tmp_path / "cache" / ".locks" / "manifest"
    with another_process_holding(lock) as process:
        waiting = subprocess.Popen(
            [sys.executable, "-c", HOLD.replace('"job 1/2"', '"job 2/2", wait=True'), str(lock)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(0.5)
        process.kill()
        assert waiting.communicate(timeout=20)[0] == "held\n"


def test_a_lock_deleted_by_its_holder_is_not_taken_for_the_new_one(tmp_path: Path) -> None:
    lock = tmp_path / "cache" / ".locks" / "manifest"
    with claim(lock, "the first"):
        remove(lock)
        with claim(lock, "the second"):
            assert "the second" in lock.read_text()
    assert holder(lock) is None


def test_a_folder_that_can_be_written_to_passes_the_probe_and_stays_empty(tmp_path: Path) -> None:
    probe(tmp_path / "new" / "folder", "cache.path")
    assert list((tmp_path / "new" / "folder").iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused_by_the_name_of_its_field(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o500)
    with pytest.raises(ValueError, match=rf"cache\.path: cannot write to {folder}: Permission denied"):
        probe(folder, "cache.path")


def test_a_folder_below_a_file_is_refused_by_the_name_of_its_field(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(ValueError, match=rf"cache\.path: cannot write to {folder}: "):
            probe(folder, "cache.path")


def test_free_bytes_of_a_folder_to_come_are_those_of_its_disk(tmp_path: Path) -> None:
    free = free_bytes(tmp_path / "not" / "yet")
    assert 0 < free <= shutil.disk_usage(tmp_path).total
    assert not (tmp_path / "not").exists()
    assert free_bytes(Path("not") / "yet") > 0  # relative to here
