"""What a latent cache says of itself. Its readers check what they rely on and refuse a mismatch, naming the field."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from data.storage import publish_json

MANIFEST = "manifest.json"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class VaeIdentity(_Record):
    """The autoencoder whose latents these are; `weights_sha256` is over names, types, shapes and values."""

    source: str
    class_name: str
    weights_sha256: str
    scaling_factor: float
    shift_factor: float
    downsampling: int  # pixels to one latent position, along each side
    input_range: tuple[float, float] = (-1.0, 1.0)


class Plan(_Record):
    """All that is known before the first latent is written. Two encodes with one plan write the same bytes."""

    format_version: Literal[1] = 1
    format: Literal["zarr"] = "zarr"
    store: Literal["moments", "mean"]  # mean and std of the posterior, or the mean alone
    dtype: Literal["float16", "float32"]
    views: tuple[Literal["identity", "flip"], ...]
    shape: tuple[int, int, int]  # channels (2C for moments), h, w
    rows: int
    shard_rows: int
    batch_size: int
    classes: tuple[str, ...]
    data_source: str
    data_fingerprint: str
    image_size: int
    preprocessing: str
    vae: VaeIdentity

    @property
    def latent_channels(self) -> int:
        return self.shape[0] // 2 if self.store == "moments" else self.shape[0]


class Failure(_Record):
    """An image that has no latents, and why."""

    row: int
    key: str
    reason: str


class Shard(_Record):
    """`rows` rows from `start` on, in one file; the sums are over the C latent channels of its committed rows."""

    file: str
    start: int
    rows: int
    size: int
    sha256: str
    values: int  # values a channel in the sums
    total: tuple[float, ...]
    squares: tuple[float, ...]  # sum of mean^2 + std^2: the second moment of latents drawn from the posterior
    failures: tuple[Failure, ...]


class Manifest(Plan):
    """A finished cache: the plan, what came of it, and the full set's mean and standard deviation a channel."""

    committed: int
    failed: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shards: tuple[Shard, ...]

    @property
    def failures(self) -> list[Failure]:
        return [failure for shard in self.shards for failure in shard.failures]

    def save(self, cache: Path) -> None:
        publish_json(cache / MANIFEST, self.model_dump(mode="json"))

    @classmethod
    def load(cls, cache: Path) -> Manifest:
        """Read the manifest of the cache folder `cache`; ValueError when there is none or it is not one."""
        file = cache / MANIFEST
        if not file.is_file():
            hint = "it is not finished: run encode again" if cache.is_dir() else "run encode first"
            raise ValueError(f"cache.path: no latent cache at {cache}: {hint}")
        try:
            return cls.model_validate_json(file.read_bytes())
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"{file}: {field}: {first['msg']}: not a manifest of format version 1") from None


def first_difference(expected: BaseModel, found: BaseModel, *, ignored: set[str]) -> tuple[str, Any, Any] | None:
    """Name and both values of the first field of `expected`, but for `ignored`, that `found` holds differently."""
    for name in (name for name in type(expected).model_fields if name not in ignored):
        ours, theirs = getattr(expected, name), getattr(found, name)
        if isinstance(ours, BaseModel):
            inner = first_difference(ours, theirs, ignored=ignored)
            if inner:
                return f"{name}.{inner[0]}", inner[1], inner[2]
        elif ours != theirs:
            return name, ours, theirs
    return None
