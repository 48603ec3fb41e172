"""Checkpoints: whole or absent, verified, and as many as are asked for."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import multiprocessing
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import data.storage
from benchmarks.fuzz import run_state
from pipeline.training import checkpoint
from pipeline.training.checkpoint import (
    checkpoint_folders,
    checkpoint_path,
    load_training_state,
    newest_checkpoint,
    open_checkpoint,
    prune_checkpoints,
    save_averages,
    save_checkpoint,
    set_aside_newer,
)
from pipeline.unet import LatentUNet
from tests.helpers.checkpoints import Parts, flip_a_byte, lose_the_state, parts, trained
from tests.helpers.disks import Death, FullDisk, on_disk, use_disk, was_killed
from tests.helpers.models import build, draws, normals, scrambled
from tests.helpers.world import tree


def save(run: Path, images_seen: int) -> Path:
    save_checkpoint(run, **trained()._asdict(), state=run_state(images_seen))
    return checkpoint_path(run, images_seen)


def test_a_checkpoint_brings_back_weights_averages_and_optimizers(tmp_path: Path) -> None:
    before, after = trained(), parts(build(seed=1))
    save_checkpoint(tmp_path, **before._asdict(), state=run_state(6))
    checkpoint, skipped = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.images_seen, skipped) == (6, [])
    load_training_state(checkpoint, *after)
    for name, value in before.objective.state_dict().items():
        assert torch.equal(after.objective.state_dict()[name], value)
    for name, average in before.averages.items():
        for key, value in average.tensors.items():
            assert torch.equal(after.averages[name].tensors[key], value)
    assert not torch.equal(
        before.averages["ema"].tensors["conv_in.bias"], before.averages["ema_2"].tensors["conv_in.bias"]
    )
    for ours, theirs in zip(before.optimizers, after.optimizers, strict=True):
        expected, loaded = ours.state_dict()["state"], theirs.state_dict()["state"]
        assert expected.keys() == loaded.keys()
        for i, state in expected.items():
            assert state.keys() == loaded[i].keys()
            assert all(torch.equal(value, loaded[i][key]) for key, value in state.items())


def test_files_are_byte_for_byte_those_of_the_library(tmp_path: Path) -> None:
    """Of every type, of channels_last kernels, of numbers without a shape, of names beyond ASCII."""
    tensors = {
        f"{name} é {kind}": (normals(3, 4, 2, 2, seed=seed).contiguous(memory_format=torch.channels_last) * 9).to(kind)
        for name in "ba"
        for seed, kind in enumerate(checkpoint._DTYPES)
    }
    tensors |= {"step": torch.tensor(7.0), "empty": torch.zeros(0, 3)}
    expected = safetensors.torch.save({name: value.contiguous() for name, value in tensors.items()})
    assert b"".join(checkpoint.serialized(tensors)) == expected


def test_loaded_moments_lie_in_memory_as_their_parameters_do(tmp_path: Path) -> None:
    """Else the fused step on a CPU would take the moments of other weights."""
    after = parts(build(seed=1), kind="adamw")
    save_checkpoint(tmp_path, **parts(scrambled(), kind="adamw")._asdict(), state=run_state(3))
    before = parts(scrambled(), kind="adamw")
    drawn = draws()
    before.objective(normals(8, 4, 4, 4), drawn.noise, drawn.times, torch.arange(8) % 3)[0].backward()
    before.optimizers[0].step()
    save_checkpoint(tmp_path, **before._asdict(), state=run_state(6))
    checkpoint, _ = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    load_training_state(checkpoint, *after)
    for parameter, state in after.optimizers[0].state.items():
        assert state["exp_avg"].stride() == parameter.stride()


def test_the_average_is_a_model_folder_of_its_own(tmp_path: Path) -> None:
    average = trained().averages["ema"].tensors
    model = LatentUNet.from_pretrained(save(tmp_path, 6) / "ema")
    assert all(torch.equal(value, average[name]) for name, value in model.state_dict().items())


def test_a_checkpoint_is_safetensors_and_json_alone(tmp_path: Path) -> None:
    files = tree(save(tmp_path, 6))
    assert {Path(name).suffix for name in files} == {".safetensors", ".json"}
    hashed = json.loads(files["state.json"])["sha256"]
    assert hashed.keys() == files.keys() - {"state.json"}


def test_the_newest_checkpoints_by_images_seen_are_kept(tmp_path: Path) -> None:
    for images_seen in (9, 99, 100, 1_000_000_000, 1_000_000_001):
        save(tmp_path, images_seen)
        prune_checkpoints(tmp_path, keep=2, keep_every=0, interval=10**12, batch_size=3)
    assert [int(folder.name) for folder in checkpoint_folders(tmp_path)] == [1_000_000_000, 1_000_000_001]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1000000000", "1000000001"]


def test_every_nth_scheduled_checkpoint_stays(tmp_path: Path) -> None:
    """Every 10 images in batches of 3: 12, 21, 30, ...; a signal asked for those at 27 and 63."""
    for images_seen in (12, 21, 27, 30, 42, 51, 60, 63, 72, 81):
        save(tmp_path, images_seen)
        prune_checkpoints(tmp_path, keep=1, keep_every=2, interval=10, batch_size=3)
    assert [int(folder.name) for folder in checkpoint_folders(tmp_path)] == [21, 42, 60, 81]


def truncate(folder: Path) -> None:
    file = folder / "ema" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def lose_the_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def empty_the_state(folder: Path) -> None:
    (folder / "state.json").write_text("[]", encoding="utf-8")


def change_a_digit_of_the_state(folder: Path) -> None:
    file = folder / "state.json"
    file.write_text(
        file.read_text(encoding="utf-8").replace('"images_seen": 12', '"images_seen": 13'), encoding="utf-8"
    )


def turn_the_average_into_a_file(folder: Path) -> None:
    shutil.rmtree(folder / "ema")
    (folder / "ema").write_bytes(b"")


DAMAGE = [
    flip_a_byte, truncate, lose_the_state, lose_the_weights, empty_the_state, change_a_digit_of_the_state,
    turn_the_average_into_a_file,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_with_a_line(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    save(tmp_path, 6)
    damage(save(tmp_path, 12))
    checkpoint, skipped = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.images_seen == 6
    assert len(skipped) == 1
    assert str(tmp_path / "checkpoints" / "000000012") in skipped[0]


def test_where_every_checkpoint_is_damaged_there_is_none(tmp_path: Path) -> None:
    lose_the_state(save(tmp_path, 6))
    checkpoint, skipped = newest_checkpoint(tmp_path)
    assert checkpoint is None
    assert len(skipped) == 1


@pytest.mark.parametrize("file", ["state.json", "model.safetensors", "ema/config.json"])
@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.ESTALE, errno.EMFILE])
def test_a_disk_that_cannot_be_read_now_is_no_damage_and_stops_with_the_name_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, code: int
) -> None:
    save(tmp_path, 6)
    unreadable = save(tmp_path, 12) / file

    def failing(path: Path, *more: str) -> object:
        if path == unreadable:
            raise OSError(code, os.strerror(code))
        return open(path, *more)

    monkeypatch.setattr(data.storage, "open", failing, raising=False)
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        newest_checkpoint(tmp_path)
    assert (caught.value.errno, caught.value.filename) == (code, str(unreadable))


def test_a_block_of_a_file_that_cannot_be_read_stops_with_its_name(tmp_path: Path) -> None:
    file = save(tmp_path, 6) / "model.safetensors"
    file.unlink()
    file.symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match="Input/output error") as caught:
        newest_checkpoint(tmp_path)
    assert caught.value.filename == str(file)


def test_a_folder_of_checkpoints_that_cannot_be_listed_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 6)

    def denied(path: Path) -> list[str]:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "listdir", denied)
    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(PermissionError, match="checkpoints"):
        newest_checkpoint(tmp_path)


def test_what_stands_in_the_way_of_a_checkpoint_is_set_aside_and_never_deleted(tmp_path: Path) -> None:
    for images_seen in (6, 9, 12, 15):
        save(tmp_path, images_seen)
        made = trained()
        save_averages(tmp_path, model=made.objective.model, averages=made.averages, state=run_state(images_seen))
    for images_seen in (9, 12, 15):
        lose_the_state(checkpoint_path(tmp_path, images_seen))
    before = tree(tmp_path)
    for _ in range(2):  # the run went on from 6, with another checkpoint_every; the second time there is nothing left
        moved = set_aside_newer(tmp_path, 9)
    assert moved == []
    expected = {"checkpoints/000000009", "checkpoints/000000012", "checkpoints/000000015"}
    expected |= {"averages/000000012", "averages/000000015"}
    after = {}
    for name, content in before.items():
        folder = next((folder for folder in expected if name.startswith(folder)), None)
        after[name.replace(folder, f"{folder}.1") if folder else name] = content
    assert tree(tmp_path) == after
    save(tmp_path, 9)
    prune_checkpoints(tmp_path, keep=1, keep_every=0, interval=3, batch_size=3)
    checkpoint, skipped = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.images_seen, skipped) == (9, [])


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_every_file_has_the_mode_that_the_umask_gives(tmp_path: Path, umask: int) -> None:
    """safetensors writes files that nobody else can read: a second user of a run would take them for damaged."""
    before = os.umask(umask)
    try:
        save(tmp_path, 6)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert len(modes) == 5
    assert set(modes.values()) == {0o666 & ~umask}


def lose(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in tensors.items() if key != name}


def add(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {**tensors, f"{name}.more": tensors[name].clone()}


def shorten(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """To one value, which would be broadcast."""
    return {**tensors, name: tensors[name].flatten()[:1].clone()}


@pytest.mark.parametrize(("change", "words"), [(lose, "is missing"), (add, "another model"), (shorten, "shape [1]")])
@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("model.safetensors", "model.conv_in.bias"),
        ("model.safetensors", "uncertainty.weight"),
        ("ema/diffusion_pytorch_model.safetensors", "conv_in.bias"),
        ("ema_2/diffusion_pytorch_model.safetensors", "classes.weight"),
        ("optimizer.safetensors", "exp_avg.model.conv_in.bias"),
        ("optimizer.safetensors", "step.model.conv_in.bias"),
        ("optimizer.safetensors", "momentum_buffer.model.middle.blocks.0.mlp.0.weight"),
    ],
)
def test_tensors_that_are_missing_or_of_another_shape_are_refused(
    tmp_path: Path, file: str, name: str, change: Callable[..., dict[str, torch.Tensor]], words: str
) -> None:
    """They would keep their fresh values, or be broadcast."""
    checkpoint = open_checkpoint(save(tmp_path, 6))
    tensors = load_file(checkpoint.path / file)
    save_file(change(tensors, name), checkpoint.path / file)
    with pytest.raises(ValueError, match=re.escape(f"{checkpoint.path / file}: {name}")) as caught:
        load_training_state(checkpoint, *parts(build(seed=1)))
    assert words in str(caught.value)
    if file.startswith("ema/"):
        with pytest.raises(ValueError, match=re.escape(f"{checkpoint.path / file}: {name}")):
            checkpoint.ema_model()


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "ema_2/diffusion_pytorch_model.safetensors"]
)
def test_a_file_whose_hash_is_not_known_is_not_loaded(tmp_path: Path, name: str) -> None:
    checkpoint = open_checkpoint(save(tmp_path, 6))
    del checkpoint.state.sha256[name]
    with pytest.raises(ValueError, match=re.escape(f"{checkpoint.path / name}: state.json lists no such file")):
        load_training_state(checkpoint, *parts(build(seed=1)))


def test_files_that_somebody_put_into_a_checkpoint_are_not_loaded(tmp_path: Path) -> None:
    """An index of shards, for one, sent diffusers' loader to other files."""
    checkpoint = open_checkpoint(save(tmp_path, 6))
    weights = checkpoint.ema_weights()
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "zeros.safetensors")}
    folder = checkpoint.path / "ema"
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    save_file({name: torch.zeros_like(value) for name, value in weights.items()}, folder / "zeros.safetensors")
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    loaded = open_checkpoint(checkpoint.path).ema_model().state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in weights.items())


