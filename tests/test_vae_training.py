"""How the bundled VAE is made, on a few images and steps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from data.files import ImageFiles
from data.heldout import split
from pipeline.anchor import SIGMA
from stages import vae as stage

STEPS = 4


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of noise, 32x32, of two classes."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for kind in ("a", "b"):
        (folder / kind).mkdir()
        for number in range(20):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / kind / f"{number}.png")
    return folder


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"SOLIDS": 8, "SOLIDS_BATCH": 1, "PHOTO_BATCH": 2, "MEASURED": 4, "REFERENCE": 4, "CHANNELS": (8, 8, 16)}
    for name, value in sizes.items():
        monkeypatch.setattr(stage, name, value)


def test_it_writes_a_plain_autoencoder_whose_bytes_are_a_function_of_the_seed(photos: Path, tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        stage.train_vae(photos, tmp_path / name, steps=STEPS, seed=seed)
    one, again, other = (
        (tmp_path / name / "diffusion_pytorch_model.safetensors").read_bytes() for name in ("one", "again", "other")
    )
    assert one == again != other
    model = AutoencoderKL.from_pretrained(tmp_path / "one")
    assert model.encode(torch.zeros(1, 3, 32, 32)).latent_dist.mean.shape == (1, stage.LATENT_CHANNELS, 8, 8)
    assert json.loads((tmp_path / "one" / "config.json").read_text())["scaling_factor"] > 0


def test_held_out_photographs_are_those_of_the_configs_and_never_drawn(photos: Path) -> None:
    training = stage.VaeTraining(photos, steps=STEPS, seed=0)
    kept, held_out = split(ImageFiles(str(photos), image_size=32), 0.1)
    assert len(training.photos) == len(kept.keys)
    seen = {image.numpy().tobytes() for image in training.photos}
    assert len(held_out.keys) > 0
    judged = training.judged["photographs"].images
    assert not any(image.numpy().tobytes() in seen for image in judged)


def test_the_last_part_moves_the_discriminator_and_the_first_does_not(photos: Path) -> None:
    training = stage.VaeTraining(photos, steps=STEPS, seed=0)
    before = [p.detach().clone() for p in training.discriminator.parameters()]
    moved = []
    for number in range(STEPS):
        training.step(number)
        now = zip(training.discriminator.parameters(), before, strict=True)
        moved.append(any((p != old).any().item() for p, old in now))
    assert moved == [False, False, False, True]
    assert not any(p.grad is not None and p.grad.any() for p in training.backbone.parameters())


def test_muon_leaves_the_anchors_where_they_are(photos: Path) -> None:
    """The first two outputs of a convolution before a norm are constants that training must not move."""
    training = stage.VaeTraining(photos, steps=STEPS, seed=0)
    for number in range(STEPS):
        training.step(number)
    conv = training.vae.encoder.conv_in
    assert not conv.weight[:2].any()
    constant = SIGMA * (conv.out_channels / 2) ** 0.5
    torch.testing.assert_close(conv.bias[:2], torch.tensor([constant, -constant]))
    inner = training.vae.encoder.mid_block.resnets[0].conv1
    assert not inner.weight[:2].any()
    assert not inner.weight[:, :2].any()
