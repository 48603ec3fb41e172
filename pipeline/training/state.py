"""Define the contents of a checkpoint's state.json."""

from __future__ import annotations

from typing import Any

from pydantic import Field, NonNegativeInt, PositiveInt

from data.cache.manifest import Manifest, Record, VaeIdentity
from pipeline.latents import Normalization
from pipeline.noise import NoiseProcess


class CacheIdentity(Record):
    """Identifies the cache of a run, which must be the same on resume: manifest fields, and the manifest's SHA-256."""

    rows: PositiveInt
    committed: NonNegativeInt
    store: str
    dtype: str
    views: tuple[str, ...]
    preprocessing: str
    data_fingerprint: str
    sha256: str

    @classmethod
    def of(cls, manifest: Manifest) -> CacheIdentity:
        fields = cls.model_fields.keys() - {"sha256"}
        return cls(**manifest.model_dump(include=fields), sha256=manifest.sha256())


class WindowState(Record):
    """Holds the sums of every process since the last log line (`pipeline.training.metrics.Window`)."""

    steps: NonNegativeInt
    sums: list[list[float]]


class RunState(Record):
    """Holds everything that a checkpoint stores besides tensors.

    `train` holds the settings that the weights depend on, `computer` what their exact bits may depend on; both are
    compared key by key when a run resumes."""

    step: NonNegativeInt
    images_seen: NonNegativeInt
    train: dict[str, Any]
    classes: tuple[str, ...]
    class_counts: tuple[NonNegativeInt, ...]  # images of each class
    without_class: float  # share of images that were trained on without their class
    noise: NoiseProcess
    normalization: Normalization
    image_size: PositiveInt
    vae: VaeIdentity
    cache: CacheIdentity
    widths: tuple[float, ...]  # of power-function averages; none if the average is exponential
    computer: dict[str, str | int]
    scaler: dict[str, Any] | None  # state of fp16's loss scaler
    window: WindowState | None = None  # only where training can resume
    sha256: dict[str, str] = Field(default_factory=dict)  # of every file of the checkpoint, by its name
