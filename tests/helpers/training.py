"""Runs that are interrupted, and data that spoils one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data.loader import LatentLoader
from pipeline.config import Config
from pipeline.training.trainer import Trainer
from stages.train import train


def interrupt(config: Config, run: Path, *, at_step: int) -> None:
    """Train until `at_step` steps are done."""

    def fail(trainer: Trainer) -> None:
        if trainer.step == at_step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, run, fail)


def poison(monkeypatch: pytest.MonkeyPatch, *, step: int, place: int) -> None:
    """From `step` on, the latents of one image of a batch are NaN, as those of no cache are."""
    batch = LatentLoader.batch

    def poisoned(self: LatentLoader, number: int) -> Any:
        read = batch(self, number)
        if number == step:
            read.moments[place] = float("nan")
        return read

    monkeypatch.setattr(LatentLoader, "batch", poisoned)
