"""Every way to compute a step: optimizers, precisions, parts of a batch, compiled, dealt out; and batch sizes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode

from data.cache.reader import LatentCache
from pipeline.config_file import load_config
from pipeline.training.checkpoint import checkpoint_folders
from pipeline.training.distributed import _check_fsdp, connect
from pipeline.training.setup import open_loader
from pipeline.training.trainer import Trainer
from stages.train import train
from tests.helpers.training import interrupt, poison
from tests.helpers.world import World, log_of, run_stage, state_of, succeed, tree, weights_of


class Asking(TorchDispatchMode):
    """Names the operations whose result decides what the host does next, so that it waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal"):
            self.found.append(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("deferred", [True, False])
@pytest.mark.parametrize(
    "overrides",
    [
        ("train.ema=power", "train.weighting=learned", "train.accumulate=2"),
        ("train.optimizer=muon",),
        ("noise.schedule=cosine", "noise.prediction=v", "sample.scheduler=ddpm", "train.weighting=min_snr"),
    ],
    ids=lambda overrides: overrides[0],
)
def test_no_step_asks_the_device_for_a_value(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], deferred: bool
) -> None:
    """As it is on a GPU; on a CPU, each step asks whether its gradient is finite."""
    update, asking = Trainer.train_step, Asking()

    def watched(self: Trainer) -> None:
        with asking:
            update(self)

    monkeypatch.setattr(Trainer, "train_step", watched)
    monkeypatch.setattr(Trainer, "can_defer", lambda self: deferred)
    succeed("train", world.config, tmp_path, "train.images=16", *overrides)
    assert asking.found == [] if deferred else asking.found == ["_local_scalar_dense"] * 4


@pytest.fixture
def accelerate_anew() -> Iterator[None]:
    """Accelerate keeps the precision it began with until its process ends."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    "overrides",
    [
        ("train.optimizer=muon",),
        ("train.precision=bf16",),
        ("train.gradient_checkpointing=true", "train.accumulate=4"),
        ("train.weighting=min_snr", "train.schedule=cosine"),
        (
            "noise.schedule=scaled_linear",
            "noise.prediction=x0",
            "noise.zero_terminal_snr=true",
            "sample.scheduler=ddim",
        ),
    ],
    ids=lambda overrides: overrides[0],
)
@pytest.mark.usefixtures("accelerate_anew")
def test_every_way_to_train_goes_on_where_it_was_interrupted(
    world: World, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    succeed("train", world.config, tmp_path / "straight", *overrides)
    interrupt(load_config(world.config, overrides), tmp_path / "broken", at_step=6)
    succeed("train", world.config, tmp_path / "broken", *overrides)
    assert tree(tmp_path / "broken" / "checkpoints") == tree(tmp_path / "straight" / "checkpoints")
    assert log_of(tmp_path / "broken") == log_of(tmp_path / "straight")


def test_gradient_checkpointing_and_parts_of_a_batch_change_no_more_than_rounding(world: World, tmp_path: Path) -> None:
    plain = ("model.dropout=0", "train.images=16", "train.lr=1e-4")
    succeed("train", world.config, tmp_path / "plain", *plain)
    succeed(
        "train", world.config, tmp_path / "parts", *plain, "train.gradient_checkpointing=true", "train.accumulate=4"
    )
    for key in ("loss", "gradient_norm"):
        plain_values, parts_values = ([line[key] for line in log_of(tmp_path / name)] for name in ("plain", "parts"))
        assert plain_values == pytest.approx(parts_values, rel=1e-4)


@pytest.mark.parametrize("noise", [(), ("noise.schedule=cosine", "noise.prediction=v", "sample.scheduler=ddpm")])
def test_a_compiled_run_learns_what_another_one_does(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noise: tuple[str, ...]
) -> None:
    """Through dynamo without inductor, which would take a minute: capture, backward pass and checkpoints."""
    compiled = torch.nn.Module.compile
    overrides = ("train.images=16", "model.dropout=0", *noise)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "compile", lambda self: compiled(self, backend="aot_eager"))
        succeed("train", world.config, tmp_path / "compiled", *overrides, "train.compile=true")
    succeed("train", world.config, tmp_path / "plain", *overrides)
    losses = [[line["loss"] for line in log_of(tmp_path / name)] for name in ("compiled", "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    ours, theirs = weights_of(tmp_path / "compiled", 16), weights_of(tmp_path / "plain", 16)
    assert ours.keys() == theirs.keys()


def test_a_batch_size_by_memory_is_written_down_and_kept(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.training.setup._MIN_STEPS", 10)
    printed = succeed("train", world.config, tmp_path, "train.batch_size=auto", "train.images=20")
    assert "train.batch_size = 2 (auto" in printed
    assert load_config(tmp_path / "config.yaml").train.batch_size == 2
    succeed("train", world.config, tmp_path, "train.batch_size=auto", "train.images=80")  # as it began
    assert load_config(tmp_path / "config.yaml").train.batch_size == 2


@pytest.mark.parametrize(("free", "expected"), [(10**6, "not one image fits"), (10**8, "batch_size = 32 ")])
def test_a_batch_size_by_memory_fits_into_half_of_what_is_free(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, expected: str
) -> None:
    monkeypatch.setattr("pipeline.training.setup._MIN_STEPS", 1)
    monkeypatch.setattr("pipeline.training.setup._free_memory", lambda accelerator: free)
    result = run_stage("train", world.config, tmp_path, "train.batch_size=auto", "train.images=40")
    assert expected in result.output


def test_a_batch_that_cannot_be_shared_is_refused(world: World, tmp_path: Path) -> None:
    result = run_stage("train", world.config, tmp_path, "train.batch_size=6", "train.accumulate=4")
    assert result.exit_code == 2
    assert "accumulate = 4 does not divide batch_size = 6" in result.stderr


def test_a_batch_that_processes_cannot_share_equally_is_refused(world: World) -> None:
    config, four = load_config(world.config, ["train.batch_size=10"]), SimpleNamespace(num_processes=4)
    with pytest.raises(ValueError, match=r"train\.batch_size = 10 .* 4 processes .*batch_size=12 is the next one"):
        open_loader(config, LatentCache(world.cache), four, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("instruction", "precision"), [("avx512_bf16", "bf16"), ("amx_bf16", "bf16"), ("avx2", "fp32")]
)
@pytest.mark.usefixtures("accelerate_anew")
def test_the_precision_is_bf16_where_the_cpu_has_instructions_for_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instruction: str, precision: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {instruction: True})
    printed = succeed("train", world.config, tmp_path, "train.precision=auto", "train.images=8")
    assert f"(cpu, {precision})" in printed


@pytest.mark.usefixtures("accelerate_anew")
def test_fp16_on_a_cpu_is_refused(world: World, tmp_path: Path) -> None:
    """Accelerate would compute in float32 and say nothing."""
    result = run_stage("train", world.config, tmp_path, "train.precision=fp16")
    assert result.exit_code == 2
    assert "train.precision = fp16" in result.stderr


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training with fp16's loss scale, in float32: a CPU has the one, but not the other."""

    def with_scaler(precision: str) -> Accelerator:
        accelerator = connect(precision)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=5)
        return accelerator

    monkeypatch.setattr("stages.train.connect", with_scaler)


