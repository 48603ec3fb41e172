"""The samplers. Gaussian data has an exact denoiser in closed form, and so an exact answer for every sampler."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor

from pipeline.noise import STEPS, Level, NoiseProcess
from pipeline.samplers import dpm_solver, euler, heun
from pipeline.sampling import Denoise, image_generators, sampling_loop

SCHEDULES = ("linear", "scaled_linear", "cosine")
TO_PURE_NOISE = [NoiseProcess("scaled_linear", target, zero_terminal_snr=True) for target in ("v", "x0")]
DISCRETE = [
    *(NoiseProcess(schedule, target) for schedule in SCHEDULES for target in ("epsilon", "v", "x0")),
    *TO_PURE_NOISE,
]
FLOW = NoiseProcess("flow", "flow")
SOME = [*DISCRETE[0:9:4], *TO_PURE_NOISE]  # each schedule and each prediction
COMMON = ("euler", "euler_ancestral", "heun", "dpm++", "unipc")
SAMPLERS = [
    *itertools.product(["ddpm", "ddim", *COMMON], SOME),
    *itertools.product(COMMON, [FLOW, NoiseProcess("flow", "flow", shift=3.0)]),
]
STOCHASTIC = ("ddpm", "euler_ancestral")
DETERMINISTIC = [(name, noise) for name, noise in SAMPLERS if name not in STOCHASTIC]
# stable diffusion's schedule leaves 7 % of the mean in what it takes for pure noise (Lin et al. 2024, section 3.1)
BIASED = [(name, noise) for name, noise in SAMPLERS if noise.schedule == "scaled_linear" and noise not in TO_PURE_NOISE]
MEAN, STD = 1.5, 0.4  # of the Gaussian data


def title(value: NoiseProcess | str) -> str:
    if isinstance(value, str):
        return value
    shift = f"-shift{value.shift:g}" if value.shift != 1 else ""
    return f"{value.schedule}-{value.prediction}{shift}" + ("-zero" if value.zero_terminal_snr else "")


def exact(noise: NoiseProcess, mean: float, std: float) -> Denoise:
    """A perfect model when every latent is drawn from N(mean, std^2), by way of what it predicts."""

    def denoise(x: Tensor, timestep: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        surprise = (x - level.alpha * mean) / (level.alpha**2 * std**2 + level.sigma**2)
        clean, e = mean + level.alpha * std**2 * surprise, level.sigma * surprise
        estimate = noise.clean(x, noise.target(clean, e, timestep.reshape(1)), level)
        return estimate, estimate

    return denoise


def sample(
    noise: NoiseProcess, name: str, denoise: Denoise, steps: int, count: int = 2, size: int = 32, eta: float = 0.0
) -> Tensor:
    return sampling_loop(
        denoise,
        noise.levels(steps),
        name,
        shape=(4, size, size),
        generators=image_generators(0, list(range(count))),
        device=torch.device("cpu"),
        eta=eta,
    )


@pytest.mark.parametrize(("name", "noise"), [pair for pair in SAMPLERS if pair not in BIASED], ids=title)
def test_with_an_exact_model_a_sampler_returns_the_distribution_of_the_data(name: str, noise: NoiseProcess) -> None:
    x = sample(noise, name, exact(noise, MEAN, STD), steps=500)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert x.std().item() == pytest.approx(STD, abs=0.01)


@pytest.mark.parametrize(("name", "noise"), DETERMINISTIC, ids=title)
def test_deterministic_samplers_carry_noise_to_the_same_quantile_of_the_data(name: str, noise: NoiseProcess) -> None:
    x = sample(noise, name, exact(noise, MEAN, STD), steps=1000, count=1, size=8)
    start = torch.randn(4, 8, 8, generator=image_generators(0, [0])[0])
    alpha, sigma = noise.coefficients(torch.tensor([STEPS if noise.schedule == "flow" else STEPS - 1]))
    quantile = (start - alpha[0] * MEAN) / (alpha[0] ** 2 * STD**2 + sigma[0] ** 2).sqrt()
    assert torch.allclose(x[0], MEAN + STD * quantile, atol=0.03)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 40, 500])
@pytest.mark.parametrize(("name", "noise"), DETERMINISTIC, ids=title)
def test_where_all_data_is_one_point_deterministic_samplers_land_on_it(
    name: str, noise: NoiseProcess, steps: int
) -> None:
    x = sample(noise, name, exact(noise, MEAN, 0.0), steps, count=1, size=8)
    assert torch.allclose(x, torch.tensor(MEAN), atol=1e-2)


@pytest.mark.parametrize("steps", [60, 150, 600])
@pytest.mark.parametrize(("name", "noise"), [pair for pair in SAMPLERS if pair not in BIASED], ids=title)
def test_the_number_of_steps_need_not_divide_that_of_training(name: str, noise: NoiseProcess, steps: int) -> None:
    x = sample(noise, name, exact(noise, MEAN, STD), steps)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.02)


def levels_of(noise: NoiseProcess, steps: int) -> list[tuple[float, float]]:
    """alpha and sigma of each step, and of the end, in float64 from the betas of the papers."""
    if noise.schedule == "flow":
        t = 1 - np.arange(steps) / steps
        t = noise.shift * t / (1 + (noise.shift - 1) * t)
        return [*zip(1 - t, t, strict=True), (1.0, 0.0)]
    if noise.schedule == "cosine":
        bar = np.cos((np.arange(STEPS + 1) / STEPS + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    elif noise.schedule == "linear":
        betas = np.linspace(1e-4, 0.02, STEPS)
    else:
        betas = np.linspace(0.00085**0.5, 0.012**0.5, STEPS) ** 2
    bars = np.cumprod(1 - betas)
    if noise.zero_terminal_snr:
        root = np.sqrt(bars)
        bars = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    chosen = bars[np.round(STEPS * (1 - np.arange(steps) / steps)).astype(int) - 1]
    return [*zip(np.sqrt(chosen), np.sqrt(1 - chosen), strict=True), (1.0, 0.0)]


def line_to_the_outcome(eta: float, noise: NoiseProcess, steps: int) -> tuple[float, float, float]:
    """Slope, intercept and added standard deviation of what a sampler with an exact denoiser makes of its first noise:
    each step is linear in x. DDIM for eta 0; for 1 the posterior of the forward chain, as DDPM draws from it."""
    slope, intercept, variance = 1.0, 0.0, 0.0
    for (alpha, sigma), (then, left) in itertools.pairwise(levels_of(noise, steps)):
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)  # x_0 is MEAN + gain (x - alpha MEAN)
        of_clean = np.array([gain, MEAN * (1 - gain * alpha)])  # slope and intercept in x
        if eta == 0:
            of_noise = (np.array([1.0, 0.0]) - alpha * of_clean) / sigma
            step, added = then * of_clean + left * of_noise, 0.0
        else:  # Ho et al. 2020, equations 6 and 7, for any alpha and sigma
            ratio = alpha / then
            spread = sigma**2 - ratio**2 * left**2  # variance of x now, given x after the step
            step = (ratio * left**2 * np.array([1.0, 0.0]) + then * spread * of_clean) / sigma**2
            added = spread * left**2 / sigma**2
        slope, intercept, variance = step[0] * slope, step[0] * intercept + step[1], step[0] ** 2 * variance + added
    return slope, intercept, variance**0.5


@pytest.mark.parametrize("steps", [1, 2, 7, 61, 122, 501])
@pytest.mark.parametrize("noise", [*DISCRETE, FLOW], ids=title)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_with_an_exact_model_any_number_of_steps_gives_what_can_be_computed(
    eta: float, noise: NoiseProcess, steps: int
) -> None:
    slope, intercept, added = line_to_the_outcome(eta, noise, steps)
    x = sample(noise, "euler_ancestral" if eta else "euler", exact(noise, MEAN, STD), steps, count=2)
    start = torch.stack([torch.randn(4, 32, 32, generator=each) for each in image_generators(0, [0, 1])])
    if not eta:
        assert torch.allclose(x, slope * start + intercept, atol=2e-3)
        return
    rest = x - slope * start - intercept
    assert rest.mean().item() == pytest.approx(0, abs=4 * added / rest.numel() ** 0.5 + 2e-3)
    assert rest.std().item() == pytest.approx(added, rel=0.03, abs=2e-3)


@pytest.mark.parametrize("noise", DISCRETE, ids=title)
def test_for_discrete_schedules_euler_is_ddim_and_its_ancestral_form_ddpm(noise: NoiseProcess) -> None:
    denoise = exact(noise, MEAN, STD)
    for name, same, eta in (("ddim", "euler", 0.0), ("ddpm", "euler_ancestral", 0.0), ("ddim", "ddpm", 1.0)):
        assert torch.equal(sample(noise, name, denoise, 9, size=4, eta=eta), sample(noise, same, denoise, 9, size=4))


@pytest.mark.parametrize("steps", [1, 2, 10, 50, 250])
@pytest.mark.parametrize("noise", [*DISCRETE[:3], TO_PURE_NOISE[0]], ids=title)
@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("ddpm", DDPMScheduler),
        ("ddim", DDIMScheduler),
        ("dpm++", DPMSolverMultistepScheduler),
        ("unipc", UniPCMultistepScheduler),
    ],
)
def test_where_the_steps_divide_those_of_training_samples_are_those_of_diffusers(
    name: str, theirs: Any, noise: NoiseProcess, steps: int
) -> None:
    options = {"clip_sample": False} if name in ("ddpm", "ddim") else {}
    scheduler = theirs(**noise.diffusers_options(), timestep_spacing="trailing", **options)
    scheduler.set_timesteps(steps)
    generators = image_generators(0, [0, 1])
    x = torch.stack([torch.randn(4, 32, 32, generator=generator) for generator in generators])
    denoise = exact(noise, MEAN, STD)
    for timestep in scheduler.timesteps:
        alpha, sigma = (value.item() for value in noise.coefficients(timestep.reshape(1)))
        clean, _ = denoise(x, timestep, Level(timestep.item(), alpha, sigma))
        e = (x - alpha * clean) / sigma
        drawn = {"generator": generators} if name == "ddpm" else {}
        x = scheduler.step(noise.target(clean, e, timestep.reshape(1)), timestep, x, **drawn).prev_sample
    # at zero SNR diffusers' multistep solvers start a little below pure noise
    tolerance = 2e-3 if noise.zero_terminal_snr and name in ("dpm++", "unipc") else 2e-4
    assert torch.allclose(sample(noise, name, denoise, steps), x, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("method", "order"),
    [
        (lambda predict, y, t: euler(lambda y, i: 2 * (predict(y, i),), y, t, draw=lambda: y), 1),
        (heun, 2),
        (dpm_solver, 2),
        (lambda predict, y, t: dpm_solver(predict, y, t, correct=True), 3),
    ],
    ids=["euler", "heun", "dpm++", "unipc"],
)
def test_the_error_falls_with_the_order_of_the_sampler(method: Callable[..., Tensor], order: int) -> None:
    """Between two noise levels: N(0, v) with v = (1 - t)^2 STD^2 + t^2 is scaled by the root of v."""

    def scale(t: float) -> float:
        return math.hypot((1 - t) * STD, t)

    def error(steps: int) -> float:
        t = np.linspace(0.9, 0.1, steps + 1).tolist()

        def predict(y: Tensor, i: int) -> Tensor:
            return (1 - t[i]) * STD**2 / scale(t[i]) ** 2 * y

        start = torch.ones(1, dtype=torch.float64) * scale(t[0])
        return abs(method(predict, start, t).item() - scale(t[-1]))

    errors = [error(steps) for steps in (40, 80, 160)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize(("name", "noise"), SAMPLERS, ids=title)
def test_the_model_is_called_once_a_step_or_twice_for_heun_and_never_without_noise(
    name: str, noise: NoiseProcess, steps: int
) -> None:
    times: list[float] = []

    def denoise(x: Tensor, timestep: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        assert timestep.item() == pytest.approx(level.timestep)
        times.append(level.timestep)
        return x, x

    sample(noise, name, denoise, steps, count=1, size=2)
    levels = [level.timestep for level in noise.levels(steps)]
    expected = [levels[0], *(time for time in levels[1:] for _ in range(2))] if name == "heun" else levels
    assert times == expected


@pytest.mark.parametrize(("name", "noise"), SAMPLERS, ids=title)
def test_samplers_do_not_clip_latents(name: str, noise: NoiseProcess) -> None:
    x = sample(noise, name, exact(noise, 7.0, 0.1), steps=25, count=1, size=8)
    assert x.mean().item() == pytest.approx(7, abs=0.1)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_any_eta_keeps_the_distribution_and_only_0_is_deterministic(eta: float) -> None:
    x = sample(FLOW, "euler", exact(FLOW, MEAN, STD), steps=400, eta=eta)
    assert (x.mean().item(), x.std().item()) == pytest.approx((MEAN, STD), abs=0.02)
    same = sample(FLOW, "euler", exact(FLOW, MEAN, STD), steps=400)
    assert torch.equal(x, same) == (eta == 0)


@pytest.mark.parametrize("name", COMMON)
def test_sampling_can_start_from_images(name: str) -> None:
    """With an exact model the noise that is added at 0.5 carries an image back towards the mean of the data."""
    start = torch.full((2, 4, 16, 16), MEAN + 2 * STD)
    x = sampling_loop(
        exact(FLOW, MEAN, STD),
        FLOW.levels(200, start=0.5),
        name,
        shape=(4, 16, 16),
        generators=image_generators(0, [0, 1]),
        device=torch.device("cpu"),
        start=start,
    )
    share = 0.5 * STD / math.hypot(0.5 * STD, 0.5)  # of the deviation that survives
    if name == "euler_ancestral":
        share = share**2
    assert x.mean().item() == pytest.approx(MEAN + share * 2 * STD, abs=0.03)


def test_neighbouring_seeds_and_indices_share_no_noise() -> None:
    generators = [generator for seed in range(3) for generator in image_generators(seed, [0, 1, 2])]
    assert len({generator.initial_seed() for generator in generators}) == 9
