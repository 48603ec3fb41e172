"""Decode latents, samples or those of any latent cache, to image files, a contact sheet and a page."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from data.cache.manifest import Plan
from data.cache.reader import FAILURES, LatentCache
from data.cache.writer import Job
from data.locks import claim
from data.sources.generated import SAMPLES, write_npz
from data.storage import parse_json, publish, read, remove, staged_folder, staged_path, strip_checksum, writing
from pipeline.config import Config, Sample
from pipeline.config_file import load_config
from pipeline.datasets import BATCH, Decoder, Latents
from pipeline.device import in_threads, pick_device, process_count
from pipeline.pictures import contact_sheet, save_png
from pipeline.training.distributed import connect
from pipeline.training.run_folder import CONFIG
from pipeline.vae import FrozenVae
from stages.sample import Samples

IMAGES, SHEET, PAGE, NPZ = "images", "grid.png", "index.html", "samples.npz"
SHEET_PER_CLASS, SHEET_CLASSES = 10, 100  # a sheet of all of ImageNet would be a picture of gigabytes
_TEMPLATE = Path(__file__).with_name("gallery.html")
_DATA = "/*DATA*/"  # the place of the JSON in it
_NAME_BYTES = 100  # of a class name in a file name
# suffix of the files and how Pillow writes them: in half the time of its defaults or less; the files are hardly larger,
# PNG's even smaller: zlib's run-length encoding is made for its differences of neighbours
_FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "png": (".png", {"format": "PNG", "compress_level": 1, "compress_type": zlib.Z_RLE}),
    "webp": (".webp", {"format": "WEBP", "lossless": True, "quality": 0, "method": 0}),
    "jpeg": (".jpg", {"format": "JPEG", "quality": 95, "subsampling": "4:4:4"}),
}


def sample_images(config: Config, run: Path, *, npz: bool = False, job: Job | None = None) -> None:
    """Draw the samples that `config` describes and decode them, shard by shard; the processes of all jobs share it.

    ValueError as of `Samples` and `decode`.
    """
    samples, job = Samples(config, run, job=job), job or Job()
    if samples.all_drawn():
        decode(config, samples.folder, npz=npz, job=job)
        return
    images = Images(samples.folder, samples.plan, config, job)
    with images.staged():
        samples.draw(images.write)
        images.meet()  # now the latents of all jobs are there
        latents = LatentCache(samples.folder)
        images.write_missing(latents, chosen := np.arange(len(latents)))
    if job.number == 0:
        images.write_summaries(latents, chosen, npz=npz, anew=True)


def decode(config: Config, folder: Path, *, excerpt: bool = False, npz: bool = False, job: Job | None = None) -> Path:
    """Decode the samples in `folder` or, with `excerpt`, the first images of each class of the cache there.

    They become images/, grid.png, index.html and, with `npz`, samples.npz for ADM's evaluator: in `folder` or, with
    `excerpt`, in its folder decoded/, which is returned. The processes of all jobs share the work. ValueError if there
    are no latents, or if they are damaged or of another VAE.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no latents found: run {'encode' if excerpt else 'sample'} first")
    latents, job = LatentCache(folder), job or Job()
    if not len(latents):
        raise ValueError(f"{folder}: there is nothing to decode: no image has latents ({FAILURES} says why)")
    out = folder / "decoded" if excerpt else folder
    labels, _ = latents.named_labels()
    chosen = _first_of_each_class(labels, config.sample.per_class) if excerpt else np.arange(len(latents))
    images = Images(out, latents.manifest, config, job)
    npz = npz or (out / NPZ).exists()  # or an older one would be of other images
    if missing := not images.are_those_of(latents, chosen):
        with images.staged():
            images.write_missing(latents, chosen)
    if job.number == 0:
        images.write_summaries(latents, chosen, npz=npz, anew=missing)
    return out


