"""Draw latents from a trained model, into the same cache format that encode writes."""

from __future__ import annotations

import difflib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import torch
from tqdm import tqdm

from data.cache.listing import Rows
from data.cache.manifest import Plan
from data.cache.reader import FAILURES, SHARD_ROWS, least_shard_rows
from data.cache.writer import CacheWriter, EncodedShard
from data.sources.generated import SAMPLES
from data.storage import probe, publish_checked
from data.text import digest
from pipeline.compatibility import usable_guidance
from pipeline.config import Config, Sample
from pipeline.device import pick_device, sampling_dtype
from pipeline.sampling import draw_samples
from pipeline.training.checkpoint import Checkpoint, newest_checkpoint


def sample(config: Config, run: Path, *, checkpoint: Checkpoint | None = None, to: Path | None = None) -> Path:
    """Draw `sample.per_class` images of every requested class, from `checkpoint` or the newest one of the run.

    Return the folder with their latents: `to`, or one in the run's folder.
    """
    checkpoint = checkpoint or require_checkpoint(run)
    config, chosen = resolve_sample_settings(config, checkpoint)
    labels = np.tile(np.array(chosen), config.sample.per_class)  # the first images stay the same when more are drawn
    folder = to or sample_folder(config, run, checkpoint)
    names = checkpoint.state.classes
    keys = [f"{names[label]}/{index:06d}" for index, label in enumerate(labels)]
    rows = Rows(keys, labels, tuple(names), [""] * len(keys), np.arange(len(keys)))
    writer = CacheWriter(folder, _plan(config, run, checkpoint, len(labels)), rows)
    if writer.is_done():
        print(f"sample: all done: {folder}")
        return folder
    probe(folder, "--run")
    with writer.claimed():
        _draw_missing(config, checkpoint, writer, labels)
        publish_checked(folder / SAMPLES, _description(config, checkpoint, labels))
        manifest = writer.finish()
    assert manifest  # there is one job
    if manifest.failed:
        print(f"sample: {manifest.failed:,} samples came out NaN or infinite; they are listed in {folder / FAILURES}")
    return folder


def drawn_folder(config: Config, run: Path) -> Path:
    """Return the folder of the samples that `config` describes, whether or not it exists."""
    checkpoint = require_checkpoint(run)
    return sample_folder(resolve_sample_settings(config, checkpoint)[0], run, checkpoint)


def resolve_sample_settings(config: Config, checkpoint: Checkpoint) -> tuple[Config, list[int]]:
    """Return `config` with the guidance and the class names that are used, and the indices of these classes.

    A line is printed for each setting that differs from the request; ValueError for one that is impossible."""
    state, requested = checkpoint.state, config.sample
    chosen = choose_classes(requested.classes, state.classes, state.class_counts)
    guidance, line = usable_guidance(requested.guidance, without_class=state.without_class, classes=len(state.classes))
    if line:
        print(line)
    every = chosen == list(range(len(state.classes)))
    names = () if every else tuple(state.classes[kind] for kind in chosen)
    resolved = requested.changed(guidance=guidance, classes=names)
    return config.changed(sample=resolved), chosen


def require_checkpoint(run: Path) -> Checkpoint:
    """Open the newest intact checkpoint of a run; ValueError if there is none."""
    checkpoint, skipped = newest_checkpoint(run)
    for line in skipped:
        print(f"skipped {line}")
    if not checkpoint:
        raise ValueError(f"--run: no checkpoint in {run}/checkpoints: run train first")
    return checkpoint


def choose_classes(wanted: tuple[str, ...], names: Sequence[str], counts: Sequence[int]) -> list[int]:
    """Return the indices of the classes `wanted`, each given as its name, its index or `index:2`; none means all with
    images.

    A name takes precedence over an index, with a message. `counts` are the training images of each class. ValueError
    for a class that does not exist or was never trained.
    """
    if not wanted:
        empty = [name for name, count in zip(names, counts, strict=True) if not count]
        if empty:
            few = f"{len(empty):,} of {len(names):,}"
            print(f"sample: {few} classes have no images and are left out, the first of them {empty[0]!r}")
        return [kind for kind, count in enumerate(counts) if count]
    chosen = list(dict.fromkeys(_find_class(each, names) for each in wanted))
    for kind in chosen:
        if not counts[kind]:
            raise ValueError(f"sample.classes: {names[kind]!r} had no images in training, so it cannot be drawn")
    return chosen


