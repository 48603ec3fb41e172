"""The objective, the optimizers, the learning rate and the averages of the weights."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipeline.ema import Average, gamma_of, halflife_weight, power_weight, reconstruction_weights, weighted_sum
from pipeline.flops import Cost, fitting_rows, peak_flops
from pipeline.latents import Draws, Normalization, draw_latents
from pipeline.loss import Objective
from pipeline.muon import Muon
from pipeline.noise import NoiseProcess
from pipeline.optim import FiniteGuard, clip_gradients, lr_at, make_optimizers
from pipeline.seeds import coordinate_seed
from tests.helpers.models import CPU, FLOW, build, draws, normals, scramble, scrambled


def columns(drawn: Draws) -> list[Tensor]:
    return [drawn.views, drawn.posterior, drawn.times, drawn.noise, drawn.dropped]


# The objective.


def test_normalised_latents_have_zero_mean_and_unit_variance_and_come_back() -> None:
    latents = normals(64, 2, 4, 4) * torch.tensor([3.0, 0.2])[:, None, None] + torch.tensor([-5.0, 1.0])[:, None, None]
    mean, std = (f(latents, dim=(0, 2, 3)) for f in (torch.mean, lambda x, dim: x.std(dim, correction=0)))
    normalization = Normalization(tuple(mean.tolist()), tuple(std.tolist()))
    normal = normalization.normalize(latents)
    assert torch.allclose(normal.mean(dim=(0, 2, 3)), torch.zeros(2), atol=1e-4)
    assert torch.allclose(normal.var(dim=(0, 2, 3), correction=0), torch.ones(2), atol=1e-4)
    assert torch.allclose(normalization.denormalize(normal), latents, atol=1e-5)


def test_draws_are_a_function_of_seed_and_step() -> None:
    assert all(torch.equal(a, b) for a, b in zip(columns(draws()), columns(draws()), strict=True))
    for other in (draws(seed=1), draws(step=1), draws(seed=-1, step=1)):
        assert not torch.equal(other.noise, draws().noise)
        assert not torch.equal(other.times, draws().times)
    assert not torch.equal(draws().noise, draws().posterior)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_parts_of_the_processes_are_the_whole(processes: int) -> None:
    size = 8 // processes
    parts = [columns(draws().part(slice(i * size, (i + 1) * size))) for i in range(processes)]
    assert all(
        torch.equal(torch.cat(part), all_of)
        for part, all_of in zip(zip(*parts, strict=True), columns(draws()), strict=True)
    )


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_as_many_labels_are_dropped_as_asked_for(share: float) -> None:
    dropped = torch.cat([draws(1000, step=step, label_dropout=share).dropped for step in range(4)])
    assert dropped.float().mean().item() == pytest.approx(share, abs=0.02 if 0 < share < 1 else 0)


def test_the_views_are_drawn_alike_often() -> None:
    views = torch.cat([draws(1000, step=step).views for step in range(4)])
    assert views.float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert not draws(views=1).views.any()


def test_coordinates_that_look_alike_have_seeds_of_their_own() -> None:
    coordinates: list[tuple[int | str, ...]] = [(1, 23), (12, 3), (3, 12), ("1", 23), ("train", 1, 23), (0,), (1,)]
    seeds = [coordinate_seed(*each) for each in coordinates]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_latent_is_drawn_from_the_posterior_of_the_drawn_view() -> None:
    moments = torch.zeros(4000, 2, 8, 4, 4)
    moments[:, 0, :4], moments[:, 0, 4:] = -3, 0.5
    moments[:, 1, :4], moments[:, 1, 4:] = 5, 2.0
    drawn = draws(4000)
    latents = draw_latents(moments.half(), drawn, channels=4)
    assert latents.dtype == torch.float32
    for view, mean, std in ((0, -3, 0.5), (1, 5, 2.0)):
        chosen = latents[drawn.views == view]
        assert chosen.mean().item() == pytest.approx(mean, abs=0.02)
        assert chosen.std().item() == pytest.approx(std, rel=0.01)


def test_a_cache_of_means_gives_the_means() -> None:
    moments = normals(8, 2, 4, 4, 4)
    drawn = draws()
    assert torch.equal(draw_latents(moments, drawn, channels=4), moments[torch.arange(8), drawn.views])


def test_the_loss_is_the_squared_error_of_the_noisy_latents_prediction() -> None:
    latents, labels, drawn = normals(8, 4, 4, 4, seed=1), torch.arange(8) % 3, draws()
    asked: list[tuple[Tensor, ...]] = []
    model = build()  # says zero
    model.register_forward_pre_hook(lambda _, arguments: asked.append(arguments))
    loss, errors = Objective(model, FLOW)(latents, drawn.noise, drawn.times, labels)
    x, times, classes = asked[0]
    assert torch.allclose(errors, (drawn.noise - latents).square().mean(dim=(1, 2, 3)))
    assert loss.item() == pytest.approx(errors.mean().item(), rel=1e-6)
    assert torch.allclose(x, latents + (drawn.times / 1000)[:, None, None, None] * (drawn.noise - latents), atol=1e-5)
    assert torch.equal(times, drawn.times)
    assert torch.equal(classes, labels)


def test_min_snr_weighs_each_image_by_its_timestep() -> None:
    noise = NoiseProcess("linear", "v")
    latents, e, times = normals(8, 4, 4, 4, seed=1), normals(8, 4, 4, 4), torch.linspace(0, 999, 8).floor()
    loss, errors = Objective(scrambled(), noise, "min_snr")(latents, e, times, torch.arange(8) % 3)
    assert loss.item() == pytest.approx((errors * noise.min_snr(times)).mean().item(), rel=1e-6)


def test_learned_weighting_begins_as_the_plain_loss_and_finds_the_error_of_each_noise_level() -> None:
    """The minimum of error / exp(u) + u over u is at exp(u) = error."""
    model = scrambled().requires_grad_(False)
    objective = Objective(model, FLOW, "learned")
    times = torch.tensor([100.0, 900.0]).repeat(64)
    latents, e = normals(128, 4, 4, 4, seed=1) * 3, normals(128, 4, 4, 4)
    arguments = (latents, e, times, torch.zeros(128, dtype=torch.long))
    loss, errors = objective(*arguments)
    assert loss.item() == pytest.approx(errors.mean().item(), rel=1e-5)
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        objective(*arguments)[0].backward()
        optimizer.step()
    expected = 1 + torch.stack([errors[0::2].mean(), errors[1::2].mean()]).log().mean()
    assert objective(*arguments)[0].item() == pytest.approx(expected.item(), abs=0.02)


def test_learned_weighting_is_not_rounded_by_autocast() -> None:
    objective = Objective(build(), FLOW, "learned")
    assert objective.uncertainty is not None
    scramble(objective.uncertainty)
    errors, times = torch.full((8,), 0.7), torch.linspace(0, 1000, 8)
    expected = objective._weigh(errors, times)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(objective._weigh(errors, times), expected)


SCHEDULES = ("constant", "cosine", "trapezoid", "inverse_sqrt")


def rates_of(schedule: str, warmup: int = 100, decay: float = 0.4) -> list[float]:
    return [lr_at(i, schedule=schedule, peak=0.5, images=1000, warmup=warmup, decay=decay) for i in range(1001)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_learning_rate_warms_up_to_its_peak_and_never_jumps(schedule: str) -> None:
    rates = rates_of(schedule)
    assert 0 < rates[0] <= 0.5 / 100
    assert rates[99] == pytest.approx(0.5, rel=1e-4)
    assert max(rates) <= 0.5
    assert max(abs(a - b) for a, b in itertools.pairwise(rates)) <= 0.5 / 100 + 1e-9
    assert all(a >= b for a, b in itertools.pairwise(rates[100:]))


def test_learning_rates_fall_as_their_names_say() -> None:
    assert set(rates_of("constant")[99:]) == {0.5}
    cosine, trapezoid, root = (rates_of(name) for name in SCHEDULES[1:])
    assert cosine[550] == pytest.approx(0.25)
    assert cosine[1000] == pytest.approx(0)
    assert set(trapezoid[99:601]) == {0.5}
    assert trapezoid[800] == pytest.approx(0.25)
    assert trapezoid[1000] == 0
    assert root[400] == pytest.approx(0.25)
    assert root[900] == pytest.approx(0.5 / 3)


def test_without_warmup_and_decay_the_learning_rate_is_constant() -> None:
    assert set(rates_of("trapezoid", warmup=0, decay=0.0)) == {0.5}


# The optimizers.


def groups_of(model: nn.Module, kind: str) -> dict[str, tuple[type, float]]:
    """Of each parameter: its optimizer and its weight decay."""
    names = {id(p): name for name, p in model.named_parameters()}
    optimizers = make_optimizers(model, kind=kind, lr=0.1, betas=(0.9, 0.95), weight_decay=0.5)
    listed = [
        (names[id(p)], type(optimizer), group["weight_decay"])
        for optimizer in optimizers
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    assert len(listed) == len(names)
    return {name: (optimizer, decay) for name, optimizer, decay in listed}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_weight_decays_but_biases_norms_positions_and_embeddings(kind: str) -> None:
    objective = Objective(build(), FLOW, "learned")
    decays = {name: decay for name, (_, decay) in groups_of(objective, kind).items()}
    for name, parameter in objective.named_parameters():
        table = any(word in name for word in ("positions", "classes", "uncertainty"))
        assert decays[name] == (0.5 if parameter.ndim >= 2 and not table else 0.0), name


def test_muon_moves_matrices_and_kernels_and_adamw_the_rest() -> None:
    objective = Objective(build(), FLOW)
    kinds = {name: kind for name, (kind, _) in groups_of(objective, "muon").items()}
    assert set(kinds.values()) == {Muon, torch.optim.AdamW}
    for name, parameter in objective.named_parameters():
        other = any(word in name for word in ("classes", "positions", "conv_in", "conv_out", "time", "modulation"))
        inner = parameter.ndim >= 2 and not other
        assert kinds[name] is (Muon if inner else torch.optim.AdamW), name


def test_the_fused_step_moves_weights_in_channels_last_as_a_plain_one_does() -> None:
    """On a CPU it reads weights, gradients and moments in the order in which they lie in memory, whatever that is."""
    model = scrambled()
    twin = copy.deepcopy(model)
    objective = Objective(model, FLOW).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    [fused] = make_optimizers(model, kind="adamw", lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    plain = torch.optim.AdamW(twin.parameters(), lr=0.1, betas=(0.9, 0.95), weight_decay=0.0, fused=False)
    latents, noise = normals(2, 4, 4, 4, 4)
    for _ in range(3):
        objective(latents, noise, torch.full((4,), 500.0), torch.arange(4) % 2)[0].backward()
        for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
            assert parameter.grad is not None
            other.grad = parameter.grad.clone(memory_format=torch.contiguous_format)
        for optimizer in (fused, plain):
            optimizer.step()
            optimizer.zero_grad()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("kind", "in_step"), [("adamw", True), ("adamw", False), ("muon", True)])
def test_a_step_sees_a_long_gradient_at_the_length_of_the_limit(kind: str, in_step: bool) -> None:
    """As by torch's own clipping."""
    models = [nn.Sequential(nn.Conv2d(4, 8, 3), nn.Linear(3, 2, bias=False)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    ours, theirs = (make_optimizers(model, kind=kind, lr=0.1, betas=(0.9, 0.95), weight_decay=0.1) for model in models)
    for number, length in enumerate([10.0, 1.0, 1e-3]):  # the limit is 2
        for parameter, other in zip(*(model.parameters() for model in models), strict=True):
            gradient = normals(*parameter.shape, seed=number)
            parameter.grad, other.grad = gradient * length, gradient * length
        expected = nn.utils.clip_grad_norm_(models[1].parameters(), 2.0)
        torch.testing.assert_close(clip_gradients(ours, 2.0, in_step=in_step), expected)
        for optimizer in (*ours, *theirs):
            optimizer.step()
    for parameter, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(parameter, other)


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_moves_nothing_then_or_later(deferred: bool, value: float) -> None:
    """Deferred, the optimizer is told on the device: what is tested here on the CPU's fused AdamW."""
    model = nn.Linear(3, 2)
    optimizers = make_optimizers(model, kind="adamw", lr=0.1, betas=(0.9, 0.95), weight_decay=0.5)
    guard = FiniteGuard(CPU, deferred=deferred)
    found: list[int | None] = []
    weights: list[Tensor] = []
    for step, gradient in enumerate([1.0, 1.0, value, 1.0, value]):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        found.append(guard.check(step, torch.tensor(gradient), optimizers))
        if found[-1] is None:
            optimizers[0].step()
        weights.append(model.weight.detach().clone())
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[2])
    assert torch.equal(weights[1], weights[4])
    assert found == ([None] * 5 if deferred else [None, None, 2, 2, 2])
    assert guard.bad_step() == 2
    assert all(state.isfinite().all() for state in optimizers[0].state[model.weight].values())


# The averages of the weights.


def test_the_average_is_a_weighted_sum_of_the_weights_so_far() -> None:
    model = nn.Linear(3, 2)
    average = Average(model, lambda images_seen, batch_size: halflife_weight(images_seen, batch_size, 40))
    expected = model.weight.detach().clone()
    for step in range(1, 6):
        scramble(model, seed=step)
        average.update(images_seen=1000 + 8 * step, batch_size=8)
        keep = 0.5 ** (8 / 40)
        expected = keep * expected + (1 - keep) * model.weight.detach()
    assert torch.allclose(average.tensors["weight"], expected, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_after_its_halflife_in_images_half_is_forgotten(batch_size: int) -> None:
    kept = 1.0
    for seen in range(batch_size, 64 + 1, batch_size):
        kept *= 1 - halflife_weight(10_000 + seen, batch_size, 64)
    assert kept == pytest.approx(0.5)


def test_early_in_a_run_the_average_forgets_faster() -> None:
    assert halflife_weight(100, 10, 10_000) == pytest.approx(0.5)  # a half-life of 10


def test_the_average_does_not_move_the_model() -> None:
    model = nn.Linear(3, 2)
    average = Average(model, lambda images_seen, batch_size: 0.5)
    scramble(model)
    after = model.weight.detach().clone()
    average.update(images_seen=8, batch_size=8)
    assert torch.equal(model.weight, after)
    assert not torch.equal(average.tensors["weight"], after)


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.2])
def test_a_power_function_average_has_its_width_in_shares_of_the_run(width: float) -> None:
    steps = 20_000
    weights, gamma = np.zeros(steps), gamma_of(width)
    for step in range(1, steps + 1):
        weight = power_weight(step, 1, gamma)
        weights *= 1 - weight
        weights[step - 1] = weight
    times = np.arange(1, steps + 1) / steps
    mean = (weights * times).sum()
    assert weights.sum() == pytest.approx(1)
    assert math.sqrt((weights * (times - mean) ** 2).sum()) == pytest.approx(width, rel=1e-2)


