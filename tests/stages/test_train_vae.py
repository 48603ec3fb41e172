"""How the bundled VAE is made, on a few images and steps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from data.sources.files import ImageFiles
from data.sources.heldout import split
from pipeline.vae_init import SIGMA
from stages import train_vae as stage

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


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    sizes = {"SOLIDS": 8, "SOLIDS_BATCH": 1, "PHOTO_BATCH": 2, "MEASURED": 4, "REFERENCE": 4, "CHANNELS": (8, 8, 16)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in sizes.items():
            patch.setattr(stage, name, value)
        yield


@pytest.fixture(scope="module")
def trained(photos: Path, small: None) -> tuple[stage.VaeTraining, list[bool]]:
    """After all steps, and whether each of them moved the discriminator."""
    training = stage.VaeTraining(photos, steps=STEPS, seed=0)
    moved = []
    for number in range(STEPS):
        before = [p.detach().clone() for p in training.discriminator.parameters()]
        training.step(number)
        now = zip(training.discriminator.parameters(), before, strict=True)
        moved.append(any((p != old).any().item() for p, old in now))
    return training, moved


def test_it_writes_a_plain_autoencoder_whose_bytes_are_a_function_of_the_seed(
    photos: Path, tmp_path: Path, trained: tuple[stage.VaeTraining, list[bool]]
) -> None:
    stage.train_vae(photos, tmp_path, steps=STEPS, seed=0)
    model = AutoencoderKL.from_pretrained(tmp_path)
    for name, tensor in trained[0].averaged().state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert model.encode(torch.zeros(1, 3, 32, 32)).latent_dist.mean.shape == (1, stage.LATENT_CHANNELS, 8, 8)
    assert json.loads((tmp_path / "config.json").read_text())["scaling_factor"] > 0


def test_held_out_photographs_are_those_of_the_configs_and_never_drawn(
    photos: Path, trained: tuple[stage.VaeTraining, list[bool]]
) -> None:
    kept, held_out = split(ImageFiles(str(photos), image_size=32), 0.1)
    training, _ = trained
    assert len(training.photos) == len(kept.keys)
    assert len(held_out.keys) > 0
    seen = {image.numpy().tobytes() for image in training.photos}
    assert not any(image.numpy().tobytes() in seen for image in training.judged["photographs"].images)


def test_the_last_part_alone_moves_the_discriminator(trained: tuple[stage.VaeTraining, list[bool]]) -> None:
    training, moved = trained
    assert moved == [number / STEPS >= stage.SHARP for number in range(STEPS)]
    assert moved[0] < moved[-1]
    assert not any(p.grad is not None for p in training.backbone.parameters())


def test_muon_leaves_the_anchors_where_they_are(trained: tuple[stage.VaeTraining, list[bool]]) -> None:
    """The first two outputs of a convolution before a norm are constants that training must not move."""
    vae = trained[0].vae
    conv, inner = vae.encoder.conv_in, vae.encoder.mid_block.resnets[0].conv1
    constant = SIGMA * (conv.out_channels / 2) ** 0.5
    torch.testing.assert_close(conv.bias[:2], torch.tensor([constant, -constant]))
    assert not conv.weight[:2].any()
    assert not inner.weight[:2].any()
    assert not inner.weight[:, :2].any()
