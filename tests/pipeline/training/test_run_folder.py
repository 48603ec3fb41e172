"""The folder of a run: told from others, and nothing in it is lost when a run begins there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.config_file import load_config
from pipeline.training.checkpoint import checkpoint_folders
from pipeline.training.run_folder import MARKER
from pipeline.training.tracker import wandb_id
from stages.cli import main
from tests.helpers.world import World, log_of, run_stage, state_of, succeed, tree

SHORT = "train.images=16"


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize("name", ["notes.txt", "config.yaml", "log.jsonl", "checkpoints/000000048/model.bin", "a/b/c"])
def test_a_folder_of_somebody_else_is_refused_in_one_line_and_not_touched(
    world: World, tmp_path: Path, name: str
) -> None:
    write(tmp_path / name, "optimizer: {name: theirs}\n")
    before = tree(tmp_path)
    result = run_stage("train", world.config, tmp_path, SHORT)
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert str(tmp_path) in result.stderr
    assert tree(tmp_path) == before


def test_an_average_is_not_written_into_a_folder_of_somebody_else(world: World, tmp_path: Path) -> None:
    succeed("train", world.config, tmp_path / "run", SHORT, "train.ema=power")
    notes = write(tmp_path / "theirs" / "notes.txt", "theirs")
    result = CliRunner().invoke(main, ["ema", str(tmp_path / "run"), "--width", "0.1", "--to", str(notes.parent)])
    assert result.exit_code == 2
    assert f"--to: {notes.parent} holds notes.txt and no {MARKER}" in result.stderr
    assert list(tree(notes.parent)) == ["notes.txt"]


def test_folders_that_hold_nothing_of_anybody_are_taken_and_marked(world: World, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("new", "hidden", "samples", "folders")]
    write(folders[1] / ".git" / "config", "hidden")
    write(folders[2] / "samples" / "48-euler2" / "grid.png", "drawn before")
    (folders[3] / "empty" / "empty").mkdir(parents=True)
    for folder in folders:
        before = tree(folder)
        succeed("train", world.config, folder, SHORT)
        assert (folder / MARKER).is_file()
        assert tree(folder).items() >= before.items()


def test_checkpoints_alone_are_a_run_that_goes_on(world: World, tmp_path: Path) -> None:
    """As when they were copied to another machine without the rest."""
    run = tmp_path / "run"
    shutil.copytree(world.run / "checkpoints" / "000000032", run / "checkpoints" / "000000032")
    assert "at 32 images" in succeed("train", world.config, run)
    assert tree(run / "checkpoints") == tree(world.run / "checkpoints")


def test_a_run_without_its_checkpoints_begins_anew_and_nothing_of_the_old_one_is_lost(
    world: World, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    first = ("train.seed=1", "train.ema=power", "train.preview_every=16", "train.tracker=tensorboard")
    succeed("train", world.config, run, *first)
    before = tree(run)
    for number in (1, 2):
        shutil.rmtree(run / "checkpoints")
        printed = succeed("train", world.config, run, *(() if number == 1 else first))
        assert f"no checkpoint in {run}: starting from scratch" in printed
        for name in ("log.jsonl", "previews", "config.yaml"):
            assert f"{name}.{number}" in printed
    assert load_config(run / "config.yaml").train.seed == 1
    after = tree(run)
    for name, content in before.items():
        top, _, rest = name.partition("/")
        if top in ("log.jsonl", "config.yaml", "previews", "averages", "tensorboard"):
            assert after[f"{top}.1/{rest}".rstrip("/")] == content, name
    assert [line["images_seen"] for line in log_of(run)] == [8, 16, 24, 32, 40, 48]
    assert "loss" in after["log.jsonl.2"].decode()
    assert state_of(run, 48)["train"]["seed"] == 1
    assert sorted(name for name in after if name.startswith("previews/")) == [
        f"{folder}/{seen:09d}.png" for folder in ("previews", "previews/rows") for seen in (16, 32, 48)
    ]


def test_a_run_that_goes_on_unchanged_sets_nothing_aside(world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(world.run, run)
    shutil.rmtree(checkpoint_folders(run)[-1])
    assert "is now" not in succeed("train", world.config, run)
    assert {name for name in tree(run) if ".1" in name} == set()


@pytest.mark.parametrize("overrides", [(), (SHORT,)])
def test_a_config_that_somebody_wrote_is_kept_with_its_comments(
    world: World, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    """`--config x/config.yaml --run x`: as it is where it says the same, else under another name."""
    run = tmp_path / "run"
    mine = write(run / "config.yaml", "# why I chose this\n" + world.config.read_text(encoding="utf-8"))
    text = mine.read_text(encoding="utf-8")
    printed = succeed("train", mine, run, *overrides)
    kept = run / ("config.yaml.1" if overrides else "config.yaml")
    assert kept.read_text(encoding="utf-8") == text
    assert (f"{mine} had other contents: it is now {kept.name}" in printed) == bool(overrides)
    assert load_config(run / "config.yaml").train.images == (16 if overrides else 48)


def test_a_damaged_config_of_a_run_is_set_aside(world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    succeed("train", world.config, run, SHORT)
    (run / "config.yaml").write_bytes(b"train: {lr: \xff")
    assert "config.yaml.1" in succeed("train", world.config, run)
    assert (run / "config.yaml.1").read_bytes() == b"train: {lr: \xff"
    assert load_config(run / "config.yaml").train.images == 48


def flip(payload: bytes) -> bytes:
    place = len(payload) * 2 // 3
    return payload[:place] + bytes([payload[place] ^ 1]) + payload[place + 1 :]


def cut(payload: bytes) -> bytes:
    return payload[: len(payload) * 2 // 3]


def test_damage_to_any_file_of_a_run_is_said_and_ends_in_the_same_bytes(world: World, tmp_path: Path) -> None:
    """Of one that goes on at 32 images. Numbers in its log have no hash: of that, lines are lost."""
    overrides = ("train.preview_every=16", "train.keep=3")
    succeed("train", world.config, tmp_path / "whole", *overrides)
    expected = tree(tmp_path / "whole" / "checkpoints")
    unfinished = shutil.copytree(tmp_path / "whole", tmp_path / "unfinished")
    shutil.rmtree(unfinished / "checkpoints" / "000000048")
    for folder in ("previews", "previews/rows"):
        (unfinished / folder / "000000048.png").unlink()
    lines = (unfinished / "log.jsonl").read_bytes().splitlines(keepends=True)
    (unfinished / "log.jsonl").write_bytes(b"".join(lines[:4]))
    pictures = {"curves.png", "previews.png"}  # which are drawn again
    files = [name for name, payload in tree(unfinished).items() if payload and name not in pictures]
    unread = ("checkpoints/000000016", "previews/0")  # an old checkpoint, and sheets, which are for people alone
    assert len(files) == 2 + 2 * 2 + 2 * 5
    for number, name in enumerate(files):
        run = shutil.copytree(unfinished, tmp_path / str(number))
        damage = cut if number % 2 or name == "log.jsonl" else flip
        (run / name).write_bytes(damage((run / name).read_bytes()))
        printed = succeed("train", world.config, run, *overrides)
        said = any(words in printed for words in ("skipped", "is now", "removed", "missing"))
        assert said != name.startswith(unread), name
        after = tree(run / "checkpoints")
        for file, content in expected.items():
            assert after[file] == content or f"checkpoints/{file}" == name, (name, file)


@pytest.mark.parametrize("zeros", [b"\0" * 4096, b"\0" * 50 + b"\n", b"\0\n\0\n"])
def test_nul_bytes_that_a_crash_left_in_the_log_are_dropped_with_a_word(
    world: World, tmp_path: Path, zeros: bytes
) -> None:
    run = tmp_path / "run"
    succeed("train", world.config, run, "train.images=24")
    with open(run / "log.jsonl", "ab") as log:
        log.write(zeros)
    printed = succeed("train", world.config, run)
    assert f"removed {zeros.count(0):,} NUL bytes, left by a crash, from {run / 'log.jsonl'}" in printed
    assert [line["images_seen"] for line in log_of(run)] == [8, 16, 24, 32, 40, 48]
    assert not (run / "log.jsonl.1").exists()


@pytest.mark.parametrize("damage", [b"loss", b'"images_seen"', b'{"step"'])
def test_a_line_of_the_log_that_cannot_be_read_is_left_out_aloud(world: World, tmp_path: Path, damage: bytes) -> None:
    run = tmp_path / "run"
    succeed("train", world.config, run, "train.images=24")
    payload = (run / "log.jsonl").read_bytes()
    first, second, third, _ = payload.split(b"\n")
    damaged = b"\n".join([first, second.replace(damage, bytes([damage[0] ^ 1, *damage[1:]]), 1), third, b'{"st'])
    (run / "log.jsonl").write_bytes(damaged)
    printed = succeed("train", world.config, run)
    assert (
        f"removed line 2 of {run / 'log.jsonl'}, which cannot be read; the original log is now log.jsonl.1" in printed
    )
    assert (run / "log.jsonl.1").read_bytes() == damaged
    assert [line["images_seen"] for line in log_of(run)] == [8, 24, 32, 40, 48]


def test_a_copy_of_a_run_is_another_one_to_wandb_and_a_moved_one_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    first = wandb_id(run)
    assert wandb_id(run) == first
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    second = wandb_id(copy)
    assert second != first
    assert wandb_id(copy) == second
    assert capsys.readouterr().out == f"train: wandb: {copy} is a copy of {run}: it becomes a separate wandb run\n"
    moved = copy.rename(tmp_path / "moved")
    assert wandb_id(moved) == second
    assert wandb_id(run) == first
