from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import fsspec
import numpy as np
import pytest
from numpy.typing import NDArray

from data.cache.listing import Rows
from data.cache.manifest import Plan, VaeIdentity
from data.cache.reader import LatentCache
from data.cache.writer import CacheWriter, EncodedShard
from tests.helpers.pictures import PICTURES, SPREAD, write_folder

if TYPE_CHECKING:
    from tests.helpers.world import World

# Before torch is imported, which this file leaves to the tests that need it.
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # on the CPU a run can be repeated bit for bit
os.environ["ACCELERATE_USE_CPU"] = "true"  # and not on an Apple GPU
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are tiny: threads cost more than they bring

_LONGEST = ("test_processes", "test_rot", "test_crash", "test_run_folder", "test_ways_to_train")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that processes which share the files end at about the same time."""
    items.sort(key=lambda item: _LONGEST.index(item.path.stem) if item.path.stem in _LONGEST else len(_LONGEST))


_costs: dict[str, Any] = {}  # of a step of each model that was counted already


@pytest.fixture(autouse=True)
def _runs_begin_and_end_quickly(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves and the FLOPs of a model take most of a run's time here; test_metrics.py sees both."""
    train = sys.modules.get("pipeline.training.trainer")  # not imported by tests that do without torch
    if train and request.path.stem != "test_metrics":
        count = train.Cost.of

        def counted_once(model: Any) -> Any:
            key = repr((sorted(model.config.items()), model.is_gradient_checkpointing))
            if key not in _costs:
                _costs[key] = count(model)
            return _costs[key]

        monkeypatch.setattr(train, "draw_curves", lambda run: None)
        monkeypatch.setattr(train, "Cost", SimpleNamespace(of=counted_once))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A data set, a tiny VAE and the outcome of all four stages."""
    from tests.helpers.world import build_world

    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(params=["zarr", "webdataset"])
def format(request: pytest.FixtureRequest) -> str:
    """Of the cache: what uses it, through `plan` or `cache` too, is run with both."""
    return request.param


@pytest.fixture
def plan(format: str) -> Plan:
    """Of a small cache: shards of 32, 32 and 11 rows, so that the last shard and its last chunk are partial."""
    return Plan(
        format=format,
        store="moments",
        dtype="float16",
        views=("identity",),
        shape=(4, 2, 3),
        rows=75,
        shard_rows=32,
        batch_size=8,
        classes=("cat", "dog"),
        data_source="somewhere",
        data_fingerprint="f" * 64,
        data_bytes=75_000,
        image_size=16,
        preprocessing="none",
        vae=VaeIdentity(
            source="bundled",
            class_name="AutoencoderKL",
            weights_sha256="a" * 64,
            scaling_factor=1.0,
            shift_factor=0.0,
            downsampling=8,
        ),
    )


@pytest.fixture
def moments(plan: Plan) -> NDArray[np.float32]:
    """Of every row of `plan`; no two values are alike."""
    shape = (plan.rows, len(plan.views), *plan.shape)
    return np.random.default_rng(0).normal(1, 2, shape).astype(np.float32)


@pytest.fixture
def keys(plan: Plan) -> list[str]:
    return [f"{plan.classes[row % 2]}/{row}.png" for row in range(plan.rows)]


@pytest.fixture
def labels(plan: Plan) -> NDArray[np.int64]:
    return np.arange(plan.rows) % 2


@pytest.fixture
def rows(plan: Plan, keys: list[str], labels: NDArray[np.int64]) -> Rows:
    """Which image each row of `plan` is."""
    return Rows(keys, labels, plan.classes, [f"{row:016x}" for row in range(plan.rows)], np.arange(plan.rows))


@pytest.fixture
def cache(tmp_path: Path, plan: Plan, rows: Rows, moments: NDArray[np.float32]) -> LatentCache:
    """A finished cache at `tmp_path / "cache"` in which rows 5 and 40 failed."""
    writer = CacheWriter(tmp_path / "cache", plan, rows)
    with writer.claimed():
        for shard in writer.pending():
            mine = plan.rows_of(shard)
            failures = {row: "unreadable" for row in (5, 40) if row in mine}
            writer.write(EncodedShard(shard, np.array(mine), moments[mine.start : mine.stop], failures))
        writer.finish()
    return LatentCache(tmp_path / "cache")


@pytest.fixture(autouse=True)
def _memory_is_empty() -> Iterator[None]:
    yield
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two classes with three and two images; the same file name in both, and one image in a nested folder."""
    return write_folder(tmp_path / "images", PICTURES)


@pytest.fixture(params=SPREAD)
def spread(request: pytest.FixtureRequest) -> Callable[[Path], str]:
    """Puts a folder where it is, into a zip file, or into memory."""
    return SPREAD[request.param]
