"""Damaged and hostile files, thousands of them: each is refused in a line, or read, within limits of memory and time.

    python -m benchmarks.fuzz [--inputs 2000] [--seed 0]

Manifests, records of shards, states of checkpoints, tars, zips, Parquet files and images are changed at places that a
seed draws: bits flipped, parts cut off, doubled or overwritten, numbers made huge, JSON nested. Of files with a hash,
half of the changed ones get a new one that fits, so that what is behind it is reached. Prints for each kind how many
were read as before (`same`), refused, or read as something else (`other`), which files without a hash of their own may
be; and every one that ended otherwise, with the number that makes it again. Exit status 1 where there is one.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import multiprocessing
import resource
import signal
import sys
import tarfile
import tempfile
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image

from data.cache.listing import Rows
from data.cache.manifest import MANIFEST, Plan, VaeIdentity
from data.cache.reader import LatentCache
from data.cache.records import existing_plan, load_records
from data.cache.writer import CacheWriter, EncodedShard
from data.sources.base import Batch
from data.sources.decode import DECODER_ERRORS, decode_image
from data.sources.files import ImageFiles
from data.storage import publish_checked, strip_checksum
from pipeline.ema import Average
from pipeline.latents import Normalization
from pipeline.loss import Objective
from pipeline.noise import NoiseProcess
from pipeline.optim import make_optimizers
from pipeline.training.checkpoint import EMA, checkpoint_folders, open_checkpoint, save_checkpoint
from pipeline.training.state import CacheIdentity, RunState
from pipeline.unet import LatentUNet

MEMORY, SECONDS = 2**30, 10.0  # that one input may take, beside what the process has
REFUSED = (ValueError, OSError)  # how anything that is wrong is told
OK = ("same", "refused", "other")


@dataclass(frozen=True)
class Kind:
    """Files of one kind: a good one, and what is read of it. Of a file that holds its own hash, a changed one that was
    not given a new hash must not be read as something else."""

    name: str
    payload: bytes
    read: Callable[[bytes], str]
    named: str = ""  # what a refusal has to say
    hashed: bool = False

    def outcome(self, payload: bytes, expected: str, *, rehashed: bool) -> str:
        """`same`, `other` or `refused`; anything else is a fault, and named."""
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                if self.read(payload) == expected:
                    return "same"
                return "read in silence as something else" if self.hashed and not rehashed else "other"
        except (*REFUSED, *DECODER_ERRORS) as error:
            if isinstance(error, TimeoutError):
                return f"took more than {SECONDS:g} s"
            return "refused" if self.named in str(error) else f"refused without its name: {error!r}"[:160]
        except MemoryError:
            return f"took more than {MEMORY >> 20} MiB"
        except Exception as error:  # what a fuzzer is for
            return f"{type(error).__name__}: {str(error)[:80]}"


def kinds(folder: Path) -> list[Kind]:
    """All kinds, of small files that are made in `folder`."""
    cache, unfinished, checkpoint = _cache(folder), _unfinished(folder), _checkpoint(folder)
    pictures = {f"{name}/{i}.png": _picture("PNG", i) for i, name in enumerate(("cat", "cat", "dog"))}
    reading = {
        cache / MANIFEST: lambda: _read_cache(cache),
        unfinished / "records" / "000000.json": lambda: _read_records(unfinished),
        checkpoint / "state.json": lambda: _read_checkpoint(checkpoint),
    }
    return [
        *(
            Kind(file.name, file.read_bytes(), _in_place(file, read), file.parent.name, hashed=True)
            for file, read in reading.items()
        ),
        Kind("tar", _tar(pictures), _source(folder / "source.tar"), "source.tar"),
        Kind("zip", _zip(pictures), _source(folder / "source.zip"), "source.zip"),
        Kind("Parquet", _parquet(pictures), _source(folder / "source.parquet"), "source.parquet"),
        *(Kind(form, _picture(form, 3), _decoded) for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")),
    ]


def changed(kind: Kind, number: int, seed: int) -> tuple[bytes, bool]:
    """Input `number`: the good file with one to four changes; and whether it got a hash that fits."""
    random = np.random.Generator(np.random.Philox(key=[seed, number]))
    payload = kind.payload
    inner = strip_checksum(payload) if kind.hashed and random.random() < 0.5 else None
    if inner is not None:
        value = json.loads(inner)
        for _ in range(random.integers(1, 3)):
            _change_value(value, random)
        with tempfile.TemporaryDirectory() as folder:
            publish_checked(Path(folder) / "file", value)
            return (Path(folder) / "file").read_bytes(), True
    for _ in range(random.integers(1, 5)):
        payload = _change_bytes(payload, random)
    return payload, False


def fuzz(kind: Kind, inputs: int, seed: int) -> tuple[Counter[str], dict[int, str]]:
    """How often each outcome came, and the faults by their numbers; in processes of their own, as some may die."""
    outcomes: Counter[str] = Counter()
    faults: dict[int, str] = {}
    expected, done = kind.read(kind.payload), 0
    while done < inputs:
        for number, outcome in _in_a_process(kind, range(done, inputs), seed, expected):
            fault = outcome not in OK
            outcomes["fault" if fault else outcome] += 1
            if fault:
                faults[number] = outcome
            done = number + 1
    return outcomes, faults


def _in_a_process(kind: Kind, numbers: range, seed: int, expected: str) -> Iterator[tuple[int, str]]:
    """Numbers and outcomes until all are tried or the process is gone, which is an outcome, too."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_try_all, args=(kind, numbers, seed, expected, there))
    process.start()
    there.close()
    number = numbers.start
    try:
        for number in numbers:
            if not here.poll(3 * SECONDS):
                yield number, f"took more than {3 * SECONDS:g} s"
                return
            yield number, here.recv()
    except EOFError:
        process.join()
        yield number, f"ended the process, {process.exitcode}"
    finally:
        process.kill()
        process.join()


