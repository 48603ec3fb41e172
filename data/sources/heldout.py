"""Opens held-out images: never trained on, so that losses, scores and memorisation can be measured on them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.sources.base import NO_CLASS, Batch, NoImagesError, Source
from data.sources.files import ImageFiles, listing_fingerprint
from data.sources.labels import ONE_CLASS
from data.sources.solids import Solids
from data.text import counted, digest, printable


class Subset:
    """Presents some images of a data set as a data set (see `data.sources.base.Source`), with all its classes."""

    def __init__(self, whole: Source, chosen: NDArray[np.int64], name: str) -> None:
        """Select the images of `whole` with the indices `chosen`."""
        self.whole, self.chosen, self.name = whole, chosen, name
        self.classes, self.preprocessing, self.image_size = whole.classes, whole.preprocessing, whole.image_size
        self.keys: Sequence[str] = [whole.keys[i] for i in chosen]
        self.stamps: Sequence[str] = [whole.stamps[i] for i in chosen]
        self.labels = whole.labels[chosen]
        self.size = whole.size * len(chosen) // len(whole.keys)  # an estimate, as if all files had the same size
        self.notes: Sequence[str] = whole.notes

    def fingerprint(self) -> str:
        return listing_fingerprint(self)

    def load(self, indices: Sequence[int]) -> Batch:
        batch = self.whole.load(self.chosen[list(indices)].tolist())
        place = dict(zip(self.chosen[list(indices)].tolist(), indices, strict=True))
        return Batch(
            np.asarray(indices, np.int64),
            batch.pixels,
            {place[index]: reason for index, reason in batch.failures.items()},
            {place[index]: each for index, each in batch.digests.items()},
        )

    def digest(self, index: int) -> str:
        return self.whole.digest(int(self.chosen[index]))


def split(whole: Source, share: float) -> tuple[Subset, Subset]:
    """Split `whole` into the images that are trained on and the `share` of them that is held out.

    The side of an image depends on its key alone, so it stays when other images are added or removed. ValueError if
    one side would be empty.
    """
    out = np.array([_hash_fraction(key) < share for key in whole.keys], bool)
    if out.all() or not out.any():
        side = "all" if out.all() else "none"
        raise ValueError(
            f"data.heldout = {share:g}: it would hold out {side} of {counted(len(out), 'image')}: choose another share"
        )
    kept = Subset(whole, np.flatnonzero(~out), f"{whole.name} but its held-out share of {share:g}")
    return kept, Subset(whole, np.flatnonzero(out), f"the held-out share of {share:g} of {whole.name}")


def open_heldout(
    heldout: float | str, training: Source, *, image_size: int, matte: str, **columns: str | None
) -> tuple[Source, Source]:
    """Return the images to train on, and the held-out ones that `data.heldout` names: a share, or a path or URL."""
    if isinstance(heldout, str):
        return training, _files(heldout, training, image_size=image_size, matte=matte, **columns)
    if isinstance(training, Solids):
        return training, _solids(training, heldout)
    return split(training, heldout)


def _solids(training: Solids, share: float) -> Solids:
    """Return renders of another seed, `share` times as many as those of training."""
    seed = int(digest([f"heldout {training.seed}"])[:15], 16)
    count = round(len(training.keys) * share)
    if count < 1:
        raise ValueError(f"data.heldout = {share:g}: that is less than one of {counted(len(training.keys), 'image')}")
    return Solids(count=count, seed=seed, image_size=training.image_size)


def _files(place: str, training: Source, *, image_size: int, matte: str, **columns: str | None) -> Source:
    """Open the images at a path or URL, with the class numbers of `training`.

    ValueError, naming data.heldout, if they are among those of training, or have a class that training does not have.
    """
    inner, outer = Path(place), Path(training.name)
    if inner.exists() and outer.exists() and inner.resolve().is_relative_to(outer.resolve()):
        raise ValueError(
            f"data.heldout = {place}: it is inside data.source = {training.name}, which is trained on: move it out,"
            " or give a share such as 0.02"
        )
    try:
        found = ImageFiles(place, image_size=image_size, matte=matte, **columns)
    except ValueError as error:
        kind = NoImagesError if isinstance(error, NoImagesError) else ValueError
        raise kind(str(error).replace("data.source", "data.heldout")) from error
    if found.classes == (ONE_CLASS,) and training.classes != found.classes:
        found.labels = np.full(len(found.keys), NO_CLASS, np.int64)
        found.classes, found.notes = training.classes, ["no held-out image has a class"]
        return found
    number = {name: kind for kind, name in enumerate(training.classes)}
    unknown = [name for kind, name in enumerate(found.classes) if name not in number and (found.labels == kind).any()]
    if unknown:
        raise ValueError(
            f"data.heldout = {place}: its class {printable(unknown[0])!r} is not one of the {len(number):,} classes of"
            f" data.source, such as {printable(training.classes[0])!r}"
        )
    numbers = np.array([number.get(name, NO_CLASS) for name in found.classes], np.int64)
    found.labels = np.where(found.labels == NO_CLASS, NO_CLASS, numbers[found.labels])
    found.classes = training.classes
    return found


def _hash_fraction(key: str) -> float:
    """Return a number in 0..1 that depends on the key alone."""
    hashed = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(hashed[:8], "big") / 2**64
