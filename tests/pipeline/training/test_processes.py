"""Real processes, one and two (gloo), that are killed, told to go, and continued."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from data.cache.reader import LatentCache
from data.loader import LatentLoader
from pipeline.training.checkpoint import checkpoint_folders
from tests.helpers.imports import ROOT
from tests.helpers.locks import another_process_holding
from tests.helpers.world import World, log_of, run_stage, succeed, tree

# 100 steps with dropout, posterior noise, label dropout, a learned weighting and two averages
LONG = (
    "train.images=400",
    "train.log_every=20",
    "train.checkpoint_every=100",
    "train.preview_every=200",
    "train.weighting=learned",
    "train.ema=power",
    "train.accumulate=2",
)


def start(
    world: World,
    run: Path,
    processes: int,
    overrides: tuple[str, ...] = LONG,
    *,
    launcher: tuple[str, ...] = (),
    module: str = "stages",
    stage: str = "train",
) -> subprocess.Popen[str]:
    """A stage as people start it: several processes by torchrun."""
    if processes > 1:
        launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m", "--")
    command = [sys.executable, "-m", *launcher, module, stage, "--config", str(world.config), "--run", str(run)]
    for override in overrides:
        command += ["--set", override]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """What a process prints until it ends with `code`."""
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == code, printed
    return printed


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    parent = psutil.Process(process.pid)
    return [*parent.children(recursive=True), parent]


def worker(process: subprocess.Popen[str], rank: int) -> psutil.Process:
    """The one of that rank among those that a launcher started."""
    return next(p for p in psutil.Process(process.pid).children() if p.environ().get("RANK") == str(rank))


@contextmanager
def after_lines(process: subprocess.Popen[str], run: Path, lines: int) -> Iterator[None]:
    """A block that runs as soon as the run's log has as many lines, while it goes on."""
    log = run / "log.jsonl"
    for _ in range(60_000):
        if log.exists() and log.read_bytes().count(b"\n") >= lines:
            break
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.001)
    yield
    assert log.read_bytes().count(b"\n") < 20, "it was over before it was interrupted"


def kill(process: subprocess.Popen[str], run: Path, lines: int) -> None:
    with after_lines(process, run, lines):
        for member in family(process):
            member.kill()
        process.communicate(timeout=60)


def assert_same(run: Path, straight: Path) -> None:
    for folder in ("checkpoints", "averages", "previews"):
        assert tree(run / folder) == tree(straight / folder), folder
    assert log_of(run) == log_of(straight)
    assert len(log_of(run)) == 20


