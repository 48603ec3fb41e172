"""Draw latents from a trained model, into the same cache format that encode writes."""

from __future__ import annotations

import difflib
import json
import time
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from data.cache.listing import Rows
from data.cache.manifest import Plan
from data.cache.reader import FAILURES, LatentCache, least_shard_rows
from data.cache.writer import CacheWriter, EncodedShard, Job
from data.sources.generated import SAMPLES
from data.storage import probe, publish_checked
from data.text import brief, digest
from pipeline.compatibility import usable_guidance
from pipeline.config import Config, Sample
from pipeline.datasets import Latents
from pipeline.device import halving, in_threads, pick_device, process_count, sampling_dtype
from pipeline.guidance import CPU_ROWS
from pipeline.sampling import draw_samples
from pipeline.training.checkpoint import Checkpoint, checkpoint_at, newest_checkpoint

NOT_DRAWN = {"batch_size", "compile", "image_format"}  # keys of sample that change no latents


def sample(
    config: Config, run: Path, *, checkpoint: Checkpoint | None = None, to: Path | None = None, job: Job | None = None
) -> Path:
    """Draw the samples that `config` describes, as `Samples.draw` does; return the folder with their latents."""
    samples = Samples(config, run, checkpoint=checkpoint, to=to, job=job)
    if not samples.all_drawn():
        samples.draw()
    return samples.folder


class Samples:
    """Draws the samples that a config describes: `sample.per_class` of every requested class.

    `folder` holds their latents and is complete when the last job is done; `plan` describes them.
    """

    def __init__(
        self,
        config: Config,
        run: Path,
        *,
        checkpoint: Checkpoint | None = None,
        to: Path | None = None,
        job: Job | None = None,
    ) -> None:
        """Take `checkpoint` or the newest one of the run; the folder is `to`, or one in the run's folder.

        ValueError, before anything is written, for settings that are impossible.
        """
        self._checkpoint = checkpoint = checkpoint or require_checkpoint(run)
        self._config, chosen = resolve_sample_settings(config, checkpoint)
        per_class = self._config.sample.per_class
        self._labels = labels = np.tile(np.array(chosen), per_class)  # the first stay the same when more are drawn
        self._sources = sources_of(self._config.sample, checkpoint)
        self.folder = to or sample_folder(self._config, run, checkpoint)
        names = checkpoint.state.classes
        keys = [f"{names[label]}/{index:06d}" for index, label in enumerate(labels)]
        rows = Rows(keys, labels, tuple(names), [""] * len(keys), np.arange(len(keys)))
        self.plan = _plan(self._config, run, checkpoint, len(labels), self._sources)
        self._writer = CacheWriter(self.folder, self.plan, rows, job)
        self._drawing: Drawing | None = None
        if not self._writer.is_done():
            self._drawing = Drawing(self._config.sample, checkpoint, labels)
            probe(self.folder, "--run")

    def all_drawn(self) -> bool:
        """Return whether nothing is left to draw, with a message."""
        if self._drawing:
            return False
        print(f"sample: all done: {self.folder}")
        return True

    def draw(self, use: Callable[[Iterator[Latents]], Iterator[Any]] | None = None) -> None:
        """Draw the samples of this job that are missing; they pass through `use`, once they are written."""
        writer = self._writer
        with writer.claimed():
            if writer.job.number == 0:
                description = _description(self._config, self._checkpoint, self._labels) | self._sources
                publish_checked(self.folder / SAMPLES, description)
            pending = writer.pending(dealt=True)
            count, started = sum(len(self.plan.rows_of(shard)) for shard in pending), time.monotonic()
            with tqdm(total=count, unit=" images", desc="sample", mininterval=1) as bar:
                drawn = self._missing(pending, bar)
                for _ in use(drawn) if use else drawn:
                    pass
            print(f"sample: {count:,} images in {self.folder}, {count / (time.monotonic() - started):.1f} images/s")
            manifest = writer.finish()
        if manifest and manifest.failed:
            failures = self.folder / FAILURES
            print(f"sample: {manifest.failed:,} samples came out NaN or infinite; they are listed in {failures}")

    def _missing(self, pending: list[int], bar: tqdm) -> Iterator[Latents]:
        """Draw the shards `pending`, batch by batch, and write each when it is complete; yield its usable samples."""
        assert self._drawing, "all are drawn"
        every = [np.array(self.plan.rows_of(shard)) for shard in pending]
        drawn = torch.empty(0)
        for latents in self._drawing.batches(np.concatenate([np.empty(0, np.int64), *every])):
            drawn = torch.cat([drawn, latents]) if len(drawn) else latents
            bar.update(len(latents))
            while every and len(drawn) >= (size := len(every[0])):
                with np.errstate(over="ignore"):  # an infinite value becomes a failure
                    moments = drawn[:size].numpy().astype(self.plan.dtype)
                rows, drawn = every.pop(0), drawn[size:]
                failed = self._writer.write(EncodedShard(pending.pop(0), rows, moments[:, None], {}))
                usable = ~np.isin(rows, [failure.row for failure in failed])
                yield Latents(rows[usable], self._labels[rows[usable]], moments[usable])