@pytest.mark.usefixtures("scaled")
def test_a_run_with_a_loss_scale_goes_on_where_it_was_interrupted(world: World, tmp_path: Path) -> None:
    config = load_config(world.config)
    train(config, tmp_path / "straight")
    interrupt(config, tmp_path / "broken", at_step=6)
    train(config, tmp_path / "broken")
    assert tree(tmp_path / "broken" / "checkpoints") == tree(tmp_path / "straight" / "checkpoints")
    assert state_of(tmp_path / "broken", 48)["scaler"]["scale"] == 4096.0  # doubled twice in twelve steps


@pytest.mark.usefixtures("scaled")
@pytest.mark.parametrize("deferred", [False, True])
def test_a_loss_that_is_not_a_number_stops_a_run_with_a_loss_scale(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deferred: bool
) -> None:
    monkeypatch.setattr(Trainer, "can_defer", lambda self: deferred)
    poison(monkeypatch, step=5, place=1)
    result = run_stage("train", world.config, tmp_path)
    assert result.exit_code == 1
    assert "train: step 6: " in result.stderr
    assert "1 of the 4 images of process 0 (" in result.stderr
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == ["000000016"]


def test_a_device_without_memory_for_a_batch_is_told_of_ways_out(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Trainer) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Trainer, "train_step", full)
    result = run_stage("train", world.config, tmp_path)
    assert result.exit_code == 1
    assert "out of memory with train.batch_size = 4: try train.accumulate=2" in result.stderr


def test_fsdp_leaves_precision_to_autocast_and_is_refused_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself it would cast the timesteps to bfloat16, in which 999 is 1000; and with float32 given, all that goes
    into and out of the blocks to float32."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    _check_fsdp(plugin)
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (None,) * 3
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="across GPUs, but no GPU was found"):
        connect("fp32")
