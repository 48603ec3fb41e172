"""Five small pictures and the ways to lay them out: folders, archives, Parquet, memory."""

from __future__ import annotations

import io
import json
import multiprocessing
import tarfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data.sources.base import Batch, Source
from data.sources.files import ImageFiles

KEYS = ["cat/1.png", "cat/2.PNG", "cat/old/1.png", "dog/1.png", "dog/2.bmp"]
REDS = [("cat", 0), ("cat", 40), ("cat", 80), ("dog", 120), ("dog", 160)]  # class and red value of each image


def picture(red: int, suffix: str = ".png") -> bytes:
    """The bytes of an image of one colour."""
    payload = io.BytesIO()
    Image.new("RGB", (8, 8), (red, 0, 0)).save(payload, Image.registered_extensions()[suffix.lower()])
    return payload.getvalue()


PICTURES = {key: picture(red, Path(key).suffix) for key, (_, red) in zip(KEYS, REDS, strict=True)}


def opened(url: str | Path, **options: Any) -> ImageFiles:
    return ImageFiles(str(url), image_size=8, **options)


def everything(images: Source) -> Batch:
    batch = images.load(range(len(images.keys)))
    assert not batch.failures
    return batch


def reds(images: Source) -> list[tuple[str, int]]:
    """The class and the red value of every image."""
    pixels = everything(images).pixels
    return [(images.classes[label], int(p[0, 0, 0])) for label, p in zip(images.labels, pixels, strict=True)]


def write_folder(path: Path, contents: Mapping[str, bytes]) -> Path:
    for key, payload in contents.items():
        (path / key).parent.mkdir(parents=True, exist_ok=True)
        (path / key).write_bytes(payload)
    return path


def write_zip(path: Path, contents: Mapping[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for key, payload in contents.items():
            archive.writestr(zipfile.ZipInfo(key), payload)
    return path


def write_tar(path: Path, contents: Mapping[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, payload in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            archive.addfile(info, io.BytesIO(payload))
    return path


def samples(pictures: Mapping[str, bytes]) -> dict[str, bytes]:
    """Members of a tar: every picture and the name of its class."""
    members = {}
    for key, payload in pictures.items():
        members[key] = payload
        members[key.split(".")[0] + ".cls"] = key.split("/")[0].encode()
    return members


def write_parquet(
    path: Path,
    payloads: Sequence[bytes | None],
    labels: Sequence[object],
    names: Sequence[str] | None = None,
    *,
    label: str = "label",
    rows_per_group: int = 2,
) -> Path:
    """As `datasets` writes it: images as `{bytes, path}`, and the names of classes in the schema's metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pa.array(
        [{"bytes": payload, "path": f"{row}.png"} for row, payload in enumerate(payloads)],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    table = pa.table({"image": image, label: pa.array(labels)})
    if names is not None:
        features = {"image": {"_type": "Image"}, label: {"names": list(names), "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=rows_per_group)
    return path


def parquet_of(path: Path, pictures: Mapping[str, bytes]) -> Path:
    names = sorted({key.split("/")[0] for key in pictures})
    labels = [names.index(key.split("/")[0]) for key in pictures]
    return write_parquet(path, list(pictures.values()), labels, names)


def in_memory(path: Path) -> str:
    """The URL of a copy of a file or folder that is on no disk."""
    found = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    copies = {f"/{file.relative_to(path.parent)}": file.read_bytes() for file in found}
    fsspec.filesystem("memory").pipe(copies)
    return f"memory://{path.name}"


def in_forks(images: Source, indices: Sequence[int], count: int) -> list[Batch]:
    """What forks of this process read at the same time, with all that it has open."""
    context = multiprocessing.get_context("fork")

    def read(end: Any) -> None:
        end.send(images.load(indices))

    receivers = []
    for _ in range(count):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=read, args=(sender,))
        process.start()
        sender.close()  # so that the end of the process is the end of the pipe
        receivers.append((receiver, process))
    batches = [receiver.recv() for receiver, _ in receivers]
    for _, process in receivers:
        process.join()
    return batches


def zipped(folder: Path) -> str:
    contents = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return str(write_zip(folder.with_suffix(".zip"), contents))


SPREAD: dict[str, Callable[[Path], str]] = {"a folder": str, "a zip file": zipped, "memory": in_memory}
