"""Decode latents, samples or those of any latent cache, to PNG files, a contact sheet and a page."""

from __future__ import annotations

import html
import re
import time
from pathlib import Path
from unicodedata import normalize
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from data.cache.reader import LatentCache
from data.storage import publish
from pipeline.config import Config
from pipeline.datasets import BATCH, DecodedLatents
from pipeline.device import pick_device
from pipeline.pictures import contact_sheet, save_png
from pipeline.vae import FrozenVae

_NAME_BYTES = 100  # of a class name in a file name
SHEET_PER_CLASS, SHEET_CLASSES = 10, 100  # a sheet of all of ImageNet would be a picture of gigabytes
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fafafa }}
h1 {{ font-size: 1.4rem; margin-bottom: 0 }} h2 {{ font-size: 1rem; margin: 1.2rem 0 .3rem }}
p {{ color: #666; margin-top: .2rem }} div {{ display: flex; flex-wrap: wrap; gap: 4px }}
img {{ width: 96px; border-radius: 3px; image-rendering: pixelated }}
</style></head><body>
<h1>{title}</h1><p>{summary}</p>
{sections}</body></html>
"""


def decode(config: Config, folder: Path, *, excerpt: bool = False) -> Path:
    """Decode the samples in `folder` or, with `excerpt`, the first images of each class of the cache there.

    Return the folder with images/, grid.png and index.html.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no latents found: run {'encode' if excerpt else 'sample'} first")
    latents = LatentCache(folder)
    manifest = latents.manifest
    images = DecodedLatents(latents, FrozenVae(config.vae.source, pick_device()))
    all_labels, classes = latents.named_labels()
    chosen = _first_of_each_class(all_labels, config.sample.per_class) if excerpt else np.arange(len(latents))
    out = folder / "decoded" if excerpt else folder
    names = [f"{latents.rows[i]:06d}-{_file_name(classes[all_labels[i]])}.png" for i in chosen]
    made = [out / "index.html", out / "grid.png", *(out / "images" / name for name in names)]
    if all(file.exists() for file in made):
        print(f"decode: all done: contact sheet {out}/grid.png, page {out}/index.html")
        return out
    labels = all_labels[chosen]
    shown = _first_of_each_class(labels, SHEET_PER_CLASS)
    shown = shown[np.isin(labels[shown], np.unique(labels)[:SHEET_CLASSES])]
    sheet = []
    started = time.monotonic()
    for start in tqdm(range(0, len(chosen), BATCH), desc="decode", unit=" batches", mininterval=1):
        rows = np.arange(start, min(start + BATCH, len(chosen)))
        pixels = images.load(chosen[rows].tolist()).pixels
        for row, image in zip(rows, pixels, strict=True):
            save_png(Image.fromarray(image), out / "images" / names[row])
        sheet.append(pixels[np.isin(rows, shown)])
    rate = len(chosen) / (time.monotonic() - started)
    save_png(contact_sheet(np.concatenate(sheet), labels[shown].tolist(), classes), out / "grid.png")
    publish(out / "index.html", _page(out, manifest.data_source, labels.tolist(), names, classes).encode())
    print(f"decode: {len(chosen):,} images in {out}/images, {rate:.0f} images/s")
    print(f"decode: contact sheet {out}/grid.png, page {out}/index.html")
    return out


def _first_of_each_class(labels: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return the indices of the first `count` images of every class, in ascending order."""
    return np.sort(np.concatenate([np.flatnonzero(labels == kind)[:count] for kind in np.unique(labels)]))


def _file_name(name: str) -> str:
    """Return a class name as part of a file name of at most 255 bytes; the index before it makes equal ones unique."""
    safe = re.sub(r"[^\w.-]+", "_", normalize("NFC", name))
    return safe.encode()[:_NAME_BYTES].decode(errors="ignore") or "_"


def _page(folder: Path, title: str, labels: list[int], names: list[str], classes: tuple[str, ...]) -> str:
    """Return an HTML page with every image under its class; it links to images/, for a browser on this machine."""
    sections = []
    for kind in sorted(set(labels)):
        mine = [name for name, label in zip(names, labels, strict=True) if label == kind]
        caption = html.escape(classes[kind])
        pictures = "".join(
            f'<img src="images/{quote(name)}" title="{html.escape(name)}" alt="{caption}" loading="lazy">'
            for name in mine
        )
        sections.append(f"<h2>{caption}</h2>\n<div>{pictures}</div>\n")
    summary = f"{len(names)} images, {html.escape(folder.name)}"
    return _PAGE.format(title=html.escape(title), summary=summary, sections="".join(sections))
