"""The noise process, the schedulers and guidance. A Gaussian data distribution has an exact denoiser in closed form, so
that every sampler can be held against the distribution it should return."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from pipeline.noise import STEPS, NoiseProcess
from pipeline.sampling import (
    Denoise,
    classifier_free_guidance,
    image_generators,
    make_scheduler,
    sampling_loop,
)
from tests.helpers.models import CLASSES, scrambled

SCHEDULES = ("linear", "scaled_linear", "cosine")
TO_PURE_NOISE = [NoiseProcess("scaled_linear", target, zero_terminal_snr=True) for target in ("v", "x0")]
DISCRETE = [
    *(NoiseProcess(schedule, target) for schedule in SCHEDULES for target in ("epsilon", "v", "x0")),
    *TO_PURE_NOISE,
]
FLOW = NoiseProcess("flow", "flow")
PROCESSES = [*DISCRETE, FLOW]
SAMPLERS = [*itertools.product(["ddpm", "ddim"], DISCRETE), ("euler", FLOW)]
DETERMINISTIC = [(name, noise) for name, noise in SAMPLERS if name != "ddpm"]
# stable diffusion's schedule leaves 7 % of the mean in what it takes for pure noise (Lin et al. 2024, section 3.1)
BIASED = [("ddim", noise) for noise in DISCRETE if noise.schedule == "scaled_linear" and noise not in TO_PURE_NOISE]
MEAN, STD = 1.5, 0.4  # of the Gaussian data


def title(value: NoiseProcess | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value.schedule}-{value.prediction}" + ("-zero" if value.zero_terminal_snr else "")


def times_of(noise: NoiseProcess) -> Tensor:
    return torch.linspace(0, STEPS if noise.schedule == "flow" else STEPS - 1, 12).round()


def latents_and_noise(count: int = 12) -> tuple[Tensor, Tensor]:
    both = torch.randn(2, count, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    return both[0] * 2 + 1, both[1]


def exact(noise: NoiseProcess, mean: float, std: float) -> Denoise:
    """What a perfect model predicts when every latent is drawn from N(mean, std^2)."""

    def denoise(x: Tensor, timestep: Tensor) -> Tensor:
        alpha, sigma = noise.coefficients(timestep.reshape(1))
        surprise = (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        return noise.target(mean + alpha * std**2 * surprise, sigma * surprise, timestep.reshape(1))

    return denoise


def sample(noise: NoiseProcess, name: str, denoise: Denoise, steps: int, count: int = 2, size: int = 32) -> Tensor:
    return sampling_loop(
        denoise,
        make_scheduler(name, noise, steps),
        shape=(4, size, size),
        generators=image_generators(0, list(range(count))),
        device="cpu",
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_discrete_schedules_go_from_almost_data_to_almost_noise(schedule: str) -> None:
    alpha, _ = NoiseProcess(schedule, "epsilon").coefficients(torch.tensor([0.0, STEPS - 1.0]))
    assert 0.999 < alpha[0].item() < 1
    assert 0 < alpha[1].item() < 0.07


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_with_zero_terminal_snr_they_end_in_pure_noise_and_begin_as_before(schedule: str) -> None:
    times = torch.tensor([0.0, STEPS - 1.0])
    plain = NoiseProcess(schedule, "v").coefficients(times)[0].flatten()
    alpha, sigma = (x.flatten() for x in NoiseProcess(schedule, "v", zero_terminal_snr=True).coefficients(times))
    assert alpha[1].item() == pytest.approx(0, abs=1e-6)
    assert sigma[1].item() == pytest.approx(1)
    assert alpha[0].item() == pytest.approx(plain[0].item())


def test_scaled_linear_is_that_of_stable_diffusion() -> None:
    """Its alphas' product ends at 0.0047 (Lin et al. 2024, table 1)."""
    alpha, _ = NoiseProcess("scaled_linear", "epsilon").coefficients(torch.tensor([STEPS - 1.0]))
    assert alpha.square().item() == pytest.approx(0.0047, abs=5e-5)


