"""A quick score while a run trains: on request, of the average, and without any effect on what is learnt."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import pipeline.training.plots
import pipeline.training.quick_score
import pipeline.training.trainer
from tests.helpers.networks import Means
from tests.helpers.world import World, succeed, weights_of


@pytest.fixture(autouse=True)
def _quick_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.training.quick_score, "open_network", lambda name, weights, device: Means())
    monkeypatch.setattr(pipeline.training.quick_score, "SCORED", 40)


def lines_of(run: Path, name: str = "KD-Means") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if name in line]


def train(world: World, run: Path, *overrides: str) -> str:
    return succeed("train", world.config, run, "train.eval_every=16", "sample.batch_size=16", *overrides)


def test_a_score_is_logged_when_it_is_due_and_the_run_learns_the_same(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.training.trainer, "draw_curves", pipeline.training.plots.draw_curves)
    said = train(world, tmp_path / "run")
    lines = lines_of(tmp_path / "run")
    assert [line["images_seen"] for line in lines] == [16, 32, 48]
    assert all(math.isfinite(line["KD-Means"]) for line in lines)
    assert all(line["score_interval"][0] < line["KD-Means"] < line["score_interval"][1] for line in lines)
    assert "quick score: 40 samples against 11 images" in said
    assert "KD-Means x1000" in said
    assert (tmp_path / "run" / "curves.png").is_file()
    plain, scored = (weights_of(run, 48) for run in (world.run, tmp_path / "run"))
    assert all(torch.equal(plain[name], scored[name]) for name in plain)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "000000048")
    train(world, tmp_path / "run")
    assert lines_of(tmp_path / "run") == lines


def test_no_score_is_asked_for_by_default(world: World) -> None:
    assert not lines_of(world.run)
