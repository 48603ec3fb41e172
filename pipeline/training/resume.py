"""Find what a run starts from: its own newest checkpoint, or the averaged weights of another run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from data.cache.manifest import Manifest
from data.text import brief
from pipeline.config import Config, Model, Train
from pipeline.latents import Normalization
from pipeline.optim import lr_at, lr_breakpoints
from pipeline.training.checkpoint import (
    Checkpoint,
    checkpoint_at,
    checkpoint_path,
    newest_checkpoint,
    open_checkpoint,
)
from pipeline.training.distributed import computer
from pipeline.training.setup import ema_widths, normalization_of
from pipeline.training.state import CacheIdentity
from pipeline.unet import LatentUNet

_FIXED = ("batch_size", "seed", "optimizer", "weighting")  # settings that must not change when a run resumes
# settings that do not affect the weights; and the precision, which is recorded with the device
_UNRECORDED = {"tracker", "keep", "keep_every", "preview_every", "eval_every", "precision"}
_LEARNING_RATE = ("lr", "schedule", "images", "warmup", "decay")


def find_checkpoint(run: Path, accelerator: Accelerator) -> Checkpoint | None:
    """Open the newest intact checkpoint of a run, or return None if it has no checkpoint.

    Only the main process verifies hashes; the others open the checkpoint that it found.
    """
    found = torch.zeros((), dtype=torch.int64, device=accelerator.device)
    checkpoint = None
    if accelerator.is_main_process:
        checkpoint, skipped = newest_checkpoint(run)
        for line in skipped:
            print(f"train: skipped {line}", flush=True)
        if skipped and not checkpoint:
            raise ValueError(
                f"{run}/checkpoints: no intact checkpoint ({skipped[0]}): move the folder away to start from scratch"
            )
        found += checkpoint.images_seen if checkpoint else 0
    images_seen = int(accelerator.reduce(found, "sum"))
    if images_seen and not checkpoint:
        folder = checkpoint_path(run, images_seen)
        if not folder.exists():
            raise ValueError(f"{folder}: not found, but the first process has it: --run must be on a shared disk")
        checkpoint = open_checkpoint(folder, verify=False)
    if checkpoint and not checkpoint.resumable:
        raise ValueError(
            f"{checkpoint.path}: holds averaged weights only, made by `latentmill ema`: choose another --run"
        )
    return checkpoint


def check_resumable(checkpoint: Checkpoint, config: Config, manifest: Manifest) -> None:
    """Raise a ValueError that names what differs if `checkpoint` cannot be resumed with this config and cache."""
    state, train = checkpoint.state, config.train
    cached, cache = (each.model_dump(mode="json") for each in (state.cache, CacheIdentity.of(manifest)))
    fixed = [
        *_model_pairs(checkpoint, config),
        *((f"noise.{name}", getattr(state.noise, name), value) for name, value in config.noise.model_dump().items()),
        ("vae", state.vae.weights_sha256, manifest.vae.weights_sha256),
        ("data.image_size", state.image_size, manifest.image_size),
        *((f"train.{name}", state.train[name], getattr(train, name)) for name in _FIXED),
        ("train.ema and ema_widths", list(state.widths), list(ema_widths(config))),
    ]
    of_latents = [
        ("classes", list(state.classes), list(manifest.classes)),
        *((f"cache's {name}", cached[name], value) for name, value in cache.items() if name != "sha256"),
        ("train.normalization", *map(asdict, (state.normalization, normalization_of(config, manifest, checkpoint)))),
        ("cache's manifest", cached["sha256"], cache["sha256"]),
    ]
    for name, old, new in fixed + of_latents:
        if old != new:
            way_out = "choose another --run"
            if (name, old, new) in of_latents:
                way_out += f", with train.init={checkpoint.path.parents[1]} to start from the weights of this one"
            values = f"is {brief(old)}, this run has {brief(new)}"
            raise ValueError(f"{checkpoint.path}: its {name} {values}: {way_out}")


def settings_of(train: Train, access: str) -> dict[str, Any]:
    """Return what a checkpoint records of the train section, with the `access` that auto was resolved to."""
    return {**train.model_dump(mode="json", exclude=_UNRECORDED), "access": access}


def changes_since(checkpoint: Checkpoint, train: Train, access: str, accelerator: Accelerator) -> list[str]:
    """Return a line for each kind of change since `checkpoint`: settings, learning rate, and machine or versions."""
    lines, before, now = [], checkpoint.state.train, settings_of(train, access)
    if changed := _changed(before, now):
        lines.append(f"changed since this checkpoint: {changed}")
    if any(before[name] != now[name] for name in _LEARNING_RATE):
        lines.append(_learning_rate(checkpoint.images_seen, before, now))
    before, now = checkpoint.state.computer, computer(accelerator)
    if changed := _changed(before, now):
        # a GPU's random numbers depend on its number of threads, which differs between models of GPU
        other = ", other noise" if before["device"] != now["device"] else ""
        lines.append(f"{changed}: same images in the same order{other}, but bits may differ")
    return lines


def _changed(before: dict[str, Any], now: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {before.get(name)} -> {value}" for name, value in now.items() if before.get(name) != value
    )


def _learning_rate(images_seen: int, before: dict[str, Any], now: dict[str, Any]) -> str:
    """Describe the learning rate of the last step and from now on, in words."""
    was, is_ = ({"peak": each["lr"], **{n: each[n] for n in _LEARNING_RATE[1:]}} for each in (before, now))
    rate = lr_at(images_seen - now["batch_size"], **was)
    parts = [f"learning rate ({now['schedule']}): it was {rate:.2g}"]
    for place, following in lr_breakpoints(images_seen, **is_):
        if f"{following:.2g}" != f"{rate:.2g}":
            parts.append(f"{'rises' if following > rate else 'falls'} to {following:.2g} at {place:,}")
        elif place > images_seen:
            parts.append(f"stays there until {place:,}")
        rate = following
    return ", ".join(parts) + " images"


def load_init(model: LatentUNet, config: Config, manifest: Manifest) -> tuple[Normalization, str]:
    """Load the averaged weights of `train.init`, a run or a checkpoint, into `model`.

    Return the normalisation of the latents that they were trained on, and a text that says what was loaded. If the list
    of classes differs, only the null class keeps its embedding. ValueError if the model, the noise process or the VAE
    differ.
    """
    source = config.train.init
    assert source
    checkpoint, skipped = checkpoint_at(source, "train.init")
    state = checkpoint.state
    pairs = [pair for pair in _model_pairs(checkpoint, config) if pair[0] != "model.dropout"]
    pairs += [
        (f"noise.{name}", getattr(state.noise, name), getattr(config.noise, name))
        for name in ("schedule", "prediction", "zero_terminal_snr")
    ]
    pairs.append(("vae", state.vae.weights_sha256, manifest.vae.weights_sha256))
    if config.model.bottleneck == "transformer":  # it has learnt an embedding for every position
        pairs.append(("size of latents", checkpoint.model_config()["sample_size"], manifest.shape[1]))
    for name, old, new in pairs:
        if old != new:
            raise ValueError(f"train.init: {checkpoint.path}: its {name} is {old}, this run has {new}")
    weights = checkpoint.ema_weights()
    line = f"starting from the averaged weights and the normalisation of {checkpoint.path}"
    if state.classes != manifest.classes:
        table = model.classes.weight.detach().clone()
        table[-1] = weights["classes.weight"][-1]
        weights["classes.weight"] = table
        line += f"; {len(manifest.classes)} classes, not its {len(state.classes)}: new class embeddings"
    model.load_state_dict(weights)
    return checkpoint.normalization, "".join(f"skipped {each}\n" for each in skipped) + line


def _model_pairs(checkpoint: Checkpoint, config: Config) -> list[tuple[str, Any, Any]]:
    stored = checkpoint.model_config()
    values = config.model.model_dump(mode="json")
    # a checkpoint that is older than a key was made with its default
    return [(f"model.{name}", stored.get(name, Model.model_fields[name].default), values[name]) for name in values]
