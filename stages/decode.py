"""Decode latents, samples or those of any latent cache, to image files, a contact sheet and a page."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from data.cache.reader import FAILURES, LatentCache
from data.locks import claim
from data.sources.generated import SAMPLES, write_npz
from data.storage import parse_json, publish, read, staged_folder, strip_checksum, writing
from pipeline.config import Config, Sample
from pipeline.config_file import load_config
from pipeline.datasets import DecodedLatents
from pipeline.device import pick_device, process_count
from pipeline.pictures import contact_sheet, save_png
from pipeline.training.run_folder import CONFIG
from pipeline.vae import FrozenVae

IMAGES, SHEET, PAGE, NPZ = "images", "grid.png", "index.html", "samples.npz"
SHEET_PER_CLASS, SHEET_CLASSES = 10, 100  # a sheet of all of ImageNet would be a picture of gigabytes
_TEMPLATE = Path(__file__).with_name("gallery.html")
_DATA = "/*DATA*/"  # the place of the JSON in it
_NAME_BYTES = 100  # of a class name in a file name
_MAX_PENDING = 32  # batches that wait for a thread: more would fill the memory
# suffix of the files and how Pillow writes them: in half the time of its defaults or less; the files are hardly larger
_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "png": (".png", {"format": "PNG", "compress_level": 2}),
    "webp": (".webp", {"format": "WEBP", "lossless": True, "quality": 0, "method": 0}),
    "jpeg": (".jpg", {"format": "JPEG", "quality": 95, "subsampling": "4:4:4"}),
}


def decode(config: Config, folder: Path, *, excerpt: bool = False, npz: bool = False) -> Path:
    """Decode the samples in `folder` or, with `excerpt`, the first images of each class of the cache there.

    Return the folder with images/, grid.png, index.html and, with `npz`, samples.npz for ADM's evaluator. The folder
    images/ appears when it is complete; it replaces an older one, for example of another format.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no latents found: run {'encode' if excerpt else 'sample'} first")
    latents = LatentCache(folder)
    if not len(latents):
        raise ValueError(f"{folder}: there is nothing to decode: no image has latents ({FAILURES} says why)")
    images = DecodedLatents(latents, FrozenVae(config.vae.source, pick_device()))
    labels, classes = latents.named_labels()
    chosen = _first_of_each_class(labels, config.sample.per_class) if excerpt else np.arange(len(latents))
    suffix, options = _FORMATS[config.sample.image_format]
    endings = [f"-{_file_name(name)}{suffix}" for name in classes]
    images_of = list(zip(latents.rows[chosen].tolist(), labels[chosen].tolist(), strict=True))
    names = [f"{row:06d}{endings[label]}" for row, label in images_of]
    out = folder / "decoded" if excerpt else folder
    page = _page(latents, images_of, list(zip(classes, endings, strict=True)), config.sample.image_format)
    npz = npz or (out / NPZ).exists()  # or an older one would be of other images
    where = f"contact sheet {out / SHEET}, page {out / PAGE}"
    if not _holds(out, names, npz=npz):
        with claim(out / ".locks" / IMAGES, "decoding"):
            _write(out, images, chosen, names, options, npz=npz)
    elif (out / PAGE).exists() and read(out / PAGE) == page:
        print(f"decode: all done: {where}")
        return out
    publish(out / PAGE, page)
    print(f"decode: {where}")
    return out


def _holds(out: Path, names: list[str], *, npz: bool) -> bool:
    """Return whether `out` holds images of exactly these names, and the files that are written before them."""
    files = (SHEET, NPZ) if npz else (SHEET,)
    found = {file.name for file in (out / IMAGES).glob("[!.]*")}  # a dot begins the name of what a file manager left
    return found == set(names) and all((out / file).exists() for file in files)


def _write(
    out: Path,
    images: DecodedLatents,
    chosen: NDArray[np.int64],
    names: list[str],
    options: dict[str, Any],
    *,
    npz: bool,
) -> None:
    """Write the images at `chosen`, the contact sheet and, with `npz`, samples.npz. The folder of images is last, so
    that the others fit to it whenever it is there."""
    labels, classes = images.cache.named_labels()
    labels = labels[chosen]
    shown = _first_of_each_class(labels, SHEET_PER_CLASS)
    on_sheet = np.isin(np.arange(len(labels)), shown[np.isin(labels[shown], np.unique(labels)[:SHEET_CLASSES])])
    sheet: list[NDArray[np.uint8]] = []
    started = time.monotonic()
    with staged_folder(out / IMAGES) as staged, ThreadPoolExecutor(process_count("auto")) as pool:
        batches = _saving(images.batches(chosen, images.workers()), [staged / name for name in names], options, pool)
        batches = _collecting(batches, on_sheet, sheet)
        if npz:
            write_npz(out / NPZ, batches, images.labels[chosen], images.image_size)
        deque(batches, maxlen=0)  # runs through them, if write_npz did not
        save_png(contact_sheet(np.concatenate(sheet), labels[on_sheet].tolist(), classes), out / SHEET)
    rate = len(chosen) / (time.monotonic() - started)
    print(f"decode: {len(chosen):,} images in {out / IMAGES}, {rate:.0f} images/s")


