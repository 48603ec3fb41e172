"""What the commands say and do once a cache is finished: without its images, when it was changed, in right numbers."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers.utils import logging

from data.cache.manifest import Manifest
from data.text import counted, human_bytes
from pipeline.vae import FrozenVae
from tests.helpers import world as helpers
from tests.helpers.world import BROKEN, CLASSES, World, make_images, make_vae, run_stage, succeed, tree

refuse = functools.partial(helpers.refuse, alone=True)


def gone(tmp_path: Path) -> Path:
    return tmp_path / "gone"


def emptied(tmp_path: Path) -> Path:
    (tmp_path / "emptied" / "cat").mkdir(parents=True)
    return tmp_path / "emptied"


@pytest.mark.parametrize("lost", [gone, emptied])
def test_a_finished_cache_stands_when_its_images_are_not_there_any_more(
    world: World, tmp_path: Path, lost: Callable[[Path], Path]
) -> None:
    before, source = tree(world.cache), lost(tmp_path)
    said = succeed("encode", world.config, tmp_path, f"data.source={source}")
    assert said.count("\n") == 1
    for part in (
        str(source),
        f"the finished cache {world.cache}, made of {world.images}, can be used without its images",
    ):
        assert part in said
    assert tree(world.cache) == before


def test_all_stages_but_encode_need_no_images(world: World, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(world.cache, tmp_path / "cache"))
    overrides = (f"data.source={tmp_path / 'gone'}", f"cache.path={cache}", "train.images=16")
    assert "no pictures: data.source: " in succeed("info", world.config, tmp_path, *overrides)
    assert (cache / "info" / "histogram.png").is_file()
    for stage in ("verify", "train", "sample", "decode"):
        succeed(stage, world.config, tmp_path / "run", *overrides)
    succeed("decode", world.config, tmp_path, *overrides, more=("--cache", str(cache)))
    assert list((cache / "decoded" / "images").iterdir())


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("cache.format=webdataset", "format = zarr, this run has webdataset"),
        ("cache.dtype=float32", "dtype = float16"),
        ("cache.flip=false", "views"),
        ("data.image_size=32", "shape = (8, 4, 4), this run has (8, 8, 8)"),
        ("data.matte=black", "preprocessing"),
    ],
)
def test_what_can_be_checked_without_the_images_is_checked(
    world: World, tmp_path: Path, override: str, part: str
) -> None:
    overrides = (f"data.source={tmp_path / 'gone'}", override)
    refuse(run_stage("encode", world.config, tmp_path, *overrides), str(world.cache), part)


def test_a_cache_of_another_vae_is_refused_without_its_images_too(world: World, tmp_path: Path) -> None:
    overrides = (f"data.source={tmp_path / 'gone'}", f"vae.source={make_vae(tmp_path / 'vae', seed=1)}")
    refuse(run_stage("encode", world.config, tmp_path, *overrides), str(world.cache), "vae.weights_sha256")


def test_what_needs_the_images_is_refused_in_one_line(world: World, tmp_path: Path) -> None:
    lost = f"data.source={tmp_path / 'gone'}"
    for more in (("--extend",), ("--retry-failed",)):
        refuse(run_stage("encode", world.config, tmp_path, lost, more=more), "data.source", str(tmp_path / "gone"))
    cache = f"cache.path={tmp_path / 'cache'}"
    refuse(run_stage("encode", world.config, tmp_path, lost, cache), "data.source", str(tmp_path / "gone"))
    succeed("encode", world.config, tmp_path, cache, more=("--job", "1/2"))  # which is not to finish it
    refuse(run_stage("encode", world.config, tmp_path, lost, cache), "data.source", str(tmp_path / "gone"))


# A cache that was changed, and runs that were trained on it.


def test_a_changed_cache_says_how_runs_go_on_that_were_trained_on_it(world: World, tmp_path: Path) -> None:
    images = Path(shutil.copytree(world.images, tmp_path / "images"))
    overrides = (f"data.source={images}", f"cache.path={tmp_path / 'cache'}")
    told = "runs that were trained on the cache before this change cannot resume with it: use train.init=RUN to start"
    assert told not in succeed("encode", world.config, tmp_path, *overrides)
    assert told not in succeed("encode", world.config, tmp_path, *overrides, more=("--retry-failed",))  # fails again
    assert told not in succeed("encode", world.config, tmp_path, *overrides, more=("--extend",))  # nothing is new
    shutil.copy(images / "cat/0.png", images / "cat/new.png")
    assert told in succeed("encode", world.config, tmp_path, *overrides, more=("--extend",))
    shutil.copy(images / "cat/0.png", images / BROKEN)
    assert told in succeed("encode", world.config, tmp_path, *overrides, more=("--retry-failed",))


# Sizes that do not fit.


@pytest.mark.parametrize("override", ["model.channels=[8,8,8,8]", "model.head_width=5", "model.channels=[9,16]"])
def test_encode_refuses_what_the_model_could_not_take(world: World, tmp_path: Path, override: str) -> None:
    cache = f"cache.path={tmp_path / 'cache'}"
    refuse(run_stage("encode", world.config, tmp_path, override, cache), override.split("=")[0])
    assert tree(tmp_path) == {}


# Figures.


def test_info_of_a_single_image_counts_one(world: World, tmp_path: Path) -> None:
    make_images(tmp_path / "images", CLASSES[:1])
    for i in range(1, 6):
        (tmp_path / "images" / CLASSES[0] / f"{i}.png").unlink()
    overrides = (f"data.source={tmp_path / 'images'}", f"cache.path={tmp_path / 'cache'}")
    assert "1 of 1 image of" in succeed("encode", world.config, tmp_path, *overrides)
    said = succeed("info", world.config, tmp_path, *overrides)
    assert "1 image beside its decoded latents" in said
    assert "classes    1, 1 image each" in said
    size = sum(file.size for file in Manifest.load(tmp_path / "cache").files)
    size += Manifest.load(tmp_path / "cache").shards[0].size
    assert f"bytes      {size / 1000:.1f} kB in 1 shard, {size / 1000:.1f} kB an image" in said
    assert " 0.0 " not in said


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (1000, "1.0 kB"), (49_949, "49.9 kB"), (10**6, "1.0 MB"),
     (3 * 10**9, "3.0 GB"), (2 * 10**12, "2.0 TB")],
)  # fmt: skip
def test_bytes_are_told_in_a_unit_that_shows_them(count: int, said: str) -> None:
    assert human_bytes(count) == said


def test_one_thing_is_not_told_in_the_plural() -> None:
    assert [counted(n, "image") for n in (0, 1, 24, 1024)] == ["0 images", "1 image", "24 images", "1,024 images"]
    assert [counted(n, "class") for n in (1, 2)] == ["1 class", "2 classes"]


def test_an_error_of_the_vae_is_told_once(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """diffusers prints what it raises."""
    (tmp_path / "vae").mkdir()
    shutil.copy(world.config.parent / "vae" / "config.json", tmp_path / "vae")
    logging.enable_propagation()
    try:
        with pytest.raises(ValueError, match=r"vae\.source: cannot load a VAE"):
            FrozenVae(str(tmp_path / "vae"))
    finally:
        logging.disable_propagation()
    assert caplog.records == []
