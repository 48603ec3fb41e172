"""Tiny trained models as they are saved, and damage to what was saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.optim import Optimizer

from pipeline.ema import Average
from pipeline.loss import Objective
from pipeline.optim import make_optimizers
from pipeline.training.checkpoint import AVERAGES, CHECKPOINTS, newest_checkpoint, save_averages
from pipeline.unet import LatentUNet
from tests.helpers.models import FLOW, draws, normals, scramble, scrambled


class Parts(NamedTuple):
    """What a checkpoint holds."""

    objective: Objective
    averages: dict[str, Average]
    optimizers: list[Optimizer]


def parts(model: LatentUNet, kind: str = "muon", deal: Callable[[Objective], object] | None = None) -> Parts:
    objective = Objective(model, FLOW, "learned")
    if deal:
        deal(objective)
    else:
        objective.to(memory_format=torch.channels_last)
    averages = {name: Average(model, lambda seen, batch, w=w: w) for name, w in (("ema", 0.5), ("ema_2", 0.1))}
    return Parts(
        objective,
        averages,
        make_optimizers(objective, kind=kind, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1),
    )


def trained(steps: int = 2, kind: str = "muon", deal: Callable[[Objective], object] | None = None) -> Parts:
    """A tiny model after some steps, its averages and its optimizers."""
    made = parts(scrambled(), "adamw", deal) if deal else parts(scrambled(), kind)
    for step in range(steps):
        drawn = draws(step=step)
        loss, _ = made.objective(normals(8, 4, 4, 4, seed=step), drawn.noise, drawn.times, torch.arange(8) % 3)
        loss.backward()
        for optimizer in made.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for average in made.averages.values():
            average.update(images_seen=3 * (step + 1), batch_size=3)
    return made


def scrambled_run(run: Path, folder: Path) -> Path:
    """A run in `folder` with the newest state of `run` and random weights, which do not ignore any of their input."""
    checkpoint, _ = newest_checkpoint(run)
    assert checkpoint
    model = checkpoint.ema_model()
    scramble(model)
    average = Average(model, lambda seen, batch: 0.5)
    save_averages(folder, model=model, averages={"ema": average}, state=checkpoint.state)
    (folder / AVERAGES).rename(folder / CHECKPOINTS)
    return folder


def flip_a_byte(folder: Path) -> None:
    file = folder / "optimizer.safetensors"
    payload = bytearray(file.read_bytes())
    payload[-1] ^= 1
    file.write_bytes(payload)


def lose_the_state(folder: Path) -> None:
    (folder / "state.json").unlink()
