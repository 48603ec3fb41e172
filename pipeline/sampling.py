"""Draw samples: one random generator per image, guidance, and the sampler that the settings name.

To add a sampler, write it in pipeline/samplers.py, call it in `sampling_loop` and name it in `SAMPLERS` in
pipeline/compatibility.py and in `Sample.scheduler` in pipeline/config.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pipeline.config import Sample
from pipeline.device import sampling_dtype
from pipeline.guidance import Guidance, GuidedModel
from pipeline.noise import Level, NoiseProcess
from pipeline.samplers import dpm_solver, euler, heun
from pipeline.seeds import coordinate_seed
from pipeline.unet import LatentUNet

# (x, timestep, level) -> two estimates of x_0, all `B C h w`: see GuidedModel
Denoise = Callable[[Tensor, Tensor, Level], tuple[Tensor, Tensor]]


def image_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """Return one generator per image, seeded by (seed, index); on the CPU, so that all devices get the same noise."""
    return [torch.Generator().manual_seed(coordinate_seed("sample", seed, index)) for index in indices]


@torch.inference_mode()
def sampling_loop(
    denoise: Denoise,
    levels: Sequence[Level],
    sampler: str,
    *,
    shape: tuple[int, int, int],
    generators: Sequence[torch.Generator],
    device: torch.device,
    eta: float = 0.0,
    start: Tensor | None = None,
    mix: Callable[[Tensor], Tensor] = lambda noise: noise,
    on_clean: Callable[[Tensor], None] = lambda clean: None,
) -> Tensor:
    """Sample from `levels` down to no noise: return normalised latents `B C h w`, one for each of `generators`.

    `start` are clean latents `B C h w` that begin, with noise added, instead of pure noise. `mix` gets all noise, at
    the beginning and in steps that replace noise, `C h w` for each generator, and returns that of the samples, of which
    there may then be more or fewer. `on_clean` gets every estimate of x_0 by the model.
    """

    def draw() -> Tensor:
        noise = mix(torch.stack([torch.randn(shape, generator=generator) for generator in generators]))
        return noise.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)

    timesteps = torch.tensor([level.timestep for level in levels], device=device)  # one copy: each copy blocks
    scales = [level.alpha + level.sigma for level in levels]

    def both(y: Tensor, i: int) -> tuple[Tensor, Tensor]:
        estimates = denoise(y if scales[i] == 1 else y * scales[i], timesteps[i], levels[i])
        on_clean(estimates[0])
        return estimates

    def clean(y: Tensor, i: int) -> Tensor:
        return both(y, i)[0]

    first = levels[0]
    x = draw() if start is None else first.alpha * start + first.sigma * draw()
    y, t = x / scales[0], [*(level.noise_share for level in levels), 0.0]
    if sampler == "heun":
        return heun(clean, y, t)
    if sampler in ("dpm++", "unipc"):
        return dpm_solver(clean, y, t, correct=sampler == "unipc")
    return euler(both, y, t, eta=1.0 if sampler in ("ddpm", "euler_ancestral") else eta, draw=draw)


def draw_samples(
    model: LatentUNet,
    noise: NoiseProcess,
    settings: Sample,
    labels: Tensor,
    *,
    indices: Sequence[int],
    device: torch.device,
    seeds: Sequence[int] | None = None,
    scales: Sequence[float] | None = None,
    guide: LatentUNet | None = None,
    start: Tensor | None = None,
    mix: Callable[[Tensor], Tensor] = lambda noise: noise,
    on_clean: Callable[[Tensor], None] = lambda clean: None,
) -> Tensor:
    """Draw normalised latents `B C h w` of the classes `labels` (int64 `B`), as `settings` say.

    Each sample depends only on its class, its seed and its number in `indices`, not on the rest of the batch. `seeds`
    and `scales` have a seed and a guidance scale for each of them, by default those of `settings`; `guide` is a weaker
    model that replaces the null class in guidance; `start` are clean latents `B C h w` to begin with at the time
    `settings.start`. With `mix`, `indices` and `seeds` are of the noise that it gets, see `sampling_loop`.
    """
    settings.check(noise.schedule)
    size = model.config["sample_size"]
    seeds = [settings.seed] * len(indices) if seeds is None else seeds
    generators = [image_generators(seed, [index])[0] for seed, index in zip(seeds, indices, strict=True)]
    guided = GuidedModel(
        model,
        noise,
        labels.to(device),
        [settings.guidance] * len(labels) if scales is None else scales,
        Guidance(
            form=settings.guidance_form,
            schedule=settings.guidance_schedule,
            interval=settings.guidance_interval,
            rescale=settings.guidance_rescale,
        ),
        guide=guide,
        half=sampling_dtype(settings.precision, device),
    )
    return sampling_loop(
        guided,
        noise.levels(settings.steps, start=settings.start, shift=settings.shift),
        settings.scheduler,
        shape=(model.config["in_channels"], size, size),
        generators=generators,
        device=device,
        eta=settings.eta,
        start=start,
        mix=mix,
        on_clean=on_clean,
    )
