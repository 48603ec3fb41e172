"""Compute the features of a set of images once, store them on disk in parts, and read them in blocks.

Rows are sorted by a digest of each image's pixels. So all metrics depend only on the images, not on how they were
stored or listed, and the first n rows are a fixed random subset.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch.utils.data import DataLoader
from tqdm import tqdm

from data.locks import claim
from data.storage import (
    publish,
    publish_checked,
    read,
    remove,
    sha256_file,
    staged_folder,
    strip_checksum,
    write_staged,
    writing,
)
from pipeline.evaluation.networks import FeatureNetwork

_READ = 64  # images read at a time
PART = 1024  # images per temporary file while features are computed
_META = "meta.json"
_VERSION = 1  # increase it when a change of the code alters features, so that no old features are reused


class Images(Protocol):
    """Describes a set of images that are read by index: a data set, or decoded latents."""

    @property
    def keys(self) -> Sequence[str]: ...

    @property
    def labels(self) -> NDArray[np.int64]: ...

    @property
    def image_size(self) -> int: ...

    @property
    def preprocessing(self) -> str: ...

    def fingerprint(self) -> str:
        """Return a digest of the data; with size and preprocessing it covers everything that pixels depend on."""
        ...

    def load(self, indices: Sequence[int]) -> Any:
        """Load the `data.sources.base.Batch` of `indices`: pixels uint8 `n S S 3`, and the failures."""
        ...


class FeatureSet:
    """Reads the stored features of a set of images in blocks; row r is the image `indices[r]` of that set."""

    def __init__(self, folder: Path) -> None:
        """Open `folder`; ValueError if a file in it does not match its SHA-256."""
        self.folder = folder
        text = strip_checksum(read(folder / _META))
        meta: dict[str, Any] = json.loads(text) if text else {"sha256": {_META: ""}}
        if any(sha256_file(folder / file) != sha256 for file, sha256 in meta["sha256"].items()):
            raise ValueError(f"{folder}: damaged: delete it to compute the features again")
        self.failures: dict[str, str] = meta["failures"]  # key -> reason
        self.labels: NDArray[np.int64] = np.load(folder / "labels.npy")
        self.indices: NDArray[np.int64] = np.load(folder / "indices.npy")
        self.digests: NDArray[np.uint8] = np.load(folder / "digests.npy")  # N 16
        self.dimension = int(np.load(folder / "features.npy", mmap_mode="r").shape[1])

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, rows: slice | NDArray[np.int64]) -> NDArray[np.float32]:
        """Read these rows: `n D`. The file is memory-mapped only during this call, so no memory is kept."""
        return np.array(np.load(self.folder / "features.npy", mmap_mode="r")[rows])

    def contents(self) -> str:
        """Return a SHA-256 of the pixels and labels of all images, but not of file names or times."""
        return hashlib.sha256(self.digests.tobytes() + self.labels.astype("<i8").tobytes()).hexdigest()

    def copies(self) -> int:
        """Return how many images have exactly the same pixels as an earlier one."""
        return len(self.digests) - len(np.unique(self.digests, axis=0))


def compute_features(images: Images, network: FeatureNetwork, folder: Path, *, workers: int, name: str) -> FeatureSet:
    """Compute the features of `images` by `network`, and store them in `folder`/`name`-<digest of both>.

    Features of an earlier call are reused. On a CPU, `workers` single-threaded processes read images and run the
    network, so that the bits do not depend on their number. On a GPU they only read images; 0: this process reads.
    """
    identity = hashlib.sha256(repr(_identity(images, network)).encode() + images.labels.tobytes()).hexdigest()[:16]
    folder = folder / f"{name.replace(' ', '-')}-{identity}"
    with claim(folder.parent / ".locks" / folder.name, "computing features", wait=True):
        if not (folder / _META).exists():
            _compute_missing(images, network, folder, workers=workers, name=name)
    return FeatureSet(folder)


def _identity(images: Images, network: FeatureNetwork) -> tuple[Any, ...]:
    """Return everything that the bits of features depend on; a CPU is identified by its instruction set."""
    if _on_cpu(network):
        device = torch.backends.cpu.get_cpu_capability()
    else:
        device = f"{network.device.type}, {network.batch_size} at a time"
    pixels = (images.fingerprint(), images.image_size, images.preprocessing)
    return (_VERSION, network.name, network.sha256, network.resize, *pixels, device, torch.__version__)


def _compute_missing(images: Images, network: FeatureNetwork, folder: Path, *, workers: int, name: str) -> None:
    parts = folder.with_name(folder.name + ".parts")
    total = len(images.keys)
    starts = range(0, total, PART)
    files = [parts / f"{start // PART:06d}.safetensors" for start in starts]
    pending = [start for start, file in zip(starts, files, strict=True) if not file.exists()]
    missing = sum(min(PART, total - start) for start in pending)
    with tqdm(total=total, initial=total - missing, unit=" images", desc=name, mininterval=1) as bar:
        for start, columns, failures in _compute(images, network, pending, workers, bar):
            payload = safetensors.numpy.save(columns, metadata={"failures": json.dumps(failures)})
            publish(files[start // PART], payload)
    _assemble(folder, files, images, network, name)
    remove(parts)


@dataclass(frozen=True)
class _Batches:
    """Serves batches from worker processes: item i is the i-th batch of images or, on a CPU, its features."""

    images: Images
    network: FeatureNetwork
    batches: Sequence[range]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> dict[str, Any]:
        try:
            batch = self.images.load(self.batches[number])
        except ValueError as error:  # an exception in a worker would add a traceback
            return {"error": str(error)}
        good = np.array([i not in batch.failures for i in self.batches[number]], bool)
        pixels = batch.pixels[good]
        digests = b"".join(hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in pixels)
        return {
            "features": self.network.features(torch.from_numpy(pixels)).numpy() if _on_cpu(self.network) else pixels,
            "indices": np.asarray(batch.indices)[good],
            "digests": np.frombuffer(digests, np.uint8).reshape(-1, 16).copy(),
            "failures": {self.images.keys[i]: reason for i, reason in batch.failures.items()},
        }


def _on_cpu(network: FeatureNetwork) -> bool:
    return network.device.type == "cpu"


def _compute(
    images: Images, network: FeatureNetwork, pending: Sequence[int], workers: int, bar: tqdm
) -> Iterator[tuple[int, dict[str, NDArray], dict[str, str]]]:
    """Yield first index, columns and failures of every missing part."""
    parts = [range(start, min(start + PART, len(images.keys))) for start in pending]
    batches = [part[at : at + _READ] for part in parts for at in range(0, len(part), _READ)]
    dataset: Any = _Batches(images, network, batches)
    processes = max(workers, 1) if _on_cpu(network) else workers  # single-threaded: on a CPU, bits depend on threads
    loader = iter(DataLoader(dataset, batch_size=None, num_workers=processes))
    for part in parts:
        read = []
        for _ in range(0, len(part), _READ):
            read.append(_next_batch(loader))
            bar.update(len(read[-1]["indices"]) + len(read[-1]["failures"]))
        columns = {name: np.concatenate([each[name] for each in read]) for name in ("features", "indices", "digests")}
        if not _on_cpu(network):
            columns["features"] = network.features(torch.from_numpy(columns["features"])).cpu().numpy()
        failures = {key: reason for each in read for key, reason in each["failures"].items()}
        bad = np.flatnonzero(~np.isfinite(columns["features"]).all(axis=1))
        if len(bad):
            key = images.keys[columns["indices"][bad[0]]]
            raise ValueError(f"{key}: its features by {network.name} are NaN or infinite: the weights may be damaged")
        yield part.start, columns, failures


def _next_batch(loader: Iterator[dict[str, Any]]) -> dict[str, Any]:
    try:
        batch = next(loader)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise RuntimeError(
            "a process that computes features was killed, perhaps because memory ran out: lower cache.workers and run"
            " the same command again to continue"
        ) from error
    if "error" in batch:
        raise ValueError(batch["error"])
    return batch


def _assemble(folder: Path, parts: Sequence[Path], images: Images, network: FeatureNetwork, name: str) -> None:
    """Write the rows of all parts, sorted by digest and then by index, atomically."""
    small = [_read_part(part, ("indices", "digests")) for part in parts]
    indices, digests = (np.concatenate([each[name] for each in small]) for name in ("indices", "digests"))
    if len(indices) < 2:
        raise ValueError(f"{name}: only {len(indices)} of {len(images.keys)} images could be read: at least 2 needed")
    order = np.lexsort((indices, *digests.T[::-1]))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    with staged_folder(folder) as staged:
        whole, hashes = staged / "features.npy", {}
        with writing(whole) as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": (len(order), network.dimension)}
            np.lib.format.write_array_header_1_0(file, header)
            start = file.tell()
            for row, at in _placed(parts, place):
                file.seek(start + at * len(row))
                file.write(row)
        written = np.load(whole, mmap_mode="r")  # a later hash would accept wrong bytes
        if any(written[at].tobytes() != row for row, at in _placed(parts, place)):
            raise OSError(errno.EIO, "the data read back differs from the data written", str(whole))
        hashes[whole.name] = sha256_file(whole)
        columns = {"labels": images.labels[indices[order]], "indices": indices[order], "digests": digests[order]}
        for column, values in columns.items():
            buffer = io.BytesIO()
            np.save(buffer, values)
            hashes[f"{column}.npy"] = write_staged(staged / f"{column}.npy", [buffer.getvalue()])
        failures = {key: reason for part in parts for key, reason in _failures(part).items()}
        publish_checked(staged / _META, {"failures": failures, "sha256": dict(sorted(hashes.items()))})


def _placed(parts: Sequence[Path], place: NDArray[np.int64]) -> Iterator[tuple[bytes, int]]:
    """Yield the features of every image, little-endian float32, and their row; one part at a time, to limit memory."""
    places = iter(place)
    for part in parts:
        for row in _read_part(part, ("features",))["features"]:
            yield row.astype("<f4", copy=False).tobytes(), int(next(places))


def _read_part(part: Path, names: Sequence[str]) -> dict[str, NDArray]:
    with safe_open(part, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in names}


def _failures(part: Path) -> dict[str, str]:
    with safe_open(part, framework="numpy") as file:
        failures: dict[str, str] = json.loads((file.metadata() or {})["failures"])
        return failures
