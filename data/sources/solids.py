"""Renders ten kinds of solids by ray marching: a labelled image data set that needs no download.

Every image depends on (seed, index, size) alone, and its scene on (seed, index): the same scene at any size.
Solids are inside the unit ball; `y` points up, an orthographic camera looks towards negative `z` and down.
Arrays of scenes and of rays have their `n` scenes or rays on the last axis.

Solids are signed distance functions (Quilez, "Distance functions"), negative inside. A maximum or minimum of
distances is only a lower bound of the distance; its slope is at most 1, which is enough for ray marching.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from math import cos, hypot, pi, radians, sin, sqrt
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from data.sources.base import Batch
from data.text import digest

VERSION = 1  # part of the fingerprint: raise it when a change alters the pictures

Floats = NDArray[np.floating]  # float32 always; numpy's types lose that where a Python number is involved
Ints = NDArray[np.int64]
Distance = Callable[[Floats, Floats, Floats], Floats]
Index = TypeVar("Index", int, Ints)

_STEPS = 48  # marching steps before a grazing ray counts as a miss
_EPSILON = 2e-3  # distance that counts as a hit
_CHUNK = 100_000  # rays marched together: their arrays stay in the processor's cache
_SUBPIXELS = ((-0.375, -0.125), (-0.125, 0.375), (0.125, -0.375), (0.375, 0.125))  # rotated grid, in pixels
_CREASE = 0.08  # squared difference of neighbouring normals that counts as an edge between two pixels


def capsule(x: Floats, y: Floats, z: Floats) -> Floats:
    return _length(_length(x, z), y - np.clip(y, -0.55, 0.55)) - 0.4


def cone(x: Floats, y: Floats, z: Floats) -> Floats:
    return _tapered(_length(x, z), y, width=0.66, low=-0.72, high=0.95)


def cross(x: Floats, y: Floats, z: Floats) -> Floats:
    x, y, z = np.abs(x), np.abs(y), np.abs(z)
    bars = (_intersection(a - 0.25, b - 0.25, c - 0.9) for a, b, c in ((y, z, x), (z, x, y), (x, y, z)))
    return reduce(np.minimum, bars)


def cube(x: Floats, y: Floats, z: Floats) -> Floats:
    return _intersection(np.abs(x) - 0.57, np.abs(y) - 0.57, np.abs(z) - 0.57)


def cylinder(x: Floats, y: Floats, z: Floats) -> Floats:
    return _intersection(_length(x, z) - 0.55, np.abs(y) - 0.75)


def octahedron(x: Floats, y: Floats, z: Floats) -> Floats:
    return (np.abs(x) + np.abs(y) + np.abs(z) - 0.98) / sqrt(3)


def pyramid(x: Floats, y: Floats, z: Floats) -> Floats:
    return _tapered(_intersection(np.abs(x), np.abs(z)), y, width=0.6, low=-0.5, high=0.85)


def ring(x: Floats, y: Floats, z: Floats) -> Floats:
    return _intersection(np.abs(_length(x, z) - 0.78) - 0.1, np.abs(y) - 0.36)


def sphere(x: Floats, y: Floats, z: Floats) -> Floats:
    return _length(_length(x, z), y) - 0.85


def torus(x: Floats, y: Floats, z: Floats) -> Floats:
    return _length(_length(x, z) - 0.64, y) - 0.29


def _length(x: Floats, y: Floats) -> Floats:
    return np.sqrt(x * x + y * y)


def _intersection(*distances: Floats) -> Floats:
    return reduce(np.maximum, distances)


def _tapered(radius: Floats, y: Floats, *, width: float, low: float, high: float) -> Floats:
    """Return the distance to a solid that narrows from radius `width` at height `low` to a point at height `high`."""
    slant = (radius * (high - low) + (y - high) * width) / hypot(high - low, width)
    return _intersection(slant, low - y)


class Kind(NamedTuple):
    """Describes a solid and the poses in which it can be recognised. Angles are in degrees."""

    distance: Distance
    low: float  # height of the ground on which its shadow falls
    yaw: tuple[float, float] = (0, 360)  # avoids flat sides seen face-on or in equal light
    lean: tuple[float, float] = (0, 0)
    lean_axis: int = 0  # 0: towards the camera, which opens a hole; 2: to the left or to the right


KINDS = {
    "capsule": Kind(capsule, -0.8, lean=(15, 60), lean_axis=2),
    "cone": Kind(cone, -0.72),
    "cross": Kind(cross, -0.9, yaw=(20, 70)),
    "cube": Kind(cube, -0.57, yaw=(20, 70)),
    "cylinder": Kind(cylinder, -0.8, lean=(0, 35), lean_axis=2),
    "octahedron": Kind(octahedron, -0.98, yaw=(-25, 25)),
    "pyramid": Kind(pyramid, -0.5, yaw=(20, 70)),
    "ring": Kind(ring, -0.6, lean=(5, 30)),
    "sphere": Kind(sphere, -0.85),
    "torus": Kind(torus, -0.55, lean=(10, 40)),
}
CLASSES = tuple(KINDS)


def label(index: Index) -> Index:
    """Return the class of image `index` (an integer, or integers of any shape): the ten classes alternate."""
    return index % len(CLASSES)


class Solids:
    """Renders the first `count` images of a seed as a data set (see `data.sources.base.Source`)."""

    def __init__(self, *, count: int, seed: int, image_size: int) -> None:
        self.name = "solids"
        self.seed, self.image_size = seed, image_size
        self.classes = CLASSES
        self.labels = label(np.arange(count, dtype=np.int64))
        self.keys: Sequence[str] = [f"{CLASSES[kind]}/{i:06d}" for i, kind in enumerate(self.labels)]
        self.stamps: Sequence[str] = [f"solids {VERSION} seed={seed}"] * count
        self.size = 0  # there are no files
        self.notes: Sequence[str] = ()
        self.preprocessing = f"drawn at {image_size}x{image_size} pixels"

    def fingerprint(self) -> str:
        return digest([f"solids {VERSION} seed={self.seed} count={len(self.keys)} size={self.image_size}"])

    def load(self, indices: Sequence[int]) -> Batch:
        return Batch(np.asarray(indices, np.int64), render(indices, seed=self.seed, size=self.image_size))

    def digest(self, index: int) -> str:
        return ""  # there is no file


def render(indices: Sequence[int] | Ints, *, seed: int, size: int) -> NDArray[np.uint8]:
    """Draw the images of `indices`: uint8 RGB of shape `n size size 3`. `size` is in pixels.

    Row i depends on (seed, indices[i], size) alone, never on the other indices.
    """
    index = np.asarray(indices, dtype=np.int64)
    images = np.empty((len(index), size, size, 3), np.uint8)
    step = max(1, _CHUNK // size**2)
    for kind, name in enumerate(CLASSES):
        rows = np.flatnonzero(label(index) == kind)
        for start in range(0, len(rows), step):
            chunk = rows[start : start + step]
            images[chunk] = _draw(KINDS[name], [scene(seed, int(i)) for i in index[chunk]], size)
    return images


class Scene(NamedTuple):
    """Describes what an image shows besides its kind of solid. Directions are unit vectors in the axes of the solid."""

    view: Floats  # 3 3, the picture's right and up, and forward into it
    light: Floats  # 2 3, towards the light, and halfway between the light and the camera
    tilt: Floats  # angle of the camera above the ground, in radians
    shadow: Floats  # 2, centre of the shadow on the ground, across and along the view
    zoom: Floats  # half the width of the picture
    shift: Floats  # 2, place of the solid in the picture, to the right and upwards
    albedo: Floats  # 3, RGB in 0..1
    ground: Floats  # 2 3, RGB of the background at the bottom and at the top of the picture


def scene(seed: int, index: int) -> Scene:
    """Draw the scene of image `index` from a Philox generator with the key (seed, index)."""
    random = np.random.Generator(np.random.Philox(key=[seed, index]))
    draw = random.uniform
    kind = KINDS[CLASSES[label(index)]]
    tilt = radians(draw(20, 40))
    # Steep enough that the top is always the brightest face, sideways enough that left and right always differ.
    light = _direction(random.choice((-1, 1)) * radians(draw(45, 75)), radians(draw(48, 60)))
    camera = _direction(0, tilt)
    half = (light + camera) / np.sqrt(((light + camera) ** 2).sum())
    world = np.stack([_direction(pi / 2, 0), _direction(pi, pi / 2 - tilt), -camera, light, half])
    lean = (random.choice((-1, 1)) if kind.lean_axis else 1) * radians(draw(*kind.lean))
    axes = world @ _rotation(kind.lean_axis, lean) @ _rotation(1, radians(draw(*kind.yaw)))
    hue, apart, value = draw(0, 1), draw(0.3, 0.7), draw(0.5, 0.85)  # apart: solid and background contrast
    fields = (
        axes[:3],
        axes[3:],
        tilt,
        -0.45 * light[[0, 2]],
        draw(1.25, 1.55),
        draw(-0.1, 0.1, size=2),
        _hsv(hue, draw(0.6, 0.95), draw(0.8, 1)),
        [_hsv(hue + apart + draw(-0.06, 0.06), draw(0.1, 0.45), value + draw(-0.1, 0.1)) for _ in range(2)],
    )
    return Scene(*(np.asarray(field, np.float32) for field in fields))


def _direction(azimuth: float, height: float) -> NDArray[np.float64]:
    """Return the unit vector at an angle around the vertical, from the camera's side, and an angle above the ground."""
    return np.array([sin(azimuth) * cos(height), sin(height), cos(azimuth) * cos(height)])


