"""Defines the manifest and the other JSON records of a latent cache. Readers refuse a mismatch, naming the field."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from data.storage import checksum, publish_checked, read, sha256_file, strip_checksum

MANIFEST = "manifest.json"
FAILED = -1  # label of a row that has no latents; NO_CLASS is the label of an image without a class
Model = TypeVar("Model", bound=BaseModel)
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(gt=0, lt=2**63)]  # fits into int64


class Record(BaseModel):
    """Is the base of all JSON records: frozen, without unknown fields, NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def changed(self, **values: Any) -> Self:
        """Return a copy with other `values`, which are validated."""
        return type(self)(**{**dict(self), **values})


class VaeIdentity(Record):
    """Identifies the autoencoder that made the latents; `weights_sha256` covers names, types, shapes and values.

    `latents_mean` and `latents_std`, one value per latent channel, come from its config, if it has them.
    """

    source: str
    class_name: str
    weights_sha256: Digest
    scaling_factor: float
    shift_factor: float
    downsampling: PositiveInt  # pixels per latent position, along each side
    input_range: tuple[float, float] = (-1.0, 1.0)
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None


class Plan(Record):
    """Holds all that is known before encoding starts. Two encodes with the same plan write the same bytes."""

    format_version: Literal[1] = 1
    format: Literal["zarr", "webdataset"] = "zarr"
    store: Literal["moments", "mean"]  # posterior mean and std, or the mean alone
    dtype: Literal["float16", "float32"]
    views: tuple[Literal["identity", "flip"], ...] = Field(min_length=1)
    shape: tuple[PositiveInt, PositiveInt, PositiveInt]  # channels (2C for moments), h, w
    rows: Count
    shard_rows: Count
    batch_size: PositiveInt
    classes: tuple[str, ...]
    data_source: str
    data_fingerprint: Digest
    data_bytes: NonNegativeInt  # of all image files; 0 for rendered images
    image_size: PositiveInt
    preprocessing: str
    vae: VaeIdentity
    # of the VAE's arithmetic; older manifests lack this field
    precision: Literal["fp32", "fp16", "bf16"] = Field("fp32", exclude_if=lambda value: value == "fp32")

    @property
    def latent_channels(self) -> int:
        return self.shape[0] // 2 if self.store == "moments" else self.shape[0]

    @property
    def row_shape(self) -> tuple[int, int, int, int]:
        """Return the shape `V 2C h w` of a row."""
        return (len(self.views), *self.shape)

    @property
    def row_bytes(self) -> int:
        return math.prod(self.row_shape) * (2 if self.dtype == "float16" else 4)

    @property
    def shard_count(self) -> int:
        return -(-self.rows // self.shard_rows)

    def rows_of(self, shard: int) -> range:
        """Return the rows of shard number `shard`."""
        start = shard * self.shard_rows
        return range(start, min(start + self.shard_rows, self.rows))


class Failure(Record):
    """Records an image that has no latents, and why."""

    row: NonNegativeInt
    key: str
    reason: str


class File(Record):
    """Records a file of the cache; its name is relative to the cache folder."""

    file: str
    size: NonNegativeInt
    sha256: Digest

    @classmethod
    def of(cls, name: str, payload: bytes) -> Self:
        return cls(file=name, size=len(payload), sha256=hashlib.sha256(payload).hexdigest())

    def size_problem(self, folder: Path) -> str | None:
        """Return what is wrong with the size of the file in `folder`, or None."""
        where = folder / self.file
        if not where.is_file():
            return "missing"
        size = where.stat().st_size
        return None if size == self.size else f"{size} bytes, expected {self.size}"

    def problem(self, folder: Path) -> str | None:
        """Read the whole file in `folder` and return what is wrong with it, or None."""
        if sized := self.size_problem(folder):
            return sized
        same = sha256_file(folder / self.file) == self.sha256
        return None if same else "damaged: its SHA-256 is not the recorded one"


class Draft(Plan):
    """Records an unfinished cache: its plan, and the files that are known already."""

    files: tuple[File, ...]  # rows.jsonl; while it is being replaced, the new and the old one


class Shard(File):
    """Records one file of latents; the sums are over its committed rows, one per latent channel."""

    rows: PositiveInt
    failed: NonNegativeInt
    values: NonNegativeInt  # number of values per channel in the sums
    total: tuple[float, ...]
    squares: tuple[float, ...]  # sum of mean^2 + std^2: the second moment of posterior samples


class ShardRecord(Record):
    """Records a finished shard until the manifest is written."""

    shard: Shard
    failures: tuple[Failure, ...]
    digests: tuple[str, ...]  # of each row's image file; empty if the row failed or there is no file


class KeptShard(Record):
    """Records what a rewritten shard keeps: `rows`, their `places` in the old `file`, and `failures`."""

    file: File
    rows: tuple[int, ...]
    places: tuple[int, ...]
    digests: tuple[str, ...]  # one per row of `rows`
    failures: tuple[Failure, ...]


class Manifest(Plan):
    """Records a finished cache: its plan, its files, and mean and standard deviation per channel of the full set."""

    committed: PositiveInt
    failed: NonNegativeInt
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shards: tuple[Shard, ...]
    files: tuple[File, ...]  # all except the shards

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        shards = self.shards
        rules = {
            "rows = committed + failed": self.rows == self.committed + self.failed,
            "failed = the failures of all shards": self.failed == sum(shard.failed for shard in shards),
            "shards cover all rows": [s.rows for s in shards] == [len(self.rows_of(i)) for i in range(len(shards))]
            and len(shards) == self.shard_count,
            "one mean and one std per latent channel": len(self.mean) == len(self.std) == self.latent_channels,
        }
        for rule, holds in rules.items():
            if not holds:
                raise ValueError(f"it contradicts itself: {rule}")
        return self

    def plan(self) -> Plan:
        """Return the plan that the cache was written by."""
        return Plan(**{name: getattr(self, name) for name in Plan.model_fields})

    def sha256(self) -> str:
        """Return the last field of the manifest's file: the SHA-256 of all bytes before it."""
        return checksum(self.model_dump(mode="json"))

    def save(self, cache: Path) -> None:
        """Publish the manifest; its last field is the SHA-256 of all bytes before it."""
        publish_checked(cache / MANIFEST, self.model_dump(mode="json"))

    @classmethod
    def load(cls, cache: Path) -> Manifest:
        """Read the manifest of the cache folder `cache`; ValueError if it is missing or invalid."""
        file = cache / MANIFEST
        if not file.is_file():
            hint = "it is not finished: run encode again" if cache.is_dir() else "run encode first"
            raise ValueError(f"cache.path: no latent cache at {cache}: {hint}")
        return parse(cls, read(file), file, remedy=f"delete {cache} and create it again")


def parse(model: type[Model], payload: bytes, file: Path, *, remedy: str) -> Model:
    """Parse what `publish_checked` wrote to `file`; ValueError names the file, and the field or what to do."""
    text = strip_checksum(payload)
    if text is None:
        raise ValueError(f"{file}: damaged or edited: its SHA-256 is not the one in its last field: {remedy}")
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        what = f"{model.__name__.lower()} of format version 1"
        raise ValueError(f"{file}: {field + ': ' if field else ''}{message}: not a {what}") from None


def first_difference(expected: BaseModel, found: BaseModel, *, ignored: set[str]) -> tuple[str, Any, Any] | None:
    """Return the name and both values of the first field, except for `ignored`, in which `found` differs."""
    for name in (name for name in type(expected).model_fields if name not in ignored):
        ours, theirs = getattr(expected, name), getattr(found, name)
        if isinstance(ours, BaseModel):
            inner = first_difference(ours, theirs, ignored=ignored)
            if inner:
                return f"{name}.{inner[0]}", inner[1], inner[2]
        elif ours != theirs:
            return name, ours, theirs
    return None