def test_an_unfinished_checkpoint_is_never_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 6)
    monkeypatch.setattr(
        "pipeline.training.checkpoint.publish_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 12)
    checkpoint, skipped = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.images_seen, skipped) == (6, [])


# A disk that is full, a process that is killed, and weights that are dealt out among processes.


def save_over(run: Path, made: Parts) -> None:
    save_checkpoint(run, **made._asdict(), state=run_state(12))
    prune_checkpoints(run, keep=1, keep_every=0, interval=6, batch_size=3)


def assert_whole(run: Path, known: dict[int, dict[str, bytes]]) -> None:
    checkpoint, skipped = newest_checkpoint(run)
    assert checkpoint is not None
    assert not [line for line in skipped if "000000012" not in line]
    assert tree(checkpoint.path) == known[checkpoint.images_seen]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("kind", ["full", "killed"])
def test_one_that_is_kept_is_whole_wherever_saving_the_next_one_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    made = trained()
    save(tmp_path / "before", 6)
    shutil.copytree(tmp_path / "before", tmp_path / "after")
    save_over(tmp_path / "after", made)
    assert [folder.name for folder in checkpoint_folders(tmp_path / "after")] == ["000000012"]
    known = {
        images: tree(tmp_path / name / "checkpoints" / f"{images:09d}")
        for images, name in ((6, "before"), (12, "after"))
    }
    for n in range(1, 1000):
        run = tmp_path / f"{kind} {n}"
        shutil.copytree(tmp_path / "before", run)
        with monkeypatch.context() as patch:
            if kind == "full":
                disk = FullDisk(n, for_good=True)
                use_disk(patch, disk)
                with contextlib.suppress(OSError):
                    save_over(run, made)
                over = disk.count < n
            else:
                over = not was_killed(on_disk(functools.partial(save_over, run, made), Death(n)))
        assert_whole(run, known)
        if over:
            break
        if newest_checkpoint(run)[0].images_seen == 6:  # the same run goes on
            save_over(run, made)
        prune_checkpoints(run, keep=1, keep_every=0, interval=6, batch_size=3)
        assert tree(run / "checkpoints") == tree(tmp_path / "after" / "checkpoints")
    assert n > 30