def _rotation(axis: int, angle: float) -> NDArray[np.float64]:
    """Return the matrix `3 3` of a rotation by `angle` about a coordinate axis."""
    j, k = (axis + 1) % 3, (axis + 2) % 3
    matrix = np.eye(3)
    matrix[j, j] = matrix[k, k] = cos(angle)
    matrix[j, k], matrix[k, j] = -sin(angle), sin(angle)
    return matrix


def _hsv(hue: float, saturation: float, value: float) -> NDArray[np.float64]:
    """Return RGB in 0..1 of a hue in turns (Smith 1978, "Color gamut transform pairs")."""
    ramp = np.clip(np.abs((hue + np.array([0, 2 / 3, 1 / 3])) % 1 * 6 - 3) - 1, 0, 1)
    return np.asarray(value * (1 - saturation * (1 - ramp)))


def _draw(kind: Kind, scenes: list[Scene], size: int) -> NDArray[np.uint8]:
    """Trace one ray per pixel, then four more where the surface has an edge: uint8 `n size size 3`."""
    stacked = Scene(*(np.stack(field, -1) for field in zip(*scenes, strict=True)))
    shape = (len(scenes), size, size)
    image, row, column = np.indices(shape).reshape(3, -1)
    centre = (np.arange(size, dtype=np.float32) * 2 + 1) / size - 1
    x, y = centre[column], -centre[row]
    colour, normal = _trace(kind, stacked, image, x, y)
    edge = np.flatnonzero(_edges(normal.reshape(3, *shape)))
    fine = np.zeros((3, len(edge)), np.float32)
    for dx, dy in _SUBPIXELS:
        fine += _trace(kind, stacked, image[edge], x[edge] + dx * 2 / size, y[edge] + dy * 2 / size)[0]
    colour[:, edge] = fine / len(_SUBPIXELS)
    pixels = (np.clip(colour, 0, 1) * 255 + 0.5).astype(np.uint8)
    return np.moveaxis(pixels.reshape(3, *shape), 0, -1)