def _try_all(kind: Kind, numbers: range, seed: int, expected: str, answer: Connection) -> None:
    def late(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, late)
    warnings.simplefilter("ignore")  # of Pillow, about what it passes over
    here = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (here + MEMORY, here + MEMORY))
    for number in numbers:
        payload, rehashed = changed(kind, number, seed)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        outcome = kind.outcome(payload, expected, rehashed=rehashed)
        signal.setitimer(signal.ITIMER_REAL, 0)
        answer.send(outcome)


def _change_bytes(payload: bytes, random: np.random.Generator) -> bytes:
    data = bytearray(payload)
    at, other = (int(place) for place in np.sort(random.integers(0, len(data) + 1, 2)))
    match int(random.integers(8)):
        case 0:  # a bit
            if at < len(data):
                data[at] ^= 1 << int(random.integers(8))
        case 1:  # cut off
            del data[at:]
        case 2:  # a part is gone
            del data[at : min(other, at + 64)]
        case 3:  # a part is doubled
            data[at:at] = data[at : min(other, at + 4096)]
        case 4:  # noise
            data[at : at + 8] = random.bytes(8)
        case 5:  # a number that is huge
            width = int(random.choice([1, 2, 4, 8]))
            data[at : at + width] = random.choice([b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"\0" * 8])[:width]
        case 6:  # digits
            for place in range(at, min(at + 12, len(data))):
                if chr(data[place]).isdecimal():
                    data[place] = ord("9")
        case _:  # all of it twice
            data[at:at] = payload
    return bytes(data)


def _change_value(value: Any, random: np.random.Generator) -> None:
    """One field of a JSON object, at any depth."""
    while True:
        places = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not places:
            return
        place = places[int(random.integers(len(places)))]
        if not isinstance(value[place], dict | list) or random.random() < 0.3:
            break
        value = value[place]
    numbers: list[Any] = [None, -1, 0, 2**70, 1e308, 0.5, True]
    others = [*numbers, "", "../../x", "a\n\x1b[2J", "9" * 5000, [], {}, [[[[0]]]]]
    match int(random.integers(3)):
        case 0:
            del value[place]
        case 1 if isinstance(value, dict):
            value["unknown"] = value[place]
        case _:
            value[place] = others[int(random.integers(len(others)))]


def _in_place(file: Path, read: Callable[[], str]) -> Callable[[bytes], str]:
    def of(payload: bytes) -> str:
        file.write_bytes(payload)
        return read()

    return of


def _source(file: Path) -> Callable[[bytes], str]:
    def read() -> str:
        source = ImageFiles(str(file), image_size=8)
        batch: Batch = source.load(range(min(len(source.keys), 100)))
        names = [source.keys, source.classes, source.labels.tolist(), sorted(batch.failures.items())]
        return _digest(batch.pixels.tobytes(), repr(names).encode())

    return _in_place(file, read)


def _decoded(payload: bytes) -> str:
    return _digest(decode_image(payload, 8).tobytes())


def _read_cache(path: Path) -> str:
    cache = LatentCache(path)
    cache.verify()
    moments = cache.load(np.arange(len(cache)))
    return _digest(moments.tobytes(), cache.labels.tobytes(), cache.manifest.model_dump_json().encode())


def _read_records(path: Path) -> str:
    plan = existing_plan(path)
    return _digest(repr(plan).encode(), repr(sorted(load_records(path).items())).encode())


def _read_checkpoint(folder: Path) -> str:
    checkpoint = open_checkpoint(folder)
    weights = checkpoint.ema_model().state_dict()
    return _digest(repr(checkpoint.state).encode(), *(value.numpy().tobytes() for value in weights.values()))


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _cache(folder: Path) -> Path:
    writer = _writer(folder / "cache")
    with writer.claimed():
        for shard in writer.pending():
            _write(writer, shard)
        writer.finish()
    return writer.path


