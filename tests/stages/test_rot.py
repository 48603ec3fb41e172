"""A flipped bit and a truncation in every file of a cache and of a run, followed by every command: refused in one line
that names the file, or the bytes of a run that nothing disturbed. Never a silent difference.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from PIL import Image

import pipeline.planning
import stages.decode
import stages.encode
import stages.info
import stages.sample
from data.cache.manifest import MANIFEST, Manifest
from data.cache.reader import ROWS, LatentCache
from data.cache.records import load_records, progress
from data.cache.writer import CacheWriter, EncodedShard
from stages.cli import main
from tests.helpers.world import IMAGE_SIZE, World, add_image, make_vae, refuse, run_stage, succeed, tree

Tree = dict[str, bytes]
MEASURED = ("log.jsonl", "curves.png", "config.yaml", "histogram.png")  # what was measured, or tells of paths


@pytest.fixture(scope="module", autouse=True)
def _quick(world: World) -> Iterator[None]:
    """Hundreds of commands are run: nothing is flushed to the disk, the VAE is read once, no curves are drawn.

    The world, which other files use too, is there before.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        patch.setattr(pipeline.planning, "SHARD_ROWS", 16)
        vae = functools.cache(stages.encode.FrozenVae)
        for module in (stages.encode, stages.info, stages.decode):
            patch.setattr(module, "FrozenVae", vae)
        blank = Image.new("RGB", (100, 60))
        patch.setattr("matplotlib.figure.Figure.savefig", lambda figure, file, **options: blank.save(file, "PNG"))
        yield