def _find_class(wanted: str, names: Sequence[str]) -> int:
    indices = {form: kind for kind in range(len(names)) for form in (str(kind), f"index:{kind}")}
    same = [kind for kind, name in enumerate(names) if name == wanted] or [
        kind for kind, name in enumerate(names) if normalize("NFC", name) == normalize("NFC", wanted)
    ]
    if not same and wanted in indices:
        return indices[wanted]
    if not same:
        close = difflib.get_close_matches(wanted, names, n=3)
        known = [repr(name) for name in dict.fromkeys([*close, *names[:10]])] + ["..."] * (len(names) > 10)
        raise ValueError(
            f"sample.classes: no class {wanted!r}: choose from {', '.join(known)} or the indices 0 to {len(names) - 1}"
        )
    if indices.get(wanted, same[0]) != same[0]:
        index = indices[wanted]
        print(f"sample: {wanted!r} is the class of that name; index:{index} is the class {names[index]!r}")
    return same[0]


def sample_folder(config: Config, run: Path, checkpoint: Checkpoint) -> Path:
    """Return the folder of the samples; its name states how they are drawn, and a digest of the classes if not all."""
    s = config.sample
    tag = f"{checkpoint.images_seen}-{s.scheduler}{s.steps}-guidance{s.guidance:g}-seed{s.seed}-{s.per_class}each"
    if s.precision != "auto":
        tag += f"-{s.precision}"
    if s.classes:
        tag += "-" + digest([json.dumps(s.classes)])[:8]
    return run / "samples" / tag


def _draw_missing(config: Config, checkpoint: Checkpoint, writer: CacheWriter, labels: np.ndarray[Any, Any]) -> None:
    device = pick_device()
    model = checkpoint.ema_model().to(device)
    pending = writer.pending()
    rows = sum(len(writer.plan.rows_of(shard)) for shard in pending)
    started = time.monotonic()
    with tqdm(total=rows, unit=" images", desc="sample", mininterval=1) as bar:
        for shard in pending:
            parts = []
            for batch in _batches(writer.plan.rows_of(shard), config.sample.batch_size):
                parts.append(_draw_batch(config.sample, checkpoint, model, device, batch, labels))
                bar.update(len(batch))
            moments = torch.cat(parts)[:, None].cpu().numpy()
            writer.write(EncodedShard(shard, np.array(writer.plan.rows_of(shard)), moments, {}))
    print(f"sample: {rows:,} images in {writer.path}, {rows / (time.monotonic() - started):.1f} images/s")


def _draw_batch(
    settings: Sample,
    checkpoint: Checkpoint,
    model: Any,
    device: torch.device,
    batch: range,
    labels: np.ndarray[Any, Any],
) -> torch.Tensor:
    """Draw the samples with the indices `batch`: latents `B C h w`, on the scale of the VAE's decoder."""
    latents = draw_samples(
        model,
        checkpoint.state.noise,
        settings,
        torch.from_numpy(labels[batch.start : batch.stop]),
        indices=batch,
        device=device,
    )
    return checkpoint.normalization.denormalize(latents)


def _batches(rows: range, size: int) -> Iterator[range]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _plan(config: Config, run: Path, checkpoint: Checkpoint, count: int) -> Plan:
    stored = checkpoint.model_config()
    weights = checkpoint.ema_sha256
    return Plan(
        store="mean",
        dtype=config.cache.dtype,
        views=("identity",),
        shape=(stored["in_channels"], stored["sample_size"], stored["sample_size"]),
        rows=count,
        shard_rows=max(SHARD_ROWS, least_shard_rows(count)),
        batch_size=config.sample.batch_size,
        classes=checkpoint.state.classes,
        data_source=f"samples of {run.resolve().name}",
        data_bytes=0,
        data_fingerprint=digest([weights, config.sample.model_dump_json(exclude={"batch_size", "image_format"})]),
        image_size=checkpoint.state.image_size,
        preprocessing="none: drawn from a model",
        vae=checkpoint.state.vae,
    )


def _description(config: Config, checkpoint: Checkpoint, labels: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Return everything that is needed to draw the same samples again."""
    names = checkpoint.state.classes
    return {
        "checkpoint": str(checkpoint.path),
        "ema_sha256": checkpoint.ema_sha256,
        "images_seen": checkpoint.images_seen,
        "vae": checkpoint.state.vae.model_dump(mode="json"),
        "noise": asdict(checkpoint.state.noise),
        "sample": config.sample.model_dump(mode="json", exclude={"image_format"}),
        "dtype": str(sampling_dtype(config.sample.precision, pick_device()) or torch.float32).removeprefix("torch."),
        "versions": {name: version(name) for name in ("torch", "diffusers")},
        "images": [{"index": i, "label": int(label), "class": names[label]} for i, label in enumerate(labels)],
    }
