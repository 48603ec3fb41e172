"""Guidance, on a tiny model whose output depends on its class."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from diffusers.guiders.classifier_free_zero_star_guidance import cfg_zero_star_scale
from diffusers.guiders.guider_utils import rescale_noise_cfg
from torch import Tensor

from pipeline.guidance import APG_MOMENTUM, APG_NORM, CPU_ROWS, Guidance, GuidedModel
from pipeline.noise import NoiseProcess
from pipeline.sampling import image_generators, sampling_loop
from tests.helpers.models import CLASSES, normals, scrambled

FLOW, DISCRETE = NoiseProcess("flow", "flow"), NoiseProcess("linear", "epsilon")
COUNT = 2 * CPU_ROWS  # of samples in a batch
LABELS = torch.arange(COUNT) % CLASSES
X = normals(COUNT, 4, 4, 4)
LEVEL = FLOW.levels(2)[1]
TIME = torch.tensor(LEVEL.timestep)


class Counted(torch.nn.Module):
    """A model that counts the images it was given, and the calls."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.model, self.images, self.calls = scrambled(), 0, 0
        self.null_class = CLASSES

    def forward(self, x: Tensor, timestep: Tensor, labels: Tensor) -> Any:
        self.images, self.calls = self.images + len(x), self.calls + 1
        return self.model(x, timestep, labels)


def predictions(model: Any = None) -> tuple[Tensor, Tensor]:
    model = model or scrambled()
    return model(X, TIME, LABELS).sample, model(X, TIME, torch.full_like(LABELS, CLASSES)).sample


def guided(scales: Any, guidance: Guidance | None = None, noise: NoiseProcess = FLOW, **options: Any) -> GuidedModel:
    scales = [scales] * COUNT if isinstance(scales, float | int) else scales
    return GuidedModel(options.pop("model", None) or scrambled(), noise, LABELS, scales, guidance, **options)


def clean(prediction: Tensor) -> Tensor:
    return FLOW.clean(X, prediction, LEVEL)


@torch.no_grad()
def estimate(*arguments: Any, **options: Any) -> Tensor:
    return guided(*arguments, **options)(X, TIME, LEVEL)[0]


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def test_guidance_interpolates_and_extrapolates_between_two_models() -> None:
    strong, weak = predictions()
    assert torch.allclose(estimate(1.0), clean(strong), atol=1e-5)
    assert torch.allclose(estimate(0.0), clean(weak), atol=1e-5)
    for scale in (2.0, 0.5):
        assert torch.allclose(estimate(scale), clean(weak + scale * (strong - weak)), atol=1e-4)
    assert (strong - weak).abs().max() > 1e-2