@pytest.mark.parametrize(
    ("process", "reason"),
    [
        (("flow", "v"), "use prediction flow with schedule flow"),
        (("flow", "x0"), "use prediction flow with schedule flow"),
        (("linear", "flow"), "use prediction flow with schedule flow"),
        (("flow", "flow", "uniform", True), "already ends in pure noise"),
        (("cosine", "epsilon", "uniform", True), "no information about the image"),
        (("linear", "v", "uniform", False, 3.0), "shift = 3 is only for schedule flow"),
    ],
)
def test_pairs_that_cannot_work_are_refused_with_the_reason(process: tuple[Any, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        NoiseProcess(*process)


def test_flow_goes_from_data_to_noise_exactly() -> None:
    alpha, sigma = FLOW.coefficients(torch.tensor([0.0, 250.0, STEPS]))
    assert alpha.flatten().tolist() == [1, 0.75, 0]
    assert sigma.flatten().tolist() == [0, 0.25, 1]


@pytest.mark.parametrize("noise", DISCRETE, ids=title)
def test_discrete_schedules_keep_the_variance_and_add_noise_with_time(noise: NoiseProcess) -> None:
    alpha, sigma = noise.coefficients(torch.arange(STEPS))
    assert torch.allclose(alpha**2 + sigma**2, torch.ones(1), atol=1e-6)
    assert (sigma.flatten().diff() > 0).all()


@pytest.mark.parametrize("noise", DISCRETE, ids=title)
def test_noisy_latents_and_targets_are_those_of_diffusers(noise: NoiseProcess) -> None:
    scheduler = DDPMScheduler(**noise.diffusers_options())
    latents, e = latents_and_noise()
    times = times_of(noise)
    assert torch.allclose(noise.add_noise(latents, e, times), scheduler.add_noise(latents, e, times.long()), atol=1e-6)
    expected = {"epsilon": e, "x0": latents, "v": scheduler.get_velocity(latents, e, times.long())}[noise.prediction]
    assert torch.allclose(noise.target(latents, e, times), expected, atol=1e-6)


def test_flow_is_the_velocity_of_the_noisy_latents() -> None:
    latents, e = latents_and_noise()
    there = FLOW.add_noise(latents, e, torch.full((12,), 600.0))
    here = FLOW.add_noise(latents, e, torch.full((12,), 400.0))
    assert torch.allclose((there - here) / 0.2, FLOW.target(latents, e, torch.full((12,), 500.0)), atol=1e-5)


@pytest.mark.parametrize("noise", PROCESSES, ids=title)
def test_the_clean_latents_follow_from_the_target(noise: NoiseProcess) -> None:
    latents, e = latents_and_noise()
    times = times_of(noise).clamp(max=800)  # of the noise alone little could be recovered
    x, target = noise.add_noise(latents, e, times), noise.target(latents, e, times)
    alpha, sigma = noise.coefficients(times)
    recovered = {
        "epsilon": (x - sigma * target) / alpha,
        "v": alpha * x - sigma * target,
        "x0": target,
        "flow": x - sigma * target,
    }[noise.prediction]
    assert torch.allclose(recovered, latents, atol=1e-4)


@pytest.mark.parametrize("noise", PROCESSES, ids=title)
def test_min_snr_counts_an_error_of_the_prediction_as_one_of_the_clean_latents(noise: NoiseProcess) -> None:
    """Two predictions that differ by d differ by c d in x_0; the weight is min(SNR, 5) c^2."""
    times = times_of(noise)[1:-1]
    latents, e = latents_and_noise(len(times))
    alpha, sigma = noise.coefficients(times)
    x, target = noise.add_noise(latents, e, times), noise.target(latents, e, times)

    def clean(prediction: Tensor) -> Tensor:
        return {
            "epsilon": lambda: (x - sigma * prediction) / alpha,
            "v": lambda: alpha * x - sigma * prediction,
            "x0": lambda: prediction,
            "flow": lambda: x - sigma * prediction,
        }[noise.prediction]()

    change = (clean(target + 1) - clean(target)).square().mean(dim=(1, 2, 3))
    expected = (alpha / sigma).square().flatten().clamp(max=5.0) * change
    assert torch.allclose(noise.min_snr(times), expected, rtol=1e-3)


@pytest.mark.parametrize("noise", PROCESSES, ids=title)
def test_min_snr_weights_are_finite_at_both_ends(noise: NoiseProcess) -> None:
    weights = noise.min_snr(times_of(noise))
    assert weights.isfinite().all()
    assert (weights >= 0).all()


@pytest.mark.parametrize("timesteps", ["uniform", "logit_normal"])
@pytest.mark.parametrize("schedule", ["linear", "flow"])
def test_times_are_in_range_and_repeatable(schedule: str, timesteps: str) -> None:
    noise = NoiseProcess(schedule, "flow" if schedule == "flow" else "v", timesteps)
    times, again = (noise.draw_timesteps(20_000, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(times, again)
    assert times.dtype == torch.float32
    assert times.min() >= 0
    assert times.max() <= (STEPS if schedule == "flow" else STEPS - 1)
    assert torch.equal(times, times.floor()) == (schedule != "flow")


@pytest.mark.parametrize("schedule", ["linear", "flow"])
def test_times_have_the_distribution_of_their_name(schedule: str) -> None:
    for timesteps, quartile in (("uniform", 250.0), ("logit_normal", 1000 * torch.tensor(-0.6745).sigmoid().item())):
        times = NoiseProcess(schedule, "flow" if schedule == "flow" else "v", timesteps).draw_timesteps(
            40_000, torch.Generator().manual_seed(0)
        )
        assert times.median().item() == pytest.approx(500, abs=8)
        assert times.quantile(0.25).item() == pytest.approx(quartile, abs=8)


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


@pytest.mark.parametrize("steps", [1, 4, 40, 125, 500])
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


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_any_number_of_steps_goes_evenly_from_the_noisiest_timestep_to_no_noise(name: str) -> None:
    for steps in range(1, STEPS + 1):
        scheduler = make_scheduler(name, DISCRETE[0], steps)
        path = [*scheduler.timesteps.tolist(), int(scheduler.previous_timestep(scheduler.timesteps[-1]))]
        sizes = -np.diff(path)
        assert (len(sizes), path[0], path[-1]) == (steps, STEPS - 1, -1)
        assert sizes.min() >= 1
        assert sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize("steps", [1, 10, 25, 50, 250, 1000])
@pytest.mark.parametrize("noise", [*DISCRETE[:3], TO_PURE_NOISE[0]], ids=title)
@pytest.mark.parametrize(("name", "theirs"), [("ddpm", DDPMScheduler), ("ddim", DDIMScheduler)])
def test_where_the_steps_divide_those_of_training_samples_are_those_of_diffusers(
    name: str, theirs: Any, noise: NoiseProcess, steps: int
) -> None:
    scheduler = theirs(**noise.diffusers_options(), clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    denoise, options = exact(noise, MEAN, STD), {"shape": (4, 2, 2), "device": torch.device("cpu")}
    ours, expected = (
        sampling_loop(denoise, each, generators=image_generators(0, [0, 1]), **options)
        for each in (make_scheduler(name, noise, steps), scheduler)
    )
    assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-5)


def line_to_the_outcome(name: str, noise: NoiseProcess, steps: int) -> tuple[float, float, float]:
    """Slope, intercept and added standard deviation of what a sampler with an exact denoiser makes of its first noise:
    each step is linear in x. In float64, from the betas of the papers, without diffusers' schedulers."""
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
    slope, intercept, variance = 1.0, 0.0, 0.0
    path = [*(np.round(STEPS * (1 - np.arange(steps) / steps)).astype(int) - 1), None]
    for t, s in itertools.pairwise(path):
        now, then = bars[t], 1.0 if s is None else bars[s]
        gain = now**0.5 * STD**2 / (now * STD**2 + 1 - now)  # x_0 is MEAN + gain (x - alpha MEAN)
        of_clean = np.array([gain, MEAN * (1 - gain * now**0.5)])  # slope and intercept in x
        if name == "ddim":
            of_noise = (np.array([1.0, 0.0]) - now**0.5 * of_clean) / (1 - now) ** 0.5
            step, added = then**0.5 * of_clean + (1 - then) ** 0.5 * of_noise, 0.0
        else:  # Ho et al. 2020, equations 6 and 7
            beta = 1 - now / then
            step = (then**0.5 * beta * of_clean + np.array([(now / then) ** 0.5 * (1 - then), 0.0])) / (1 - now)
            added = (1 - then) / (1 - now) * beta
        slope, intercept, variance = step[0] * slope, step[0] * intercept + step[1], step[0] ** 2 * variance + added
    return slope, intercept, variance**0.5


@pytest.mark.parametrize("steps", [1, 2, 7, 61, 62, 122, 501])
@pytest.mark.parametrize("noise", DISCRETE, ids=title)
@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_with_an_exact_model_any_number_of_steps_gives_what_can_be_computed(
    name: str, noise: NoiseProcess, steps: int
) -> None:
    slope, intercept, added = line_to_the_outcome(name, noise, steps)
    x = sample(noise, name, exact(noise, MEAN, STD), steps, count=2)
    start = torch.stack([torch.randn(4, 32, 32, generator=each) for each in image_generators(0, [0, 1])])
    if name == "ddim":
        assert torch.allclose(x, slope * start + intercept, atol=2e-3)
        return
    rest = x - slope * start - intercept
    assert rest.mean().item() == pytest.approx(0, abs=4 * added / rest.numel() ** 0.5 + 2e-3)
    assert rest.std().item() == pytest.approx(added, rel=0.03, abs=2e-3)


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_more_steps_than_timesteps_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^sample\.steps = 1001: {name} takes at most 1000 steps"):
        make_scheduler(name, DISCRETE[0], 1001)
    assert len(make_scheduler("euler", FLOW, 1001).timesteps) == 1001


@pytest.mark.parametrize(("name", "noise"), SAMPLERS, ids=title)
def test_samplers_do_not_clip_latents(name: str, noise: NoiseProcess) -> None:
    x = sample(noise, name, exact(noise, 7.0, 0.1), steps=25, count=1, size=8)
    assert x.mean().item() == pytest.approx(7, abs=0.1)


@pytest.mark.parametrize("steps", [1, 10, 25, 50])
@pytest.mark.parametrize(("name", "noise"), SAMPLERS, ids=title)
def test_sampling_starts_at_the_noisiest_timestep(name: str, noise: NoiseProcess, steps: int) -> None:
    scheduler = make_scheduler(name, noise, steps)
    assert len(scheduler.timesteps) == steps
    assert scheduler.timesteps[0] == (STEPS if name == "euler" else STEPS - 1)
    assert steps == 1 or (scheduler.timesteps.diff() < 0).all()


@pytest.mark.parametrize(("name", "noise"), [("euler", DISCRETE[0]), ("ddpm", FLOW), ("ddim", FLOW)], ids=title)
def test_a_sampler_of_another_process_is_refused(name: str, noise: NoiseProcess) -> None:
    with pytest.raises(ValueError, match=rf"^sample.scheduler: {name} cannot sample .* {noise.schedule} schedule"):
        make_scheduler(name, noise, 25)


def test_guidance_interpolates_and_extrapolates_between_two_models() -> None:
    model = scrambled()
    x, labels = latents_and_noise(3)[0][:, :, :2, :2].repeat(1, 1, 2, 2), torch.tensor([0, 1, 2])
    conditional = model(x, 500, labels).sample
    unconditional = model(x, 500, torch.full_like(labels, CLASSES)).sample
    time = torch.tensor(500)
    assert torch.equal(classifier_free_guidance(model, labels, 1.0)(x, time), conditional)
    assert torch.equal(classifier_free_guidance(model, labels, 0.0)(x, time), unconditional)
    for scale in (2.0, 0.5):
        expected = unconditional + scale * (conditional - unconditional)
        assert torch.allclose(classifier_free_guidance(model, labels, scale)(x, time), expected, atol=1e-4)
    assert (conditional - unconditional).abs().max() > 1e-2


@pytest.mark.parametrize(("name", "noise"), [("ddpm", DISCRETE[0]), ("ddim", DISCRETE[7]), ("euler", FLOW)], ids=title)
def test_a_sample_depends_on_its_index_alone(name: str, noise: NoiseProcess) -> None:
    model = scrambled()

    def images(indices: list[int]) -> Tensor:
        return sampling_loop(
            classifier_free_guidance(model, torch.tensor(indices) % CLASSES, 2.0),
            make_scheduler(name, noise, 5),
            shape=(4, 4, 4),
            generators=image_generators(9, indices),
            device="cpu",
        )

    together = images([0, 1, 2, 3, 4])
    scale = together.abs().max()
    assert torch.allclose(torch.cat([images([i]) for i in range(5)]) / scale, together / scale, atol=1e-4)
    assert torch.allclose(images([4, 1]) / scale, together[[4, 1]] / scale, atol=1e-4)
    assert (together[0] - together[3]).abs().max() > 1e-2 * scale  # of one class, and yet not alike


def test_neighbouring_seeds_and_indices_share_no_noise() -> None:
    generators = [generator for seed in range(3) for generator in image_generators(seed, [0, 1, 2])]
    assert len({generator.initial_seed() for generator in generators}) == 9


def test_a_shift_moves_the_draws_of_training_and_the_steps_of_sampling_alike() -> None:
    noise = NoiseProcess("flow", "flow", "logit_normal", shift=3.0)
    drawn = noise.draw_timesteps(40_000, torch.Generator().manual_seed(0))
    assert drawn.median().item() == pytest.approx(750, abs=8)  # of 1/2: 3/2 / (1 + 2/2)
    plain = make_scheduler("euler", NoiseProcess("flow", "flow"), 5).sigmas
    expected = 3 * plain / (1 + 2 * plain)
    torch.testing.assert_close(make_scheduler("euler", noise, 5).sigmas, expected)
    assert (expected[0], expected[-1]) == (1, 0)


@pytest.mark.parametrize("steps", [1, 4, 25])
def test_euler_takes_equal_steps_and_none_is_wasted(steps: int) -> None:
    times: list[float] = []

    def denoise(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        times.append(timestep.item() / STEPS)
        return torch.zeros_like(x)

    sample(FLOW, "euler", denoise, steps, count=1, size=2)
    assert times == pytest.approx([1 - i / steps for i in range(steps)], abs=1e-6)
