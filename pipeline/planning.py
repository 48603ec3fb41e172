"""Plan a latent cache before encoding: its settings, and which image each of its rows is."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from data.cache.listing import Change, Rows, digests_of, listing_of
from data.cache.manifest import Manifest, Plan
from data.cache.reader import FAILURES, SHARD_ROWS, least_shard_rows, read_verified_file
from data.cache.records import existing_plan, load_digests, load_failures
from data.sources.base import Source
from data.storage import publish
from data.text import counted, digest, printable
from pipeline.config import Config
from pipeline.device import process_count
from pipeline.unet import check_model
from pipeline.vae import MAX_ROUNDING_ERROR, FrozenVae, to_pixels

_COMPARED = ".compared"  # folder in a cache: records which copies of its data set were found identical
_PROBE_IMAGES = 16  # number of images on which a precision is tested


def plan_rows(
    config: Config, source: Source, vae: FrozenVae, *, extend: bool = False, retry_failed: bool = False
) -> tuple[Plan, Rows]:
    """Return the plan that the manifest records, and which image each row is.

    ValueError if a cache exists and its images are not those of `source`.
    """
    path = config.cache.path
    found, rows = existing_plan(path), Rows.of(source)
    if found:
        rows, change = Rows.aligned(source, path, found)
        if any(change):
            if isinstance(found, Manifest):
                read_verified_file(path, found, FAILURES)  # it lists the failed images, so it must be intact
            if found.data_fingerprint != source.fingerprint():
                change.edited.extend(_changed_contents(config, source, rows, change.touched))
            failed = {failure.key for failure in load_failures(path)}
            _check_change(change, failed, f"{path}: {source.name}", extend=extend, retry_failed=retry_failed)
            rows = rows.with_stamps_of(path, found, change.touched)
    plan = make_plan(config, source, rows, vae, found)
    if found:  # an extended cache keeps its shards
        plan = plan.changed(shard_rows=found.shard_rows)
    if found and rows.file == listing_of(found):  # a copy of the data set counts as the same one
        plan = plan.changed(data_fingerprint=found.data_fingerprint)
    return plan, rows


def _changed_contents(config: Config, source: Source, rows: Rows, touched: Sequence[str]) -> list[str]:
    """Return the keys of `touched` images (same size, other time) whose bytes are not those that were encoded.

    Images that were not encoded, or failed, are left out. The result "it is a copy" is recorded in the cache, so that
    the data set is read only once.
    """
    path = config.cache.path
    recorded = load_digests(path)
    compared = path / _COMPARED / digest([source.fingerprint(), *recorded.values()])
    wanted = set(touched)
    places = [row for row, key in enumerate(rows.keys) if key in wanted and row in recorded]
    if not places or compared.exists():
        return []
    print(f"encode: {counted(len(places), 'image')} with the same size but another time stamp: comparing contents")
    now = digests_of(source, rows.order[places], workers=process_count(config.cache.workers))
    other = [rows.keys[row] for row, each in zip(places, now, strict=True) if each != recorded[row]]
    if not other:
        # ignore a read-only cache (it is compared again) and another job that writes the same file
        with contextlib.suppress(OSError, ValueError):
            publish(compared, b"")
    return other


def _check_change(change: Change, failed: set[str], where: str, *, extend: bool, retry_failed: bool) -> None:
    """Raise ValueError if the data set has changed in a way that `extend` and `retry_failed` do not allow."""
    repaired = [key for key in change.edited if printable(key) in failed]
    lost = change.gone + [key for key in change.edited if printable(key) not in failed]
    cases = (
        (lost, False, "changed or missing", "encode into another cache.path"),
        (change.added, extend, "new", "give --extend to encode them"),
        (repaired, retry_failed, "changed that could not be read", "give --retry-failed to read them again"),
    )
    for keys, allowed, what, remedy in cases:
        if keys and not allowed:
            verb = "is" if len(keys) == 1 else "are"
            count = f"{counted(len(keys), 'image')} {verb} {what}, such as {printable(keys[0])}"
            raise ValueError(f"{where}: the data set has changed since the encode: {count}: {remedy}")


def make_plan(config: Config, source: Source, rows: Rows, vae: FrozenVae, found: Plan | None = None) -> Plan:
    """Return the plan of a cache of `rows` of `source`; `found` is the plan of an existing cache, if there is one."""
    return Plan(
        **settings_of_plan(config, vae, source=source, found=found),
        rows=len(rows.keys),
        shard_rows=max(SHARD_ROWS, least_shard_rows(len(rows.keys))),
        classes=rows.classes,
        data_source=source.name,
        data_fingerprint=source.fingerprint(),
        data_bytes=source.size,
        preprocessing=source.preprocessing,
    )


def settings_of_plan(
    config: Config, vae: FrozenVae, *, source: Source | None = None, found: Plan | None = None
) -> dict[str, Any]:
    """Return the fields of a plan that do not depend on the images; ValueError if sizes in `config` do not match."""
    if config.data.image_size % vae.downsampling:
        raise ValueError(
            f"data.image_size = {config.data.image_size}: this VAE maps {vae.downsampling}x{vae.downsampling} pixels"
            f" to one latent position: choose a multiple of {vae.downsampling}"
        )
    if vae.image_size not in (None, config.data.image_size):
        raise ValueError(
            f"data.image_size = {config.data.image_size}: this VAE works only with images of {vae.image_size} pixels:"
            f" use data.image_size={vae.image_size}"
        )
    side = config.data.image_size // vae.downsampling
    model = config.model
    check_model(side, model.patch_size, model.channels, model.bottleneck, model.head_width)
    channels = vae.latent_channels
    return {
        "format": config.cache.format,
        "store": config.cache.store,
        "dtype": config.cache.dtype,
        "views": ("identity", "flip") if config.cache.flip else ("identity",),
        "shape": (2 * channels if config.cache.store == "moments" else channels, side, side),
        "batch_size": config.cache.batch_size,
        "image_size": config.data.image_size,
        "vae": vae.identity(),
        "precision": _precision(config, vae, source, found),
    }


def _precision(config: Config, vae: FrozenVae, source: Source | None, found: Plan | None) -> str:
    """Return the precision of the VAE; for auto, that of an existing cache, or one that the VAE tolerates (on a GPU).

    ValueError if a requested precision changes the latents of the first images by too much.
    """
    requested = config.cache.precision
    if requested == "auto" and (found or vae.device.type != "cuda"):
        return found.precision if found else "fp32"
    if requested == "fp32" or found or source is None:
        return requested
    images = source.load(range(min(_PROBE_IMAGES, len(source.keys)))).pixels
    pixels = to_pixels(torch.from_numpy(images))
    if requested == "auto":
        return vae.tolerated_precision(pixels)
    change = vae.rounding_error(pixels, requested)
    if not change <= MAX_ROUNDING_ERROR:  # also true for NaN
        raise ValueError(
            f"cache.precision = {requested}: it changes the latents of the first images by {change:.1%} of their"
            f" standard deviation, more than {MAX_ROUNDING_ERROR:.0%}: use cache.precision=fp32"
        )
    return requested