def _unfinished(folder: Path) -> Path:
    writer = _writer(folder / "unfinished")
    with writer.claimed():
        _write(writer, 0)
    return writer.path


def _writer(path: Path) -> CacheWriter:
    named = {"source": "none", "class_name": "none", "weights_sha256": "0" * 64, "downsampling": 4}
    plan = Plan(
        store="moments",
        dtype="float16",
        views=("identity",),
        shape=(4, 2, 2),
        rows=40,
        shard_rows=32,
        batch_size=4,
        classes=("cat", "dog"),
        data_source="somewhere",
        data_fingerprint="f" * 64,
        data_bytes=100,
        image_size=8,
        preprocessing="none",
        vae=VaeIdentity(**named, scaling_factor=1.0, shift_factor=0.0),
    )
    keys = [f"cat/{row}.png" for row in range(plan.rows)]
    return CacheWriter(path, plan, Rows(keys, np.arange(40) % 2, plan.classes, [""] * 40, np.arange(40)))


def _write(writer: CacheWriter, shard: int) -> None:
    rows = writer.plan.rows_of(shard)
    moments = np.random.default_rng(shard).normal(size=(len(rows), *writer.plan.row_shape))
    failures, digests = {rows.start: "unreadable"}, dict.fromkeys(rows, "d" * 64)
    writer.write(EncodedShard(shard, np.array(rows), moments, failures, digests))


def _checkpoint(folder: Path) -> Path:
    torch.manual_seed(0)
    model = LatentUNet(in_channels=2, sample_size=4, num_classes=2, channels=[8, 8], blocks=1, depth=1, head_width=8)
    objective = Objective(model, NoiseProcess(schedule="flow", prediction="flow"))
    optimizers = make_optimizers(objective, kind="adamw", lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    x = torch.randn(2, 2, 4, 4)
    objective(x, torch.randn_like(x), torch.tensor([100.0, 900.0]), torch.tensor([0, 1]))[0].backward()
    for optimizer in optimizers:
        optimizer.step()
    average = {EMA[0]: Average(model, lambda images_seen, batch_size: 0.5)}
    state = run_state(images_seen=2)
    save_checkpoint(folder / "run", objective=objective, averages=average, optimizers=optimizers, state=state)
    return checkpoint_folders(folder / "run")[0]


def run_state(images_seen: int) -> RunState:
    """The state of a run that exists nowhere."""
    digest = "0" * 64
    vae = VaeIdentity(
        source="none", class_name="None", weights_sha256=digest, scaling_factor=1, shift_factor=0, downsampling=1
    )
    cache = {"dtype": "float16", "views": ("identity",), "preprocessing": "none", "data_fingerprint": digest}
    return RunState(
        step=images_seen,
        images_seen=images_seen,
        train={"seed": 0},
        classes=("cat", "dog"),
        class_counts=(1, 1),
        without_class=0.1,
        noise=NoiseProcess(schedule="flow", prediction="flow"),
        normalization=Normalization((0.0, 0.0), (1.0, 1.0)),
        image_size=4,
        vae=vae,
        cache=CacheIdentity(rows=2, committed=2, store="mean", sha256=digest, **cache),
        widths=(),
        computer={},
        scaler=None,
    )


def _picture(form: str, number: int) -> bytes:
    payload = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (12, 10, 3), np.uint8)
    Image.fromarray(pixels).save(payload, form)
    return payload.getvalue()


def _tar(pictures: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for key, payload in pictures.items():
            for name, content in ((key, payload), (key[:-4] + ".cls", key.split("/")[0].encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def _zip(pictures: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, payload in pictures.items():
            archive.writestr(zipfile.ZipInfo(key), payload)
    return buffer.getvalue()


def _parquet(pictures: dict[str, bytes]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    images = [{"bytes": payload, "path": key} for key, payload in pictures.items()]
    pq.write_table(pa.table({"image": images, "label": [key.split("/")[0] for key in pictures]}), buffer)
    return buffer.getvalue()


@click.command()
@click.option("--inputs", default=2000, show_default=True, help="Of each kind.")
@click.option("--seed", default=0, show_default=True)
def main(inputs: int, seed: int) -> None:
    found = False
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds(Path(folder)):
            outcomes, faults = fuzz(kind, inputs, seed)
            print(f"{kind.name:13}", ", ".join(f"{outcomes[name]:,} {name}" for name in (*OK, "fault")), flush=True)
            for number, fault in faults.items():
                print(f"  {kind.name} {number}: {fault}")
            found |= bool(faults)
    sys.exit(int(found))


if __name__ == "__main__":
    main()
