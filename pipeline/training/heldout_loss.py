"""The loss on held-out images, which are never trained on, at draws that are the same in every run.

So two runs are compared pair by pair: the difference of their losses has no noise of other images, timesteps or noise.
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

DRAWS = 1024  # each of an image, a timestep, its noise, and a latent of its posterior
_ROWS = 64  # that the model takes at once


class HeldOut:
    """Held-out latents, and what is drawn for each of them: on the CPU, so that every device has the same."""

    def __init__(self, moments: Tensor, labels: Tensor, *, noise: NoiseProcess, channels: int, cache: str) -> None:
        """`moments` `DRAWS V 2C h w` (or `C`, means alone) and `labels` int64 `DRAWS` of the images `drawn_images`, of
        `cache`, the SHA-256 of its manifest. Labels below 0 are no class."""
        assert len(moments) == len(labels) == DRAWS
        self._noise, self._labels, self._cache = noise, labels, cache
        draws = heldout_draws(noise, (channels, *moments.shape[3:]))
        self._latents, self._added, self._times = draw_latents(moments, draws, channels), draws.noise, draws.times

    @torch.no_grad()
    def measure(self, model: LatentUNet, normalization: Normalization) -> dict[str, Any]:
        """For the log: the mean squared error of `model` over all timesteps and at each of the `LEVELS` of noise, and
        the cache on which it was measured.

        Errors are plain and weighted by the density of the timesteps that the run draws: they compare with the training
        loss of the weighting `plain`. In float32 whatever train.precision is: of runs of different precision, weights
        are compared and not roundings.
        """
        objective = Objective(model, self._noise)
        classes = torch.where(self._labels < 0, model.null_class, self._labels)
        columns = (self._latents, self._added, self._times, classes)
        errors = []
        for part in zip(*(column.split(_ROWS) for column in columns), strict=True):
            latents, *others = (column.to(model.device) for column in part)
            errors.append(objective(normalization.normalize(latents), *others)[1].cpu())
        times = self._times.double()
        weights, level = self._noise.time_density(times), noise_level(times)
        weighted = weights * torch.cat(errors).double()
        by_noise = level.bincount(weighted) / level.bincount(weights)
        return {
            "heldout_loss": float(weighted.sum() / weights.sum()),
            "heldout_loss_by_noise": by_noise.tolist(),
            "heldout_cache": self._cache,
        }


def drawn_images(count: int) -> NDArray[np.int64]:
    """The image of each of the `DRAWS`, of `count` images: all of them in turn or, of more, some at equal distances."""
    draws = np.arange(DRAWS)
    return draws % count if count < DRAWS else draws * count // DRAWS


def heldout_draws(noise: NoiseProcess, shape: tuple[int, ...]) -> Draws:
    """What is drawn for latents of `shape` (`C h w`), on the CPU: functions of the place in a list of `DRAWS` alone.

    Timesteps are at equal distances, so that every level of noise has its share, in an order that has nothing to do
    with that of the images. Of the views it is the first, the image itself, and no label is dropped.
    """

    def generator(name: str) -> torch.Generator:
        return torch.Generator().manual_seed(coordinate_seed("heldout", name))

    places = torch.randperm(DRAWS, generator=generator("times"))
    return Draws(
        views=torch.zeros(DRAWS, dtype=torch.int64),
        posterior=torch.randn(DRAWS, *shape, generator=generator("posterior")),
        times=noise.times_at((places + 0.5) / DRAWS),
        noise=torch.randn(DRAWS, *shape, generator=generator("noise")),
        dropped=torch.zeros(DRAWS, dtype=torch.bool),
    )
