"""The files that decode writes: images in each format, samples.npz, and what the page says about samples."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image

from data.cache.reader import LatentCache
from data.cache.writer import Job
from data.memory import Memory
from data.sources.generated import GeneratedArray
from data.storage import strip_checksum
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.datasets import BATCH, DecodedLatents, Decoder, Latents
from pipeline.device import in_threads
from pipeline.vae import FrozenVae
from stages.cli import main
from stages.decode import Images, decode
from stages.sample import sample_folder
from tests.helpers.world import CLASSES, IMAGE_SIZE, World, page_data, refuse, run_stage, succeed, tree

SUFFIXES = {"png": ".png", "webp": ".webp", "jpeg": ".jpg"}


@pytest.fixture
def run(world: World, tmp_path: Path) -> Path:
    """A copy of the run, for a test to change."""
    return Path(shutil.copytree(world.run, tmp_path / "run"))


@pytest.fixture
def folder(run: Path, world: World) -> Path:
    """Its samples."""
    return run / "samples" / world.samples.name


def pixels_of(folder: Path) -> NDArray[np.uint8]:
    return np.stack([np.array(Image.open(file).convert("RGB")) for file in sorted((folder / "images").iterdir())])


@pytest.mark.parametrize("image_format", ["webp", "jpeg"])
def test_another_format_replaces_the_files_and_changes_no_sample(
    world: World, run: Path, folder: Path, image_format: str
) -> None:
    setting, before, png = f"sample.image_format={image_format}", pixels_of(folder), tree(folder)
    assert "all done" not in succeed("decode", world.config, run, setting)
    files = sorted((folder / "images").iterdir())
    assert {file.suffix for file in files} == {SUFFIXES[image_format]}
    assert {Image.open(file).format for file in files} == {image_format.upper()}
    lossless = image_format == "webp"
    difference = np.abs(pixels_of(folder).astype(int) - before)
    assert (difference.max() == 0) == lossless
    assert difference.mean() < 3
    said = succeed("sample", world.config, run, setting)
    assert said.startswith("sample: all done")
    assert "decode: all done" in said
    succeed("decode", world.config, run)
    assert tree(folder) == png


def test_jpeg_keeps_colours_at_full_resolution(world: World, run: Path, folder: Path) -> None:
    succeed("decode", world.config, run, "sample.image_format=jpeg")
    for file in (folder / "images").iterdir():
        image: Any = Image.open(file)
        assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3


def test_the_format_of_images_does_not_name_samples_nor_is_it_recorded_with_them(world: World) -> None:
    tags = set()
    for image_format in SUFFIXES:
        config = Config(sample=Config().sample.changed(image_format=image_format))
        checkpoint: Any = type("Checkpoint", (), {"images_seen": 48})
        tags.add(sample_folder(config, world.run, checkpoint))
    assert len(tags) == 1
    assert "image_format" not in (world.samples / "samples.json").read_text()


def test_npz_holds_the_images_and_classes_and_evaluate_reads_it(world: World, run: Path, folder: Path) -> None:
    before = tree(folder)
    succeed("decode", world.config, run, more=("--npz",))
    arrays = np.load(folder / "samples.npz")
    assert (arrays["arr_0"] == pixels_of(folder)).all()
    assert arrays["arr_0"].dtype == np.uint8
    assert arrays["arr_1"].tolist() == LatentCache(folder).labels.tolist()
    assert arrays["arr_1"].dtype == np.int64
    images = GeneratedArray(folder / "samples.npz", image_size=IMAGE_SIZE, classes=CLASSES)
    assert images.labels.tolist() == [0, 1] * 3
    after = tree(folder)
    assert {name for name in after if after[name] != before.get(name)} == {"samples.npz"}
    for more in ((), ("--npz",)):
        assert succeed("decode", world.config, run, more=more).startswith("decode: all done")


def test_sample_writes_npz_too_but_not_without_images(world: World, run: Path, folder: Path) -> None:
    shutil.rmtree(folder)
    refuse(run_stage("sample", world.config, run, more=("--npz", "--latents")), "--npz", "--latents")
    succeed("sample", world.config, run, more=("--npz",))
    assert len(np.load(folder / "samples.npz")["arr_0"]) == 6


def test_npz_of_a_cache_follows_its_images(world: World, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(world.cache, tmp_path / "cache"))
    more = ("--cache", str(cache))
    succeed("decode", world.config, tmp_path, "sample.per_class=3", more=(*more, "--npz"))
    assert len(np.load(cache / "decoded" / "samples.npz")["arr_0"]) == 6
    succeed("decode", world.config, tmp_path, "sample.per_class=2", more=more)
    assert len(np.load(cache / "decoded" / "samples.npz")["arr_0"]) == 4
    assert len(list((cache / "decoded" / "images").iterdir())) == 4


def test_no_image_is_seen_before_all_are_on_disk_and_the_page_is_last(
    world: World, run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tree(folder)
    for name in ("index.html", "grid.png"):
        (folder / name).unlink()
    shutil.rmtree(folder / "images")
    flushed: list[int] = []
    fsync = os.fsync

    def noted(handle: int) -> None:
        flushed.append(os.fstat(handle).st_ino)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    succeed("decode", world.config, run)
    assert tree(folder) == whole
    images, page = folder / "images", folder / "index.html"
    in_order = [flushed.index(path.stat().st_ino) for path in (*images.iterdir(), images, page)]
    assert max(in_order[:-2]) < in_order[-2] < in_order[-1]


def test_what_a_killed_decode_left_half_done_is_done_again(world: World, run: Path, folder: Path) -> None:
    whole = tree(folder)
    (folder / "index.html").unlink()
    (folder / "images").rename(folder / ".staged-images")
    (folder / ".staged-images" / "000002-cat.png").write_bytes(b"\x89PNG\r\n")
    (folder / ".staged-images" / "000005-dog_fox_.png").unlink()
    assert "6 images" in succeed("decode", world.config, run)
    assert tree(folder) == whole


@pytest.mark.parametrize("lost", ["grid.png", "samples.npz", "index.html"])
def test_what_sums_the_images_up_is_made_of_the_files_again(
    world: World, run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """They need no decoding, so a disk that is too full for samples.npz costs nothing else."""
    succeed("decode", world.config, run, more=("--npz",))
    whole = tree(folder)
    (folder / lost).unlink()
    monkeypatch.setattr(Images, "_write", failing)
    for name in ("write_npz", "save_png", "publish"):
        with monkeypatch.context() as patched:
            patched.setattr(f"stages.decode.{name}", failing)
            run_stage("decode", world.config, run, more=("--npz",))
        assert tree(folder).keys() == whole.keys() - {lost} or tree(folder) == whole
    succeed("decode", world.config, run, more=("--npz",))
    assert tree(folder) == whole


def test_samples_that_were_interrupted_are_completed_and_so_are_their_images(
    world: World, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second time, what is drawn is decoded on the way, and then what was drawn the first time."""
    shutil.rmtree(run / "samples")
    settings = ("sample.per_class=40",)  # five shards of 16
    monkeypatch.setattr("pipeline.datasets.process_count", lambda requested: 1)
    succeed("sample", world.config, run, *settings)
    (folder,) = (run / "samples").iterdir()
    whole = tree(folder)
    shutil.rmtree(folder)
    write = Images._write

    def interrupted(self: Images, batch: Latents) -> int:
        return failing() if 20 in batch.rows else write(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(Images, "_write", interrupted)
        assert "the encoder is broken" in run_stage("sample", world.config, run, *settings).stderr
    assert not (folder / "images").exists()
    assert not (folder / "manifest.json").exists()
    printed = succeed("sample", world.config, run, *settings)
    assert "sample: 32 images" in printed
    assert "decode: 48 images" in printed
    assert tree(folder) == whole


def test_jobs_share_the_images_of_a_folder(
    world: World, run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tree(folder)
    (folder / "index.html").unlink()
    shutil.rmtree(folder / "images")
    written: dict[int, list[int]] = {0: [], 1: []}
    everyone, config = threading.Barrier(2), load_config(world.config)
    write = Images._write

    def noted(self: Images, batch: Latents) -> int:
        written[self._job.number] += batch.rows.tolist()
        return write(self, batch)

    monkeypatch.setattr(Images, "meet", lambda self: everyone.wait(timeout=60))
    monkeypatch.setattr(Images, "_write", noted)
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(decode, config, folder, job=Job(number, 2)) for number in (0, 1)]:
            done.result()
    assert written == {0: [0, 1, 2], 1: [3, 4, 5]}
    assert tree(folder) == whole


def test_an_error_in_a_thread_is_an_error_of_the_command_and_leaves_nothing(
    world: World, run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(folder)
    monkeypatch.setattr(Image.Image, "save", failing)
    result = run_stage("decode", world.config, run, "sample.image_format=webp")
    assert result.exit_code == 1
    assert "the encoder is broken" in result.stderr
    assert tree(folder) == before


def failing(*args: Any, **options: Any) -> NoReturn:
    raise OSError("the encoder is broken")


def test_at_most_a_few_batches_are_in_memory(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, written, ahead = 0, 0, []
    write = Images._write

    def counted(self: Images, batch: Latents) -> int:
        nonlocal written
        written += 1
        return write(self, batch)

    def shards() -> Iterator[Latents]:
        nonlocal made
        cache = LatentCache(world.cache)
        rows = np.zeros(BATCH, np.int64)
        for number in range(12):
            made += 1
            ahead.append(made - written)
            yield Latents(rows + number, cache.labels[rows], cache.means(rows))

    monkeypatch.setattr(Images, "_write", counted)
    monkeypatch.setattr("pipeline.datasets.process_count", lambda requested: 2)
    config = load_config(world.config)
    images = Images(tmp_path, LatentCache(world.cache).manifest, config, Job())
    with images.staged():
        assert list(images.write(shards())) == [BATCH] * 12
    assert written == 12
    assert max(ahead) <= 4  # those of two threads, one that waits, and the one that is read
    assert len(list((tmp_path / "images").iterdir())) == 12


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_an_image_does_not_depend_on_those_decoded_beside_it(world: World, workers: int) -> None:
    latents = LatentCache(world.cache)
    decoder = Decoder(FrozenVae(str(world.config.parent / "vae")))
    chosen = np.random.default_rng(0).integers(0, len(latents), 5 * BATCH + 3)
    alone = np.concatenate([decoder(latents.means(chosen[i : i + 1])) for i in range(len(chosen))])
    parts = [chosen[start : start + size] for start, size in ((0, 3), (3, BATCH), (3 + BATCH, 1), (4 + BATCH, BATCH))]
    together = list(in_threads(lambda part: decoder(latents.means(part)), parts, workers))
    assert [len(part) for part in together] == [len(part) for part in parts]
    assert np.array_equal(np.concatenate(together), alone[: 4 + 2 * BATCH])
    every = Latents(chosen, latents.labels[chosen], latents.means(chosen))
    assert [len(part.rows) for part in every.split(BATCH)] == [BATCH] * 5 + [3]
    assert np.array_equal(np.concatenate([decoder(part.means) for part in every.split(BATCH)]), alone)
    assert np.array_equal(DecodedLatents(latents, decoder.vae).load(chosen).pixels, alone)


def test_as_many_threads_decode_as_there_are_cores_and_memory_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = Decoder(FrozenVae(str(world.config.parent / "vae")))
    monkeypatch.setattr("pipeline.datasets.process_count", lambda requested: 5)
    assert decoder.workers(IMAGE_SIZE) == 5
    monkeypatch.setattr("pipeline.datasets.host_memory", lambda: Memory(0, 0))
    assert decoder.workers(IMAGE_SIZE) == 1
    decoder.vae.device = torch.device("cuda")  # whose memory is another one
    assert decoder.workers(IMAGE_SIZE) == 5


def test_a_decoder_that_runs_out_of_memory_goes_on_with_smaller_batches_to_the_same_images(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    vae = FrozenVae(str(world.config.parent / "vae"))
    latents = LatentCache(world.cache)
    indices = np.arange(3 * BATCH + 1) % len(latents)
    expected = DecodedLatents(latents, vae).load(indices).pixels
    decode, sizes = vae.decode, []

    def small(given: torch.Tensor) -> torch.Tensor:
        if len(given) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(given))
        return decode(given)

    vae.decode = small  # type: ignore[method-assign]
    images = DecodedLatents(latents, vae)
    for _ in range(2):
        found = images.load(indices).pixels
        assert found.shape == expected.shape
        assert np.abs(found.astype(int) - expected).max() <= 1  # other batches may round otherwise
    assert capsys.readouterr().out.splitlines() == [
        "decode: out of memory with batches of 16: going on with 8",
        "decode: out of memory with batches of 8: going on with 4",
    ]
    assert set(sizes) == {4}


def test_the_command_on_the_page_draws_the_same_samples(
    world: World, run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run.parent)
    chosen = f"sample.classes={json.dumps([CLASSES[1]])}"
    succeed("sample", world.config, Path("run"), chosen, "sample.seed=3", "sample.guidance=1.5", more=("--npz",))
    (made,) = (path for path in (run / "samples").iterdir() if path != folder)
    before, command = tree(made), shlex.split(page_data(made / "index.html")["command"])
    shutil.rmtree(made)
    assert command[0] == "latentmill"
    result = CliRunner().invoke(main, [*command[1:], "--npz"])
    assert result.exit_code == 0, result.output
    assert tree(made) == before


def test_the_page_says_how_samples_were_drawn(world: World, folder: Path) -> None:
    data = page_data(folder / "index.html")
    settings = dict(data["settings"])
    assert settings.items() >= {"sampler": "unipc", "steps": "2", "guidance": "2.0", "seed": "0"}.items()
    assert settings["checkpoint"] == "48 images seen"
    assert settings["run"] == str(world.run)
    assert data["images"] == [[i, i % 2] for i in range(6)]
    assert data["summary"] == ["unipc, 2 steps", "guidance 2", "seed 0"]


def test_a_record_of_samples_that_was_changed_is_refused_and_may_be_deleted(
    world: World, run: Path, folder: Path
) -> None:
    file = folder / "samples.json"
    assert strip_checksum(file.read_bytes())
    file.write_bytes(file.read_bytes().replace(b'"steps": 2', b'"steps": 3'))
    refuse(run_stage("decode", world.config, run), str(file), "delete it")
    record = json.loads(file.read_bytes())
    del record["sha256"]
    file.write_text(json.dumps(record))  # as version 0.1.0 wrote it
    succeed("decode", world.config, run)
    assert dict(page_data(folder / "index.html")["settings"])["steps"] == "3"
    file.unlink()
    succeed("decode", world.config, run)
    data = page_data(folder / "index.html")
    assert (data["settings"], data["command"]) == ([], "")


def test_a_cache_has_a_page_without_settings(world: World, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(world.cache, tmp_path / "cache"))
    succeed("decode", world.config, tmp_path, more=("--cache", str(cache)))
    data = page_data(cache / "decoded" / "index.html")
    assert (data["settings"], data["command"], data["summary"]) == ([], "", [])
    assert data["title"] == LatentCache(cache).manifest.data_source