@pytest.mark.parametrize("width", [0.0, 0.28, 0.5])
def test_a_width_that_no_power_function_has_is_refused(width: float) -> None:
    with pytest.raises(ValueError, match=f"^width = {width:g}: "):
        gamma_of(width)


@pytest.mark.parametrize(("width", "share"), [(0.06, 1.0), (0.08, 1.0), (0.15, 1.0), (0.08, 0.75)])
def test_an_average_from_snapshots_is_the_one_that_was_taken_directly(width: float, share: float) -> None:
    """Weights that wander for 4,000 steps; snapshots of two averages at 16 times; a third from them."""
    steps, batch_size = 4000, 8
    model = nn.Linear(64, 8)
    gammas = [gamma_of(0.05), gamma_of(0.10), gamma_of(width)]
    averages = [Average(model, lambda seen, batch, gamma=gamma: power_weight(seen, batch, gamma)) for gamma in gammas]
    snapshots: list[tuple[int, float]] = []
    tensors: list[Tensor] = []
    for step in range(1, int(steps * share) + 1):
        with torch.no_grad():
            model.weight += normals(8, 64, seed=step) * 0.1
        for average in averages:
            average.update(images_seen=step * batch_size, batch_size=batch_size)
        if step % (steps // 16) == 0:
            for average, gamma in zip(averages[:2], gammas[:2], strict=True):
                snapshots.append((step * batch_size, gamma))
                tensors.append(average.tensors["weight"].clone())
    weights = reconstruction_weights(snapshots, int(steps * share) * batch_size, gammas[2])
    ours, direct = weighted_sum(tensors, weights.tolist()), averages[2].tensors["weight"]
    error = (ours - direct).norm() / direct.norm()
    nearest = min((tensor - direct).norm() / direct.norm() for tensor in tensors)
    assert error < 2e-2
    assert error < nearest / 10


# What a step costs.


def test_the_cost_of_a_layer_is_its_multiplications_and_additions_in_both_passes() -> None:
    """A wider MLP ratio is none of the model's settings, but one more block of a known size is."""
    width, tokens, condition = 16, 4, 32  # of `build`: 2x2 tokens in the bottleneck
    one, two = Cost.of(build(depth=1)), Cost.of(build(depth=2))
    products = tokens * width * (3 * width + width + 4 * width + 4 * width) + condition * 6 * width
    attention = 2 * tokens * tokens * width  # by the scores, and by the values
    assert two.flops - one.flops == 3 * 2 * (products + attention)
    assert two.kept_bytes > one.kept_bytes


def test_gradient_checkpointing_keeps_less() -> None:
    plain, recomputing = build(), build()
    recomputing.enable_gradient_checkpointing()
    assert Cost.of(recomputing).kept_bytes < Cost.of(plain).kept_bytes / 2


def test_more_memory_has_room_for_more_images_and_none_for_none() -> None:
    model = build()
    rows = [fitting_rows(model, size, averages=1, half=False) for size in (0, 10**8, 2 * 10**8)]
    assert rows[0] == 0 < rows[1] < rows[2]
    assert fitting_rows(model, 10**8, averages=1, half=True) > rows[1]


@pytest.mark.parametrize(
    ("name", "half", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", True, 989),
        ("NVIDIA A100-SXM4-80GB", False, 156),
        ("NVIDIA A10", True, 125),
        ("NVIDIA A10G", True, None),
        ("NVIDIA RTX A1000", True, None),
        ("NVIDIA T400 4GB", True, None),
        ("NVIDIA L40S", True, 362),
        ("NVIDIA L4", True, 121),
        ("Some Other GPU", True, None),
    ],
)
def test_the_peak_of_a_known_gpu_is_found_by_its_name(name: str, half: bool, teraflops: float | None) -> None:
    assert peak_flops(name, half=half) == (None if teraflops is None else teraflops * 1e12)