def dealt_out(rank: int, folder: Path) -> None:
    """In one of two processes: train sharded weights, save them, and load them into others."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    made, again = (trained(deal=lambda objective: fully_shard(objective, mesh=mesh), steps=n) for n in (2, 0))
    save_checkpoint(folder, **made._asdict(), state=run_state(6), writing=rank == 0)
    dist.barrier()
    load_training_state(open_checkpoint(folder / "checkpoints" / "000000006"), *again)
    save_checkpoint(folder / "again", **again._asdict(), state=run_state(6), writing=rank == 0)
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_sharded_weights_are_saved_whole_and_loaded_in_shares(tmp_path: Path) -> None:
    """FSDP2 on two gloo processes; both see the same batches, so what they learn is what one process learns."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=dealt_out, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert tree(tmp_path / "again" / "checkpoints") == tree(tmp_path / "checkpoints")
    save_checkpoint(tmp_path / "one", **trained(kind="adamw")._asdict(), state=run_state(6))
    for file in ("model.safetensors", "optimizer.safetensors", "ema/diffusion_pytorch_model.safetensors"):
        one, two = (load_file(run / "checkpoints" / "000000006" / file) for run in (tmp_path / "one", tmp_path))
        assert one.keys() == two.keys()
        assert all(torch.allclose(two[name], value, rtol=1e-3, atol=1e-5) for name, value in one.items()), file
