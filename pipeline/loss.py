"""One training example's way from cached moments to a loss, with all of its randomness from coordinates."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.noise import NoiseProcess
from pipeline.unet import LatentUNet, timestep_embedding

_FEATURES = 64  # of a timestep, for the learned weighting


class MicroBatch(NamedTuple):
    """What one forward and backward pass is about."""

    latents: Tensor  # B C h w, normalised
    noise: Tensor  # B C h w
    times: Tensor  # B, timesteps
    classes: Tensor  # B int64, of which some are the null class


class Objective(nn.Module):
    """The model and its loss: the one module that is called in a step, and so wrapped for many processes.

    `weighting` is plain; min_snr (`NoiseProcess.min_snr`); or learned: error / exp(u) + u, where u learns the logarithm
    of the error at each timestep, so that all of them weigh alike (Kendall et al. 2018; Karras et al. 2024, "Analyzing
    and improving the training dynamics of diffusion models", section 2 and appendix A).
    """

    def __init__(
        self,
        model: LatentUNet,
        noise: NoiseProcess,
        weighting: str = "plain",
        direction: float = 0.0,
        contrastive: float = 0.0,
    ) -> None:
        super().__init__()
        self.model, self.noise, self.weighting = model, noise, weighting
        self.direction, self.contrastive = direction, contrastive
        self.uncertainty = nn.Linear(_FEATURES, 1) if weighting == "learned" else None
        if self.uncertainty is not None:  # u = 0: the plain loss at first
            nn.init.zeros_(self.uncertainty.weight)
            nn.init.zeros_(self.uncertainty.bias)

    def forward(self, latents: Tensor, noise: Tensor, times: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised latents and noise `B C h w`, timesteps `B`, classes int64 `B` -> the loss, and each image's mean
        squared error `B`, unweighted and without gradient."""
        noisy = self.noise.corrupt(latents, noise, times).contiguous(memory_format=torch.channels_last)
        prediction = self.model(noisy, times, classes).sample.float()
        target = self.noise.target(latents, noise, times)
        errors = (prediction - target).square().mean(dim=(1, 2, 3))
        loss = self._weigh(errors, times).mean()
        if self.direction:
            cosine = F.cosine_similarity(prediction, target, dim=1).mean()
            loss = loss + self.direction * (1 - cosine)
        if self.contrastive:
            loss = loss - self.contrastive * (prediction - target.roll(1, 0)).square().mean()
        return loss, errors.detach()

    def _weigh(self, errors: Tensor, times: Tensor) -> Tensor:
        if self.weighting == "min_snr":
            return errors * self.noise.min_snr(times)
        if self.uncertainty is not None:
            with torch.autocast(times.device.type, enabled=False):  # which would round the weights of the loss
                logarithm = self.uncertainty(timestep_embedding(times, _FEATURES)).flatten()
            return errors * (-logarithm).exp() + logarithm
        return errors
