"""The noise process."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from pipeline.noise import STEPS, NoiseProcess

SCHEDULES = ("linear", "scaled_linear", "cosine")
TO_PURE_NOISE = [NoiseProcess("scaled_linear", target, zero_terminal_snr=True) for target in ("v", "x0")]
DISCRETE = [
    *(NoiseProcess(schedule, target) for schedule in SCHEDULES for target in ("epsilon", "v", "x0")),
    *TO_PURE_NOISE,
]
FLOW = NoiseProcess("flow", "flow")
PROCESSES = [*DISCRETE, FLOW]


def title(value: NoiseProcess | str) -> str:
    if isinstance(value, str):
        return value
    return f"{value.schedule}-{value.prediction}" + ("-zero" if value.zero_terminal_snr else "")


def times_of(noise: NoiseProcess) -> Tensor:
    return torch.linspace(0, STEPS if noise.schedule == "flow" else STEPS - 1, 12).round()


def latents_and_noise(count: int = 12) -> tuple[Tensor, Tensor]:
    both = torch.randn(2, count, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    return both[0] * 2 + 1, both[1]


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


@pytest.mark.parametrize("noise", PROCESSES, ids=title)
def test_the_clean_latents_of_a_level_are_recovered_from_the_target(noise: NoiseProcess) -> None:
    latents, e = latents_and_noise()
    for level in noise.levels(7)[2:]:  # of the noise alone little could be recovered
        times = torch.full((12,), level.timestep)
        x, target = noise.add_noise(latents, e, times), noise.target(latents, e, times)
        assert torch.allclose(noise.clean(x, target, level), latents, atol=1e-4)


@pytest.mark.parametrize("noise", PROCESSES, ids=title)
def test_any_number_of_steps_goes_evenly_from_the_noisiest_timestep_to_no_noise(noise: NoiseProcess) -> None:
    flow = noise.schedule == "flow"
    for steps in (*range(1, 60), *range(60, STEPS, 61), STEPS):
        path = [*(level.timestep for level in noise.levels(steps)), 0.0 if flow else -1.0]
        sizes = [now - then for now, then in itertools.pairwise(path)]
        assert (len(sizes), path[0]) == (steps, STEPS if flow else STEPS - 1)
        assert min(sizes) > (0.99 if not flow else STEPS / steps - 1e-6)
        assert max(sizes) - min(sizes) <= (1 if not flow else 1e-6)


def test_a_later_start_goes_as_evenly_from_its_time() -> None:
    assert [level.timestep for level in FLOW.levels(3, start=0.6)] == pytest.approx([600, 400, 200])
    assert [level.timestep for level in DISCRETE[0].levels(3, start=0.6)] == [599, 399, 199]


def test_the_levels_are_those_that_training_used() -> None:
    for noise in PROCESSES:
        for level in noise.levels(11):
            alpha, sigma = (value.item() for value in noise.coefficients(torch.tensor([level.timestep])))
            assert (level.alpha, level.sigma) == pytest.approx((alpha, sigma), abs=1e-6)
            assert level.noise_share == pytest.approx(sigma / (alpha + sigma), abs=1e-6)


def test_a_shift_moves_the_draws_of_training_and_the_steps_of_sampling_alike() -> None:
    noise = NoiseProcess("flow", "flow", "logit_normal", shift=3.0)
    drawn = noise.draw_timesteps(40_000, torch.Generator().manual_seed(0))
    assert drawn.median().item() == pytest.approx(750, abs=8)  # of 1/2: 3/2 / (1 + 2/2)
    plain = torch.tensor([level.sigma for level in FLOW.levels(5)])
    expected = (3 * plain / (1 + 2 * plain)).tolist()
    assert [level.sigma for level in noise.levels(5)] == pytest.approx(expected)
    assert [level.sigma for level in FLOW.levels(5, shift=3.0)] == pytest.approx(expected)
    assert [level.sigma for level in noise.levels(5, shift=1.0)] == pytest.approx(plain.tolist())
    assert expected[0] == 1
