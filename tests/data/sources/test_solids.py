from __future__ import annotations

from itertools import combinations, pairwise
from math import pi, sqrt

import numpy as np
import pytest
from numpy.typing import NDArray

from data.sources.solids import CLASSES, KINDS, Solids, label, render, scene

# By elementary geometry, from the measures in data/solids.py.
VOLUMES = {
    "capsule": pi * 0.4**2 * 1.1 + 4 / 3 * pi * 0.4**3,
    "cone": pi * 0.66**2 * 1.67 / 3,
    "cross": 3 * 0.5**2 * 1.8 - 2 * 0.5**3,
    "cube": 1.14**3,
    "cylinder": pi * 0.55**2 * 1.5,
    "octahedron": 4 / 3 * 0.98**3,
    "pyramid": 1.2**2 * 1.35 / 3,
    "ring": pi * (0.88**2 - 0.68**2) * 0.72,
    "sphere": 4 / 3 * pi * 0.85**3,
    "torus": 2 * pi**2 * 0.64 * 0.29**2,
}


def points(count: int, seed: int = 0) -> NDArray[np.float32]:
    """Uniform points in a cube a little larger than the unit ball, `3 count`."""
    return np.random.default_rng(seed).uniform(-1.1, 1.1, (3, count)).astype(np.float32)


def length(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    result: NDArray[np.float32] = np.sqrt((vectors**2).sum(0))
    return result


@pytest.mark.parametrize("size", [32, 47])
def test_an_image_does_not_depend_on_its_batch(size: int) -> None:
    together = render(range(40), seed=5, size=size)
    assert together.shape == (40, size, size, 3)
    assert together.dtype == np.uint8
    some = [33, 1, 17, 23, 1]
    np.testing.assert_array_equal(render(some, seed=5, size=size), together[some])
    alone = [render([index], seed=5, size=size)[0] for index in range(40)]
    np.testing.assert_array_equal(np.stack(alone), together)


def test_an_empty_batch_is_empty() -> None:
    assert render([], seed=0, size=16).shape == (0, 16, 16, 3)


def test_images_of_other_seeds_and_indices_differ() -> None:
    images = [*render(range(0, 50, 10), seed=0, size=24), *render(range(0, 50, 10), seed=1, size=24)]
    for a, b in combinations(images, 2):
        assert np.abs(a.astype(int) - b).mean() > 3


def test_classes_are_sorted_and_take_turns() -> None:
    assert list(CLASSES) == sorted(CLASSES)
    assert len(CLASSES) == 10
    np.testing.assert_array_equal(label(np.arange(25)), np.arange(25) % 10)
    assert CLASSES[label(19)] == "torus"


def test_the_scene_is_the_same_at_any_size() -> None:
    small, large = (render(range(20), seed=3, size=size).astype(float) for size in (64, 128))
    halved = large.reshape(20, 64, 2, 64, 2, 3).mean((2, 4))
    errors = np.abs(small - halved).mean((1, 2, 3))
    assert errors.max() < 1.2  # grey levels; 0.85 was the most of 80 images


@pytest.mark.parametrize("name", CLASSES)
def test_a_solid_keeps_inside_the_unit_ball(name: str) -> None:
    p = points(100_000)
    assert (KINDS[name].distance(*p)[length(p) >= 1] > 0).all()


def test_the_unit_ball_keeps_inside_the_frame() -> None:
    for index in range(500):
        x = scene(0, index)
        assert (1 + np.abs(x.shift).max()) / x.zoom < 1


def test_directions_are_unit_vectors_and_the_view_is_a_right_handed_frame() -> None:
    for index in range(50):
        x = scene(1, index)
        right, up, forward = x.view
        np.testing.assert_allclose(x.view @ x.view.T, np.eye(3), atol=1e-6)
        np.testing.assert_allclose(np.cross(right, up), -forward, atol=1e-6)
        np.testing.assert_allclose((x.light**2).sum(-1), 1, atol=1e-6)
        assert x.light[0] @ forward < 0  # the light is on the camera's side


def test_solid_and_background_contrast() -> None:
    scenes = [scene(2, index) for index in range(2000)]
    assert min(np.sqrt(((x.albedo - x.ground) ** 2).sum(-1)).min() for x in scenes) > 0.33
    assert all(field.min() >= 0 and field.max() <= 1 for x in scenes for field in (x.albedo, x.ground))


@pytest.mark.parametrize("name", CLASSES)
def test_distances_grow_no_faster_than_the_way(name: str) -> None:
    """|d(p) - d(q)| <= |p - q|: a march in steps of d passes through no surface."""
    p, q = points(50_000, seed=1), points(50_000, seed=2)
    for scale in (1, 0.05):  # far and near pairs
        r = p + scale * (q - p)
        difference = np.abs(KINDS[name].distance(*p) - KINDS[name].distance(*r))
        assert (difference <= length(p - r) + 1e-6).all()


@pytest.mark.parametrize("name", CLASSES)
def test_distances_are_negative_in_the_volume_of_the_solid(name: str) -> None:
    count = 200_000
    inside = (KINDS[name].distance(*points(count)) < 0).mean()
    expected = VOLUMES[name] / 2.2**3
    assert abs(inside - expected) < 5 * sqrt(expected * (1 - expected) / count)  # five standard errors


def test_solids_differ_in_shape() -> None:
    p = points(50_000)
    inside = {name: KINDS[name].distance(*p) < 0 for name in CLASSES}
    for a, b in combinations(CLASSES, 2):
        common, either = (inside[a] & inside[b]).sum(), (inside[a] | inside[b]).sum()
        assert common / either < 0.7, (a, b)


def test_neighbouring_faces_of_a_cube_differ_in_light() -> None:
    for index in range(CLASSES.index("cube"), 2000, len(CLASSES)):
        x = scene(0, index)
        faces = np.concatenate([np.eye(3), -np.eye(3)])
        seen = faces[faces @ x.view[2] < 0]
        shades = np.sort(np.maximum(seen @ x.light[0], 0))
        assert len(seen) == 3
        assert min(b - a for a, b in pairwise(shades)) > 0.05


def test_a_data_set_reads_what_render_draws() -> None:
    solids = Solids(count=25, seed=4, image_size=16)
    batch = solids.load([3, 21])
    np.testing.assert_array_equal(batch.pixels, render([3, 21], seed=4, size=16))
    assert not batch.failures
    assert len(solids.keys) == 25 == len(set(solids.keys))
    assert [key.split("/")[0] for key in solids.keys] == [solids.classes[kind] for kind in solids.labels]


def test_the_fingerprint_tells_data_sets_apart() -> None:
    ways = [(25, 4, 16), (26, 4, 16), (25, 5, 16), (25, 4, 32)]
    prints = {Solids(count=n, seed=seed, image_size=size).fingerprint() for n, seed, size in ways}
    assert len(prints) == len(ways)
