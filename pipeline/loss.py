"""The training loss: add noise to latents, predict the target, and weight the error by noise level."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pipeline.noise import NoiseProcess
from pipeline.unet import LatentUNet, timestep_embedding

_FEATURES = 64  # width of the timestep embedding for the learned weighting


class MicroBatch(NamedTuple):
    """Holds the inputs of one forward and backward pass."""

    latents: Tensor  # B C h w, normalised
    noise: Tensor  # B C h w
    times: Tensor  # B, timesteps
    classes: Tensor  # B int64; dropped labels are already the null class


class Objective(nn.Module):
    """Combines the model and its loss in one module, so that DDP or FSDP can wrap both.

    `weighting` is plain; min_snr (`NoiseProcess.min_snr`); or learned: error / exp(u) + u, where u learns the logarithm
    of the error at each timestep, so that all timesteps have equal weight (Kendall et al. 2018; Karras et al. 2024,
    "Analyzing and improving the training dynamics of diffusion models", section 2 and appendix A).
    """

    def __init__(self, model: LatentUNet, process: NoiseProcess, weighting: str = "plain") -> None:
        super().__init__()
        self.model, self.process, self.weighting = model, process, weighting
        self.uncertainty = nn.Linear(_FEATURES, 1) if weighting == "learned" else None
        if self.uncertainty is not None:  # start at u = 0, the plain loss
            nn.init.zeros_(self.uncertainty.weight)
            nn.init.zeros_(self.uncertainty.bias)

    def forward(self, latents: Tensor, noise: Tensor, times: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss and each image's mean squared error `B`, unweighted and without gradient.

        `latents` (normalised) and `noise` are `B C h w`, `times` are timesteps `B`, `classes` int64 `B`.
        """
        noisy = self.process.add_noise(latents, noise, times).contiguous(memory_format=torch.channels_last)
        prediction = self.model(noisy, times, classes).sample.float()
        target = self.process.target(latents, noise, times)
        errors = (prediction - target).square().mean(dim=(1, 2, 3))
        return self._weigh(errors, times).mean(), errors.detach()

    def _weigh(self, errors: Tensor, times: Tensor) -> Tensor:
        if self.weighting == "min_snr":
            return errors * self.process.min_snr(times)
        if self.uncertainty is not None:
            with torch.autocast(times.device.type, enabled=False):  # autocast would round the loss weights
                logarithm = self.uncertainty(timestep_embedding(times, _FEATURES)).flatten()
            return errors * (-logarithm).exp() + logarithm
        return errors
