"""The forward process: how latents become noise, what the model learns to predict, and at which timesteps.

One form holds for all: x_t = alpha_t x_0 + sigma_t e. For DDPM's discrete schedules alpha_t^2 + sigma_t^2 = 1
(Ho et al. 2020, equation 4); for flow matching alpha_t = 1 - t, sigma_t = t (Lipman et al. 2023; Liu et al. 2023).
The model is told the timestep on a scale of 0..1000 in both cases.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler
from torch import Tensor

STEPS = 1000


@dataclass(frozen=True)
class NoiseProcess:
    """`schedule` is linear, cosine or flow; `prediction` epsilon, v or flow; `timesteps` uniform or logit_normal."""

    schedule: str
    prediction: str
    timesteps: str = "uniform"

    def draw_times(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` timesteps in 0..1000, float32; whole numbers below 1000 for the discrete schedules.

        logit_normal: the logistic function of a standard normal draw (Esser et al. 2024, section 3.1).
        """
        if self.timesteps == "uniform":
            share = torch.rand(count, generator=generator, device=generator.device)
        else:
            share = torch.randn(count, generator=generator, device=generator.device).sigmoid()
        return share * STEPS if self.schedule == "flow" else (share * STEPS).floor().clamp(max=STEPS - 1)

    def coefficients(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, each `B 1 1 1` float32."""
        if self.schedule == "flow":
            sigma = times / STEPS
            alpha = 1 - sigma
        else:
            alpha_bar = _alphas_cumprod(self.schedule, times.device)[times.long()]
            alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        return alpha[:, None, None, None], sigma[:, None, None, None]

    def corrupt(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """x_t of latents x_0 and noise e, all `B C h w`."""
        alpha, sigma = self.coefficients(times)
        return alpha * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the model should say: e; v = alpha_t e - sigma_t x_0 (Salimans and Ho 2022, appendix D); or e - x_0."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "flow":
            return noise - latents
        alpha, sigma = self.coefficients(times)
        return alpha * noise - sigma * latents


def diffusers_schedule(schedule: str) -> str:
    """diffusers' name of a discrete schedule."""
    return {"linear": "linear", "cosine": "squaredcos_cap_v2"}[schedule]


@functools.cache
def _alphas_cumprod(schedule: str, device: torch.device) -> Tensor:
    """Product of 1 - beta up to each step, `STEPS`: diffusers' own table, so that training and sampling agree.

    It stays on the device: a copy to a GPU in every step would wait for it.
    """
    scheduler = DDPMScheduler(num_train_timesteps=STEPS, beta_schedule=diffusers_schedule(schedule))
    return scheduler.alphas_cumprod.to(device)
