"""What sample draws, and that it says what is not as it was asked for."""

from __future__ import annotations

import json
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.cache.manifest import Manifest
from data.cache.reader import LatentCache
from data.cache.writer import Job
from pipeline.compatibility import usable_guidance
from pipeline.config_file import load_config
from pipeline.training.checkpoint import checkpoint_folders
from pipeline.training.setup import build_model
from stages.sample import Drawing, choose_classes, require_checkpoint, sample
from tests.helpers.world import (
    CLASSES,
    IMAGE_SIZE,
    World,
    drawn,
    make_images,
    refuse,
    run_stage,
    state_of,
    succeed,
    train_on,
    tree,
    weights_of,
)

NUMBERS = ["1", "2", "3", "010", "index:1"]


@pytest.mark.parametrize(
    ("wanted", "expected", "said"),
    [
        ("2", [1], "'2' is the class of that name; index:2 is the class '3'"),
        ("3", [2], "'3' is the class of that name; index:3 is the class '010'"),
        ("0", [0], ""),
        ("4", [4], ""),
        ("010", [3], ""),
        ("index:2", [2], ""),
        ("index:1", [4], "'index:1' is the class of that name; index:1 is the class '2'"),
    ],
)
def test_a_name_wins_over_an_index_and_says_so(
    wanted: str, expected: list[int], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert choose_classes((wanted,), NUMBERS, [1] * 5) == expected
    assert capsys.readouterr().out == (f"sample: {said}\n" if said else "")


@pytest.mark.parametrize("wanted", ["5", "-1", "01", "1.0", "10", "index:5", "index:-1", "index:01", "", "index:"])
def test_what_is_no_name_and_no_index_is_refused(wanted: str) -> None:
    with pytest.raises(ValueError, match=r"^sample\.classes: no class .*: choose from .*'1', .* indices 0 to 4$"):
        choose_classes((wanted,), NUMBERS, [1] * 5)


def test_of_a_thousand_classes_the_nearest_are_suggested() -> None:
    names = [f"class {i}" for i in range(999)] + ["goldfish"]
    with pytest.raises(ValueError, match="'goldfihs': choose from 'goldfish', ") as caught:
        choose_classes(("goldfihs",), names, [1] * 1000)
    assert len(str(caught.value)) < 300


def test_a_name_is_found_in_either_form_of_unicode_and_drawn_once() -> None:
    assert choose_classes(("caf\u00e9", "0"), ["dog", "cafe\u0301"], [1, 1]) == [1, 0]
    assert choose_classes(("cafe\u0301", "caf\u00e9"), ["caf\u00e9", "cafe\u0301"], [1, 1]) == [1, 0]
    assert choose_classes(("dog", "0", "dog"), ["dog", "cat"], [1, 1]) == [0]


def test_classes_without_images_are_left_out_aloud_and_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert choose_classes((), ["a", "b", "c", "d"], [2, 0, 1, 0]) == [0, 2]
    assert "2 of 4 classes have no images and are left out, the first of them 'b'" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"^sample\.classes: 'd' had no images in training"):
        choose_classes(("a", "3"), ["a", "b", "c", "d"], [2, 0, 1, 0])


@pytest.mark.parametrize(
    ("asked", "label_dropout", "classes", "usable"),
    [
        *((asked, 0.1, 2, asked) for asked in (0, 0.5, 1, 2)),
        *((asked, 0.0, 2, 1) for asked in (0.5, 1, 2)),
        *((asked, 1.0, 2, 0) for asked in (0, 1, 2)),
        *((asked, dropout, 1, 1) for asked in (0, 1, 2) for dropout in (0, 0.1)),
        (2, 1.0, 1, 0),
    ],
)
def test_guidance_is_that_of_what_was_trained(asked: float, label_dropout: float, classes: int, usable: float) -> None:
    guidance, why = usable_guidance(asked, "cfg", without_class=label_dropout, classes=classes)
    assert guidance == usable
    assert why.startswith(f"sample.guidance = {usable}, not {asked:g}: ") if usable != asked else not why
    if label_dropout == 0:  # it draws with the null class at every scale
        with pytest.raises(ValueError, match=r"^sample\.guidance_form = cfg\+\+ needs the null class.*: use cfg$"):
            usable_guidance(asked, "cfg++", without_class=label_dropout, classes=classes)


