"""What a run goes on from: its newest checkpoint, or the averaged weights of another run."""

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
from pipeline.optim import lr_at, lr_course
from pipeline.training.checkpoint import Checkpoint, checkpoint_path, newest_checkpoint, open_checkpoint
from pipeline.training.distributed import computer
from pipeline.training.setup import ema_widths, normalization_of
from pipeline.training.state import CacheIdentity
from pipeline.unet import LatentUNet

_FIXED = ("batch_size", "seed", "optimizer", "weighting")  # settings that a run keeps to its end
# settings that no weight depends on; and the precision, which is known only with the device
_UNRECORDED = {"tracker", "keep", "keep_every", "preview_every", "eval_every", "precision"}
_LEARNING_RATE = ("lr", "schedule", "images", "warmup", "decay")


def find_checkpoint(run: Path, accelerator: Accelerator) -> Checkpoint | None:
    """The newest whole checkpoint of a run, if it has any: the main process verifies hashes, the others follow it."""
    found = torch.zeros((), dtype=torch.int64, device=accelerator.device)
    checkpoint = None
    if accelerator.is_main_process:
        checkpoint, passed_over = newest_checkpoint(run)
        for line in passed_over:
            print(f"train: passed over {line}", flush=True)
        if passed_over and not checkpoint:
            raise ValueError(f"{run}/checkpoints: none is whole ({passed_over[0]}): move the folder away to start anew")
        found += checkpoint.images_seen if checkpoint else 0
    images_seen = int(accelerator.reduce(found, "sum"))
    if images_seen and not checkpoint:
        folder = checkpoint_path(run, images_seen)
        if not folder.exists():
            raise ValueError(f"{folder} is not there, but the first process has it: --run must be on a shared disk")
        checkpoint = open_checkpoint(folder, verify=False)
    if checkpoint and not checkpoint.resumable:
        raise ValueError(f"{checkpoint.path} holds an average alone, made by `latentmill ema`: choose another --run")
    return checkpoint


def check_resumable(checkpoint: Checkpoint, config: Config, manifest: Manifest) -> None:
    """ValueError when `checkpoint` cannot go on under this config and cache, naming what differs."""
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
                way_out += f"; with train.init={checkpoint.path.parents[1]} it begins with the weights of this one"
            values = f"is {brief(old)}, this run has {brief(new)}"
            raise ValueError(f"{checkpoint.path}: its {name} {values}: {way_out}")


def settings_of(train: Train, access: str) -> dict[str, Any]:
    """What a checkpoint records of the train section, with the `access` that auto has become."""
    return {**train.model_dump(mode="json", exclude=_UNRECORDED), "access": access}


def changes_since(checkpoint: Checkpoint, train: Train, access: str, accelerator: Accelerator) -> list[str]:
    """A line for the settings that have changed since `checkpoint`, one for what the learning rate does now, and one
    for the machine and the versions; none where nothing has."""
    lines, before, now = [], checkpoint.state.train, settings_of(train, access)
    if changed := _changed(before, now):
        lines.append(f"changed since this checkpoint: {changed}")
    if any(before[name] != now[name] for name in _LEARNING_RATE):
        lines.append(_learning_rate(checkpoint.images_seen, before, now))
    before, now = checkpoint.state.computer, computer(accelerator)
    if changed := _changed(before, now):
        # a generator on a GPU deals its numbers out among as many threads as that kind of GPU has
        other = ", other noise" if before["device"] != now["device"] else ""
        lines.append(f"{changed}: same images in the same order{other}, but bits may differ")
    return lines


def _changed(before: dict[str, Any], now: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {before.get(name)} -> {value}" for name, value in now.items() if before.get(name) != value
    )


def _learning_rate(images_seen: int, before: dict[str, Any], now: dict[str, Any]) -> str:
    """What it was in the last step and how it goes on, in words."""
    was, is_ = ({"peak": each["lr"], **{n: each[n] for n in _LEARNING_RATE[1:]}} for each in (before, now))
    rate = lr_at(images_seen - now["batch_size"], **was)
    parts = [f"learning rate ({now['schedule']}): it was {rate:.2g}"]
    for place, following in lr_course(images_seen, **is_):
        if f"{following:.2g}" != f"{rate:.2g}":
            parts.append(f"{'rises' if following > rate else 'falls'} to {following:.2g} at {place:,}")
        elif place > images_seen:
            parts.append(f"stays so until {place:,}")
        rate = following
    return ", ".join(parts) + " images"


def begin_with(model: LatentUNet, config: Config, manifest: Manifest) -> tuple[Normalization, str]:
    """Load the averaged weights of `train.init`, a run or a checkpoint, into `model`; the normalisation of the latents
    that they know, and what was done, in one line.

    Another list of classes has a new table of classes, but for the null class. ValueError where the model, the noise
    process or the VAE differ.
    """
    source = config.train.init
    assert source
    passed_over: list[str] = []
    if (source / "state.json").is_file():
        checkpoint: Checkpoint | None = open_checkpoint(source)
    else:
        checkpoint, passed_over = newest_checkpoint(source)
    if not checkpoint:
        raise ValueError(f"train.init: no whole checkpoint in {source}")
    state = checkpoint.state
    pairs = [pair for pair in _model_pairs(checkpoint, config) if pair[0] != "model.dropout"]
    pairs += [
        (f"noise.{name}", getattr(state.noise, name), getattr(config.noise, name))
        for name in ("schedule", "prediction", "zero_terminal_snr")
    ]
    pairs.append(("vae", state.vae.weights_sha256, manifest.vae.weights_sha256))
    if config.model.bottleneck == "transformer":  # which has learnt a position for every token
        pairs.append(("size of latents", checkpoint.model_config()["sample_size"], manifest.shape[1]))
    for name, old, new in pairs:
        if old != new:
            raise ValueError(f"train.init: {checkpoint.path}: its {name} is {old}, this run has {new}")
    weights, line = checkpoint.ema_weights(), f"beginning with averaged weights and normalisation of {checkpoint.path}"
    if state.classes != manifest.classes:
        table = model.classes.weight.detach().clone()
        table[-1] = weights["classes.weight"][-1]
        weights["classes.weight"] = table
        line += f"; {len(manifest.classes)} classes, not its {len(state.classes)}: their table is new"
    model.load_state_dict(weights)
    said = "".join(f"passed over {each}\n" for each in passed_over) + line
    return checkpoint.normalization, said


def _model_pairs(checkpoint: Checkpoint, config: Config) -> list[tuple[str, Any, Any]]:
    stored = checkpoint.model_config()
    values = config.model.model_dump(mode="json")
    # a key that is newer than the checkpoint had its default then
    return [(f"model.{name}", stored.get(name, Model.model_fields[name].default), values[name]) for name in values]