def drawn_folder(config: Config, run: Path) -> Path:
    """Return the folder of the samples that `config` describes, whether or not it exists."""
    checkpoint = require_checkpoint(run)
    return sample_folder(resolve_sample_settings(config, checkpoint)[0], run, checkpoint)


def resolve_sample_settings(config: Config, checkpoint: Checkpoint) -> tuple[Config, list[int]]:
    """Return `config` with the guidance and the class names that are used, and the indices of these classes.

    A line is printed for each setting that differs from the request; ValueError for one that is impossible."""
    state, requested = checkpoint.state, config.sample
    requested.check(state.noise.schedule)
    chosen = choose_classes(requested.classes, state.classes, state.class_counts)
    by_class = {
        state.classes[_find_class(name, state.classes, "sample.guidance_by_class")]: scale
        for name, scale in requested.guidance_by_class.items()
    }
    guidance = requested.guidance
    if not requested.guide:  # without one, the null class guides
        usable = [
            usable_guidance(
                scale, requested.guidance_form, without_class=state.without_class, classes=len(state.classes)
            )
            for scale in (guidance, *by_class.values())
        ]
        if lines := [line for _, line in usable if line]:
            print(lines[0])
            guidance, by_class = usable[0][0], {}
    every = chosen == list(range(len(state.classes)))
    names = () if every else tuple(state.classes[kind] for kind in chosen)
    resolved = requested.changed(guidance=guidance, guidance_by_class=by_class, classes=names)
    return config.changed(sample=resolved), chosen


def require_checkpoint(run: Path) -> Checkpoint:
    """Open the newest intact checkpoint of a run; ValueError if there is none."""
    checkpoint, skipped = newest_checkpoint(run)
    for line in skipped:
        print(f"skipped {line}")
    if not checkpoint:
        raise ValueError(f"--run: no checkpoint in {run}/checkpoints: run train first")
    return checkpoint


def choose_classes(
    wanted: tuple[str, ...], names: Sequence[str], counts: Sequence[int], field: str = "sample.classes"
) -> list[int]:
    """Return the indices of the classes `wanted`, each given as its name, its index or `index:2`; none means all with
    images.

    A name takes precedence over an index, with a message. `counts` are the training images of each class. ValueError,
    with the name of the `field`, for a class that does not exist or was never trained.
    """
    if not wanted:
        empty = [name for name, count in zip(names, counts, strict=True) if not count]
        if empty:
            few = f"{len(empty):,} of {len(names):,}"
            print(f"sample: {few} classes have no images and are left out, the first of them {empty[0]!r}")
        return [kind for kind, count in enumerate(counts) if count]
    chosen = list(dict.fromkeys(_find_class(each, names, field) for each in wanted))
    for kind in chosen:
        if not counts[kind]:
            raise ValueError(f"{field}: {names[kind]!r} had no images in training, so it cannot be drawn")
    return chosen


def _find_class(wanted: str, names: Sequence[str], field: str) -> int:
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
            f"{field}: no class {wanted!r}: choose from {', '.join(known)} or the indices 0 to {len(names) - 1}"
        )
    if indices.get(wanted, same[0]) != same[0]:
        index = indices[wanted]
        print(f"sample: {wanted!r} is the class of that name; index:{index} is the class {names[index]!r}")
    return same[0]


def sources_of(settings: Sample, checkpoint: Checkpoint) -> dict[str, str]:
    """Return the hashes of what samples depend on beside their settings and the model: of the weights of a guide, and
    of a cache of images to start from."""
    sources = {}
    if settings.guide:
        sources["guide_sha256"] = _open_guide(settings.guide, checkpoint).ema_sha256
    if settings.start_from:
        sources["start_from_sha256"] = LatentCache(settings.start_from).manifest.sha256()
    return sources