def _saving(
    batches: Iterator[NDArray[np.uint8]], files: list[Path], options: dict[str, Any], pool: ThreadPoolExecutor
) -> Iterator[NDArray[np.uint8]]:
    """Yield the batches, and write their images to `files` in the threads of `pool`: Pillow releases the GIL."""
    done, pending = 0, deque[Future[None]]()
    with tqdm(total=len(files), desc="decode", unit=" images", mininterval=1) as bar:
        for pixels in batches:
            pending.append(pool.submit(_save, pixels, files[done : done + len(pixels)], options))
            done += len(pixels)
            if len(pending) > _MAX_PENDING:
                pending.popleft().result()
            bar.update(len(pixels))
            yield pixels
    for future in pending:
        future.result()


def _save(images: NDArray[np.uint8], files: list[Path], options: dict[str, Any]) -> None:
    """Write images of a batch, without flushing them to disk."""
    for pixels, path in zip(images, files, strict=True):
        buffer = io.BytesIO()  # Pillow's own errors about a full disk do not say so
        Image.fromarray(pixels).save(buffer, **options)
        with writing(path) as file:
            file.write(buffer.getbuffer())


def _collecting(
    batches: Iterator[NDArray[np.uint8]], wanted: NDArray[np.bool_], found: list[NDArray[np.uint8]]
) -> Iterator[NDArray[np.uint8]]:
    """Yield the batches, and append a copy of the images that are `wanted` to `found`."""
    done = 0
    for pixels in batches:
        found.append(pixels[wanted[done : done + len(pixels)]])
        done += len(pixels)
        yield pixels


def _first_of_each_class(labels: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return the indices of the first `count` images of every class, in ascending order."""
    return np.sort(np.concatenate([np.flatnonzero(labels == kind)[:count] for kind in np.unique(labels)]))


def _file_name(name: str) -> str:
    """Return a class name as part of a file name of at most 255 bytes; the index before it makes equal ones unique."""
    safe = re.sub(r"[^\w.-]+", "_", normalize("NFC", name))
    return safe.encode()[:_NAME_BYTES].decode(errors="ignore") or "_"


def _page(latents: LatentCache, images: list[tuple[int, int]], classes: list[tuple[str, str]], format_: str) -> bytes:
    """Return the HTML page that shows images, each given as its row and its class, from the folder beside it.

    `classes` are names with the endings of their files. All text is data for the page's script: none becomes HTML.
    """
    record = _recorded(latents.path)
    seeds = {each["index"]: str(each["seed"]) for each in record.get("images", []) if "seed" in each}
    data = {
        "title": latents.manifest.data_source,
        "size": latents.manifest.image_size,
        "classes": classes,
        "images": [(row, kind, seeds[row]) if row in seeds else (row, kind) for row, kind in images],
        "settings": [],
        "summary": [],
        "command": "",
        "note": "",
    }
    if record:
        data |= _drawn(record, format_)
    text = json.dumps(data, separators=(",", ":")).replace("<", r"\u003c")  # so that no tag ends the script
    return _TEMPLATE.read_text(encoding="utf-8").replace(_DATA, text).encode()


def _recorded(folder: Path) -> dict[str, Any]:
    """Read what `latentmill sample` recorded about the images in `folder`; empty if they are not samples."""
    file = folder / SAMPLES
    if not file.exists():
        return {}
    payload = read(file)
    with contextlib.suppress(ValueError):
        record: dict[str, Any] = parse_json(payload)
        if strip_checksum(payload) or "sha256" not in record:  # version 0.1.0 wrote none
            return record
    raise ValueError(
        f"{file}: damaged: delete it, and the page will show no settings; or delete the folder and sample again"
    )


def _drawn(record: dict[str, Any], format_: str) -> dict[str, Any]:
    """Return what the page says about samples: their settings, and the command that draws them again.

    The command reads the config in the run's folder, and names the settings that are not those of this config. The
    page shows the main settings and those that are not the default.
    """
    settings: dict[str, Any] = record["sample"]
    run, seen = Path(record["checkpoint"]).parents[1], f"{record['images_seen']:,}"
    file = run / CONFIG
    words = ["latentmill", "sample", "--config", str(file), "--run", str(run)]
    drawn = {"precision": "auto"} | settings | {"image_format": format_}  # auto is not recorded
    configured = {"precision": "auto"} | load_config(file).sample.model_dump(mode="json") if file.exists() else {}
    for name, value in drawn.items():
        if name not in configured or value != configured[name]:
            words += ["--set", f"sample.{name}={_text(value)}"]
    left_out = {"classes", "per_class", "batch_size"}
    if any("seed" in image for image in record["images"]):  # each is shown with its own
        left_out.add("seed")
    usual = Sample().model_dump(mode="json", exclude={"steps", "guidance", "seed"})
    shown = {name: value for name, value in settings.items() if name not in left_out and value != usual.get(name)}
    sampler, steps, guidance = settings["scheduler"], shown["steps"], shown["guidance"]
    shown.pop("scheduler", None)
    return {
        "summary": [
            f"{sampler}, {steps} steps",
            f"guidance {guidance:g}",
            *([f"seed {shown['seed']}"] if "seed" in shown else []),
        ],
        "settings": [
            ("sampler", sampler),
            *((name.replace("_", " "), _text(value)) for name, value in shown.items()),
            ("number type", record["dtype"]),
            ("run", str(run)),
            ("checkpoint", f"{seen} images seen"),
        ],
        "command": shlex.join(words),
        "note": f"It draws from the newest checkpoint of the run. These images are of the one at {seen} images seen.",
    }


def _text(value: Any) -> str:
    """Return a value of a config as `--set` takes it, also a list of any names."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