def test_without_a_null_class_guidance_is_one_and_every_place_says_so(world: World, tmp_path: Path) -> None:
    untrained = "it needs the null class, which was never trained (train.label_dropout=0)"
    more = ("train.label_dropout=0", "train.images=8")
    printed = succeed("train", world.config, tmp_path, *more, "train.preview_every=4")
    assert printed.count(f"train: previews: sample.guidance = 1, not 2: {untrained}") == 1
    assert f"sample.guidance = 1, not 2: {untrained}" in succeed("sample", world.config, tmp_path)
    folder = drawn(tmp_path).path
    assert "-guidance1-" in folder.name
    assert json.loads((folder / "samples.json").read_text(encoding="utf-8"))["sample"]["guidance"] == 1
    before = tree(tmp_path)
    assert succeed("sample", world.config, tmp_path, "sample.guidance=1").startswith("sample: all done")
    of_a_class = ("sample.guidance=1", f"sample.guidance_by_class={{{CLASSES[0]}: 3}}")
    assert f"sample.guidance = 1, not 3: {untrained}" in succeed("sample", world.config, tmp_path, *of_a_class)
    assert "all done" in succeed("decode", world.config, tmp_path, "sample.guidance=3")
    assert tree(tmp_path) == before
    preview = tmp_path / "previews" / "000000008.png"
    drawn_before = preview.read_bytes()
    preview.unlink()
    succeed("train", world.config, tmp_path / "again", *more, "sample.guidance=1")
    assert (tmp_path / "again" / "previews" / "000000008.png").read_bytes() == drawn_before
    for stage, run in (("sample", tmp_path), ("train", tmp_path / "new")):
        result = run_stage(stage, world.config, run, *more, "sample.guidance=0")
        assert result.exit_code == 2
        assert "sample.guidance = 0: it needs the null class" in result.stderr


def test_without_trained_classes_the_unconditional_model_is_drawn(world: World, tmp_path: Path) -> None:
    succeed("train", world.config, tmp_path, "train.label_dropout=1", "train.images=8")
    printed = succeed("sample", world.config, tmp_path)
    assert "sample.guidance = 0, not 2: no class was ever trained (train.label_dropout=1)" in printed
    assert "-guidance0-" in drawn(tmp_path).path.name


def test_one_class_has_nothing_to_be_guided_from(world: World, tmp_path: Path) -> None:
    given = train_on(world, tmp_path, ("cat",))
    assert "sample.guidance = 1, not 2: there is only one class" in succeed(
        "sample", world.config, tmp_path / "run", *given
    )
    assert drawn(tmp_path / "run").labels.tolist() == [0] * 3