@pytest.fixture(scope="module")
def alone(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process that nothing disturbs."""
    run = tmp_path_factory.mktemp("alone")
    succeed("train", world.config, run, *LONG)
    return run


@pytest.fixture(scope="module")
def pair(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that nothing disturbs."""
    run = tmp_path_factory.mktemp("pair")
    finish(start(world, run, 2))
    return run


def test_a_run_that_is_killed_and_signalled_ends_as_one_that_was_not(world: World, alone: Path, tmp_path: Path) -> None:
    launcher = ("accelerate.commands.launch", "--num_processes", "1", "-m")
    kill(start(world, tmp_path, 1, launcher=launcher), tmp_path, 3)  # before the first checkpoint
    for number, lines in ((signal.SIGTERM, 8), (signal.SIGINT, 12)):
        process = start(world, tmp_path, 1)
        with after_lines(process, tmp_path, lines):
            process.send_signal(number)
            printed = finish(process, 128 + number)
        assert f"{number.name}: saved at " in printed
    newest = int(checkpoint_folders(tmp_path)[-1].name)
    assert newest >= 240
    assert f"continuing {tmp_path} at {newest:,} images" in succeed("train", world.config, tmp_path, *LONG)
    assert_same(tmp_path, alone)


def test_two_processes_that_are_signalled_end_as_those_that_were_not(world: World, pair: Path, tmp_path: Path) -> None:
    """A signal reaches one of them or their launcher. It kills those that are left, soon after one has gone, so none
    goes while another is still saving."""
    process = start(world, tmp_path, 2, module="tests.helpers.slow_disk")
    with after_lines(process, tmp_path, 9):
        second = worker(process, 1)
        second.send_signal(signal.SIGUSR1)
        second.wait(timeout=60)
        newest = int(checkpoint_folders(tmp_path)[-1].name)
        printed, _ = process.communicate(timeout=120)
    assert f"SIGUSR1: saved at {newest} images" in printed
    assert process.returncode != 0
    process = start(world, tmp_path, 2)
    with after_lines(process, tmp_path, 14):
        process.send_signal(signal.SIGINT)  # torchrun's, as from a terminal: the two are in sessions of their own
        printed, _ = process.communicate(timeout=120)
    assert "SIGINT: saved at " in printed
    finish(start(world, tmp_path, 2))
    assert_same(tmp_path, pair)


def test_a_second_ctrl_c_leaves_at_once_without_a_trace(world: World, alone: Path, tmp_path: Path) -> None:
    """While the first one is being saved, which takes seconds here; the run goes on from the checkpoint before."""
    process = start(world, tmp_path, 1, module="tests.helpers.slow_disk")
    with after_lines(process, tmp_path, 6):
        process.send_signal(signal.SIGINT)
        staged = tmp_path / "checkpoints"
        while not list(staged.glob(".staged-*")):
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        printed = finish(process, 130)
    assert "press Ctrl-C again to stop at once" in printed
    assert "SIGINT: stopped at once" in printed
    assert "SIGINT: saved" not in printed
    assert "Traceback" not in printed
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == ["000000100"]
    succeed("train", world.config, tmp_path, *LONG)
    assert_same(tmp_path, alone)


def test_two_processes_become_one_that_goes_on_at_the_same_place_and_rate(
    world: World, alone: Path, pair: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(pair, run)
    shutil.rmtree(checkpoint_folders(run)[-1])
    printed = succeed("train", world.config, run, *LONG)
    assert f"continuing {run} at 300 images" in printed
    assert "processes 2 -> 1" in printed
    assert "bits may differ" in printed
    rates = [[(line["images_seen"], line["lr"]) for line in log_of(each)] for each in (run, alone, pair)]
    assert rates[0] == rates[1] == rates[2]
    assert tree(run / "checkpoints") != tree(pair / "checkpoints")


def test_the_images_of_a_step_do_not_depend_on_the_number_of_processes(world: World) -> None:
    cache = LatentCache(world.cache)

    def images(step: int, processes: int) -> list[int]:
        loaders = [
            LatentLoader(cache, seed=0, batch_size=4, rank=rank, world_size=processes, device=torch.device("cpu"))
            for rank in range(processes)
        ]
        return [int(i) for loader in loaders for i in loader.batch(step).indices]

    for step in range(8):
        assert images(step, 1) == images(step, 2) == images(step, 4)


def test_two_processes_have_the_gradients_of_one_with_the_same_batch(world: World, tmp_path: Path) -> None:
    """In one part and in two. After one step of AdamW, exp_avg is a tenth of the gradient; dropout alone is drawn by
    process."""
    overrides = ("train.images=4", "train.grad_clip=1000000", "model.dropout=0", "train.betas=[0.9, 0.95]")
    succeed("train", world.config, tmp_path / "one", *overrides)
    finish(start(world, tmp_path / "two", 2, (*overrides, "train.accumulate=2")))
    one, two = (
        load_file(tmp_path / name / "checkpoints" / "000000004" / "optimizer.safetensors") for name in ("one", "two")
    )
    gradients = {name: value for name, value in one.items() if name.startswith("exp_avg.")}
    assert any(value.abs().max() > 1e-3 for value in gradients.values())
    for name, gradient in gradients.items():
        assert torch.allclose(two[name], gradient, rtol=1e-4, atol=1e-7), name


def test_what_one_process_reads_as_not_a_number_stops_both_before_the_update(world: World, tmp_path: Path) -> None:
    overrides = ("train.images=48", "train.checkpoint_every=8")
    printed = finish(start(world, tmp_path, 2, overrides, module="tests.helpers.poisoned"), code=1)
    assert "step 6: the gradient is NaN or infinite; so is the loss of 1 of the 2 images of process 1 (" in printed
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == ["000000008", "000000016"]


def test_a_second_launch_on_a_run_is_refused_and_told_of_the_first(world: World, tmp_path: Path) -> None:
    with another_process_holding(tmp_path / ".locks" / "train") as process:
        result = run_stage("train", world.config, tmp_path)
    assert result.exit_code == 2
    assert f"job 1/2, process {process.pid} on " in result.stderr
    assert not (tmp_path / "log.jsonl").exists()


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_copies_that_are_not_connected_are_refused(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "2")
    result = run_stage("train", world.config, tmp_path)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith(f"error: {name} = 2, but 1 process(es) are connected")
    assert not (tmp_path / "log.jsonl").exists()


def test_two_processes_share_the_drawing_and_the_decoding(world: World, tmp_path: Path) -> None:
    run, alone = (Path(shutil.copytree(world.run, tmp_path / name)) for name in ("run", "alone"))
    settings = ("sample.per_class=12", "sample.scheduler=euler_ancestral")
    printed = finish(start(world, run, 2, settings, stage="sample"))
    succeed("sample", world.config, alone, *settings)
    assert printed.count("sample: 16 images") == printed.count("sample: 8 images") == 1
    assert printed.count("decode: ") == 1  # of the page: nothing was left to decode
    folders = [next((each / "samples").glob("*12each*")) for each in (run, alone)]
    one, other = ({name: file for name, file in tree(folder).items() if "images" in name} for folder in folders)
    assert one == other
    assert len(one) == 24
