"""Drawing latents: diffusers' schedulers, classifier-free guidance, and one generator an image.

`denoise(x, timestep)` maps noisy latents `B C h w` to the model's prediction; guidance wraps a model into one, and
neither the loop nor the scheduler knows the network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from numpy.typing import NDArray
from torch import Tensor

from pipeline.compatibility import STEPS, check_sampler
from pipeline.config import Sample
from pipeline.device import sampling_dtype
from pipeline.noise import NoiseProcess
from pipeline.seeds import coordinate_seed
from pipeline.unet import LatentUNet

Denoise = Callable[[Tensor, Tensor], Tensor]


def make_scheduler(name: str, noise: NoiseProcess, steps: int) -> Any:
    """The scheduler `name` (ddpm, ddim or euler), set to draw in `steps` from a model trained on `noise`.

    `clip_sample` is off: it clips to -1..1, which suits pixels and ruins latents. ValueError for what does not go
    together.
    """
    check_sampler(name, steps, noise.schedule)
    if name == "euler":
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=STEPS)
        # from 1 to 0, evenly but for the shift; diffusers' default puts the last evaluation at 0.001 and so wastes it
        scheduler.set_timesteps(sigmas=noise.shifted(np.linspace(1, 1 / steps, steps)))
        return scheduler
    kind = {"ddpm": DDPMScheduler, "ddim": _DDIM}[name]
    scheduler = kind(**noise.diffusers_options(), clip_sample=False)
    scheduler.set_timesteps(timesteps=trailing_timesteps(steps).tolist())
    return scheduler


def trailing_timesteps(steps: int) -> NDArray[np.int64]:
    """`steps` timesteps, evenly spaced and falling, the first of them the noisiest (Lin et al. 2024, section 3.3)."""
    # where 1000 / steps rounds down, arange has one value more, at which diffusers asks for timestep -1
    return np.round(np.arange(STEPS, 0, -STEPS / steps)[:steps]).astype(np.int64) - 1


class _DDIM(DDPMScheduler):
    """DDIM without added noise on any falling timesteps; diffusers' own goes back by 1000 // steps each time."""

    def step(self, prediction: Tensor, timestep: Tensor, x: Tensor, **_: Any) -> DDPMSchedulerOutput:
        """From `timestep` to the next of the list, or to no noise after the last (Song et al. 2021, equation 12)."""
        after = self.previous_timestep(timestep)
        now, then = self.alphas_cumprod[timestep], self.alphas_cumprod[after] if after >= 0 else self.one
        alpha, sigma = now.sqrt(), (1 - now).sqrt()
        kind = self.config.prediction_type
        if kind == "epsilon":
            clean, noise = (x - sigma * prediction) / alpha, prediction
        elif kind == "sample":
            clean, noise = prediction, (x - alpha * prediction) / sigma
        else:
            clean, noise = alpha * x - sigma * prediction, alpha * prediction + sigma * x
        return DDPMSchedulerOutput(then.sqrt() * clean + (1 - then).sqrt() * noise)


def image_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """A generator for every image, a function of (seed, index) alone; on the CPU, so that every device draws alike."""
    return [torch.Generator().manual_seed(coordinate_seed("sample", seed, index)) for index in indices]


def guided(model: LatentUNet, labels: Tensor, scale: float, half: torch.dtype | None = None) -> Denoise:
    """Classifier-free guidance: uncond + scale (cond - uncond) (Ho and Salimans 2021, equation 6, with scale = 1 + w).

    `labels` are int64 `B`. Scale 1 is the conditional model and 0 the unconditional one, at half the cost. The model
    runs under autocast to `half`, if that is given; guidance and sampler stay in float32.
    """
    null = torch.full_like(labels, model.null_class)

    def predict(x: Tensor, timestep: Tensor, classes: Tensor) -> Tensor:
        with torch.autocast(x.device.type, half, enabled=half is not None):
            return model(x, timestep, classes).sample.float()

    def denoise(x: Tensor, timestep: Tensor) -> Tensor:
        if scale == 1 or scale == 0:
            return predict(x, timestep, labels if scale == 1 else null)
        both = predict(torch.cat([x, x]), timestep, torch.cat([labels, null]))
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
    times = torch.as_tensor(scheduler.timesteps, device=device)  # at once: each copy would wait for the device
    for timestep, time in zip(scheduler.timesteps, times, strict=True):
        prediction = denoise(x, time)
        x = scheduler.step(prediction, timestep, x, **extra).prev_sample
    return x


def draw_samples(
    model: LatentUNet,
    noise: NoiseProcess,
    settings: Sample,
    labels: Tensor,
    *,
    indices: Sequence[int],
    device: torch.device,
) -> Tensor:
    """Normalised latents `B C h w` of the classes `labels` int64 `B`, as `settings` say; sample i is a function of its
    class, of `settings.seed` and of its number in `indices`, whatever is drawn beside it."""
    size = model.config["sample_size"]
    return draw(
        guided(model, labels.to(device), settings.guidance, sampling_dtype(settings.precision, device)),
        make_scheduler(settings.scheduler, noise, settings.steps),
        shape=(model.config["in_channels"], size, size),
        generators=image_generators(settings.seed, indices),
        device=device,
    )