def _edges(normal: Floats) -> NDArray[np.bool_]:
    """Find pixels whose normal differs from a neighbour's, `3 n s s` -> `n s s` (the normal of a miss is zero)."""
    edge = np.zeros(normal.shape[1:], bool)
    for axis in (-2, -1):  # the roll joins opposite borders, where the normal is zero: no solid reaches them
        differs = ((normal - np.roll(normal, 1, axis)) ** 2).sum(0) > _CREASE
        edge |= differs | np.roll(differs, -1, axis)
    return edge


def _trace(kind: Kind, scene: Scene, image: Ints, x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Return colour and normal, both `3 n`, of rays at positions (x, y) in -1..1 of the images number `image`."""
    a, b = x * scene.zoom[image] - scene.shift[0, image], y * scene.zoom[image] - scene.shift[1, image]
    colour = _background(scene, kind.low, image, a, b, y)
    normal = np.zeros_like(colour)
    rays = np.flatnonzero(a * a + b * b < 1)
    near = image[rays]
    right, up, forward = scene.view[..., near]
    hit, points = _march(kind.distance, a[rays] * right + b[rays] * up, forward)
    rays, near = rays[hit], near[hit]
    normal[:, rays] = _normals(kind.distance, points)
    colour[:, rays] = _shade(scene, near, normal[:, rays])
    return colour, normal


def _march(distance: Distance, centre: Floats, direction: Floats) -> tuple[NDArray[np.bool_], Floats]:
    """Return which rays hit, and where (`3 hits`): sphere tracing in the unit ball (Hart 1996, "Sphere tracing").

    `centre` is the middle of a ray's path through the ball. A step as long as the distance crosses no surface.
    """
    end = np.sqrt(np.maximum(1 - _dot(centre, centre), 0))
    t, hit, active = -end, np.zeros(len(end), bool), np.arange(len(end))
    for _ in range(_STEPS):
        gap = distance(*(centre[:, active] + t[active] * direction[:, active]))
        hit[active] = gap < _EPSILON
        t[active] += np.where(hit[active], 0, gap)
        active = active[~hit[active] & (t[active] < end[active])]
    return hit, centre[:, hit] + t[hit] * direction[:, hit]


def _normals(distance: Distance, points: Floats) -> Floats:
    """Return the unit gradient at `points`, `3 n`, from a tetrahedron's corners (Quilez, "Normals for an SDF")."""
    gradient: Floats = np.zeros_like(points)
    for corner in ((1, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1)):
        offset = np.array(corner, np.float32)[:, None]
        gradient += offset * distance(*(points + 5e-3 * offset))
    return gradient / np.sqrt(_dot(gradient, gradient))


def _dot(a: Floats, b: Floats) -> Floats:
    product: Floats = (a * b).sum(0)
    return product


def _shade(scene: Scene, image: Ints, normal: Floats) -> Floats:
    """Shade by Lambert's cosine law over ambient light, and a highlight (Blinn 1977, "Models of light reflection")."""
    light, half = scene.light[..., image]
    lambert, shine = np.maximum(_dot(normal, light), 0), np.maximum(_dot(normal, half), 0) ** 32
    return scene.albedo[:, image] * (0.28 + 0.72 * lambert) + 0.3 * shine


def _background(scene: Scene, low: float, image: Ints, a: Floats, b: Floats, y: Floats) -> Floats:
    """Return a vertical gradient, with a soft shadow where the ray at (a, b) meets the ground at height `low`."""
    along = (low * np.cos(scene.tilt)[image] - b) / np.sin(scene.tilt)[image]
    bottom, top = scene.ground[..., image]
    away = (a - scene.shadow[0, image]) ** 2 + (along - scene.shadow[1, image]) ** 2
    colour: Floats = (bottom + (top - bottom) * ((y + 1) / 2)) * (1 - 0.55 / (1 + 1.2 * away) ** 2)
    return colour
