"""Drawing latents: diffusers' schedulers, classifier-free guidance, and one generator an image.

`denoise(x, timestep)` maps noisy latents `B C h w` to the model's prediction; guidance wraps a model into one, and
neither the loop nor the scheduler knows the network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from pipeline.noise import STEPS, NoiseProcess, diffusers_schedule
from pipeline.objective import coordinate_seed
from pipeline.unet import LatentUNet

Denoise = Callable[[Tensor, Tensor], Tensor]


def make_scheduler(name: str, noise: NoiseProcess) -> Any:
    """diffusers' scheduler `name` (ddpm, ddim or euler) for a model trained on `noise`; ValueError if they do not fit.

    `clip_sample` is off: it clips to -1..1, which suits pixels and ruins latents. Timesteps end at the noisiest one
    (`trailing`, Lin et al. 2024, section 3.3).
    """
    if (name == "euler") != (noise.schedule == "flow"):
        raise ValueError(f"sample.scheduler: {name} cannot draw from a model trained on the {noise.schedule} schedule")
    if name == "euler":
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=STEPS)
    kind = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}[name]
    return kind(
        num_train_timesteps=STEPS,
        beta_schedule=diffusers_schedule(noise.schedule),
        prediction_type={"epsilon": "epsilon", "v": "v_prediction"}[noise.prediction],
        clip_sample=False,
        timestep_spacing="trailing",
    )


def image_generators(seed: int, indices: list[int]) -> list[torch.Generator]:
    """A generator for every image, a function of (seed, index) alone; on the CPU, so that every device draws alike."""
    return [torch.Generator().manual_seed(coordinate_seed("sample", seed, index)) for index in indices]


def guided(model: LatentUNet, labels: Tensor, scale: float) -> Denoise:
    """Classifier-free guidance: uncond + scale (cond - uncond) (Ho and Salimans 2021, equation 6, with scale = 1 + w).

    `labels` are int64 `B`. Scale 1 is the conditional model and 0 the unconditional one, at half the cost.
    """
    null = torch.full_like(labels, model.null_class)

    def denoise(x: Tensor, timestep: Tensor) -> Tensor:
        if scale == 1 or scale == 0:
            return model(x, timestep, labels if scale == 1 else null).sample
        both = model(torch.cat([x, x]), timestep, torch.cat([labels, null])).sample
        conditional, unconditional = both.chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return denoise


@torch.inference_mode()
def draw(
    denoise: Denoise,
    scheduler: Any,
    *,
    steps: int,
    shape: tuple[int, int, int],
    generators: list[torch.Generator],
    device: torch.device,
) -> Tensor:
    """Latents `B C h w` in the space of training, one for each of `generators`, in `steps` steps."""
    if isinstance(scheduler, DDIMScheduler) and STEPS % steps:
        # diffusers' DDIM steps by STEPS // steps between timesteps that lie STEPS / steps apart
        raise ValueError(f"sample.steps = {steps}: ddim needs a divisor of {STEPS}, such as 20, 25, 40, 50 or 100")
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        # evenly from 1 to 0; diffusers' default puts the last evaluation at 0.001 and so wastes it
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), device=device)
    else:
        scheduler.set_timesteps(steps, device=device)
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    x = noise.to(device).contiguous(memory_format=torch.channels_last) * getattr(scheduler, "init_noise_sigma", 1.0)
    extra = {} if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) else {"generator": generators}
    for timestep in scheduler.timesteps:
        prediction = denoise(x, timestep)
        x = scheduler.step(prediction, timestep, x, **extra).prev_sample
    return x
