"""A data set whose files have other times, as copies have, is the same one as long as their bytes are."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import pipeline.planning
from data.cache.reader import DIGESTS
from data.sources.base import content_digest
from tests.helpers.world import make_vae as make_tiny_vae
from tests.helpers.world import refuse, run_stage, succeed, tree, write_config

COMPARED = "with the same size but another time stamp: comparing contents"


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.planning, "SHARD_ROWS", 16)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Of 40 images without compression, so that all files have one size, in three shards; one cannot be read."""
    random = np.random.default_rng(0)
    for number in range(40):
        write(tmp_path / "images" / ("cat" if number % 2 else "dog") / f"{number:02d}.bmp", random)
    (tmp_path / "images" / "dog" / "08.bmp").write_bytes(b"BM and then nothing")
    make_tiny_vae(tmp_path / "vae", seed=0)
    return write_config(tmp_path)


def write(file: Path, random: np.random.Generator) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file)


def copied(config: Path, name: str) -> str:
    """The same files with other times, elsewhere."""
    folder = shutil.copytree(config.parent / "images", config.parent / name, copy_function=shutil.copyfile)
    for number, file in enumerate(sorted(Path(folder).rglob("*.bmp"))):
        os.utime(file, ns=(0, 10**18 + number))
    return f"data.source={folder}"


def encode(config: Path, *overrides: str, more: tuple[str, ...] = ()) -> str:
    return succeed("encode", config, config.parent / "run", *overrides, more=more)


def test_jobs_of_which_each_has_a_copy_of_its_own_write_one_cache(config: Path) -> None:
    encode(config, f"cache.path={config.parent / 'whole'}")
    encode(config, more=("--job", "1/3"))
    assert COMPARED in encode(config, copied(config, "second"), more=("--job", "2/3"))
    assert "committed" in encode(config, copied(config, "third"), more=("--job", "3/3"))
    kept = tree(config.parent / "whole").items() - tree(config.parent / "cache").items()
    assert {name for name, _ in kept} <= {"manifest.json"}  # which says where the images were


def test_a_finished_cache_is_compared_with_a_copy_once(config: Path) -> None:
    encode(config)
    before, source = tree(config.parent / "cache"), copied(config, "copy")
    assert f"39 images {COMPARED}" in encode(config, source)
    assert COMPARED not in encode(config, source)
    assert COMPARED not in encode(config)
    now = tree(config.parent / "cache")
    assert {name: payload for name, payload in now.items() if not name.startswith(".compared/")} == before


def test_the_digests_are_those_of_the_files(config: Path) -> None:
    encode(config)
    lines = (config.parent / "cache" / DIGESTS).read_text().splitlines()
    keys = sorted((config.parent / "images").rglob("*.bmp"))
    broken = [key.name for key in keys].index("08.bmp")
    assert lines == ["" if row == broken else content_digest(key.read_bytes()) for row, key in enumerate(keys)]


@pytest.mark.parametrize("more", [(), ("--job", "1/3")], ids=["finished", "unfinished"])
def test_other_contents_of_the_same_size_are_found(config: Path, more: tuple[str, ...]) -> None:
    encode(config, more=more)
    before, source = tree(config.parent / "cache"), copied(config, "copy")
    write(config.parent / "copy" / "cat" / "03.bmp", np.random.default_rng(1))
    changed = "1 image is changed or missing, such as cat/03.bmp"
    refuse(run_stage("encode", config, config.parent / "run", source, more=more), "has changed", changed)
    assert tree(config.parent / "cache") == before


def test_a_copy_can_be_extended_and_its_failures_read_again(config: Path) -> None:
    encode(config)
    source = copied(config, "copy")
    write(config.parent / "copy" / "cat" / "99.bmp", np.random.default_rng(2))
    result = run_stage("encode", config, config.parent / "run", source)
    refuse(result, "1 image is new, such as cat/99.bmp: give --extend to encode them")
    said = encode(config, source, more=("--extend",))
    assert "40 committed + 1 failed = 41 listed" in said
    write(config.parent / "copy" / "dog" / "08.bmp", np.random.default_rng(3))
    assert "41 committed + 0 failed" in encode(config, source, more=("--retry-failed",))
    assert "all done" in encode(config, source)


def test_a_damaged_list_of_digests_is_not_compared_with(config: Path) -> None:
    encode(config)
    file = config.parent / "cache" / DIGESTS
    payload = file.read_bytes()
    file.write_bytes(payload.replace(b"a", b"b", 1))
    refuse(run_stage("encode", config, config.parent / "run", copied(config, "copy")), DIGESTS, "damaged")
    before = {name: each for name, each in tree(config.parent / "cache").items() if name != DIGESTS}
    succeed("verify", config, config.parent / "run", more=("--repair",))
    assert tree(config.parent / "cache") == {**before, DIGESTS: payload}
