"""What a run writes for people: its log, status lines, pictures and trackers; and what may not be in it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from pipeline.config_file import load_config
from pipeline.noise import LEVELS
from pipeline.training.metrics import Window
from pipeline.training.plots import draw_curves
from pipeline.training.state import WindowState
from pipeline.training.tracker import Tracker
from tests.helpers.imports import ROOT
from tests.helpers.world import CLASSES, IMAGE_SIZE, World, log_of, run_stage, succeed, tree


def test_a_line_of_the_log_has_all_that_a_run_is_watched_by(world: World) -> None:
    lines = [json.loads(line) for line in (world.run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in lines:
        assert line.keys() == {
            "step", "images_seen", "loss", "gradient_norm", "lr", "loss_by_noise", "images_per_second",
            "teraflops_per_second", "core_share", "data_wait", "memory_gb",
        }  # fmt: skip
        assert len(line["loss_by_noise"]) == LEVELS
        assert 0 <= line["data_wait"] <= 1
        assert 0 < line["core_share"] <= 1
        assert line["memory_gb"] > 0.05
        assert line["images_per_second"] > 0


def test_the_loss_by_noise_is_the_mean_error_of_the_images_at_that_noise() -> None:
    window = Window(Accelerator(), flops_per_image=1)
    errors, times = torch.tensor([1.0, 3.0, 5.0, 8.0]), torch.tensor([0.0, 99.0, 100.0, 1000.0])
    window.add(errors.mean(), torch.tensor(0.5), errors, times)
    window.add(errors.mean() * 3, torch.tensor(1.5), errors * 3, times)
    values = window.close(step=2, batch_size=4, lr=0.1)
    assert values["loss"] == pytest.approx(2 * 4.25)
    assert values["gradient_norm"] == pytest.approx(1.0)
    assert values["loss_by_noise"] == [4.0, 10.0, *[None] * 7, 16.0]
    window.add(errors.mean(), torch.tensor(0.5), errors, times)
    assert window.close(step=3, batch_size=4, lr=0.1)["loss"] == pytest.approx(4.25)


def test_a_window_goes_on_from_a_checkpoint_to_the_bit() -> None:
    """And of two processes becomes that of one with the same means."""
    windows = [Window(Accelerator(), flops_per_image=1) for _ in range(3)]
    generator = torch.Generator().manual_seed(0)
    steps = [(torch.rand(4, generator=generator), torch.rand(4, generator=generator) * 1000) for _ in range(6)]
    for number, (errors, times) in enumerate(steps):
        if number == 3:
            windows[1].load(WindowState.model_validate_json(windows[0].state().model_dump_json()))
        for window in windows[: 1 if number < 3 else 2]:
            window.add(errors.mean(), errors.max(), errors, times)
    states = [window.state() for window in windows]
    assert states[0] == states[1]
    windows[2].load(WindowState(steps=6, sums=states[0].sums * 2))
    one, both = (window.close(step=6, batch_size=4, lr=0.1) for window in (windows[0], windows[2]))
    assert (one["loss"], one["gradient_norm"]) == pytest.approx((both["loss"], both["gradient_norm"]))
    assert one["loss_by_noise"] == pytest.approx(both["loss_by_noise"])


def test_the_status_lines_read_well_in_a_file(world: World) -> None:
    lines = world.printed["train"].splitlines()
    assert not any("\r" in line or "\x1b" in line for line in lines)
    status = [line for line in lines if " of 48 images" in line]
    assert len(status) == 6
    assert all(re.match(r"train: [ \d]\d of 48 images   loss \d\.\d{4}   gradient ", line) for line in status)
    assert status[0].endswith(" left")


def test_the_run_has_its_curves_and_a_strip_of_its_previews(world: World, tmp_path: Path) -> None:
    succeed("train", world.config, tmp_path, "train.preview_every=16")
    assert Image.open(tmp_path / "curves.png").size == (1200, 700)
    strip = Image.open(tmp_path / "previews.png").convert("RGB")
    tile = -(-64 // IMAGE_SIZE) * IMAGE_SIZE
    assert strip.height >= 3 * tile
    margin = strip.width - len(CLASSES) * (tile + 2)
    for row, seen in enumerate((16, 32, 48)):
        sheet = Image.open(tmp_path / "previews" / f"{seen:09d}.png").convert("RGB")
        top = 2 + row * (tile + 2)
        assert (
            strip.crop((margin, top, margin + tile, top + tile)).tobytes()
            == sheet.crop((sheet.width - tile - 2, 2, sheet.width - 2, 2 + tile)).tobytes()
        )


@pytest.mark.parametrize(
    ("function", "part", "error"),
    [
        ("previews.save_png", "preview", OSError(28, "No space left on device")),
        ("previews.draw_strip", "preview", MemoryError()),
        ("trainer.draw_curves", "curves.png", ValueError("$ in \n a name")),
    ],
)
def test_what_is_for_people_to_look_at_never_stops_a_run(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, part: str, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        assert (tmp_path / "checkpoints" / "000000048").is_dir(), "the checkpoint comes first"
        raise error

    monkeypatch.setattr(f"pipeline.training.{function}", fail)
    said = succeed("train", world.config, tmp_path).splitlines()
    warnings = [line for line in said if "training continues without it" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"train: {part}: {type(error).__name__}: ")
    assert tree(tmp_path / "checkpoints") == tree(world.run / "checkpoints")


def test_a_tracker_that_fails_is_asked_no_more(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(world.config)
    with Tracker("tensorboard", tmp_path, config, images_seen=0, active=True) as tracker:
        asked = []
        monkeypatch.setattr(tracker._board, "add_scalar", lambda *values: asked.append(values) or 1 / 0)
        for step in (1, 2):
            tracker.log({"images_seen": step, "loss": 0.5})
    assert len(asked) == 1
    assert capsys.readouterr().out.count("training continues without it") == 1


def test_a_preview_that_a_crash_has_prevented_is_drawn_by_the_next_run(world: World, tmp_path: Path) -> None:
    settings = ("train.preview_every=16", "train.checkpoint_every=16")
    whole, again = tmp_path / "whole", tmp_path / "again"
    succeed("train", world.config, whole, *settings)
    shutil.copytree(whole, again)
    (again / "previews" / "000000048.png").unlink()
    succeed("train", world.config, again, *settings)
    assert tree(again / "previews") == tree(whole / "previews")
    assert log_of(again) == log_of(whole)


def test_pictures_of_somebody_else_among_the_previews_are_left_out(world: World, tmp_path: Path) -> None:
    succeed("train", world.config, tmp_path)
    strip = (tmp_path / "previews.png").read_bytes()
    (tmp_path / "previews" / "000000048.png").unlink()
    Image.new("RGB", (3, 3)).save(tmp_path / "previews" / "notes.png")
    said = succeed("train", world.config, tmp_path)
    assert "without it" not in said
    assert (tmp_path / "previews.png").read_bytes() == strip


def test_a_loss_below_zero_has_its_curve(world: World, tmp_path: Path) -> None:
    """As the learned weighting's, which a logarithmic axis would leave out."""
    lines = [json.loads(line) for line in (world.run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    drawn = []
    for sign in (1, -1):
        text = "".join(json.dumps({**line, "loss": sign * line["loss"]}) + "\n" for line in lines)
        (tmp_path / "log.jsonl").write_text(text, encoding="utf-8")
        draw_curves(tmp_path)
        upper_left = Image.open(tmp_path / "curves.png").convert("RGB").crop((0, 0, 560, 350))
        drawn.append(sum(count for count, color in upper_left.getcolors(2**20) or [] if color == (31, 119, 180)))
    assert min(drawn) > 100


def test_tensorboard_has_every_line_of_the_log(world: World, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for images in (24, 48):  # the second time it goes on
        succeed("train", world.config, tmp_path, "train.tracker=tensorboard", f"train.images={images}")
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    losses = [(event.step, event.value) for event in board.Scalars("loss")]
    assert losses == [(line["images_seen"], pytest.approx(line["loss"])) for line in log_of(tmp_path)]
    assert "loss_by_noise/5" in board.Tags()["scalars"]


def test_tensorboard_that_is_not_installed_is_asked_for(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.training.tracker.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install tensorboard"):
        Tracker("tensorboard", tmp_path, load_config(world.config), images_seen=0, active=True)


def test_a_server_that_does_not_answer_does_not_disturb_a_run(world: World, tmp_path: Path) -> None:
    """wandb with a key, at a port where nobody listens: offline after a bounded wait, the same weights at the end."""
    key = "0123456789" * 4
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("WANDB")},
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_API_KEY": key,
        "HOME": str(tmp_path),
        "WANDB_MODE": "online",
    }
    code = "import pipeline.training.tracker, stages.cli; pipeline.training.tracker.WAIT = 1; stages.cli.main()"
    command = [sys.executable, "-c", code, "train", "--config", str(world.config), "--run", str(tmp_path / "run")]
    done = subprocess.run(
        [*command, "--set", "train.tracker=wandb"],
        cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "continuing offline" in done.stdout
    assert tree(tmp_path / "run" / "checkpoints") == tree(world.run / "checkpoints")
    run_id = json.loads((tmp_path / "run" / "wandb.json").read_text(encoding="utf-8"))["id"]
    assert len(list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{run_id}"))) == 1
    for name, content in tree(tmp_path / "run").items():
        assert key.encode() not in content, name


def test_no_secret_of_the_environment_is_in_any_output(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = "canary-7f3a9b"
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "MY_PASSWORD"):
        monkeypatch.setenv(name, canary)
    printed = "".join(succeed(stage, world.config, tmp_path) for stage in ("train", "sample", "decode"))
    assert canary not in printed
    for name, content in tree(tmp_path).items():
        assert canary.encode() not in content, name


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_loaded(world: World, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    result = run_stage("train", world.config, tmp_path / "file" / "run", f"cache.path={tmp_path / 'nowhere'}")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: --run: cannot write to ")
