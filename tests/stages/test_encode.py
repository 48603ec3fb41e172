"""The stages that make, change and check a latent cache, as a user calls them."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from PIL import Image

import pipeline.datasets
import pipeline.device
import pipeline.planning
import stages.encode
from data.cache.manifest import MANIFEST, Manifest
from data.cache.reader import FAILURES, LatentCache
from data.cache.records import progress
from data.sources.base import Batch
from pipeline.vae import FrozenVae
from stages.cli import main
from tests.helpers.imports import ROOT
from tests.helpers.world import IMAGE_SIZE, World, add_image, make_vae, refuse, run_stage, succeed, tree

COUNT = 40  # images in shards of 16, 16 and 8


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.planning, "SHARD_ROWS", 16)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config beside a folder `images` of forty pictures in two classes and a tiny VAE; `cache` is not there yet."""
    for i in range(COUNT):
        add_image(tmp_path / "images" / ("cat" if i < COUNT // 2 else "dog") / f"{i:02d}.png", seed=i)
    make_vae(tmp_path / "vae", seed=0)
    values = {
        "data": {"source": str(tmp_path / "images"), "image_size": IMAGE_SIZE},
        "vae": {"source": str(tmp_path / "vae")},
        "cache": {"path": str(tmp_path / "cache"), "batch_size": 4, "workers": 0},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return tmp_path / "config.yaml"


def encode(config: Path, *overrides: str, more: Sequence[str] = (), to: str = "cache") -> str:
    return succeed("encode", config, config.parent, f"cache.path={config.parent / to}", *overrides, more=tuple(more))


def moments_by_key(cache: Path) -> dict[str, bytes]:
    latents = LatentCache(cache)
    return {key: latents.read(np.array([i])).tobytes() for i, key in enumerate(latents.keys())}


@pytest.mark.parametrize("format_", ["zarr", "webdataset"])
def test_jobs_in_any_order_write_the_bytes_of_one(config: Path, format_: str) -> None:
    encode(config, f"cache.format={format_}", to="whole")
    whole = tree(config.parent / "whole")
    for number, order in enumerate(itertools.permutations([1, 2, 3])):
        for job in order:
            assert not (config.parent / f"jobs{number}" / "manifest.json").exists()
            encode(config, f"cache.format={format_}", more=["--job", f"{job}/3"], to=f"jobs{number}")
        assert tree(config.parent / f"jobs{number}") == whole


@pytest.mark.parametrize("workers", ["1", "2", "auto"])
def test_processes_that_encode_write_the_bytes_of_one(config: Path, workers: str) -> None:
    break_images(config, "cat/03.png")
    encode(config, to="whole")
    encode(config, f"cache.workers={workers}")
    assert tree(config.parent / "cache") == tree(config.parent / "whole")


def test_processes_that_have_no_memory_for_a_batch_each_read_ahead(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FrozenVae, "encoding_bytes", lambda vae, batch_size, image_size: 2**60)
    encode(config, "cache.workers=2", to="large")
    monkeypatch.undo()
    monkeypatch.setattr(pipeline.planning, "SHARD_ROWS", 16)
    encode(config)
    assert tree(config.parent / "large") == tree(config.parent / "cache")


@pytest.mark.parametrize(
    ("limit", "local", "expected"), [("max 100000", "1", 6), ("250000 100000", "1", 3), ("max 100000", "4", 1)]
)
def test_processes_are_counted_by_the_cores_of_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, local: str, expected: int
) -> None:
    (tmp_path / "cpu.max").write_text(limit)
    monkeypatch.setattr(pipeline.device, "_CPU_LIMIT", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    assert pipeline.device.process_count("auto") == expected
    assert pipeline.device.process_count(5) == 5


def test_processes_of_a_launcher_share_the_work(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode(config, to="whole")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        encode(config)
    assert tree(config.parent / "cache") == tree(config.parent / "whole")


def test_of_many_processes_one_lists_a_data_set_that_is_all_encoded(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(config)
    opened, listed = [], stages.encode.open_config_sources

    def counted(*arguments: Any) -> Any:
        opened.append(os.environ["RANK"])
        return listed(*arguments)

    monkeypatch.setattr(stages.encode, "open_config_sources", counted)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in (("0", "all done"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert said in encode(config)
    assert opened == ["0"]


@pytest.mark.parametrize("job", ["0/2", "3/2", "2", "a/b", "1/0", "-1/2"])
def test_a_job_that_is_none_is_refused(config: Path, job: str) -> None:
    refuse(run_stage("encode", config, config.parent, more=("--job", job)), "--job", job)


def test_a_killed_encode_goes_on_to_the_same_bytes(config: Path) -> None:
    """A real process, killed when it has published its first shard; and no second one is let in beside it."""
    encode(config, to="whole")
    code = (
        "import sys, time, pipeline.planning as planning, stages.encode as encode; "
        "from stages.cli import main; planning.SHARD_ROWS = 16;"
        "write = encode.CacheWriter.write;"
        "encode.CacheWriter.write = lambda *a: (write(*a), print('written', flush=True), time.sleep(60));"
        "main(['encode', '--config', sys.argv[1]])"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(config)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert any("written" in line for line in process.stdout)
    refuse(run_stage("encode", config, config.parent), "job 1/1", f"process {process.pid}", "is using it")
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert progress(config.parent / "cache") == (16, 0, 24)
    assert "24 of 40 images" in encode(config)
    assert tree(config.parent / "cache") == tree(config.parent / "whole")


class _Dying:
    """A data set whose reader is killed, as it is for want of memory."""

    def load(self, indices: Sequence[int]) -> Batch:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def test_a_killed_reader_is_an_error_in_seconds(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.sources.files.ImageFiles.load", _Dying.load)
    started = time.monotonic()
    result = run_stage("encode", config, config.parent, "cache.workers=1")
    assert result.exit_code == 1
    assert "a process that reads images was killed" in result.stderr
    assert "cache.workers" in result.stderr
    assert time.monotonic() - started < 20
    monkeypatch.undo()
    monkeypatch.setattr(pipeline.planning, "SHARD_ROWS", 16)
    encode(config)


def test_an_image_that_vanishes_after_the_listing_is_recorded(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = stages.encode.FrozenVae

    def late(*arguments: Any) -> FrozenVae:
        (config.parent / "images/cat/03.png").unlink()
        return real(*arguments)

    monkeypatch.setattr(stages.encode, "FrozenVae", late)
    assert "39 committed + 1 failed = 40 listed" in encode(config)
    (failure,) = LatentCache(config.parent / "cache").lines(FAILURES)
    assert failure["key"] == "cat/03.png"
    assert "No such file" in failure["reason"]


def test_latents_that_are_not_finite_are_recorded_and_never_committed(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = FrozenVae.encode

    def poisoned(vae: FrozenVae, pixels: torch.Tensor) -> torch.Tensor:
        moments = real(vae, pixels).clone()
        moments[1:2, 0, 0, 0] = float("nan")
        return moments

    monkeypatch.setattr(FrozenVae, "encode", poisoned)
    assert "30 committed + 10 failed = 40 listed" in encode(config)  # the second of every batch of four
    cache = LatentCache(config.parent / "cache")
    assert np.isfinite(cache.read(np.arange(len(cache)))).all()
    assert {line["reason"] for line in cache.lines(FAILURES)} == {"its latents are NaN or infinite"}


def test_a_precision_is_recorded_and_that_of_a_cache_stays(config: Path) -> None:
    """Latents in fp16 are close to those in fp32, and a cache that does not name a precision is one of fp32."""
    assert "on cpu in fp32" in encode(config)
    assert "precision" not in json.loads((config.parent / "cache" / MANIFEST).read_text())
    assert "on cpu in fp16" in encode(config, "cache.precision=fp16", to="half")
    plain, half = (LatentCache(config.parent / name) for name in ("cache", "half"))
    assert (plain.manifest.precision, half.manifest.precision) == ("fp32", "fp16")
    exact, rounded = (cache.read(np.arange(len(cache))).astype(np.float32) for cache in (plain, half))
    assert 0 < np.abs(rounded - exact).max() < 0.05 * exact.std()
    assert "all done" in encode(config, to="half")
    refuse(
        run_stage("encode", config, config.parent, f"cache.path={config.parent / 'half'}", "cache.precision=fp32"),
        "has precision = fp16, this run has fp32",
    )


def test_a_precision_that_changes_latents_too_much_is_refused(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.planning.MAX_ROUNDING_ERROR", 1e-4)
    refuse(run_stage("encode", config, config.parent, "cache.precision=bf16"), "cache.precision = bf16: it changes the")


def break_images(config: Path, *keys: str) -> None:
    for key in keys:
        (config.parent / "images" / key).write_bytes(b"no image")


def test_too_many_failures_stop_the_encode_and_a_retry_ends_as_if_nothing_had_been(config: Path) -> None:
    encode(config, to="whole")
    broken = {key: (config.parent / "images" / key).read_bytes() for key in ("cat/01.png", "cat/02.png", "dog/39.png")}
    stamps = {key: (config.parent / "images" / key).stat() for key in broken}
    break_images(config, *broken)
    result = run_stage("encode", config, config.parent, "cache.max_failures=1")
    refuse(result, "2 images", "cache.max_failures", "cat/01.png", FAILURES)
    committed, failed, pending = progress(config.parent / "cache")
    assert (committed + failed + pending, failed) == (COUNT, 2)
    listed = [json.loads(line)["key"] for line in (config.parent / "cache" / FAILURES).read_text().splitlines()]
    assert listed == ["cat/01.png", "cat/02.png"]
    assert "37 committed + 3 failed = 40 listed" in encode(config)
    assert "all done" in encode(config)
    for key, payload in broken.items():
        (config.parent / "images" / key).write_bytes(payload)
        os.utime(config.parent / "images" / key, ns=(stamps[key].st_atime_ns, stamps[key].st_mtime_ns))
    refuse(run_stage("encode", config, config.parent), "3 images", "could not be read", "--retry-failed")
    assert "3 of 40 images" in encode(config, more=["--retry-failed"])
    assert tree(config.parent / "cache") == tree(config.parent / "whole")


def test_failed_images_are_read_again_and_only_they(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed for a while, such as a network drive, and not because of the file."""
    encode(config, to="whole")
    read = pipeline.datasets.open_source

    def flaky(*arguments: Any, **options: Any) -> Any:
        source = read(*arguments, **options)
        load = source._container.read

        def failing(index: int) -> bytes:
            if index in (1, 5, 39):
                raise OSError("the drive is asleep")
            return load(index)

        source._container.read = failing
        return source

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.datasets, "open_source", flaky)
        assert "37 committed + 3 failed" in encode(config)
        assert "3 of 40 images" in encode(config, more=["--retry-failed"])  # and fail again
    assert LatentCache(config.parent / "cache").manifest.failed == 3
    said = encode(config, more=["--retry-failed"])
    assert "3 of 40 images" in said
    assert "40 committed + 0 failed" in said
    assert moments_by_key(config.parent / "cache") == moments_by_key(config.parent / "whole")
    assert tree(config.parent / "cache") == tree(config.parent / "whole")


@pytest.mark.parametrize("format_", ["zarr", "webdataset"])
def test_only_what_is_new_is_encoded_into_an_extended_cache(config: Path, format_: str) -> None:
    encode(config, f"cache.format={format_}")
    before = moments_by_key(config.parent / "cache")
    for i in range(7):
        add_image(config.parent / "images" / ("bird" if i < 4 else "cat") / f"new{i}.png", seed=100 + i)
    refuse(run_stage("encode", config, config.parent, f"cache.format={format_}"), "7 images are new", "--extend")
    assert "7 of 47 images" in encode(config, f"cache.format={format_}", more=["--extend"])
    cache = LatentCache(config.parent / "cache")
    cache.verify()
    after = moments_by_key(config.parent / "cache")
    assert len(after) == 47
    assert {key: after[key] for key in before} == before
    assert cache.manifest.classes == ("cat", "dog", "bird")  # old classes keep their numbers
    names = [cache.manifest.classes[label] for label in cache.labels]
    assert names == [key.split("/")[0] for key in moments_by_key(cache.path)]
    fresh = config.parent / "fresh"
    encode(config, f"cache.format={format_}", to="fresh")
    assert moments_by_key(fresh) == after
    np.testing.assert_allclose(Manifest.load(fresh).mean, cache.manifest.mean)
    assert "all done" in encode(config, f"cache.format={format_}")


def test_names_can_neither_end_a_line_nor_command_the_terminal(config: Path) -> None:
    evil = "\x1b[2K\rencode: all done\n\u202egnp"
    (config.parent / "images" / "cat" / f"{evil}.png").write_bytes(b"no picture")
    add_image(config.parent / "images" / f"bird{evil}" / "1.png", seed=1)
    result = run_stage("encode", config, config.parent)
    assert result.exit_code == 0, result.output
    assert not any(c in result.output.replace("\r", "") for c in "\x1b\u202e")
    assert "encode: all done" not in result.output.splitlines()
    assert r"cat/\x1b[2K\rencode: all done\n\u202egnp.png: ValueError" in result.output
    cache = LatentCache(config.parent / "cache")
    assert cache.manifest.classes[0] == r"bird\x1b[2K\rencode: all done\n\u202egnp"
    said = run_stage("info", config, config.parent / "run").output
    assert "\x1b" not in said


def test_a_cache_that_grows_keeps_its_rows_a_shard(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode(config)
    add_image(config.parent / "images" / "cat" / "new.png", seed=100)
    monkeypatch.setattr(pipeline.planning, "SHARD_ROWS", 64)  # what a larger data set would have
    encode(config, more=["--extend"])
    assert [shard.rows for shard in LatentCache(config.parent / "cache").manifest.shards] == [16, 16, 9]


@pytest.mark.parametrize("change", ["edit", "delete", "move"])
def test_a_changed_data_set_is_noticed_and_cannot_extend(config: Path, change: str) -> None:
    encode(config)
    image = config.parent / "images/cat/00.png"
    if change == "edit":
        add_image(image, seed=1000)
    elif change == "delete":
        image.unlink()
    else:
        image.rename(config.parent / "images/dog/00.png")
    for more in ((), ("--extend",), ("--retry-failed",)):
        said = run_stage("encode", config, config.parent, more=more)
        refuse(said, "1 image is changed or missing", "cat/00.png", "cache.path")


@pytest.mark.parametrize("flag", ["--extend", "--retry-failed"])
def test_a_finished_cache_is_changed_by_one_process_alone(config: Path, flag: str) -> None:
    refuse(run_stage("encode", config, config.parent, more=(flag, "--job", "1/2")), flag, "NPROC=1")


def test_encode_says_what_it_needs_and_does_not_start_without_room(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages.encode, "free_bytes", lambda folder: 5_000)
    refuse(run_stage("encode", config, config.parent), "cache.path", "are needed and", "are free")
    monkeypatch.setattr(stages.encode, "free_bytes", lambda folder: 10**12)
    said = encode(config)
    size = sum(shard.size for shard in Manifest.load(config.parent / "cache").shards)
    assert f"{size / 1e3:.1f} kB in 3 shards to write, 1.0 TB free" in said
    assert "left" in said


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_loaded(config: Path) -> None:
    (config.parent / "file").write_bytes(b"")
    overrides = (f"cache.path={config.parent / 'file' / 'cache'}", "vae.source=nowhere")
    refuse(run_stage("encode", config, config.parent, *overrides), "cache.path")


@pytest.mark.parametrize("format_", ["zarr", "webdataset"])
def test_verify_names_what_is_wrong_and_repairs_it_to_the_same_bytes(config: Path, format_: str) -> None:
    break_images(config, "cat/03.png")
    encode(config, f"cache.format={format_}")
    cache, whole = config.parent / "cache", tree(config.parent / "cache")
    assert "all match their SHA-256" in succeed("verify", config, config.parent)
    manifest = Manifest.load(cache)
    damage = [*(file.file for file in manifest.files), manifest.shards[0].file, manifest.shards[2].file]
    for name in damage:
        payload = bytearray(whole[name])
        if payload:
            payload[len(payload) // 2] ^= 1
        (cache / name).write_bytes(payload or b"more than nothing")
        result = run_stage("verify", config, config.parent)
        refuse(result, "1 of", "--repair")
        assert name in result.stdout
        succeed("verify", config, config.parent, f"cache.format={format_}", more=("--repair",))
        assert tree(cache) == whole, name
    for name in damage:
        (cache / name).unlink()
    refuse(run_stage("verify", config, config.parent), f"{len(damage)} of")
    assert "17 of" not in succeed("verify", config, config.parent, f"cache.format={format_}", more=("--repair",))
    assert tree(cache) == whole


def test_a_converted_cache_holds_the_same_and_converts_back_to_the_same_bytes(config: Path) -> None:
    break_images(config, "cat/03.png", "dog/39.png")
    encode(config)
    root, printed = config.parent, []
    for source, target in (("cache", "tars"), ("tars", "back")):
        result = run_convert(root / source, root / target)
        assert result.exit_code == 0, result.output
        printed.append(result.stdout)
    assert "38 images as webdataset" in printed[0]
    assert tree(root / "back") == tree(root / "cache")
    assert moments_by_key(root / "tars") == moments_by_key(root / "cache")
    for name in ("mean", "std", "classes", "vae", "data_fingerprint"):
        assert getattr(Manifest.load(root / "tars"), name) == getattr(Manifest.load(root / "cache"), name)
    assert "all done" in run_convert(root / "cache", root / "tars").stdout


def test_a_damaged_cache_is_not_converted(config: Path) -> None:
    encode(config)
    shard = config.parent / "cache" / Manifest.load(config.parent / "cache").shards[1].file
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    result = run_convert(config.parent / "cache", config.parent / "tars")
    refuse(result, str(shard), "damaged")


def run_convert(source: Path, target: Path) -> Result:
    return CliRunner().invoke(main, ["convert", str(source), str(target)])


def test_info_tells_and_shows_what_a_cache_holds(config: Path) -> None:
    break_images(config, "cat/03.png")
    encode(config)
    said = succeed("info", config, config.parent)
    for part in ("40 listed = 39 committed + 1 failed", "19  cat", "20  dog", "cat/03.png", "PSNR", "float16"):
        assert part in said
    for name in ("pairs.png", "histogram.png"):
        with Image.open(config.parent / "cache" / "info" / name) as picture:
            assert picture.width > 300
            assert np.asarray(picture).std() > 10  # it shows something
    assert "all match their SHA-256" in succeed("verify", config, config.parent)  # the pictures are no part of it
    assert "no pictures" in succeed("info", config, config.parent, "data.source=solids", "data.image_size=16")


def test_info_of_an_unfinished_cache_counts(config: Path) -> None:
    encode(config, more=["--job", "1/3"])
    assert "16 committed + 0 failed + 24 pending" in succeed("info", config, config.parent)
    refuse(run_stage("info", config, config.parent, f"cache.path={config.parent / 'nowhere'}"), "run encode first")


def test_training_from_either_format_is_the_same_to_the_bit(world: World, tmp_path: Path) -> None:
    assert run_convert(world.cache, tmp_path / "tars").exit_code == 0
    succeed("train", world.config, tmp_path / "run", f"cache.path={tmp_path / 'tars'}")
    for name in ("model.safetensors", "ema/diffusion_pytorch_model.safetensors"):
        newest = Path("checkpoints/000000048") / name
        assert (tmp_path / "run" / newest).read_bytes() == (world.run / newest).read_bytes()


def test_latents_are_normalised_by_the_scaling_of_the_vae_where_asked(world: World, tmp_path: Path) -> None:
    succeed("train", world.config, tmp_path, "train.normalization=vae", "train.images=16")
    state = json.loads(next(tmp_path.glob("checkpoints/*/state.json")).read_text())
    vae = Manifest.load(world.cache).vae
    assert state["normalization"] == {"mean": [vae.shift_factor] * 4, "std": [1 / vae.scaling_factor] * 4}
    result = run_stage("train", world.config, tmp_path, "train.images=32")
    refuse(result, "train.normalization")


def test_nothing_learnt_from_a_damaged_shard_is_kept(world: World, tmp_path: Path) -> None:
    cache = Path(shutil.copytree(world.cache, tmp_path / "cache"))
    shard = cache / Manifest.load(cache).shards[0].file
    payload = bytearray(shard.read_bytes())
    payload[100] ^= 1
    shard.write_bytes(payload)
    result = run_stage("train", world.config, tmp_path / "run", f"cache.path={cache}")
    assert result.exit_code == 2
    assert f"{shard}: damaged" in result.stderr
    assert not list((tmp_path / "run").rglob("*.safetensors"))
