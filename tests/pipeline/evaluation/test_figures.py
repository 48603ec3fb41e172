"""The figures of an evaluation, from features: against other people's code, and where the answer is known."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.evaluation import classes, figures, kernel, neighbours
from pipeline.evaluation.classes import (
    class_frechet_distances,
    class_kernel_distances,
    fit_probe,
    inception_score,
)
from pipeline.evaluation.figures import Estimate, Selected, share
from pipeline.evaluation.frechet import FrechetFigures, Gaussian, Sums, frechet, frechet_distance, too_few
from pipeline.evaluation.kernel import kernel_difference, kernel_distance, mean_similarity
from pipeline.evaluation.neighbours import Memorisation, closer_than_heldout, nearest, neighbour_figures

CPU = torch.device("cpu")


@dataclass
class Rows:
    """Features in memory, that remember the most rows read at once."""

    rows: NDArray[np.float32]
    labels: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    most: int = 0

    def __post_init__(self) -> None:
        self.rows = np.asarray(self.rows, np.float32)
        self.labels = self.labels if len(self.labels) else np.full(len(self.rows), -1)

    @property
    def dimension(self) -> int:
        return self.rows.shape[1]

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        found = self.rows[rows]
        assert len(found) > 0
        self.most = max(self.most, len(found))
        return found


def fd(features: Rows, reference: Rows) -> float:
    return frechet_distance(Sums.of(features, CPU).gaussian(), Sums.of(reference, CPU).gaussian())


def frechet_figures(features: Rows, reference: Rows) -> FrechetFigures:
    return frechet(features, Sums.of(reference, CPU).gaussian(), CPU)


def kd(features: Rows, reference: Rows) -> Estimate:
    return kernel_distance(features, reference, mean_similarity(reference, CPU), CPU)


def four(features: Rows, reference: Rows) -> tuple[float, ...]:
    """Precision, recall, density and coverage."""
    found = neighbour_figures(features, reference, CPU)
    return tuple(each.value for each in (found.precision, found.recall, found.density, found.coverage))


def normals(*shape: int, seed: int = 0) -> NDArray[np.float64]:
    return np.random.RandomState(seed).standard_normal(shape)


def inside(estimate: Estimate | None, truth: float) -> bool:
    assert estimate is not None
    assert estimate.interval is not None
    return estimate.interval[0] <= truth <= estimate.interval[1]


@pytest.fixture(params=[30, 70, 1000])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The rows read at once: 260 and 300 rows in many blocks, in some, and in one."""
    for module in (figures, kernel, neighbours, classes):
        monkeypatch.setattr(module, "BLOCK", request.param)
    return int(request.param)


# Against other people's code. The numbers were made from these very rows, in float64 (RandomState never changes):
#   scipy 1.17.1: np.cov of both, and the real part of scipy.linalg.sqrtm(A @ B)
#   torchmetrics 1.9.0: FrechetInceptionDistance; KernelInceptionDistance(subsets=1, subset_size=all)
#     (InceptionScore(splits=1) of 0.3 times the fake rows as logits)
#   prdc 0.2: compute_prdc of the first 260 real rows and the fake ones
#   scikit-learn 1.9.1: LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.01, priors=[1/3, 1/3, 1/3])


@pytest.fixture
def sets() -> tuple[Rows, Rows]:
    """Real and fake."""
    random = np.random.RandomState(16)
    mix = random.standard_normal((24, 24))
    real = (random.standard_normal((300, 24)) @ mix + 1).astype(np.float32)
    fake = (1.1 * random.standard_normal((260, 24)) @ mix + 1.3 + random.exponential(size=(260, 24))).astype(np.float32)
    return Rows(real), Rows(fake)


@pytest.fixture
def labelled_sets(sets: tuple[Rows, Rows]) -> tuple[Rows, Rows]:
    """The same, with three classes, each moved by a vector of its own."""
    random = np.random.RandomState(17)
    shifts = 2 * random.standard_normal((3, 24)).astype(np.float32)
    labels = [np.arange(len(each)) % 3 for each in sets]
    real, fake = (Rows(each.rows + shifts[own], own) for each, own in zip(sets, labels, strict=True))
    return real, fake


