"""What a checkpoint says of its run: the contents of state.json, typed."""

from __future__ import annotations

from typing import Any

from pydantic import Field, NonNegativeInt, PositiveInt

from data.cache.manifest import Manifest, Record, VaeIdentity
from pipeline.latents import Normalization
from pipeline.noise import NoiseProcess


class CacheIdentity(Record):
    """What a run must find again in its cache: fields of the manifest, and `sha256` of all of it."""

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
    """The sums of every process since the last log line (`pipeline.training.metrics.Window`)."""

    steps: NonNegativeInt
    sums: list[list[float]]


class RunState(Record):
    """All that a run knows besides tensors. `train` are the settings that weights depend on, `computer` what bits may
    depend on: both are compared with those of a run that goes on, key by key."""

    step: NonNegativeInt
    images_seen: NonNegativeInt
    train: dict[str, Any]
    classes: tuple[str, ...]
    class_counts: tuple[NonNegativeInt, ...]  # images of each class
    without_class: float  # the share of images that were trained on without their class
    noise: NoiseProcess
    normalization: Normalization
    image_size: PositiveInt
    vae: VaeIdentity
    cache: CacheIdentity
    widths: tuple[float, ...]  # of power-function averages; none where the average is exponential
    computer: dict[str, str | int]
    scaler: dict[str, Any] | None  # of the loss in fp16
    window: WindowState | None = None  # there where training can go on
    sha256: dict[str, str] = Field(default_factory=dict)  # of every file of the checkpoint, by its name
