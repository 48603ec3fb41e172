"""One command, one number, its receipt: what is measured, kept, repeated and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stages.evaluate
from data.storage import checked, publish_checked
from tests.small_world import IMAGE_SIZE, make_images, run_stage, succeed, tree, write_config
from tests.small_world import make_vae as make_tiny_vae
from tests.test_features import Means

IMAGES = 8  # samples: four a class


@pytest.fixture(autouse=True, scope="module")
def _quick_network() -> Iterator[None]:
    """The networks themselves have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages.evaluate, "open_network", lambda name, weights, device: Means())
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a config, its images, of which some are held out, and a run. Tests change copies of it."""
    root = tmp_path_factory.mktemp("evaluate")
    make_images(root / "images")
    make_tiny_vae(root / "vae", seed=0)
    config = write_config(root)
    text = config.read_text().replace("data:\n", "data:\n  heldout: 0.4\n")
    config.write_text(text + f"evaluate:\n  network: effnet_lite0\n  images: {IMAGES}\n")
    for stage in ("encode", "train"):
        succeed(stage, config, root / "run")
    succeed("evaluate", config, root / "run")
    return root


@pytest.fixture
def root(trained: Path, tmp_path: Path) -> Path:
    """A copy of it, to which its config points."""
    shutil.copytree(trained, tmp_path / "copy")
    config = tmp_path / "copy" / "config.yaml"
    config.write_text(config.read_text().replace(str(trained), str(config.parent)))
    return config.parent


def evaluate(root: Path, *overrides: str, more: tuple[str, ...] = ()) -> str:
    return succeed("evaluate", root / "config.yaml", root / "run", *overrides, more=more)


def refused(root: Path, *overrides: str, more: tuple[str, ...] = ()) -> str:
    result = run_stage("evaluate", root / "config.yaml", root / "run", *overrides, more=more)
    assert result.exit_code == 2
    return result.stderr.splitlines()[-1]


def receipt_of(root: Path, name: str = "*seed0-4each*") -> dict[str, Any]:
    (file,) = (root / "run" / "eval").glob(f"{name}.json")
    text = checked(file.read_bytes())
    assert text
    return json.loads(text)


def test_the_receipt_says_what_the_figures_depend_on(trained: Path) -> None:
    receipt = receipt_of(trained)
    assert receipt["figures"].keys() == {"samples", "held-out images", "held-out images through the VAE"}
    samples = receipt["figures"]["samples"]
    assert samples["images"] == IMAGES
    for name in ("KD", "FD", "precision", "recall", "density", "coverage", "IS", "accuracy"):
        assert np.isfinite(samples[f"{name}-Means"]["value"])
    assert {label: each["images"] for label, each in samples["classes"].items()} == {"0": 4, "1": 4}
    assert samples["warning"].startswith("8 images are fewer than 10 D = 30")
    assert receipt["samples"]["times"] == [1.0, 0.5, 0.0]
    assert (receipt["samples"]["guidance"], receipt["samples"]["seed"], receipt["samples"]["drawn"]) == (2.0, 0, 8)
    assert receipt["weights"]["images_seen"] == 48
    assert receipt["weights"]["average"] == "exponential average with a half-life of 16 images"
    assert len(receipt["network"]["sha256"]) == len(receipt["cache"]) == len(receipt["vae"]) == 64
    assert "the held-out share" not in receipt["reference"]["images"]


def test_the_page_shows_the_table_and_pictures_that_are_there(trained: Path) -> None:
    (page,) = (trained / "run" / "eval").glob("*.html")
    text = page.read_text(encoding="utf-8")
    assert "dog &amp; &lt;fox&gt;" in text
    assert "KD-Means x1000" in text
    pictures = [part.split('"')[0] for part in text.split('src="')[1:]]
    assert len(pictures) == 3 + 3
    assert all((page.parent / picture).is_file() for picture in pictures)


def test_a_second_time_nothing_is_computed_and_anew_all_figures_are_the_same(root: Path) -> None:
    before = receipt_of(root)["figures"]
    features = tree(root / "cache-features")
    evaluate(root)
    assert tree(root / "cache-features") == features
    assert receipt_of(root)["figures"] == before
    for folder in ("run/eval", "run/samples", "cache-features"):
        shutil.rmtree(root / folder)
    evaluate(root, "sample.batch_size=3", "cache.workers=2")
    assert receipt_of(root)["figures"] == before


def test_the_same_images_have_the_same_figures_however_they_are_stored(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(stages.evaluate.PROTOCOLS, "imagenet-50k", {"images": IMAGES, "reference": "training"})
    before = receipt_of(root)["figures"]["samples"]
    evaluate(root, more=("--protocol", "imagenet-50k"))
    succeed("sample", root / "config.yaml", root / "run", "sample.per_class=4")
    (npz,) = (root / "run" / "eval").glob("*.npz")
    (images,) = (root / "run" / "samples").glob("*/images")
    with np.load(npz, allow_pickle=False) as arrays:
        assert arrays["arr_0"].shape == (IMAGES, IMAGE_SIZE, IMAGE_SIZE, 3)
        assert arrays["arr_1"].tolist() == [0, 1] * 4
    for path in (npz, images):
        evaluate(root, more=("--images", str(path)))
        assert receipt_of(root, f"{path.stem}-????????-Means")["figures"]["samples"] == before


def test_a_receipt_is_repeated_from_nothing(root: Path) -> None:
    (file,) = (root / "run" / "eval").glob("*.json")
    before = tree(root)
    said = evaluate(root, more=("--repeat", str(file)))
    assert "the same figures to the last digit" in said
    assert tree(root) == before


def test_a_receipt_of_other_weights_is_not_the_same(root: Path) -> None:
    (file,) = (root / "run" / "eval").glob("*.json")
    config = json.loads(checked(file.read_bytes()) or b"")
    succeed("train", root / "config.yaml", root / "run", "train.images=64")
    result = run_stage("evaluate", root / "config.yaml", root / "run", more=("--repeat", str(file)))
    assert result.exit_code == 1
    assert "weights.images_seen was 48, is now 64" in result.stdout
    assert "not the same figures" in result.stdout
    config["config"]["sample"]["seed"] = 1
    publish_checked(file, {key: value for key, value in config.items() if key != "sha256"})
    assert run_stage("evaluate", root / "config.yaml", root / "run", more=("--repeat", str(file))).exit_code == 1


def test_what_is_no_receipt_is_refused(root: Path) -> None:
    (file,) = (root / "run" / "eval").glob("*.json")
    file.write_text(file.read_text().replace('"seed": 0', '"seed": 1'))
    assert "damaged, or no receipt" in refused(root, more=("--repeat", str(file)))
    assert "no such file" in refused(root, more=("--repeat", str(root / "none.json")))


def test_held_out_images_may_be_the_reference(root: Path) -> None:
    evaluate(root, "evaluate.reference=heldout")
    receipt = receipt_of(root, "*seed0-4each*heldout")
    assert receipt["figures"].keys() == {"samples", "training images", "held-out images through the VAE"}
    assert "the held-out share of 0.4" in receipt["reference"]["images"]


def test_without_held_out_images_samples_stand_alone(root: Path) -> None:
    for part in ("cache", "run"):
        shutil.rmtree(root / part)
    for stage in ("encode", "train"):
        succeed(stage, root / "config.yaml", root / "run", "data.heldout=null")
    assert "no images are held out (data.heldout)" in evaluate(root, "data.heldout=null")
    assert receipt_of(root)["figures"].keys() == {"samples"}
    assert "no images are held out: give data.heldout" in refused(
        root, "data.heldout=null", "evaluate.reference=heldout"
    )


def test_a_set_of_one_class_has_no_accuracy(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "images" / "cat", tmp_path / "flat")
    evaluate(root, more=("--images", str(tmp_path / "flat")))
    samples = receipt_of(root, "flat-*")["figures"]["samples"]
    assert "accuracy-Means" not in samples
    assert list(samples["classes"]) == ["-2"]


def test_a_class_without_images_is_said(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "images" / "cat", tmp_path / "samples" / "cat")
    said = evaluate(root, more=("--images", str(tmp_path / "samples")))
    assert "samples: 1 of 2 classes have no image, such as 'dog & <fox>'" in said


def test_what_cannot_be_measured_is_refused_in_one_line(root: Path) -> None:
    np.savez(root / "small.npz", np.zeros((4, 8, 8, 3), np.uint8))
    assert "8x8 pixels, and data.image_size is 16" in refused(root, more=("--images", str(root / "small.npz")))
    shutil.rmtree(root / "run")
    assert "--run: no checkpoint in" in refused(root)