def test_the_frechet_distance_is_that_of_scipy_and_torchmetrics(sets: tuple[Rows, Rows], block: int) -> None:
    real, fake = sets
    assert fd(fake, real) == pytest.approx(63.64669436054, rel=1e-10)
    assert frechet_figures(fake, real).distance.value == pytest.approx(63.64669436054, rel=1e-10)
    few_real, few_fake = Rows(real.rows[:15]), Rows(fake.rows[:18])  # singular: 24 numbers an image
    assert fd(few_real, few_fake) == pytest.approx(395.69734, rel=1e-7)
    assert fd(few_fake, few_real) == pytest.approx(395.69734, rel=1e-7)
    assert fake.most <= block


def test_the_kernel_distance_is_that_of_torchmetrics(sets: tuple[Rows, Rows], block: int) -> None:
    real, fake = sets
    assert kd(fake, Rows(real.rows[:260])).value == pytest.approx(606.66861978659, rel=1e-10)
    few = kd(Rows(fake.rows[:15]), Rows(real.rows[:15]))
    assert few == Estimate(pytest.approx(758.493755885353, rel=1e-10), None)  # too few for an interval
    assert fake.most <= block


def test_the_kernel_distance_of_sets_of_two_sizes_is_that_of_all_pairs(sets: tuple[Rows, Rows], block: int) -> None:
    real, fake = (each.rows.astype(np.float64) for each in sets)

    def similarity(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
        return (x @ y.T / 24 + 1) ** 3

    def unbiased(x: NDArray[np.float64]) -> float:
        within = similarity(x, x)
        return float((within.sum() - np.trace(within)) / (len(x) * (len(x) - 1)))

    def distance(x: NDArray[np.float64]) -> float:
        return unbiased(x) + unbiased(real) - 2 * float(similarity(x, real).mean())

    found = kd(sets[1], sets[0])
    assert found.value == pytest.approx(distance(fake), rel=1e-10)
    without = [distance(fake[np.arange(260) % 10 != group]) for group in range(10)]
    margin = 2.262 * np.sqrt(0.9 * np.square(without - np.mean(without)).sum())
    assert found.interval == pytest.approx((found.value - margin, found.value + margin), rel=1e-9)


def test_precision_recall_density_and_coverage_are_those_of_prdc(sets: tuple[Rows, Rows], block: int) -> None:
    real, fake = sets
    expected = 0.573076923076923, 0.8615384615384616, 0.4415384615384616, 0.7538461538461538
    assert four(fake, real) == pytest.approx(expected, rel=1e-12)  # the first 260 of either
    assert neighbour_figures(fake, real, CPU).rows == 260
    assert fake.most <= block


def test_the_inception_score_is_that_of_torchmetrics(sets: tuple[Rows, Rows], block: int) -> None:
    logits = Rows(np.float32(0.3) * sets[1].rows)
    found = inception_score(logits, lambda features: features.double().softmax(1), CPU)
    assert found.value == pytest.approx(2.2396553413524, rel=1e-10)
    assert inside(found, found.value)
    assert logits.most <= block


def test_the_linear_probe_is_that_of_scikit_learn(labelled_sets: tuple[Rows, Rows], block: int) -> None:
    real, fake = labelled_sets
    found = fit_probe(real, CPU).accuracy(fake, CPU)
    assert found.images == 260
    assert found.overall == share(246, 260)
    assert found.by_class == {0: share(74, 87), 1: share(87, 87), 2: share(85, 86)}
    assert fake.most <= block


def test_a_shrunk_probe_of_fewer_images_than_numbers_is_the_one_by_hand() -> None:
    rows, labels = normals(12, 30), np.arange(12) % 2
    probe = fit_probe(Rows(rows, labels), CPU)
    rows = rows.astype(np.float32).astype(np.float64)
    means = np.stack([rows[labels == label].mean(0) for label in (0, 1)])
    within = sum(np.cov(rows[labels == label].T) * 5 for label in (0, 1)) / 10
    shrunk = 0.99 * within + 0.01 * np.trace(within) / 30 * np.eye(30)
    weights = means @ np.linalg.inv(shrunk)
    np.testing.assert_allclose(probe.weights, weights, rtol=1e-8)
    np.testing.assert_allclose(probe.bias, [-0.5 * w @ m for w, m in zip(weights, means, strict=True)], rtol=1e-8)


# Known answers of the Fréchet distance.


def test_sums_add_and_subtract_and_give_what_numpy_gives(sets: tuple[Rows, Rows], block: int) -> None:
    rows = sets[0].rows.astype(np.float64)
    whole, first, rest = (Sums.of(Rows(part), CPU) for part in (rows, rows[:110], rows[110:]))
    for sums, part in ((whole, rows), (first + rest, rows), (whole - first, rows[110:])):
        gaussian = sums.gaussian()
        assert gaussian.count == len(part)
        np.testing.assert_allclose(gaussian.mean, part.mean(0), rtol=1e-12)
        np.testing.assert_allclose(gaussian.covariance, np.cov(part.T), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rows", [300, 20, 2], ids=["many", "fewer than numbers", "two"])
def test_equal_sets_have_no_frechet_distance(sets: tuple[Rows, Rows], rows: int) -> None:
    some = Rows(sets[0].rows[:rows])
    spread = Sums.of(some, CPU).gaussian().covariance.trace().item()
    assert 0 <= fd(some, some) < 1e-9 * spread
    repeated = Rows(np.tile(some.rows[:7], (40, 1)))  # 280 rows, of which 7 differ
    assert 0 <= fd(repeated, repeated) < 1e-9 * spread


def test_sets_without_spread_are_as_far_apart_as_their_means() -> None:
    ones, twos = Rows(np.ones((25, 3))), Rows(np.full((25, 3), 2.0))
    assert frechet_figures(twos, ones).distance == Estimate(pytest.approx(3), (pytest.approx(3), pytest.approx(3)))
    assert fd(Rows(normals(50, 3)), ones) == pytest.approx(
        np.square(normals(50, 3).mean(0) - 1).sum() + np.trace(np.cov(normals(50, 3).T)), rel=1e-6
    )


def test_gaussians_have_the_distance_of_the_closed_form() -> None:
    """Of commuting covariances: by the differences of means and of standard deviations."""
    turn, _ = torch.linalg.qr(torch.from_numpy(normals(6, 6)))
    shift = torch.arange(6, dtype=torch.float64)
    a, b = torch.tensor([[1.0, 2, 3, 4, 5, 0], [3.0, 1, 4, 1, 5, 9]], dtype=torch.float64)
    gaussians = [
        Gaussian(turn @ mean, turn @ torch.diag(std**2) @ turn.T, 1000) for mean, std in ((shift, a), (0 * shift, b))
    ]
    expected = shift.square().sum() + (a - b).square().sum()
    assert frechet_distance(*gaussians) == pytest.approx(expected.item(), rel=1e-7)
    assert frechet_distance(*reversed(gaussians)) == pytest.approx(expected.item(), rel=1e-7)


def test_more_samples_of_shifted_gaussians_come_nearer_to_the_closed_form() -> None:
    truth = 8 * 0.25 + 8 * 0.5**2
    exact = Gaussian(torch.zeros(8, dtype=torch.float64), torch.eye(8, dtype=torch.float64), 10**9)
    errors = []
    for count in (40, 400, 4000, 40_000):
        rows = Rows(1.5 * normals(count, 8) + 0.5)
        errors.append(abs(frechet_distance(Sums.of(rows, CPU).gaussian(), exact) - truth))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.02 * truth


# The bias of the Fréchet distance, and intervals.

DRAWS = 150


@pytest.fixture(scope="module")
def frechet_draws() -> tuple[list[FrechetFigures], float]:
    """The figures of many draws of 10 D rows, and the true distance to the reference."""
    spread = torch.linspace(0.2, 2, 16, dtype=torch.float64)
    reference = Gaussian(torch.zeros(16, dtype=torch.float64), torch.diag(spread**2), 10**9)
    draws = [Rows(1.1 * normals(160, 16, seed=seed) * spread.numpy() + 0.1) for seed in range(DRAWS)]
    truth = 16 * 0.1**2 + (0.1**2 * spread.square().sum()).item()
    return [frechet(rows, reference, CPU) for rows in draws], truth


def test_intervals_cover_what_they_should_95_times_in_100(frechet_draws: tuple[list[FrechetFigures], float]) -> None:
    found, truth = frechet_draws
    centre = float(np.mean([each.distance.value for each in found]))
    assert 0.9 <= np.mean([inside(each.distance, centre) for each in found]) <= 0.99
    assert 0.9 <= np.mean([inside(each.extrapolated, truth) for each in found]) <= 0.99
    assert np.mean([inside(each.distance, truth) for each in found]) < 0.8  # it is biased


def test_extrapolated_the_frechet_distance_comes_nearer_to_the_truth(
    frechet_draws: tuple[list[FrechetFigures], float],
) -> None:
    found, truth = frechet_draws
    plain = np.array([each.distance.value for each in found]) - truth
    extrapolated = np.array([each.extrapolated.value for each in found if each.extrapolated]) - truth
    assert plain.mean() > 3 * abs(extrapolated.mean())
    assert np.square(extrapolated).mean() < np.square(plain).mean() / 2


def test_the_extrapolated_distance_is_where_a_line_through_its_two_sizes_ends(sets: tuple[Rows, Rows]) -> None:
    real, fake = sets
    found = frechet_figures(fake, real)
    nine_tenths = [fd(Rows(fake.rows[np.arange(260) % 10 != group]), real) for group in range(10)]
    slope = (np.mean(nine_tenths) - found.distance.value) / (1 / (0.9 * 260) - 1 / 260)
    assert found.extrapolated is not None
    assert found.extrapolated.value == pytest.approx(found.distance.value - slope / 260, rel=1e-9)


def test_a_line_that_bends_is_not_extrapolated(sets: tuple[Rows, Rows]) -> None:
    real, fake = sets
    assert frechet_figures(Rows(fake.rows[:47]), real).extrapolated is None  # 24 numbers an image
    assert frechet_figures(Rows(fake.rows[:48]), real).extrapolated is not None
    few = Rows(fake.rows[:19])
    assert frechet_figures(few, real) == (Estimate(pytest.approx(fd(few, real), rel=1e-9), None), None)


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (10, "10 images are fewer than D + 1 = 11: ... read the kernel distance"),
        (11, "11 images are fewer than 2 D = 20: ... read the kernel distance"),
        (20, "20 images are fewer than 10 D = 100: ... read the extrapolated Fréchet distance or the kernel distance"),
    ],
)
def test_too_few_images_are_told_with_what_to_read_instead(count: int, words: str) -> None:
    warning = too_few(count, 10)
    assert warning is not None
    assert "\n" not in warning
    start, end = words.split(" ... ")
    assert warning.startswith(start)
    assert warning.endswith(end)
    assert too_few(100, 10) is None


