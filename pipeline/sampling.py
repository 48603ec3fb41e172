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

from pipeline.noise import NoiseProcess
from pipeline.objective import coordinate_seed
from pipeline.pairs import STEPS, check_sampler
from pipeline.unet import LatentUNet

Denoise = Callable[[Tensor, Tensor], Tensor]


def make_scheduler(name: str, noise: NoiseProcess, steps: int) -> Any:
    """diffusers' scheduler `name` (ddpm, ddim or euler), set to draw in `steps` from a model trained on `noise`.

    `clip_sample` is off: it clips to -1..1, which suits pixels and ruins latents. Timesteps begin at the noisiest one
    (`trailing`, Lin et al. 2024, section 3.3). ValueError for a pair that does not go together.
    """
    check_sampler(name, steps, noise.schedule)
    if name == "euler":
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=STEPS)
        # evenly from 1 to 0; diffusers' default puts the last evaluation at 0.001 and so wastes it
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
        return scheduler
    kind = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler}[name]
    scheduler = kind(**noise.diffusers_options(), clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    return scheduler


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
    shape: tuple[int, int, int],
    generators: list[torch.Generator],
    device: torch.device,
) -> Tensor:
    """Latents `B C h w` in the space of training, one for each of `generators`."""
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    x = noise.to(device).contiguous(memory_format=torch.channels_last) * getattr(scheduler, "init_noise_sigma", 1.0)
    extra = {} if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) else {"generator": generators}
    for timestep in scheduler.timesteps:
        prediction = denoise(x, timestep)
        x = scheduler.step(prediction, timestep, x, **extra).prev_sample
    return x
