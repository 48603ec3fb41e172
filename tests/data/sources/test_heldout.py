"""Held-out images are never trained on, and stay what they were when a data set grows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from data.sources.base import NO_CLASS, Source
from data.sources.heldout import open_heldout, split
from data.sources.solids import Solids
from tests.helpers.pictures import everything, opened, picture, reds, write_folder
from tests.helpers.world import make_images, run_stage, succeed, tree, write_config
from tests.helpers.world import make_vae as make_tiny_vae

MANY = {f"{name}/{number}.png": picture(number) for name in ("cat", "dog") for number in range(100)}


def heldout(place: float | str, training: Source) -> tuple[Source, Source]:
    return open_heldout(place, training, image_size=8, matte="white")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    make_images(tmp_path / "images")
    make_tiny_vae(tmp_path / "vae", seed=0)
    return write_config(tmp_path)


def test_a_share_and_the_rest_are_the_whole_with_its_classes(tmp_path: Path) -> None:
    whole = opened(write_folder(tmp_path / "many", MANY))
    kept, out = split(whole, 0.2)
    assert sorted([*kept.keys, *out.keys]) == sorted(MANY)
    assert 20 <= len(out.keys) <= 60  # of 200, three standard deviations about 40
    assert kept.classes == out.classes == whole.classes
    assert sorted(reds(kept) + reds(out)) == sorted(reds(whole))
    assert everything(out).digests == {i: out.digest(i) for i in range(len(out.keys))}
    assert kept.fingerprint() != out.fingerprint() != whole.fingerprint()


def test_an_image_stays_on_its_side_when_others_come_and_go(tmp_path: Path) -> None:
    _, before = split(opened(write_folder(tmp_path / "many", MANY)), 0.2)
    half = {key: payload for number, (key, payload) in enumerate(MANY.items()) if number % 2}
    grown = {**half, **{f"bee/{number}.png": picture(number) for number in range(100)}}
    kept, now = split(opened(write_folder(tmp_path / "other", grown)), 0.2)
    assert set(before.keys) & set(half) == set(now.keys) & set(half)
    assert not set(before.keys) & set(kept.keys)


def test_a_larger_share_holds_out_what_a_smaller_one_does(tmp_path: Path) -> None:
    whole = opened(write_folder(tmp_path / "many", MANY))
    assert set(split(whole, 0.1)[1].keys) < set(split(whole, 0.4)[1].keys)


def test_a_share_that_holds_out_none_or_all_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match=r"data.heldout = 1e-06: it would hold out none of 5 images"):
        split(opened(root), 1e-6)
    with pytest.raises(ValueError, match=r"data.heldout = 0.999999: it would hold out all of 5 images"):
        split(opened(root), 0.999999)


def test_a_failure_keeps_its_place(root: Path) -> None:
    (root / "dog" / "1.png").write_bytes(b"no image")
    for part in split(opened(root), 0.5):
        batch = part.load(range(len(part.keys)))
        assert [part.keys[i] for i in batch.failures] == [key for key in part.keys if key == "dog/1.png"]


def test_solids_are_held_out_as_renders_of_another_seed() -> None:
    training = Solids(count=40, seed=3, image_size=8)
    kept, out = heldout(0.25, training)
    assert kept is training
    assert len(out.keys) == 10
    assert not np.array_equal(out.load([0]).pixels, training.load([0]).pixels)
    assert out.fingerprint() == heldout(0.25, training)[1].fingerprint()
    assert out.fingerprint() != heldout(0.25, Solids(count=40, seed=4, image_size=8))[1].fingerprint()


def test_images_elsewhere_have_the_labels_of_the_classes_of_training(root: Path, tmp_path: Path) -> None:
    place = write_folder(tmp_path / "val", {"dog/9.png": picture(9), "dog/8.png": picture(8)})
    _, out = heldout(str(place), opened(root))
    assert reds(out) == [("dog", 8), ("dog", 9)]
    assert out.classes == opened(root).classes


def test_images_elsewhere_may_have_no_classes(root: Path, tmp_path: Path) -> None:
    _, out = heldout(str(write_folder(tmp_path / "val", {"9.png": picture(9)})), opened(root))
    assert out.labels.tolist() == [NO_CLASS]


def test_what_cannot_be_held_out_is_refused(root: Path, tmp_path: Path) -> None:
    training = opened(root)
    with pytest.raises(
        ValueError, match=r"data.heldout = .*val: its class 'bee' is not one of the 2 classes of data.sou"
    ):
        heldout(str(write_folder(tmp_path / "val", {"bee/1.png": picture(1)})), training)
    with pytest.raises(ValueError, match=r"data.heldout = .*dog: it is inside data.source = .*images, which is trai"):
        heldout(str(root / "dog"), training)
    with pytest.raises(ValueError, match=r"data.heldout: no such folder or file: .*nowhere"):
        heldout(str(tmp_path / "nowhere"), training)


@pytest.mark.parametrize("share", ["0", "1", "-0.1", "2", "nan"])
def test_a_share_is_above_0_and_below_1(share: str, config: Path) -> None:
    result = run_stage("encode", config, config.parent / "run", f"data.heldout={share}")
    assert result.exit_code == 2
    assert f"data.heldout: {share}: give a fraction above 0 and below 1, such as 0.02; for a folder" in result.stderr


def test_encode_writes_a_cache_of_each_part_which_all_commands_know(config: Path) -> None:
    run, cache, out = (config.parent / name for name in ("run", "cache", "cache-heldout"))
    said = succeed("encode", config, run, "data.heldout=0.3")
    keys = [
        [json.loads(line)["key"] for line in (path / "rows.jsonl").read_text().splitlines()] for path in (cache, out)
    ]
    assert len(keys[0]) + len(keys[1]) == 12
    assert not set(keys[0]) & set(keys[1])
    assert "the held-out share of 0.3 of" in said
    written = tree(out)
    assert succeed("encode", config, run, "data.heldout=0.3").count("all done") == 2
    assert "beside" in succeed("info", config, run, "data.heldout=0.3", more=("--cache", str(out)))
    next((out / "latents.zarr").rglob("c/0*/0/0/0/0")).unlink()
    assert run_stage("verify", config, run, "data.heldout=0.3").exit_code == 2
    succeed("verify", config, run, "data.heldout=0.3", more=("--repair",))
    assert {name: payload for name, payload in tree(out).items() if "info" not in name} == written


def test_jobs_write_both_caches(config: Path) -> None:
    run = config.parent / "run"
    succeed("encode", config, run, "data.heldout=0.3", f"cache.path={config.parent / 'whole'}")
    for job in ("1/2", "2/2"):
        succeed("encode", config, run, "data.heldout=0.3", more=("--job", job))
    for kind in ("", "-heldout"):
        assert tree(config.parent / f"cache{kind}") == tree(config.parent / f"whole{kind}")


def test_another_share_is_another_data_set(config: Path) -> None:
    succeed("encode", config, config.parent / "run")
    result = run_stage("encode", config, config.parent / "run", "data.heldout=0.3")
    assert result.exit_code == 2
    assert "changed or missing" in result.stderr


def test_held_out_copies_of_training_images_are_said(config: Path) -> None:
    place = config.parent / "val" / "cat"
    place.mkdir(parents=True)
    shutil.copy(config.parent / "images" / "cat" / "0.png", place / "other.png")
    said = succeed("encode", config, config.parent / "run", f"data.heldout={place.parent}")
    assert "1 held-out image also among the training images, byte for byte (such as row 0 of" in said


def test_finished_caches_stand_without_images(config: Path) -> None:
    succeed("encode", config, config.parent / "run", "data.heldout=0.3")
    shutil.rmtree(config.parent / "images")
    said = succeed("encode", config, config.parent / "run", "data.heldout=0.3")
    assert said.count("can be used without its images") == 2