def test_the_kernel_distance_has_no_bias_and_an_interval_that_covers() -> None:
    reference = Rows(normals(400, 5, seed=1000))
    similarity = mean_similarity(reference, CPU)
    found = [kernel_distance(Rows(normals(60, 5, seed=seed)), reference, similarity, CPU) for seed in range(DRAWS)]
    values = np.array([each.value for each in found])
    assert min(values) < 0 < max(values)
    assert 0.9 <= np.mean([inside(each, values.mean()) for each in found]) <= 0.995
    small = np.array(
        [kd(Rows(normals(4, 5, seed=2 * i)), Rows(normals(6, 5, seed=2 * i + 1))).value for i in range(400)]
    )
    assert abs(small.mean()) < 3 * small.std() / np.sqrt(len(small))
    assert small.std() / np.sqrt(len(small)) < 0.1 * small.std()


def test_the_difference_of_two_kernel_distances_is_told_apart_by_what_their_rows_have_in_common() -> None:
    """Rows of the same draws: one set is the other, moved a little. Apart, their intervals overlap."""
    reference, one = Rows(normals(400, 8, seed=1)), Rows(normals(100, 8, seed=2) + 0.3)
    other = Rows(one.rows + 0.1)
    paired = kernel_difference(other, one, reference, mean_similarity(reference, CPU), CPU)
    alone, moved = kd(one, reference), kd(other, reference)
    assert paired.value == pytest.approx(moved.value - alone.value, rel=1e-9)
    assert alone.interval
    assert moved.interval
    assert moved.interval[0] < alone.interval[1]
    assert paired.interval
    assert 0 < paired.interval[0] < paired.value < paired.interval[1]


