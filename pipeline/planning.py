"""What a latent cache is to hold, before anything is encoded: its plan, and which image each of its rows is."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from data.cache.listing import Change, Rows, digests_of, listing_of
from data.cache.manifest import Manifest, Plan
from data.cache.reader import FAILURES, SHARD_ROWS, least_shard_rows, verified
from data.cache.records import existing_plan, recorded_digests, recorded_failures
from data.sources.base import Source
from data.storage import publish
from data.text import counted, digest, printable
from pipeline.config import Config
from pipeline.device import process_count
from pipeline.unet import check_model
from pipeline.vae import ROUNDING, FrozenVae, to_pixels

_COMPARED = ".compared"  # beside a cache: which copies of its data set were found to hold the same bytes
_TRIED = 16  # images that a precision is tried on


def plan_rows(
    config: Config, source: Source, vae: FrozenVae, *, extend: bool = False, retry_failed: bool = False
) -> tuple[Plan, Rows]:
    """What the manifest pins and which image each row is, before anything is encoded.

    ValueError when the images of the cache that is there are not those of `source`.
    """
    path = config.cache.path
    found, rows = existing_plan(path), Rows.of(source)
    if found:
        rows, change = Rows.aligned(source, path, found)
        if any(change):
            if isinstance(found, Manifest):
                verified(path, found, FAILURES)  # or nobody could tell which images had failed
            if found.data_fingerprint != source.fingerprint():
                change.edited.extend(_other_contents(config, source, rows, change.touched))
            failed = {failure.key for failure in recorded_failures(path)}
            _check_change(change, failed, f"{path}: {source.name}", extend=extend, retry_failed=retry_failed)
            rows = rows.with_stamps_of(path, found, change.touched)
    plan = make_plan(config, source, rows, vae, found)
    if found:  # a cache that grows keeps its shards
        plan = plan.model_copy(update={"shard_rows": found.shard_rows})
    if found and rows.file == listing_of(found):  # or a copy of the data set would count as another one
        plan = plan.model_copy(update={"data_fingerprint": found.data_fingerprint})
    return plan, rows


def _other_contents(config: Config, source: Source, rows: Rows, touched: Sequence[str]) -> list[str]:
    """Those of the images `touched` whose files hold other bytes than those that were encoded.

    Images that have not been encoded so far, or could not be, have nothing that they could differ from. That a data set
    was found to be a copy is kept beside the cache, so that it is read once.
    """
    path = config.cache.path
    recorded = recorded_digests(path)
    compared = path / _COMPARED / digest([source.fingerprint(), *recorded.values()])
    wanted = set(touched)
    places = [row for row, key in enumerate(rows.keys) if key in wanted and row in recorded]
    if not places or compared.exists():
        return []
    print(f"encode: {counted(len(places), 'image')} of the size, but not of the time of before: comparing contents")
    now = digests_of(source, rows.order[places], workers=process_count(config.cache.workers))
    other = [rows.keys[row] for row, each in zip(places, now, strict=True) if each != recorded[row]]
    if not other:
        # a cache that may only be read is compared again, and another job may write the same
        with contextlib.suppress(OSError, ValueError):
            publish(compared, b"")
    return other


def _check_change(change: Change, failed: set[str], where: str, *, extend: bool, retry_failed: bool) -> None:
    """ValueError when the images of a cache are no longer those of its data set, unless it was asked to follow."""
    mended = [key for key in change.edited if printable(key) in failed]
    lost = change.gone + [key for key in change.edited if printable(key) not in failed]
    cases = (
        (lost, False, "changed or gone", "encode into another cache.path"),
        (change.added, extend, "new", "--extend encodes them"),
        (mended, retry_failed, "changed that could not be read", "--retry-failed reads them again"),
    )
    for keys, allowed, what, remedy in cases:
        if keys and not allowed:
            verb = "is" if len(keys) == 1 else "are"
            count = f"{counted(len(keys), 'image')} {verb} {what}, such as {printable(keys[0])}"
            raise ValueError(f"{where}: the data set has changed since the encode: {count}: {remedy}")


def make_plan(config: Config, source: Source, rows: Rows, vae: FrozenVae, found: Plan | None = None) -> Plan:
    """The plan of a cache of `rows` of `source`; `found` is what is planned of it already, if it is."""
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
    """The fields of a plan that do not depend on the images; ValueError when `config` has sizes that do not fit."""
    if config.data.image_size % vae.downsampling:
        raise ValueError(
            f"data.image_size = {config.data.image_size}: this VAE turns {vae.downsampling}x{vae.downsampling} pixels"
            f" into one latent position: choose a multiple of {vae.downsampling}"
        )
    if vae.image_size not in (None, config.data.image_size):
        raise ValueError(
            f"data.image_size = {config.data.image_size}: this VAE takes and returns images of {vae.image_size}: choose"
            " that"
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
    """What the VAE computes in: as in the cache that is there or, of auto on a GPU, as the VAE bears it.

    ValueError where it is asked for and changes the latents of the first images by too much.
    """
    asked = config.cache.precision
    if asked == "auto" and (found or vae.device.type != "cuda"):
        return found.precision if found else "fp32"
    if asked == "fp32" or found or source is None:
        return asked
    images = source.load(range(min(_TRIED, len(source.keys)))).pixels
    pixels = to_pixels(torch.from_numpy(images))
    if asked == "auto":
        return vae.bearable_precision(pixels)
    change = vae.rounding(pixels, asked)
    if not change <= ROUNDING:  # NaN, too
        raise ValueError(
            f"cache.precision = {asked}: it changes the latents of the first images by {change:.1%} of their standard"
            f" deviation, more than {ROUNDING:.0%}: use cache.precision=fp32"
        )
    return asked