def sample_folder(config: Config, run: Path, checkpoint: Checkpoint) -> Path:
    """Return the folder of the samples. Its name states the main settings, with a digest of all others and of what they
    depend on."""
    s = config.sample
    tag = f"{checkpoint.images_seen}-{s.scheduler}{s.steps}-guidance{s.guidance:g}-seed{s.seed}-{s.per_class}each"
    if s.precision != "auto":
        tag += f"-{s.precision}"
    shown = {"scheduler", "steps", "guidance", "seed", "per_class", "precision", *NOT_DRAWN}
    if others := s.model_dump(mode="json", exclude_defaults=True, exclude=shown):
        sources = sources_of(s, checkpoint).values()
        tag += "-" + digest([json.dumps(others["classes"] if [*others] == ["classes"] else others), *sources])[:8]
    return run / "samples" / tag


def summary(settings: Sample, *, without: Set[str] = frozenset()) -> list[str]:
    """Return texts such as `guidance 3` for a picture: of the main settings and those that are not the default."""
    others = settings.model_dump(mode="json", exclude_defaults=True, exclude={"per_class", "classes", *NOT_DRAWN})
    main = {name: getattr(settings, name) for name in ("scheduler", "steps", "guidance", "seed")}
    told = {name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in (main | others).items()}
    return [text if name == "scheduler" else f"{name} {text}" for name, text in told.items() if name not in without]


