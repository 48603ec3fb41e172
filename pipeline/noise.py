"""The forward process: noise schedule, adding noise, prediction targets, timestep distribution and min-SNR weights.

All schedules have the form x_t = alpha_t x_0 + sigma_t e. For DDPM's discrete schedules alpha_t^2 + sigma_t^2 = 1
(Ho et al. 2020, equation 4); for flow matching alpha_t = 1 - t, sigma_t = t (Lipman et al. 2023; Liu et al. 2023).
In both cases the model gets the timestep on a scale of 0..1000.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from pipeline.compatibility import STEPS, check_noise

LEVELS = 10  # noise levels (equal ranges of timesteps) for which losses are logged


class Level(NamedTuple):
    """Describes a noise level: noisy latents are alpha x_0 + sigma e, and the model gets the timestep, in 0..1000."""

    timestep: float
    alpha: float
    sigma: float

    @property
    def noise_share(self) -> float:
        """Return sigma / (alpha + sigma): 0 without noise, 1 for pure noise, and t for flow matching."""
        return self.sigma / (self.alpha + self.sigma)


@dataclass(frozen=True)
class NoiseProcess:
    """Defines the noise schedule, the prediction target and the distribution of training timesteps.

    `schedule` is linear, scaled_linear (Rombach et al. 2022), cosine or flow; `prediction` epsilon, x0, v or flow;
    `timesteps` uniform or logit_normal. `zero_terminal_snr` rescales a discrete schedule so that its last step is pure
    noise (Lin et al. 2024, algorithm 1). `shift` s moves flow's timesteps t, in training and sampling, towards noise: t
    becomes s t / (1 + (s - 1) t) (Esser et al. 2024, equation 23). ValueError, with the reason, for settings that do
    not work together.
    """

    schedule: str
    prediction: str
    timesteps: str = "uniform"
    zero_terminal_snr: bool = False
    shift: float = 1.0

    def __post_init__(self) -> None:
        check_noise(self.schedule, self.prediction, self.zero_terminal_snr, self.shift)

    def draw_timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw `count` training timesteps in 0..1000, float32; whole numbers below 1000 for the discrete schedules.

        logit_normal: the logistic function of a standard normal draw (Esser et al. 2024, section 3.1).
        """
        if self.timesteps == "uniform":
            t = torch.rand(count, generator=generator, device=generator.device)
        else:
            t = torch.randn(count, generator=generator, device=generator.device).sigmoid()
        return self.timesteps_at(self.apply_shift(t))

    def apply_shift(self, t: Any) -> Any:
        """Shift flow times t in 0..1 (a tensor or an array) by `shift`."""
        return self.shift * t / (1 + (self.shift - 1) * t)

    def timesteps_at(self, t: Tensor) -> Tensor:
        """Convert times t in 0..1, of any shape, to timesteps in 0..1000."""
        return t * STEPS if self.schedule == "flow" else (t * STEPS).floor().clamp(max=STEPS - 1)

    def timestep_density(self, times: Tensor) -> Tensor:
        """Return the density of `draw_timesteps` at timesteps `B`, relative to uniform: its mean over all of them is 1.

        logit_normal: exp(-logit(t)^2 / 2) / (sqrt(2 pi) t (1 - t)), 0 < t < 1 (Esser et al. 2024, section 3.1), at the
        t that the shift maps to `times`, multiplied by the derivative of t there.
        """
        middle = times if self.schedule == "flow" else times + 0.5  # a whole number n stands for the range n..n+1
        place = (middle / STEPS).clamp(1e-6, 1 - 1e-6)
        below = self.shift - (self.shift - 1) * place
        t, slope = place / below, self.shift / below**2
        if self.timesteps == "uniform":
            return slope
        return slope * (t.logit().square() / -2).exp() / (math.sqrt(2 * math.pi) * t * (1 - t))

    def coefficients(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha_t and sigma_t at timesteps `B`, each `B 1 1 1` float32."""
        if self.schedule == "flow":
            sigma = times / STEPS
            alpha = 1 - sigma
        else:
            alpha_bar = _alphas_cumprod(self, times.device)[times.long()]
            alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        return alpha[:, None, None, None], sigma[:, None, None, None]

    def add_noise(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Return noisy latents x_t = alpha_t x_0 + sigma_t e of latents x_0 and noise e, all `B C h w`."""
        alpha, sigma = self.coefficients(times)
        return alpha * latents + sigma * noise

    def clean(self, x: Tensor, prediction: Tensor, level: Level) -> Tensor:
        """Return the clean latents x_0 that the model's `prediction` at noisy latents `x` stands for."""
        alpha, sigma = level.alpha, level.sigma
        if self.prediction == "epsilon":
            return (x - sigma * prediction) / alpha
        if self.prediction == "x0":
            return prediction
        return (x if self.prediction == "flow" else alpha * x) - sigma * prediction

    def levels(self, steps: int, *, start: float = 1.0, shift: float | None = None) -> list[Level]:
        """Return the noise levels at which `steps` sampling steps begin, the noisiest first, evenly spaced in time.

        They begin at the time `start` in 0..1; 1 is the noisiest. `shift` replaces that of training. Discrete timesteps
        are whole numbers (Lin et al. 2024, section 3.3), so that there are at most `start` * 1000 of them.
        """
        if self.schedule == "flow":
            shifted = replace(self, shift=self.shift if shift is None else shift)
            times = shifted.apply_shift(np.linspace(start, start / steps, steps)) * STEPS
        else:
            # rounding can give arange one value too many, which would be timestep -1
            last = round(start * STEPS)
            times = np.round(np.arange(last, 0, -last / steps)[:steps]) - 1
        alpha, sigma = self.coefficients(torch.from_numpy(times))
        return [Level(*values) for values in np.stack([times, alpha.flatten(), sigma.flatten()], 1).tolist()]

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Return what the model should predict.

        epsilon: e; x0: x_0; v: alpha_t e - sigma_t x_0 (Salimans and Ho 2022, appendix D); flow: e - x_0.
        """
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "x0":
            return latents
        if self.prediction == "flow":
            return noise - latents
        alpha, sigma = self.coefficients(times)
        return alpha * noise - sigma * latents

    def min_snr(self, times: Tensor, gamma: float = 5.0) -> Tensor:
        """Return loss weights `B` that give an error in x_0 the weight min(SNR, gamma) (Hang et al. 2023, section 3.4).

        x_0 is x_t - sigma v for flow, alpha x_t - sigma v for v, (x_t - sigma e) / alpha for epsilon: the weight of the
        squared error is min(SNR, gamma) times the square of the factor before the prediction.
        """
        alpha, sigma = (column.flatten() for column in self.coefficients(times))
        snr = (alpha / sigma.clamp(min=1e-6)).square()  # avoids division by 0 at flow's timestep 0
        if self.prediction == "x0":
            return snr.clamp(max=gamma)
        if self.prediction == "epsilon":
            return snr.clamp(max=gamma) / snr
        return snr.clamp(max=gamma) * sigma.square()

    def diffusers_options(self) -> dict[str, Any]:
        """Return the options with which diffusers' discrete schedulers use this process."""
        return {
            "num_train_timesteps": STEPS,
            "beta_schedule": "squaredcos_cap_v2" if self.schedule == "cosine" else self.schedule,
            **({"beta_start": 0.00085, "beta_end": 0.012} if self.schedule == "scaled_linear" else {}),
            "prediction_type": {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}[self.prediction],
            "rescale_betas_zero_snr": self.zero_terminal_snr,
        }


def noise_level(times: Tensor) -> Tensor:
    """Return the noise level 0..`LEVELS` - 1 of each timestep, int64; 0 is the least noisy."""
    return (times * (LEVELS / STEPS)).long().clamp(max=LEVELS - 1)


@functools.cache
def _alphas_cumprod(noise: NoiseProcess, device: torch.device) -> Tensor:
    """Return the product of 1 - beta up to each step, `STEPS`: diffusers' own table, so training and sampling agree.

    It is cached on the device: copying it to a GPU in every step would block.
    """
    scheduler = DDPMScheduler(**noise.diffusers_options())
    return scheduler.alphas_cumprod.to(device)
