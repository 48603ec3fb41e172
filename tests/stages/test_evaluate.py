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
from data.storage import strip_checksum
from tests.helpers.networks import Means
from tests.helpers.world import IMAGE_SIZE, make_images, run_stage, succeed, tree, write_config
from tests.helpers.world import make_vae as make_tiny_vae

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


def receipt_of(root: Path, name: str = "*-4each-Means") -> dict[str, Any]:
    (file,) = (root / "run" / "eval").glob(f"{name}.json")
    text = strip_checksum(file.read_bytes())
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
    assert samples["warning"].startswith("6 images are fewer than 10 D = 30")
    assert receipt["samples"]["times"] == [1000.0, 500.0]
    assert (receipt["samples"]["guidance"], receipt["samples"]["seed"], receipt["samples"]["drawn"]) == (2.0, 0, 8)
    assert receipt["weights"]["images_seen"] == 48
    assert receipt["weights"]["average"] == "exponential average with a half-life of 16 images"
    assert len(receipt["network"]["sha256"]) == len(receipt["cache"]) == len(receipt["vae"]) == 64
    assert receipt["reference"] == "training images"
    assert {name: each["count"] for name, each in receipt["images"].items()} == {
        "samples": IMAGES,
        "training images": 6,
        "held-out images": 6,
        "held-out images through the VAE": 6,
    }
    assert receipt["weights"]["cache"] == receipt["cache"]
    assert receipt["notes"] == []


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


def test_a_receipt_is_repeated_from_its_own_checkpoint_as_long_as_that_is_there(root: Path) -> None:
    (file,) = (root / "run" / "eval").glob("*.json")
    succeed("train", root / "config.yaml", root / "run", "train.images=64")
    assert "the same figures to the last digit" in evaluate(root, more=("--repeat", str(file)))
    shutil.rmtree(root / "run" / "checkpoints" / "000000048")
    result = run_stage("evaluate", root / "config.yaml", root / "run", more=("--repeat", str(file)))
    assert result.exit_code == 1
    assert "weights.images_seen was 48, is now 64" in result.stdout
    assert "not the same figures" in result.stdout


def test_what_is_no_receipt_is_refused(root: Path) -> None:
    (file,) = (root / "run" / "eval").glob("*.json")
    file.write_text(file.read_text().replace('"seed": 0', '"seed": 1'))
    assert "damaged, or not a receipt" in refused(root, more=("--repeat", str(file)))
    assert "no such file" in refused(root, more=("--repeat", str(root / "none.json")))
    other = next((root / "cache-features").rglob("meta.json"))
    assert "damaged, or not a receipt" in refused(root, more=("--repeat", str(other)))
    assert "leave out --images" in refused(root, more=("--repeat", str(other), "--images", "x"))


def test_held_out_images_may_be_the_reference(root: Path) -> None:
    evaluate(root, "evaluate.reference=heldout")
    receipt = receipt_of(root, "*-against-heldout")
    assert receipt["figures"].keys() == {"samples", "training images", "held-out images through the VAE"}
    assert receipt["reference"] == "held-out images"
    assert "accuracy-Means" not in receipt["figures"]["training images"]
    assert receipt["figures"]["training images"].keys() < receipt["figures"]["samples"].keys()


def test_images_that_are_no_longer_what_was_encoded_are_refused(root: Path) -> None:
    assert "has changed since it was encoded: 6 images new" in refused(root, "data.heldout=null")
    assert "its preprocessing is v1: EXIF" in refused(root, "data.matte=red")
    shutil.copytree(root / "images" / "cat", root / "images" / "ant")
    assert "such as ant/" in refused(root)


def test_classes_keep_the_numbers_of_the_cache(root: Path) -> None:
    before = receipt_of(root)
    shutil.copytree(root / "images" / "cat", root / "images" / "ant")
    succeed("encode", root / "config.yaml", root / "run", more=("--extend",))
    assert "its classes are not those of" in refused(root)
    shutil.rmtree(root / "run")
    succeed("train", root / "config.yaml", root / "run")
    evaluate(root, "evaluate.images=12")
    now = receipt_of(root)
    assert now["classes"] == [*before["classes"], "ant"]
    assert now["figures"]["samples"]["classes"].keys() == {"0", "1", "2"}


def test_a_run_of_another_cache_is_told(root: Path) -> None:
    for path in root.glob("cache*"):
        shutil.rmtree(path)
    succeed("encode", root / "config.yaml", root / "run", "cache.dtype=float32")
    assert "the run was trained on another cache" in evaluate(root)


def test_an_evaluation_of_others_images_leaves_the_folder_to_a_run(root: Path) -> None:
    np.savez(root / "other.npz", np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), dtype=np.uint8))
    more = ("--images", str(root / "other.npz"))
    succeed("evaluate", root / "config.yaml", root / "new", more=more)
    succeed("train", root / "config.yaml", root / "new", "train.images=16")
    (root / "mine").mkdir()
    (root / "mine" / "thesis.txt").write_text("mine")
    result = run_stage("evaluate", root / "config.yaml", root / "mine", more=more)
    assert "holds thesis.txt and no .latentmill-run" in result.stderr


def test_a_sample_that_cannot_be_read_is_named_in_one_line(root: Path) -> None:
    folder = shutil.copytree(root / "images" / "cat", root / "flat")
    (folder / "5.png").write_bytes(b"no image")
    error = refused(root, more=("--images", str(folder)))
    assert "5.png" in error
    assert "Traceback" not in error


def intervals_of(figures: dict[str, Any]) -> list[Any]:
    """All of them, those within classes too."""
    inner = [intervals_of(value) for value in figures.values() if isinstance(value, dict)]
    return [figures[name] for name in ("interval",) if name in figures] + [each for part in inner for each in part]


def test_copies_have_no_interval(root: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 16, 16, 3), dtype=np.uint8)
    for name, array in (("once", images), ("twice", np.concatenate([images, images[:3]]))):
        np.savez(root / f"{name}.npz", array, np.arange(len(array)) % 2)
        evaluate(root, more=("--images", str(root / f"{name}.npz")))
        samples = receipt_of(root, f"{name}-*")["figures"]["samples"]
        assert (samples["KD-Means"]["interval"] is None) == (name == "twice")
    assert samples["copies"] == 3
    found = intervals_of(samples)
    assert len(found) > 8
    assert set(found) == {None}


def test_without_held_out_images_samples_stand_alone(root: Path) -> None:
    for part in ("cache", "run"):
        shutil.rmtree(root / part)
    for stage in ("encode", "train"):
        succeed(stage, root / "config.yaml", root / "run", "data.heldout=null")
    assert "no images are held out (data.heldout)" in evaluate(root, "data.heldout=null")
    assert receipt_of(root)["figures"].keys() == {"samples"}
    assert receipt_of(root)["figures"]["samples"]["memorisation"].keys() == {"median_distance", "copies"}
    assert "there are no held-out images: give data.heldout" in refused(
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
    assert "8x8 pixels, but data.image_size is 16" in refused(root, more=("--images", str(root / "small.npz")))
    shutil.rmtree(root / "run")
    assert "--run: no checkpoint in" in refused(root)