class Drawing:
    """Draws samples of a checkpoint, on the scale of the VAE's decoder."""

    def __init__(
        self, settings: Sample, checkpoint: Checkpoint, labels: NDArray[np.int64], *, model: Any = None
    ) -> None:
        """Take the classes of all samples, `labels`; `model` is that of another `Drawing`, which need not be loaded."""
        self._settings, self._checkpoint, self._labels = settings, checkpoint, labels
        self.device = pick_device()
        on_cpu = self.device.type == "cpu"
        self.batch_size = min(settings.batch_size, CPU_ROWS) if on_cpu else settings.batch_size  # samples at a time
        self.model = model or self._prepared(checkpoint)
        self.guide = self._prepared(_open_guide(settings.guide, checkpoint)) if settings.guide else None
        self._images = _Images(settings.start_from, checkpoint, labels) if settings.start_from else None
        by_class = settings.guidance_by_class
        self._scales = [by_class.get(name, settings.guidance) for name in checkpoint.state.classes]

    def _prepared(self, checkpoint: Checkpoint) -> Any:
        model = checkpoint.ema_model().to(self.device)
        return torch.compile(model) if self._settings.compile else model

    def batches(self, rows: NDArray[np.int64]) -> Iterator[Tensor]:
        """Yield the latents `B C h w`, on the CPU, of the samples with the indices `rows`, batch by batch.

        A CPU draws one batch on each core. A GPU draws batches of one size, which is halved where memory runs out: the
        last one is filled up, so that the bits of a sample do not depend on which others are missing.
        """
        if self.device.type != "cpu":
            every, left = len(self._labels), len(rows)
            size = -(-every // -(-every // self.batch_size))  # as many batches as needed, all equally large
            filled = np.concatenate([rows, np.repeat(rows[:1], -left % size)])
            for latents in halving(self, filled, size, "sample"):
                yield latents[: max(left, 0)]
                left -= len(latents)
            return
        size = self.batch_size
        batches = (rows[start : start + size] for start in range(0, len(rows), size))
        yield from in_threads(self, batches, process_count("auto"))

    def __call__(
        self,
        batch: NDArray[np.int64],
        *,
        indices: Sequence[int] | None = None,
        scales: Sequence[float] | None = None,
        **options: Any,
    ) -> Tensor:
        """Draw the samples `batch`, which index the classes: latents `B C h w`.

        The options are those of `draw_samples`; by default the index of a sample in its seed is that in `batch`, and
        the guidance scale that of its class.
        """
        normalization, labels = self._checkpoint.normalization, self._labels[batch]
        start = normalization.normalize(self._images.load(batch).to(self.device)) if self._images else None
        latents = draw_samples(
            self.model,
            self._checkpoint.state.noise,
            self._settings,
            torch.from_numpy(labels),
            indices=batch.tolist() if indices is None else indices,
            device=self.device,
            scales=[self._scales[label] for label in labels] if scales is None else scales,
            guide=self.guide,
            start=start,
            **options,
        )
        return normalization.denormalize(latents).cpu()


def _open_guide(place: Path, checkpoint: Checkpoint) -> Checkpoint:
    """Open the weaker model in `place`; ValueError if its predictions do not fit those of `checkpoint`."""
    guide, skipped = checkpoint_at(place, "sample.guide")
    for line in skipped:
        print(f"skipped {line}")
    pairs = {
        name: (getattr(guide.state, name), getattr(checkpoint.state, name)) for name in ("normalization", "classes")
    }
    pairs |= {"vae": (guide.state.vae.weights_sha256, checkpoint.state.vae.weights_sha256)}
    for name in ("schedule", "prediction", "zero_terminal_snr"):
        pairs[f"noise.{name}"] = getattr(guide.state.noise, name), getattr(checkpoint.state.noise, name)
    sizes = [each.model_config() for each in (guide, checkpoint)]
    for name in ("in_channels", "sample_size"):
        pairs[f"model {name}"] = sizes[0][name], sizes[1][name]
    for name, (theirs, ours) in pairs.items():
        if theirs != ours:
            raise ValueError(
                f"sample.guide: {guide.path}: its {name} is {brief(theirs)}, that of the run is {brief(ours)}: give a"
                " run that was trained on the same cache with the same noise process"
            )
    return guide


class _Images:
    """Reads the images that samples start from: of each class in turn, from the latent cache `path`."""

    def __init__(self, path: Path, checkpoint: Checkpoint, labels: NDArray[np.int64]) -> None:
        self._cache = cache = LatentCache(path)
        theirs, ours = cache.manifest.vae, checkpoint.state.vae
        if theirs.weights_sha256 != ours.weights_sha256:
            raise ValueError(f"sample.start_from: {path}: it was encoded by another VAE than the one of the run")
        size = checkpoint.model_config()["sample_size"]
        if cache.manifest.shape[1] != size:
            raise ValueError(
                f"sample.start_from: {path}: its latents are {cache.manifest.shape[1]} wide, those of the run {size}:"
                " encode images of the same size"
            )
        self._places = np.zeros(len(labels), dtype=np.int64)
        for kind in np.unique(labels):
            name = checkpoint.state.classes[kind]
            known = cache.manifest.classes.index(name) if name in cache.manifest.classes else None
            mine = np.flatnonzero(cache.labels == known) if known is not None else np.empty(0, dtype=np.int64)
            if not len(mine):
                raise ValueError(f"sample.start_from: {path}: it has no images of class {name!r}: set sample.classes")
            wanted = np.flatnonzero(labels == kind)
            self._places[wanted] = mine[np.arange(len(wanted)) % len(mine)]

    def load(self, batch: NDArray[np.int64]) -> Tensor:
        """Read the posterior means that the samples `batch` start from: latents `B C h w` as float32."""
        return torch.from_numpy(self._cache.means(self._places[batch]).astype(np.float32))


def _shard_rows(count: int) -> int:
    """Return the rows per shard: a power of two, small enough that several processes have work."""
    return max(1 << min(max((count // 64).bit_length() - 1, 4), 10), least_shard_rows(count))


def _plan(config: Config, run: Path, checkpoint: Checkpoint, count: int, sources: dict[str, str]) -> Plan:
    stored = checkpoint.model_config()
    weights = checkpoint.ema_sha256
    return Plan(
        store="mean",
        dtype=config.cache.dtype,
        views=("identity",),
        shape=(stored["in_channels"], stored["sample_size"], stored["sample_size"]),
        rows=count,
        shard_rows=_shard_rows(count),
        batch_size=config.sample.batch_size,
        classes=checkpoint.state.classes,
        data_source=f"samples of {run.resolve().name}",
        data_bytes=0,
        data_fingerprint=digest([weights, config.sample.model_dump_json(exclude=NOT_DRAWN), *sources.values()]),
        image_size=checkpoint.state.image_size,
        preprocessing="none: drawn from a model",
        vae=checkpoint.state.vae,
    )


def _description(config: Config, checkpoint: Checkpoint, labels: NDArray[np.int64]) -> dict[str, Any]:
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