def test_every_sample_has_a_scale_of_its_own_and_only_guided_ones_cost_twice() -> None:
    model = Counted()
    scales = [1.0, 3.0, 3.0, 0.0] * (COUNT // 4)
    mixed = estimate(scales, model=model)
    assert model.images == COUNT + COUNT // 2
    for i, scale in enumerate(scales[:4]):
        assert torch.allclose(mixed[i], estimate(scale)[i], atol=1e-4)


@pytest.mark.parametrize(("scale", "images"), [(1.0, COUNT), (0.0, COUNT), (2.0, 2 * COUNT)])
def test_scales_0_and_1_need_one_half(scale: float, images: int) -> None:
    model = Counted()
    estimate(scale, model=model)
    assert (model.images, model.calls) == (images, images // CPU_ROWS)


def test_a_cpu_always_computes_as_many_images_at_a_time() -> None:
    model = Counted()
    alone = GuidedModel(model, FLOW, LABELS[:1], [2.0])
    assert torch.equal(alone(X[:1], TIME, LEVEL)[0], estimate(2.0)[:1])
    assert (model.images, model.calls) == (CPU_ROWS, 1)


def test_outside_its_interval_guidance_costs_nothing_and_does_nothing() -> None:
    low, high = 0.5, 2.0
    for sigma, inside in ((0.3, False), (0.4, True), (0.6, True), (0.7, False), (1.0, False)):
        level = FLOW.levels(1, start=sigma)[0]
        model = Counted()
        both = guided(3.0, Guidance(interval=(low, high)), model=model)
        x0, _ = both(X, torch.tensor(level.timestep), level)
        assert (low < sigma / max(1 - sigma, 1e-9) <= high) == inside == (model.images == 2 * COUNT)
        plain, _ = guided(3.0 if inside else 1.0)(X, torch.tensor(level.timestep), level)
        assert torch.equal(x0, plain)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_schedule_keeps_the_mean_of_guidance_and_never_falls(schedule: str) -> None:
    weights = [Guidance(schedule=schedule).weight(level) for level in FLOW.levels(1000)]
    assert sum(weights) / 1000 == pytest.approx(1, abs=2e-3)
    assert all(later >= earlier for earlier, later in itertools.pairwise(weights))
    expected = 1 + Guidance(schedule=schedule).weight(LEVEL) * 2.0
    assert torch.allclose(estimate(3.0, Guidance(schedule=schedule)), estimate(expected), atol=1e-5)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_rescaling_is_that_of_diffusers(share: float) -> None:
    strong, weak = predictions()
    expected = rescale_noise_cfg(weak + 4 * (strong - weak), strong, share)
    assert torch.allclose(estimate(4.0, Guidance(rescale=share)), clean(expected), atol=1e-4)


def test_apg_is_that_of_diffusers_on_clean_latents() -> None:
    buffer, ours = MomentumBuffer(APG_MOMENTUM), guided(4.0, Guidance(form="apg"))
    for time in (TIME, TIME / 2):
        level = FLOW.levels(1, start=time.item() / 1000)[0]
        model = scrambled()
        strong, weak = (
            FLOW.clean(X, model(X, time, labels).sample, level) for labels in (LABELS, torch.full_like(LABELS, CLASSES))
        )
        expected = normalized_guidance(
            strong, weak, 3.0, buffer, eta=0.0, norm_threshold=APG_NORM * 8, use_original_formulation=True
        )
        assert torch.allclose(ours(X, time, level)[0], expected, atol=1e-4)


def test_cfg_zero_scales_the_weak_velocity_as_diffusers_does_and_begins_at_rest() -> None:
    strong, weak = predictions()
    ours = guided(3.0, Guidance(form="cfg_zero"))
    assert torch.equal(ours(X, TIME, LEVEL)[0], X)
    weak = weak * cfg_zero_star_scale(strong.flatten(1), weak.flatten(1)).view(-1, 1, 1, 1)
    assert torch.allclose(ours(X, TIME, LEVEL)[0], clean(weak + 3 * (strong - weak)), atol=1e-4)


def test_cfg_zero_is_at_rest_in_the_first_step_alone_also_when_rescaled() -> None:
    rescaled = guided(3.0, Guidance(form="cfg_zero", rescale=0.5))
    assert torch.equal(rescaled(X, TIME, LEVEL)[0], X)
    assert torch.isfinite(rescaled(X, TIME, LEVEL)[0]).all()
    late = guided(3.0, Guidance(form="cfg_zero", interval=(0.1, 5)))
    noisiest = FLOW.levels(2)[0]  # outside the interval
    late(X, torch.tensor(noisiest.timestep), noisiest)
    assert not torch.equal(late(X, TIME, LEVEL)[0], X)


@pytest.mark.parametrize("guidance", [Guidance(), Guidance(schedule="linear"), Guidance(interval=(2, 3), rescale=0.5)])
def test_scale_0_is_the_null_class_whatever_else_is_in_the_batch(guidance: Guidance) -> None:
    alone = estimate(0.0, guidance)
    mixed = estimate([0.0, 3.0] * (COUNT // 2), guidance)
    assert torch.equal(mixed[::2], alone[::2])
    assert torch.allclose(alone, clean(predictions()[1]), atol=1e-5)


def test_cfg_plus_plus_takes_the_remaining_noise_from_the_weak_prediction() -> None:
    strong, weak = predictions()
    x0, of_noise = guided(0.6, Guidance(form="cfg++"))(X, TIME, LEVEL)
    assert torch.allclose(x0, clean(weak + 0.6 * (strong - weak)), atol=1e-5)
    assert torch.allclose(of_noise, clean(weak), atol=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_scale_1_and_pure_noise_are_no_exceptions_of_cfg_plus_plus(schedule: str) -> None:
    """It takes the noise from the weak prediction there, too: a scale a little higher draws the same."""
    noisiest = FLOW.levels(2)[0]
    for level in (LEVEL, noisiest):
        exact, nearly = (
            guided([scale, 0.6] * (COUNT // 2), Guidance(form="cfg++", schedule=schedule))(
                X, torch.tensor(level.timestep), level
            )
            for scale in (1.0, 1 + 1e-6)
        )
        for one, other in zip(exact, nearly, strict=True):
            assert torch.allclose(one, other, atol=1e-4)
        assert not torch.allclose(*exact, atol=1e-2)
    outside = guided(1.0, Guidance(form="cfg++", interval=(0.1, 5)))(X, torch.tensor(noisiest.timestep), noisiest)
    assert torch.equal(*outside)


def test_a_weaker_model_guides_with_the_same_class() -> None:
    guide = scrambled(depth=1)
    strong, weak = predictions()[0], predictions(guide)[0]
    assert torch.allclose(estimate(3.0, guide=guide), clean(weak + 3 * (strong - weak)), atol=1e-4)
    assert torch.allclose(estimate(3.0, guide=scrambled()), clean(strong), atol=1e-5)  # a model guides itself nowhere


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *itertools.product(["ddpm", "ddim"], ["cfg", "apg", "cfg++"]),
        *itertools.product(["euler", "euler_ancestral"], ["cfg", "apg", "cfg_zero", "cfg++"]),
        *itertools.product(["unipc", "dpm++", "heun"], ["cfg", "apg", "cfg_zero"]),
    ],
)
def test_a_sample_depends_on_its_index_alone(name: str, form: str) -> None:
    noise = DISCRETE if name.startswith("dd") else FLOW
    model = scrambled()

    def images(indices: list[int]) -> Tensor:
        labels = torch.tensor(indices) % CLASSES
        scales = [1.0 + 0.5 * (i % 2) for i in indices]
        return sampling_loop(
            GuidedModel(model, noise, labels, scales, Guidance(form=form)),
            noise.levels(5),
            name,
            shape=(4, 4, 4),
            generators=image_generators(9, indices),
            device=torch.device("cpu"),
        )

    together = images([0, 1, 2, 3, 4])
    scale = together.abs().max()
    assert torch.allclose(torch.cat([images([i]) for i in range(5)]) / scale, together / scale, atol=1e-4)
    assert torch.allclose(images([4, 1]) / scale, together[[4, 1]] / scale, atol=1e-4)
    assert (together[0] - together[3]).abs().max() > 1e-2 * scale  # of one class, and yet not alike
