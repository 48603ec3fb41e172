"""Measure the loss on held-out images, which are never trained on, at fixed draws, which are the same in every run.

So two runs are compared draw by draw: no part of the difference comes from different images, timesteps or noise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.latents import Draws, Normalization, draw_latents
from pipeline.loss import Objective
from pipeline.noise import NoiseProcess, noise_level
from pipeline.seeds import coordinate_seed
from pipeline.unet import LatentUNet

DRAWS = 1024  # each is an image, a timestep, noise, and a latent drawn from the posterior
_ROWS = 64  # per forward pass


class HeldOut:
    """Holds held-out latents and their fixed draws, made on the CPU so that they are the same on every device."""

    def __init__(self, moments: Tensor, labels: Tensor, *, noise: NoiseProcess, channels: int, cache: str) -> None:
        """Draw latents from `moments` `DRAWS V 2C h w` (or `C`, means only) of the images `drawn_images`.

        `labels` int64 `DRAWS` are their classes, below 0 for none. `cache` is the SHA-256 of the cache's manifest."""
        assert len(moments) == len(labels) == DRAWS
        self._noise, self._labels, self._cache = noise, labels, cache
        draws = heldout_draws(noise, (channels, *moments.shape[3:]))
        self._latents, self._added, self._times = draw_latents(moments, draws, channels), draws.noise, draws.times

    @torch.no_grad()
    def measure(self, model: LatentUNet, normalization: Normalization) -> dict[str, Any]:
        """Return, for the log, the mean squared error of `model` over all timesteps and at each of the `LEVELS` of
        noise, and the cache on which it was measured.

        Errors are weighted only by the density of the timesteps that the run draws, so they are comparable with the
        training loss of the weighting `plain`. They are computed in float32 whatever train.precision is, so that a
        comparison of runs in different precisions compares their weights and not rounding.
        """
        objective = Objective(model, self._noise)
        classes = torch.where(self._labels < 0, model.null_class, self._labels)
        columns = (self._latents, self._added, self._times, classes)
        errors = []
        for part in zip(*(column.split(_ROWS) for column in columns), strict=True):
            latents, *others = (column.to(model.device) for column in part)
            errors.append(objective(normalization.normalize(latents), *others)[1].cpu())
        times = self._times.double()
        weights, level = self._noise.timestep_density(times), noise_level(times)
        weighted = weights * torch.cat(errors).double()
        by_noise = level.bincount(weighted) / level.bincount(weights)
        return {
            "heldout_loss": float(weighted.sum() / weights.sum()),
            "heldout_loss_by_noise": by_noise.tolist(),
            "heldout_cache": self._cache,
        }


def drawn_images(count: int) -> NDArray[np.int64]:
    """Return the image index of each of the `DRAWS`: all `count` images in turn, or evenly spaced ones of more."""
    draws = np.arange(DRAWS)
    return draws % count if count < DRAWS else draws * count // DRAWS


def heldout_draws(noise: NoiseProcess, shape: tuple[int, ...]) -> Draws:
    """Return the fixed draws for latents of `shape` (`C h w`), on the CPU; each depends on its index alone.

    Timesteps are evenly spaced, so that every noise level has its share, and in an order that is independent of that of
    the images. The view is always the first, the image itself, and no label is dropped.
    """

    def generator(name: str) -> torch.Generator:
        return torch.Generator().manual_seed(coordinate_seed("heldout", name))

    places = torch.randperm(DRAWS, generator=generator("times"))
    return Draws(
        views=torch.zeros(DRAWS, dtype=torch.int64),
        posterior=torch.randn(DRAWS, *shape, generator=generator("posterior")),
        times=noise.timesteps_at((places + 0.5) / DRAWS),
        noise=torch.randn(DRAWS, *shape, generator=generator("noise")),
        dropped=torch.zeros(DRAWS, dtype=torch.bool),
    )