def test_a_class_all_of_whose_images_failed_is_not_drawn_nor_previewed(world: World, tmp_path: Path) -> None:
    make_images(tmp_path / "images", ("ant", "cat", "owl"))
    for file in (tmp_path / "images" / "ant").iterdir():
        file.write_bytes(b"nothing")
    cache = f"cache.path={tmp_path / 'cache'}"
    said = succeed("encode", world.config, tmp_path / "run", f"data.source={tmp_path / 'images'}", cache)
    assert "encode: 1 class without images, such as ant: it cannot be sampled" in said
    given = train_on(world, tmp_path, ())
    assert state_of(tmp_path / "run", 8)["class_counts"] == [0, 6, 6]
    printed = succeed("sample", world.config, tmp_path / "run", *given)
    assert "1 of 3 classes have no images and are left out, the first of them 'ant'" in printed
    assert drawn(tmp_path / "run").labels.tolist() == [1, 2] * 3
    result = run_stage("sample", world.config, tmp_path / "run", *given, "sample.classes=[cat,ant]")
    assert result.exit_code == 2
    assert "sample.classes: 'ant' had no images in training" in result.stderr
    tile = -(-64 // IMAGE_SIZE) * IMAGE_SIZE + 2
    assert Image.open(tmp_path / "run" / "previews" / "000000008.png").height == 2 * tile + 2
    assert Image.open(tmp_path / "run" / "previews.png").height == tile + 2


def test_classes_called_by_numbers_are_drawn_by_name(world: World, tmp_path: Path) -> None:
    given = train_on(world, tmp_path, ("008", "010", "2"))
    for asked, labels in (("010", [2]), ("[2, 008]", [0, 1]), ("index:2", [2]), ("0", [0])):
        shutil.rmtree(tmp_path / "run" / "samples", ignore_errors=True)
        printed = succeed(
            "sample", world.config, tmp_path / "run", *given, f"sample.classes={asked}", "sample.per_class=1"
        )
        assert drawn(tmp_path / "run").labels.tolist() == labels, printed


def test_images_without_a_class_are_trained_without_one(world: World, tmp_path: Path) -> None:
    make_images(tmp_path / "images", ("cat", "dog"))
    for number in range(3):
        shutil.copy(tmp_path / "images" / "cat" / f"{number}.png", tmp_path / "images" / f"top{number}.png")
    given = train_on(world, tmp_path, (), "train.label_dropout=0", "train.images=32", "train.lr=1e-3")
    state = state_of(tmp_path / "run", 32)
    assert (state["class_counts"], state["without_class"]) == ([6, 6], 1 - 12 / 15)
    rows = weights_of(tmp_path / "run", 32)["classes.weight"]
    before = build_model(load_config(world.config, given), Manifest.load(tmp_path / "cache")).classes.weight
    assert ((rows - before).abs().amax(1) > 0).all()  # the null class, too, has learnt
    assert "not 2" not in succeed("sample", world.config, tmp_path / "run", *given)  # so it can guide
    assert drawn(tmp_path / "run").labels.tolist() == [0, 1] * 3
    cache = str(tmp_path / "cache")
    succeed("decode", world.config, tmp_path / "run", *given, "sample.per_class=1", more=("--cache", cache))
    names = [file.name for file in sorted((tmp_path / "cache" / "decoded" / "images").iterdir())]
    assert names == ["000000-cat.png", "000006-dog.png", "000012-no_class.png"]
    assert "15 listed" in succeed("info", world.config, tmp_path / "run", *given)


def test_the_same_classes_are_the_same_samples_however_they_are_named(world: World, tmp_path: Path) -> None:
    overrides = (f"data.source={world.images}", "sample.per_class=1")
    run = Path(shutil.copytree(world.run, tmp_path / "run"))
    succeed("sample", world.config, run, *overrides, f"sample.classes=['{CLASSES[1]}']")
    assert succeed("sample", world.config, run, *overrides, "sample.classes=1").startswith("sample: all done")
    assert succeed("decode", world.config, run, *overrides, "sample.classes=index:1").startswith("decode: all done")


def test_sample_ends_in_images_and_stops_before_them_when_asked_to(world: World, tmp_path: Path) -> None:
    run = Path(shutil.copytree(world.run, tmp_path / "run"))
    shutil.rmtree(run / "samples")
    printed = succeed("sample", world.config, run, more=("--latents",))
    folder = drawn(run).path
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["latents.zarr"]
    assert "decode" not in printed
    for said in (succeed("sample", world.config, run), succeed("sample", world.config, run)):
        last = said.splitlines()[-1]
        assert f"{folder}/grid.png" in last
        assert f"{folder}/index.html" in last
    assert len(list((folder / "images").iterdir())) == len(drawn(run))
    assert np.array_equal(LatentCache(folder).labels, [0, 1] * 3)


def test_samples_in_half_precision_are_near_those_in_full_and_lie_beside_them(world: World, tmp_path: Path) -> None:
    run = shutil.copytree(world.run, tmp_path / "run")
    for precision in ("fp32", "bf16"):
        succeed("sample", world.config, run, f"sample.precision={precision}", more=("--latents",))
    folders = {name: next((run / "samples").glob(f"*-{name}")) for name in ("fp32", "bf16")}
    said = {name: json.loads((folder / "samples.json").read_text()) for name, folder in folders.items()}
    assert {name: each["dtype"] for name, each in said.items()} == {"fp32": "float32", "bf16": "bfloat16"}
    exact, rounded = (LatentCache(folders[name]) for name in ("fp32", "bf16"))
    first, other = (cache.read(np.arange(len(cache))).astype(np.float32) for cache in (exact, rounded))
    assert 0 < np.abs(other - first).max() < 0.1 * first.std()
    auto = LatentCache(world.samples)
    assert (auto.read(np.arange(len(auto))) == exact.read(np.arange(len(exact)))).all()  # on a CPU


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("sample.scheduler=euler_ancestral",),
        ("sample.scheduler=heun", "sample.guidance_form=apg"),
        ("sample.scheduler=dpm++", "sample.guidance_by_class="),
    ],
    ids=["unipc", "euler_ancestral", "heun", "dpm++"],
)
def test_every_batch_size_and_number_of_processes_draws_the_same_bytes(
    world: World, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    overrides = [*settings, "sample.per_class=20"]
    names = "{" + ", ".join(f"'{name}': {2 * i}" for i, name in enumerate(CLASSES)) + "}"
    overrides = [re.sub(r"by_class=.*", f"by_class={names}", each) for each in overrides]
    shards = []
    for batch_size, jobs in ((1, 1), (5, 3), (64, 2)):
        run = shutil.copytree(world.run, tmp_path / f"{batch_size}")
        config = load_config(world.config, [*overrides, f"sample.batch_size={batch_size}"])
        for number in range(jobs):
            folder = sample(config, run, job=Job(number, jobs))
        assert (folder / "manifest.json").exists()
        shards.append({name: payload for name, payload in tree(folder).items() if "latents.zarr/" in name})
    assert shards[0] == shards[1] == shards[2]


@pytest.mark.parametrize(("count", "size"), [(20, 7), (16, 8), (3, 3)])
def test_a_gpu_draws_batches_of_one_size_whatever_is_missing(
    world: World, monkeypatch: pytest.MonkeyPatch, count: int, size: int
) -> None:
    """A GPU's rounding depends on the size of a batch: here its calls are counted, on a CPU."""
    config = load_config(world.config, ["sample.batch_size=8"])
    drawing = Drawing(config.sample, require_checkpoint(world.run), np.zeros(count, np.int64))
    sizes = []

    def call(self: Drawing, batch: np.ndarray) -> torch.Tensor:
        sizes.append(len(batch))
        return torch.from_numpy(batch)

    monkeypatch.setattr(Drawing, "__call__", call)
    drawing.device, drawing.batch_size = torch.device("cuda"), 8
    for rows in ([*range(count)], [0], [2, 1], [1] * count, []):
        drawn_rows = [row for batch in drawing.batches(np.array(rows, np.int64)) for row in batch.tolist()]
        assert drawn_rows == rows
    assert {*sizes} == {size}


def test_a_compiled_model_draws_the_same_samples(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through dynamo without inductor, which would take a minute."""
    run = Path(shutil.copytree(world.run, tmp_path / "run"))
    shutil.rmtree(run / "samples")
    monkeypatch.setattr("stages.sample.process_count", lambda requested: 2)
    monkeypatch.setattr("torch.compile", partial(torch.compile, backend="aot_eager"))
    settings = ("sample.per_class=20",)  # two batches, which two threads draw at once
    latents = []
    for more in (("sample.compile=true",), ()):
        succeed("sample", world.config, run, *settings, *more, more=("--latents",))
        (folder,) = (run / "samples").iterdir()
        latents.append(LatentCache(folder).read(np.arange(40)).astype(np.float32))
        shutil.rmtree(folder)
    assert np.allclose(*latents, rtol=1e-2, atol=1e-2)


def test_a_weaker_model_guides_and_must_fit(world: World, tmp_path: Path) -> None:
    run = shutil.copytree(world.run, tmp_path / "run")
    shutil.rmtree(run / "samples")
    strong = "sample.guidance=1000"
    for settings in (("sample.guidance=1",), (strong,), (strong, f"sample.guide={run}")):
        succeed("sample", world.config, run, *settings, more=("--latents",))
    folders = sorted((run / "samples").iterdir(), key=lambda folder: len(folder.name))
    conditional, alone, guided = (LatentCache(folder) for folder in folders)
    every, close = np.arange(len(alone)), {"rtol": 1e-2, "atol": 1e-2}
    assert np.allclose(guided.read(every), conditional.read(every), **close)  # a model guides itself nowhere
    assert not np.allclose(alone.read(every), conditional.read(every), **close)
    guide = Path(shutil.copytree(world.run, tmp_path / "guide"))
    for left in (2, 1):  # checkpoints of the guide, of which the newest guides
        succeed("sample", world.config, run, f"sample.guide={guide}", more=("--latents",))
        assert len([*(run / "samples").iterdir()]) == 6 - left
        shutil.rmtree(checkpoint_folders(guide)[-1])
    other = tmp_path / "other"
    succeed("train", world.config, other, "train.normalization=vae", "train.images=16")
    result = run_stage("sample", world.config, run, f"sample.guide={other}")
    refuse(result, f"sample.guide: {other}/checkpoints/000000016: its normalization is", "trained on the same cache")
    refuse(
        run_stage("sample", world.config, run, "sample.guide=nowhere"), "sample.guide: no intact checkpoint in nowhere"
    )


def test_samples_start_from_the_images_of_a_cache(world: World, tmp_path: Path) -> None:
    run = shutil.copytree(world.run, tmp_path / "run")
    near, far = (
        (f"sample.start={start}", f"sample.start_from={world.cache}", "sample.steps=8") for start in (0.01, 0.9)
    )
    cache = LatentCache(world.cache)
    channels = cache.manifest.latent_channels
    firsts = [np.flatnonzero(cache.labels == label)[turn] for turn in range(3) for label in (0, 1)]
    originals = cache.read(np.array(firsts))[:, 0, :channels].astype(np.float32)
    distances = []
    for settings in (near, far):
        before = {*(run / "samples").iterdir()}
        succeed("sample", world.config, run, *settings, more=("--latents",))
        (folder,) = {*(run / "samples").iterdir()} - before
        drawn_latents = LatentCache(folder).read(np.arange(6))[:, 0].astype(np.float32)
        distances.append(np.abs(drawn_latents - originals).mean())
    assert distances[0] < 0.1 * originals.std() < distances[1]
    refuse(run_stage("sample", world.config, run, "sample.start=0.5"), "start = 0.5 and start_from = None")
