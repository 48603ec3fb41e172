"""Reconstruct an average of the weights of any width from snapshots of the two widths that a run tracked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from data.storage import publish, read, set_aside
from pipeline.ema import gamma_of, reconstruction_weights, weighted_sum
from pipeline.training.checkpoint import (
    AVERAGES,
    EMA,
    Checkpoint,
    checkpoint_folders,
    checkpoint_path,
    open_checkpoint,
    save_reconstruction,
)
from pipeline.training.metrics import LOG
from pipeline.training.run_folder import CONFIG, MARKER, check_run_folder


def ema(run: Path, width: float, images: int | None, to: Path | None) -> Path:
    """Write the power-function average of `width` at `images` seen (default: at the last snapshot) as a new run.

    Return the folder of that run, which sample, decode and `train.init` accept."""
    gamma = gamma_of(width)
    folders = checkpoint_folders(run, AVERAGES)
    if not folders:
        raise ValueError(f"{run}/{AVERAGES}: no snapshots: only runs with train.ema=power keep them")
    target = to or run.with_name(f"{run.resolve().name}-ema{width:g}" + ("" if images is None else f"-{images}"))
    images = int(folders[-1].name) if images is None else images
    if images not in [int(folder.name) for folder in folders]:
        known = ", ".join(str(int(folder.name)) for folder in folders)
        raise ValueError(f"--images {images}: there is no snapshot at that number of images: choose from {known}")
    _check_target(target, images)
    check_run_folder(target, "--to")
    snapshots = list(_snapshots([folder for folder in folders if int(folder.name) <= images]))
    publish(target / MARKER, b"")
    _reconstruct(target, snapshots, width, gamma)
    _copy_config(run / CONFIG, target / CONFIG)
    print(f"ema: width {width:g} at {images:,} images from {len(snapshots)} snapshots of two averages: {target}")
    return target


def _check_target(target: Path, images: int) -> None:
    """Raise ValueError if a run was trained in `target`, or if it holds a later average, which would be sampled."""
    if (target / LOG).exists():
        raise ValueError(f"--to {target}: a run was trained there: choose another folder")
    if later := [folder.name for folder in checkpoint_folders(target) if int(folder.name) > images]:
        raise ValueError(f"--to {target}: it holds an average at {int(later[-1]):,} images: choose another folder")


def _copy_config(source: Path, target: Path) -> None:
    if not source.exists() or (target.exists() and read(target) == read(source)):
        return
    if target.exists():
        print(f"ema: {target} had other contents: it is now {set_aside(target).name}", flush=True)
    publish(target, read(source))


def _snapshots(folders: list[Path]) -> Iterator[Checkpoint]:
    """Yield the intact snapshots and print which are skipped; the last one must be intact."""
    for folder in folders:
        try:
            yield open_checkpoint(folder)
        except ValueError as error:
            if folder == folders[-1]:
                raise
            print(f"ema: skipped {error}", flush=True)


def _reconstruct(target: Path, snapshots: list[Checkpoint], width: float, gamma: float) -> None:
    sources = [
        (snapshot, name, gamma_of(tracked))
        for snapshot in snapshots
        for name, tracked in zip(EMA, snapshot.state.widths, strict=True)
    ]
    last = snapshots[-1]
    weights = reconstruction_weights([(s.images_seen, g) for s, _, g in sources], last.images_seen, gamma).tolist()
    loaded = [snapshot.ema_weights(name) for snapshot, name, _ in sources]  # memory-mapped
    tensors = {key: weighted_sum([each[key] for each in loaded], weights) for key in loaded[0]}
    state = last.state.changed(widths=(width,))
    save_reconstruction(checkpoint_path(target, last.images_seen), last, tensors, state)