def test_beyond_the_limit_no_row_counts_where_work_grows_with_the_square(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (kernel, neighbours):
        monkeypatch.setattr(module, "BLOCK", 20)
        monkeypatch.setattr(module, "LIMIT", 40)
    monkeypatch.setattr(figures, "BLOCK", 20)
    features, reference = normals(70, 4), normals(90, 4, seed=1)
    whole = Rows(features), Rows(reference)
    first = Rows(features[:40]), Rows(reference[:40])
    assert kd(*whole) == kd(*first)
    assert neighbour_figures(*whole, CPU) == neighbour_figures(*first, CPU)
    assert neighbour_figures(*whole, CPU).rows == 40


@pytest.mark.parametrize(("hits", "of"), [(0, 20), (20, 20), (3, 10), (1, 1)])
def test_a_share_has_an_interval_even_where_all_or_none_are_hits(hits: int, of: int) -> None:
    found = share(hits, of)
    assert found.value == hits / of
    assert inside(found, found.value)
    assert found.interval is not None
    assert 0 <= found.interval[0] < found.interval[1] <= 1
    for bound in found.interval:  # Wilson's: the shares of which these hits are 1.96 standard errors away
        if 0 < bound < 1:
            assert abs(bound - hits / of) == pytest.approx(1.96 * np.sqrt(bound * (1 - bound) / of), rel=1e-9)


# Neighbours.


def test_a_set_has_precision_and_recall_1_to_itself_and_0_to_one_far_away(sets: tuple[Rows, Rows], block: int) -> None:
    real, _ = sets
    away = Rows(real.rows + 1000)
    assert four(real, real) == pytest.approx((1, 1, 1 + 1 / 5, 1), rel=1e-12)
    assert four(away, real) == (0, 0, 0, 0)
    assert four(real, away) == (0, 0, 0, 0)


@pytest.mark.parametrize("rows", [2, 3, 5, 6, 50])
def test_sets_of_few_images_or_of_one_image_many_times_have_neighbours_too(rows: int) -> None:
    some = Rows(np.cumsum(normals(rows, 7), axis=0) + 100)
    assert four(some, some)[:2] == (1, 1)
    assert four(some, some)[3] == 1
    same = Rows(np.tile(1e3 * normals(1, 7), (rows, 1)))
    assert four(same, same) == pytest.approx((1, 1, rows / min(5, rows - 1), 1))


def test_dropped_modes_lower_recall_and_noise_lowers_precision() -> None:
    centres = 5 * normals(8, 6)
    real, alike = (centres[np.arange(400) % 8] + normals(400, 6, seed=seed) for seed in (1, 2))
    dropped = centres[np.arange(400) % 4] + normals(400, 6, seed=3)
    noisy = alike + 3 * normals(400, 6, seed=4)
    best, fewer, worse = (four(Rows(each), Rows(real)) for each in (alike, dropped, noisy))
    assert fewer[0] > best[0] - 0.05
    assert fewer[1] < best[1] - 0.3
    assert fewer[3] < best[3] - 0.3
    assert worse[0] < best[0] - 0.3
    assert worse[2] < best[2] - 0.3
    assert best[2] == pytest.approx(1, abs=0.15)


def test_the_nearest_row_is_the_one_that_a_loop_finds(sets: tuple[Rows, Rows], block: int) -> None:
    real, fake = sets
    distances, rows = nearest(fake, real, CPU)
    assert distances.dtype == np.float64
    assert rows.dtype == np.int64
    differences = fake.rows[:, None].astype(np.float64) - real.rows.astype(np.float64)
    everywhere = np.sqrt(np.square(differences).sum(2))
    np.testing.assert_array_equal(rows, everywhere.argmin(1))
    np.testing.assert_allclose(distances, everywhere.min(1), rtol=1e-14)
    assert real.most <= block


def test_an_exact_copy_is_at_0_even_among_rows_that_differ_in_the_last_bit(block: int) -> None:
    reference = (1000 + normals(300, 16)).astype(np.float32)
    copied = np.array([3, 11, 140, 299])
    reference[copied - 1] = reference[copied]
    reference[copied - 1, 5] = np.nextafter(reference[copied, 5], np.float32(np.inf))
    distances, rows = nearest(Rows(reference[copied]), Rows(reference), CPU)
    np.testing.assert_array_equal(rows, copied)
    np.testing.assert_array_equal(distances, 0)
    near, _ = nearest(Rows(reference[copied]), Rows(np.delete(reference, copied, axis=0)), CPU)
    assert (near > 0).all()


def test_of_rows_at_the_same_distance_the_first_counts(block: int) -> None:
    corners = np.concatenate([np.eye(4), -np.eye(4)])
    reference = np.concatenate([np.full((3, 4), 9.0), np.tile(corners, (30, 1))])
    distances, rows = nearest(Rows(np.zeros((25, 4))), Rows(reference), CPU)
    np.testing.assert_array_equal(distances, 1)
    np.testing.assert_array_equal(rows, 3)
    constant = Rows(np.full((230, 4), 0.1))  # not a sum of powers of two
    np.testing.assert_array_equal(nearest(constant, constant, CPU), np.zeros((2, 230)))


def test_memorised_images_lie_closer_than_held_out_ones() -> None:
    heldout = np.arange(1.0, 200)
    found = closer_than_heldout(np.array([0.0, 0.0, 0.5, 100.0]), heldout)
    assert found.closer.value == pytest.approx((3 + (99 + 0.5) / 199) / 4)
    assert found.very_close == share(3, 4)  # of 199, the nearest 1 % are those up to 2.0: the second
    assert found.copies == 2
    assert closer_than_heldout(heldout, heldout).closer.value == pytest.approx(0.5)
    assert closer_than_heldout(np.zeros(5), np.zeros(9)) == Memorisation(
        closer=Estimate(0.5, (0.5, 0.5)), very_close=share(0, 5), copies=5
    )
    assert closer_than_heldout(heldout + 300, heldout).closer.value == 0


def test_images_like_the_held_out_ones_are_as_close_as_they() -> None:
    draws = [
        closer_than_heldout(abs(normals(300, seed=i)), abs(normals(250, seed=-1 - i % 9 + 10**6))) for i in range(200)
    ]
    assert np.mean([each.closer.value for each in draws]) == pytest.approx(0.5, abs=0.02)
    assert np.mean([inside(each.closer, 0.5) for each in draws]) > 0.9
    many = [closer_than_heldout(normals(99, seed=2 * i), normals(99, seed=2 * i + 1)) for i in range(500)]
    assert np.mean([each.very_close.value for each in many]) == pytest.approx(0.01, abs=0.002)


# Classes.


def one_hot(count: int) -> Callable[[Tensor], Tensor]:
    return lambda features: torch.eye(count, dtype=torch.float64)[features[:, 0].long()]


def test_the_inception_score_is_the_number_of_classes_seen_for_certain() -> None:
    rows = Rows(np.arange(1400)[:, None] % 7)
    assert inception_score(rows, one_hot(7), CPU).value == pytest.approx(7, rel=1e-12)
    assert inception_score(rows, one_hot(70), CPU).value == pytest.approx(7, rel=1e-12)
    alike = inception_score(rows, lambda features: torch.full((len(features), 5), 0.2, dtype=torch.float64), CPU)
    assert alike == Estimate(pytest.approx(1), (pytest.approx(1), pytest.approx(1)))
    assert inception_score(Rows(rows.rows[:7]), one_hot(7), CPU) == Estimate(pytest.approx(7), None)


def test_the_interval_of_the_inception_score_covers_its_mean() -> None:
    found = [
        inception_score(Rows(normals(200, 4, seed=seed)), lambda features: features.double().softmax(1), CPU)
        for seed in range(DRAWS)
    ]
    centre = float(np.mean([each.value for each in found]))
    assert 0.9 <= np.mean([inside(each, centre) for each in found]) <= 0.99


def test_classes_with_enough_images_on_both_sides_have_distances_of_their_own() -> None:
    """Class 0 has too few in one set, class 1 in the other, class 3 is in one alone, and some have no label."""
    of_features, of_reference = (
        [0] * 49 + [1] * 60 + [2] * 55 + [3] * 80 + [-1] * 70,
        [2] * 50 + [1] * 49 + [0] * 60 + [-1] * 60,
    )
    random = np.random.RandomState(0)
    features, reference = (
        Rows(normals(len(labels), 3, seed=len(labels)), random.permutation(labels))
        for labels in (of_features, of_reference)
    )
    own = [Rows(each.rows[each.labels == 2]) for each in (features, reference)]
    assert class_kernel_distances(features, reference, CPU) == {2: kd(*own)}
    found = class_frechet_distances(features, reference, CPU)  # at least 6 images
    assert list(found) == [0, 1, 2]
    assert found[2] == fd(*own)
    wide = [Rows(normals(len(each), 26), each.labels) for each in (features, reference)]
    assert class_frechet_distances(*wide, CPU) == {}


def test_selected_rows_are_features_too(sets: tuple[Rows, Rows]) -> None:
    rows = np.arange(5, 300, 7)
    some = Selected(Rows(sets[0].rows, np.arange(300)), rows)
    assert len(some) == len(rows)
    assert some.dimension == 24
    np.testing.assert_array_equal(some.labels, rows)
    np.testing.assert_array_equal(some.read(slice(3, 9)), sets[0].rows[rows[3:9]])


def test_the_probe_passes_over_images_whose_class_it_does_not_know() -> None:
    centres = 10 * np.eye(6)
    labels = np.array([4, 2, -1] * 20)
    probe = fit_probe(Rows(centres[labels] + normals(60, 6), labels), CPU)
    shown, told = np.array([4, 2, 2, 4, 1, 0]), np.array([4, 2, 4, 4, 3, -1])
    found = probe.accuracy(Rows(centres[shown], told), CPU)
    assert found.images == 4
    assert found.overall == share(3, 4)
    assert found.by_class == {2: share(1, 1), 4: share(2, 3)}
    with pytest.raises(ValueError, match=r"^no image has a class of the reference"):
        probe.accuracy(Rows(centres[shown]), CPU)


def test_the_probe_of_classes_without_spread_takes_the_nearest_mean() -> None:
    reference = Rows(np.eye(3).repeat(5, axis=0), np.arange(3).repeat(5))
    assert fit_probe(reference, CPU).accuracy(reference, CPU).overall.value == 1


# Bad input.

MEASURES: dict[str, Callable[[Rows, Rows], object]] = {
    "frechet": frechet_figures,
    "kernel": kd,
    "neighbours": four,
    "nearest": lambda features, reference: nearest(features, reference, CPU),
    "inception": lambda features, _: inception_score(features, lambda block: block.double().softmax(1), CPU),
    "classes": lambda features, reference: class_frechet_distances(features, reference, CPU),
    "class kernel": lambda features, reference: class_kernel_distances(features, reference, CPU),
    "probe": lambda features, reference: fit_probe(reference, CPU).accuracy(features, CPU),
}


def numbered(rows: NDArray[np.float64]) -> Rows:
    return Rows(rows, np.arange(len(rows)) % 2)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_first_image_whose_features_are_not_finite_is_named(measure: str, value: float, block: int) -> None:
    rows = normals(200, 3)
    rows[[123, 151], 2] = value
    with pytest.raises(ValueError, match=r"^features of image 123 \(counted from 0\) contain NaN or infinity: [^\n]*$"):
        MEASURES[measure](numbered(rows), numbered(normals(200, 3)))


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_images_are_refused(measure: str, count: int) -> None:
    with pytest.raises(ValueError, match=f"^number of images = {count}: metrics need at least two$"):
        MEASURES[measure](numbered(normals(count, 3)), numbered(normals(200, 3)))


@pytest.mark.parametrize("measure", sorted(MEASURES.keys() - {"inception"}))
def test_features_of_two_networks_are_not_compared(measure: str) -> None:
    with pytest.raises(ValueError, match=r"^features with (3 and 4|4 and 3) numbers per image: "):
        MEASURES[measure](numbered(normals(200, 4)), numbered(normals(200, 3)))


def test_a_probe_of_one_class_and_no_distances_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^number of classes = 1: a linear probe needs at least two classes$"):
        fit_probe(Rows(normals(20, 3), np.zeros(20, np.int64)), CPU)
    with pytest.raises(ValueError, match=r"^distances of 0 images and 7 held out: "):
        closer_than_heldout(np.zeros(0), np.zeros(7))


@pytest.mark.parametrize("measure", sorted(MEASURES.keys() - {"inception"}))
def test_a_device_without_float64_leaves_the_work_to_the_cpu(measure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of ours is put on it, so it need not be there."""
    sets = [numbered(normals(200, 3, seed=seed)) for seed in (1, 2)]
    expected = MEASURES[measure](*sets)
    monkeypatch.setattr(sys.modules[__name__], "CPU", torch.device("mps"))
    np.testing.assert_equal(MEASURES[measure](*sets), expected)


def test_measuring_twice_gives_the_same_bits_and_json_holds_them(sets: tuple[Rows, Rows]) -> None:
    real, fake = sets
    assert frechet_figures(fake, real) == frechet_figures(fake, real)
    assert kd(fake, real) == kd(fake, real)
    assert asdict(neighbour_figures(fake, real, CPU)) == asdict(neighbour_figures(fake, real, CPU))
    assert set(asdict(kd(fake, real))) == {"value", "interval"}