@dataclass(frozen=True)
class Place:
    """A folder with a config, the data set as it was, was mended and has grown, and a VAE; `cache` and `out` are each
    case's own."""

    root: Path
    format: str

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def out(self) -> Path:
        return self.root / "out"

    def run(self, command: str, images: str = "broken") -> Result:
        """A command with its options, on the data set `images`."""
        name, *more = command.split()
        if name == "convert":
            return CliRunner().invoke(main, ["convert", str(self.cache), str(self.out / "converted")])
        if name == "decode":
            more += ["--cache", str(self.cache)]
        overrides = (f"data.source={self.root / images}", f"cache.format={self.format}", "train.images=8")
        return run_stage(name, self.root / "config.yaml", self.out / "run", *overrides, more=tuple(more))

    def written(self) -> tuple[Tree, Tree]:
        """The cache, and what else a command has written."""
        return tuple(  # type: ignore[return-value]
            {name: payload for name, payload in tree(folder).items() if not name.endswith(MEASURED)}
            for folder in (self.cache, self.out)
        )

    def set_up(self, cache: Tree) -> None:
        for folder in (self.cache, self.out):
            shutil.rmtree(folder, ignore_errors=True)
        for name, payload in cache.items():
            (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
            (self.cache / name).write_bytes(payload)


@pytest.fixture(scope="module", params=["zarr", "webdataset"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Twenty pictures in shards of 16 and 4 rows, one of each broken; fourteen more make shards of 16, 16 and 2."""
    root = tmp_path_factory.mktemp("rot")
    for i in range(34):
        add_image(root / ("broken" if i < 20 else "new") / ("cat" if i % 2 else "dog") / f"{i:02d}.png", seed=i)
    shutil.copytree(root / "broken", root / "mended")
    for key in ("cat/03.png", "dog/18.png"):
        (root / "broken" / key).write_bytes(b"no image")
    shutil.copytree(root / "broken", root / "grown")
    shutil.copytree(root / "new", root / "grown", dirs_exist_ok=True)
    values: dict[str, Any] = {
        "data": {"source": "", "image_size": IMAGE_SIZE},
        "vae": {"source": str(make_vae(root / "vae", seed=0))},
        "cache": {"path": str(root / "cache"), "batch_size": 4, "workers": 0},
        "model": {"channels": [8, 16], "blocks": 1, "depth": 1, "head_width": 8},
        "train": {"batch_size": 4, "precision": "fp32", "log_every": 8, "warmup": 4},
        "sample": {"per_class": 2},
    }
    (root / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return Place(root, request.param)


def begun(place: Place, command: str = "encode", images: str = "broken", shards: int = 1) -> None:
    """The command, which is killed when it has written some shards."""
    write, left = CacheWriter.write, [shards]

    def dying(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return write(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CacheWriter, "write", dying)
        assert place.run(command, images).exit_code == 1
    assert not (place.cache / MANIFEST).exists()


def finished(place: Place) -> None:
    assert place.run("encode").exit_code == 0


def retried(place: Place) -> None:
    finished(place)
    begun(place, "encode --retry-failed", "mended")


def extended(place: Place) -> None:
    finished(place)
    begun(place, "encode --extend", "grown")


def damages(name: str, payload: bytes) -> dict[str, bytes]:
    """What may become of a file; of the rows, another label too. Of JSON, a bit in the middle is another value."""
    if not payload:
        return {"longer": b"\0"}
    places = {len(payload) - 3}
    if name.endswith((".json", ".jsonl")):
        places.add(len(payload) // 2)
    if name == ROWS:
        places.add(payload.index(b'"label": ') + len(b'"label": '))
    found = {f"bit of byte {i}": payload[:i] + bytes([payload[i] ^ 1]) + payload[i + 1 :] for i in sorted(places)}
    empty = {"empty": b""} if name.endswith((".json", ".jsonl")) else {}
    return found | {"truncated": payload[: len(payload) // 2]} | empty


def silent(place: Place, before: Tree, command: str, images: str, names: list[str] | None = None) -> list[str]:
    """The damages to the files `names`, by default all, that `command` neither names nor is undisturbed by."""
    place.set_up(before)
    expected = place.run(command, images).exit_code, *place.written()
    found = []
    for name in names or sorted(before):
        for damage, payload in damages(name, before[name]).items():
            place.set_up(before | {name: payload})
            result = place.run(command, images)
            cache, out = place.written()
            if cache.get(name) == payload and expected[1].get(MANIFEST) == before.get(MANIFEST):
                cache[name] = before[name]  # it was not for this command to write, or to read
            lines = result.stderr.splitlines() or [""]
            named = result.exit_code != 0 and lines[-1].startswith("error: ") and name in lines[-1]
            if not named and (result.exit_code, cache, out) != expected:
                found.append(f"{command}: {name}: {damage}: {result.exit_code}: {lines[-1]}")
    return found


BUILD: dict[str, Callable[[Place], None]] = {
    "finished": finished,
    "begun": begun,
    "retried": retried,
    "extended": extended,
}


@pytest.mark.parametrize(
    ("state", "images", "commands"),
    [
        ("finished", "broken", ["encode", "verify", "verify --repair", "convert", "decode"]),
        ("finished", "mended", ["encode --retry-failed"]),
        ("finished", "grown", ["encode --extend"]),
        ("begun", "broken", ["encode", "encode --job 2/2", "info", "verify", "convert", "decode", "train"]),
        ("retried", "mended", ["encode", "encode --retry-failed"]),
        ("extended", "grown", ["encode", "encode --extend"]),
    ],
)
def test_nothing_is_silently_different_after_a_damage_to_any_file_of_a_cache(
    place: Place, state: str, images: str, commands: list[str]
) -> None:
    place.set_up({})
    BUILD[state](place)
    before = tree(place.cache)
    assert len(before) >= 4
    assert [line for command in commands for line in silent(place, before, command, images)] == []


def test_nothing_is_drawn_of_or_learnt_from_a_damaged_cache(place: Place) -> None:
    place.set_up({})
    finished(place)
    before = tree(place.cache)
    shards = [shard.file for shard in Manifest.load(place.cache).shards]
    assert silent(place, before, "info", "broken", [MANIFEST, ROWS, *shards]) == []
    assert silent(place, before, "train", "broken", [ROWS, shards[1]]) == []


@pytest.fixture
def samples(world: World, tmp_path: Path) -> Callable[[str], Result]:
    """`sample` or `decode` of twenty images of a copied run, in shards of 16 and 4."""
    shutil.copytree(world.run / "checkpoints", tmp_path / "run" / "checkpoints")
    return lambda stage: run_stage(stage, world.config, tmp_path / "run", "sample.per_class=10", "sample.steps=1")


def folder_of_samples(tmp_path: Path) -> Path:
    return next((tmp_path / "run" / "samples").iterdir())


def test_sampling_goes_on_to_the_same_bytes_or_names_a_damaged_file(
    samples: Callable[[str], Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = CacheWriter.write

    def dying(writer: CacheWriter, shard: EncodedShard) -> Any:
        if shard.number == 1:
            raise KeyboardInterrupt
        return write(writer, shard)

    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "write", dying)
        assert samples("sample").exit_code == 1
    folder = folder_of_samples(tmp_path)
    before = tree(folder)
    assert samples("sample").exit_code == 0
    whole = tree(folder)
    for name, payload in before.items():
        for damage, damaged in damages(name, payload).items():
            shutil.rmtree(folder)
            for each, content in (before | {name: damaged}).items():
                (folder / each).parent.mkdir(parents=True, exist_ok=True)
                (folder / each).write_bytes(content)
            result = samples("sample")
            if result.exit_code:
                refuse(result, name)
                if "must be written again" not in result.stderr:
                    continue
                assert samples("sample").exit_code == 0
            assert tree(folder) == whole, (name, damage)


def test_nothing_is_decoded_from_damaged_samples(samples: Callable[[str], Result], tmp_path: Path) -> None:
    assert samples("sample").exit_code == 0
    folder = folder_of_samples(tmp_path)
    before = tree(folder)
    assert samples("decode").exit_code == 0
    whole = tree(folder)
    for name in sorted(before):
        for damage, damaged in damages(name, before[name]).items():
            (folder / "grid.png").unlink()
            (folder / name).write_bytes(damaged)
            result = samples("decode")
            (folder / name).write_bytes(before[name])
            if result.exit_code:
                refuse(result, name)
                (folder / "grid.png").write_bytes(whole["grid.png"])
            assert tree(folder) == whole, (name, damage)


@pytest.mark.parametrize("stage", ["train", "sample"])
def test_a_damaged_file_of_a_run_is_named_or_changes_nothing(world: World, tmp_path: Path, stage: str) -> None:
    """A run goes on from its newest whole checkpoint to the same bytes, and what it passes over is said."""
    run, newest = tmp_path / "run", "000000048"

    def outcome(name: str = "", payload: bytes = b"") -> tuple[Result, Tree]:
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(world.run, run)
        if not name.startswith(f"checkpoints/{newest}") and stage == "train":
            shutil.rmtree(run / "checkpoints" / newest)
        if name:
            (run / name).write_bytes(payload)
        result = run_stage(stage, world.config, run, "sample.seed=1")
        made = tree(run / "checkpoints" / newest) if stage == "train" else tree(run / "samples")
        return result, {file: content for file, content in made.items() if not file.endswith("samples.json")}

    result, expected = outcome()
    assert result.exit_code == 0
    for name, payload in tree(world.run).items():
        if not name.startswith("checkpoints") and name not in ("config.yaml", "log.jsonl"):
            continue
        for damage, damaged in list(damages(name, payload).items())[1:4]:
            result, made = outcome(name, damaged)
            folder = name.split("/")[1] if "/" in name else name
            told = f"{folder}" in result.output
            assert told or (result.exit_code, made) == (0, expected), (name, damage, result.output)
            if result.exit_code == 0 and stage == "train":
                assert made == expected, (name, damage)


def test_an_average_is_never_made_of_a_damaged_snapshot_without_a_word(world: World, tmp_path: Path) -> None:
    run, made = tmp_path / "run", tmp_path / "made"
    succeed("train", world.config, run, "train.ema=power", "train.images=24", "train.checkpoint_every=8")

    def outcome() -> tuple[Result, Tree]:
        shutil.rmtree(made, ignore_errors=True)
        result = CliRunner().invoke(main, ["ema", str(run), "--width", "0.15", "--to", str(made)])
        return result, tree(made / "checkpoints")

    result, expected = outcome()
    assert result.exit_code == 0
    snapshots = tree(run / "averages")
    assert len(snapshots) >= 10
    for name, payload in snapshots.items():
        for damage, damaged in list(damages(name, payload).items())[1:4]:
            (run / "averages" / name).write_bytes(damaged)
            result, found = outcome()
            assert name.split("/")[0] in result.output or (result.exit_code, found) == (0, expected), (name, damage)
        (run / "averages" / name).write_bytes(payload)


# The finish looks at every shard before the manifest is written.


@pytest.mark.parametrize("damage", ["flipped", "truncated", "gone"])
@pytest.mark.parametrize("state", ["begun", "retried", "extended"])
def test_a_shard_that_is_damaged_before_the_manifest_is_written_is_encoded_again_and_said(
    place: Place, state: str, damage: str
) -> None:
    place.set_up({})
    images = {"begun": "broken", "retried": "mended", "extended": "grown"}[state]
    BUILD[state](place)
    before = tree(place.cache)
    assert place.run("encode", images).exit_code == 0
    whole = tree(place.cache)
    place.set_up(before)
    shard = load_records(place.cache)[0].shard.file
    if damage == "gone":
        (place.cache / shard).unlink()
    else:
        (place.cache / shard).write_bytes({"flipped": before[shard][:-9] + b"!" + before[shard][-8:]}.get(damage, b""))
    result = place.run("encode", images)
    assert result.exit_code == 0
    assert f"{place.cache / shard}: " in result.stdout
    assert "1 shard must be written again" in result.stdout
    assert tree(place.cache) == whole


def test_the_last_job_does_not_finish_over_a_damaged_shard_of_another(place: Place) -> None:
    place.set_up({})
    assert place.run("encode --job 1/2").exit_code == 0
    shard = place.cache / load_records(place.cache)[0].shard.file
    payload = shard.read_bytes()
    shard.write_bytes(payload[:-1])
    refuse(place.run("encode --job 2/2"), str(shard), "1 shard must be written again: run the same command")
    assert progress(place.cache) == (3, 1, 16)
    assert "the last job writes the manifest" in place.run("encode --job 2/2").stdout
    assert place.run("encode --job 1/2").exit_code == 0
    assert shard.read_bytes() == payload
    LatentCache(place.cache).verify()


def test_rows_in_another_order_are_not_written_into_one_cache(place: Place, tmp_path: Path) -> None:
    """One data set, extended to the same images or encoded at once: shards of one do not go with rows of the other."""
    place.set_up({})
    finished(place)
    assert place.run("encode --extend", "grown").exit_code == 0
    shutil.copytree(place.cache, tmp_path / "extended")
    place.set_up({})
    assert place.run("encode", "grown").exit_code == 0
    ours, theirs = Manifest.load(place.cache), Manifest.load(tmp_path / "extended")
    assert ours.data_fingerprint == theirs.data_fingerprint
    for source in (place.cache, tmp_path / "extended"):
        result = CliRunner().invoke(main, ["convert", str(source), str(tmp_path / "to")])
    refuse(result, f"{tmp_path / 'to' / ROWS}: ", "lists other images or another order")
