"""Sample latents: diffusers' schedulers, classifier-free guidance, and one random generator per image.

`denoise(x, timestep)` maps noisy latents `B C h w` to the model's prediction. `classifier_free_guidance` makes this
function from a model; the sampling loop and the scheduler do not depend on the network. To add a sampler, extend
`make_scheduler` here, `check_sampler` in pipeline/compatibility.py and `Sample.scheduler` in pipeline/config.py.
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
    """Create the sampler `name` (ddpm, ddim or euler): a diffusers scheduler with `steps` steps for `noise`.

    `clip_sample` is off: it clips to -1..1, which is right for pixels and wrong for latents. ValueError if sampler,
    steps and noise schedule do not work together.
    """
    check_sampler(name, steps, noise.schedule)
    if name == "euler":
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=STEPS)
        # from 1 to 0, evenly spaced before the shift; diffusers' default wastes the last step at sigma 0.001
        scheduler.set_timesteps(sigmas=noise.apply_shift(np.linspace(1, 1 / steps, steps)))
        return scheduler
    kind = {"ddpm": DDPMScheduler, "ddim": _DDIM}[name]
    scheduler = kind(**noise.diffusers_options(), clip_sample=False)
    scheduler.set_timesteps(timesteps=trailing_timesteps(steps).tolist())
    return scheduler


def trailing_timesteps(steps: int) -> NDArray[np.int64]:
    """Return `steps` evenly spaced, decreasing timesteps that start at the noisiest (Lin et al. 2024, section 3.3)."""
    # rounding can give arange one value too many, for which diffusers would request timestep -1
    return np.round(np.arange(STEPS, 0, -STEPS / steps)[:steps]).astype(np.int64) - 1


class _DDIM(DDPMScheduler):
    """Deterministic DDIM for any decreasing timesteps; diffusers' DDIM supports only a step of 1000 // steps."""

    def step(self, prediction: Tensor, timestep: Tensor, x: Tensor, **_: Any) -> DDPMSchedulerOutput:
        """Step from `timestep` to the next one, or to zero noise after the last (Song et al. 2021, equation 12)."""
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
    """Return one generator per image, seeded by (seed, index); on the CPU, so that all devices get the same noise."""
    return [torch.Generator().manual_seed(coordinate_seed("sample", seed, index)) for index in indices]


def classifier_free_guidance(
    model: LatentUNet, labels: Tensor, scale: float, half: torch.dtype | None = None
) -> Denoise:
    """Return a function that predicts with guidance: uncond + scale (cond - uncond).

    This is Ho and Salimans 2021, equation 6, with scale = 1 + w. `labels` are int64 `B`. Scale 1 is the conditional
    model and 0 the unconditional one, both at half the cost. The model runs under autocast to `half` if it is given;
    guidance and sampler stay in float32.
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
def sampling_loop(
    denoise: Denoise,
    scheduler: Any,
    *,
    shape: tuple[int, int, int],
    generators: list[torch.Generator],
    device: torch.device,
) -> Tensor:
    """Run all sampling steps: return normalised latents `B C h w`, one for each of `generators`."""
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    x = noise.to(device).contiguous(memory_format=torch.channels_last) * getattr(scheduler, "init_noise_sigma", 1.0)
    extra = {} if isinstance(scheduler, FlowMatchEulerDiscreteScheduler) else {"generator": generators}
    times = torch.as_tensor(scheduler.timesteps, device=device)  # one copy: each copy blocks
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
    """Draw normalised latents `B C h w` of the classes `labels` (int64 `B`) with sampler, steps and guidance of
    `settings`.

    Each sample depends only on its class, `settings.seed` and its number in `indices`, not on the rest of the batch.
    """
    size = model.config["sample_size"]
    half = sampling_dtype(settings.precision, device)
    return sampling_loop(
        classifier_free_guidance(model, labels.to(device), settings.guidance, half),
        make_scheduler(settings.scheduler, noise, settings.steps),
        shape=(model.config["in_channels"], size, size),
        generators=image_generators(settings.seed, indices),
        device=device,
    )