class Images:
    """Writes the image files of latents to the folder `out`, and what sums them up: a sheet, a page and samples.npz.

    The folder of the files is filled under another name, by the processes of all jobs, and appears when all are there;
    it replaces an older one, for example of another format.
    """

    def __init__(self, out: Path, plan: Plan, config: Config, job: Job) -> None:
        """Raise ValueError if the VAE of `config` is not the one of the latents, which `plan` describes."""
        vae = FrozenVae(config.vae.source, pick_device())
        vae.check(plan.vae, out)
        self._decoder, self._out, self._plan, self._job = Decoder(vae), out, plan, job
        self._format, self._staged = config.sample.image_format, staged_path(out / IMAGES)
        suffix, self._options = _FORMATS[self._format]
        # names, each with the ending of its files
        self._classes = [(name, f"-{_file_name(name)}{suffix}") for name in (*plan.classes, "no class")]

    def _names(self, rows: NDArray[np.int64], labels: NDArray[np.int64]) -> list[str]:
        return [f"{row:06d}{self._classes[label][1]}" for row, label in zip(rows, labels, strict=True)]

    def are_those_of(self, latents: LatentCache, chosen: NDArray[np.int64]) -> bool:
        """Return whether the files are there, and are those of the latents `chosen`, by their names."""
        names = self._names(latents.rows[chosen], latents.named_labels()[0][chosen])
        return {file.name for file in (self._out / IMAGES).glob("[!.]*")} == {*names}  # a file manager's have a dot

    @contextlib.contextmanager
    def staged(self) -> Iterator[None]:
        """Fill the folder in this block, which every process enters."""
        if self._job.number:
            self.meet()
            yield
            return
        with claim(self._out / ".locks" / IMAGES, "decoding"), staged_folder(self._out / IMAGES):
            self.meet()
            yield
            for name in (SHEET, NPZ):  # of older images
                remove(self._out / name)

    def meet(self) -> None:
        """Wait for the processes of all jobs."""
        if self._job.jobs > 1:
            connect("fp32").wait_for_everyone()

    def write(self, latents: Iterable[Latents]) -> Iterator[int]:
        """Decode latents and write their files, without flushing them to disk; yield how many after each batch.

        Batches are decoded and written at once in threads, on a CPU one on each core.
        """
        batches = (batch for part in latents for batch in part.split(BATCH))
        yield from in_threads(self._write, batches, self._decoder.workers(self._plan.image_size))

    def _write(self, batch: Latents) -> int:
        for pixels, name in zip(self._decoder(batch.means), self._names(batch.rows, batch.labels), strict=True):
            buffer = io.BytesIO()  # Pillow's own errors about a full disk do not say so
            Image.fromarray(pixels).save(buffer, **self._options)
            with writing(self._staged / name) as file:
                file.write(buffer.getbuffer())
        return len(batch.rows)

    def write_missing(self, latents: LatentCache, chosen: NDArray[np.int64]) -> None:
        """Write this job's share of the files of `chosen`, but for those that `write` has written; wait for others."""
        labels, started = latents.named_labels()[0][chosen], time.monotonic()
        names, share = self._names(latents.rows[chosen], labels), self._job.share(len(chosen))
        there = {file.name for file in self._staged.iterdir()}
        missing = np.array([i for i in share if names[i] not in there], np.int64)
        parts = (missing[start : start + BATCH] for start in range(0, len(missing), BATCH))
        batches = (Latents(latents.rows[chosen[part]], labels[part], latents.means(chosen[part])) for part in parts)
        if len(missing):
            with tqdm(total=len(missing), desc="decode", unit=" images", mininterval=1) as bar:
                for count in self.write(batches):
                    bar.update(count)
            rate = len(missing) / (time.monotonic() - started)
            print(f"decode: {len(missing):,} images in {self._out / IMAGES}, {rate:.0f} images/s")
        self.meet()

    def write_summaries(self, latents: LatentCache, chosen: NDArray[np.int64], *, npz: bool, anew: bool) -> None:
        """Write the sheet, the page and, with `npz`, samples.npz, if they are missing; print where they are.

        `anew` tells that the images are new, so that the page is written in any case.
        """
        labels, classes = latents.named_labels()
        rows, labels = latents.rows[chosen], labels[chosen]
        files = [self._out / IMAGES / name for name in self._names(rows, labels)]
        sheet, page, archive = (self._out / name for name in (SHEET, PAGE, NPZ))
        if npz and not archive.exists():
            if self._format == "jpeg":
                print(f"decode: {archive} has the pixels of JPEG files: for exact ones, set sample.image_format=png")
            parts = (files[start : start + BATCH] for start in range(0, len(files), BATCH))
            pixels = in_threads(_read_images, parts, process_count("auto"))
            write_npz(archive, pixels, latents.labels[chosen], self._plan.image_size)
            anew = True
        if not sheet.exists():
            shown = _first_of_each_class(labels, SHEET_PER_CLASS)
            shown = shown[np.isin(labels[shown], np.unique(labels)[:SHEET_CLASSES])]
            pixels_shown = _read_images([files[i] for i in shown])
            save_png(contact_sheet(pixels_shown, labels[shown].tolist(), classes), sheet)
            anew = True
        images = list(zip(rows.tolist(), labels.tolist(), strict=True))
        content, where = _page(latents, images, self._classes, self._format), f"contact sheet {sheet}, page {page}"
        if anew or not page.exists() or read(page) != content:
            publish(page, content)
            print(f"decode: {where}")
        else:
            print(f"decode: all done: {where}")


def _read_images(files: list[Path]) -> NDArray[np.uint8]:
    """Read image files of one size, uint8 `n S S 3`; ValueError with the name of a damaged one."""
    pixels = []
    for file in files:
        try:
            pixels.append(np.asarray(Image.open(file)))
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises
            raise ValueError(f"{file}: damaged ({error}): delete {file.parent} and run decode") from error
    return np.stack(pixels)


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
    record = recorded(latents.path)
    data = {
        "title": latents.manifest.data_source,
        "size": latents.manifest.image_size,
        "classes": classes,
        "images": images,
        "settings": [],
        "summary": [],
        "command": "",
        "note": "",
    }
    if record:
        data |= _drawn(record, format_)
    text = json.dumps(data, separators=(",", ":")).replace("<", r"\u003c")  # so that no tag ends the script
    return _TEMPLATE.read_text(encoding="utf-8").replace(_DATA, text).encode()


def recorded(folder: Path) -> dict[str, Any]:
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
    usual = Sample().model_dump(mode="json", exclude={"steps", "guidance", "seed"})
    shown = {name: value for name, value in settings.items() if name not in left_out and value != usual.get(name)}
    sampler, steps, guidance = settings["scheduler"], shown["steps"], shown["guidance"]
    shown.pop("scheduler", None)
    return {
        "summary": [f"{sampler}, {steps} steps", f"guidance {guidance:g}", f"seed {shown['seed']}"],
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
