"""What a latent cache says of itself. Its readers check what they rely on and refuse a mismatch, naming the field."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from data.storage import checked, checksum, publish_checked, read, sha256_file

MANIFEST = "manifest.json"
FAILED = -1  # the label of a row that has no latents; NO_CLASS is that of an image without a class
Model = TypeVar("Model", bound=BaseModel)
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(gt=0, lt=2**63)]  # of what numpy counts


class Record(BaseModel):
    """What is kept as JSON: nothing unknown, nothing changed, no NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class VaeIdentity(Record):
    """The autoencoder whose latents these are; `weights_sha256` is over names, types, shapes and values.

    `latents_mean` and `latents_std`, one a latent channel, are those of its config, where that has them.
    """

    source: str
    class_name: str
    weights_sha256: Digest
    scaling_factor: float
    shift_factor: float
    downsampling: PositiveInt  # pixels to one latent position, along each side
    input_range: tuple[float, float] = (-1.0, 1.0)
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None


class Plan(Record):
    """All that is known before the first latent is written. Two encodes with one plan write the same bytes."""

    format_version: Literal[1] = 1
    format: Literal["zarr", "webdataset"] = "zarr"
    store: Literal["moments", "mean"]  # mean and std of the posterior, or the mean alone
    dtype: Literal["float16", "float32"]
    views: tuple[Literal["identity", "flip"], ...] = Field(min_length=1)
    shape: tuple[PositiveInt, PositiveInt, PositiveInt]  # channels (2C for moments), h, w
    rows: Count
    shard_rows: Count
    batch_size: PositiveInt
    classes: tuple[str, ...]
    data_source: str
    data_fingerprint: Digest
    data_bytes: NonNegativeInt  # of all image files; 0 where images are drawn
    image_size: PositiveInt
    preprocessing: str
    vae: VaeIdentity
    # in which the VAE computed; not in manifests that are older than the field
    precision: Literal["fp32", "fp16", "bf16"] = Field("fp32", exclude_if=lambda value: value == "fp32")

    @property
    def latent_channels(self) -> int:
        return self.shape[0] // 2 if self.store == "moments" else self.shape[0]

    @property
    def row_shape(self) -> tuple[int, int, int, int]:
        """V 2C h w."""
        return (len(self.views), *self.shape)

    @property
    def row_bytes(self) -> int:
        return math.prod(self.row_shape) * (2 if self.dtype == "float16" else 4)

    @property
    def shard_count(self) -> int:
        return -(-self.rows // self.shard_rows)

    def rows_of(self, shard: int) -> range:
        """The rows that shard number `shard` holds."""
        start = shard * self.shard_rows
        return range(start, min(start + self.shard_rows, self.rows))


class Failure(Record):
    """An image that has no latents, and why."""

    row: NonNegativeInt
    key: str
    reason: str


class File(Record):
    """A file of the cache, by its name in the cache's folder."""

    file: str
    size: NonNegativeInt
    sha256: Digest

    @classmethod
    def of(cls, name: str, payload: bytes) -> Self:
        return cls(file=name, size=len(payload), sha256=hashlib.sha256(payload).hexdigest())

    def size_problem(self, folder: Path) -> str | None:
        """What is wrong with the size of the file in `folder`; None when nothing is."""
        where = folder / self.file
        if not where.is_file():
            return "missing"
        size = where.stat().st_size
        return None if size == self.size else f"{size} bytes, {self.size} were written"

    def problem(self, folder: Path) -> str | None:
        """What is wrong with the file in `folder`, all of which is read; None when it is what was written."""
        if sized := self.size_problem(folder):
            return sized
        same = sha256_file(folder / self.file) == self.sha256
        return None if same else "damaged: its SHA-256 is not that of what was written"


class Draft(Plan):
    """A cache that is being written: the plan, and the files that are known already."""

    files: tuple[File, ...]  # rows.jsonl; where it is being replaced, as it is to be and as it was


class Shard(File):
    """One file of latents; the sums are over the C latent channels of its committed rows."""

    rows: PositiveInt
    failed: NonNegativeInt
    values: NonNegativeInt  # values a channel in the sums
    total: tuple[float, ...]
    squares: tuple[float, ...]  # sum of mean^2 + std^2: the second moment of latents drawn from the posterior


class ShardRecord(Record):
    """What the writer keeps of a finished shard until the manifest is assembled."""

    shard: Shard
    failures: tuple[Failure, ...]
    digests: tuple[str, ...]  # a row: of its image file's bytes; empty where it failed, or there is no file


class KeptShard(Record):
    """What stays of a shard that is written anew: its `rows`, from their `places` in `file`, and its `failures`."""

    file: File
    rows: tuple[int, ...]
    places: tuple[int, ...]
    digests: tuple[str, ...]  # as `rows`
    failures: tuple[Failure, ...]


class Manifest(Plan):
    """A finished cache: the plan, what came of it, and the full set's mean and standard deviation a channel."""

    committed: PositiveInt
    failed: NonNegativeInt
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shards: tuple[Shard, ...]
    files: tuple[File, ...]  # all others

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        shards = self.shards
        rules = {
            "rows = committed + failed": self.rows == self.committed + self.failed,
            "failed = the failures of all shards": self.failed == sum(shard.failed for shard in shards),
            "shards cover all rows": [s.rows for s in shards] == [len(self.rows_of(i)) for i in range(len(shards))]
            and len(shards) == self.shard_count,
            "one mean and one std a latent channel": len(self.mean) == len(self.std) == self.latent_channels,
        }
        for rule, holds in rules.items():
            if not holds:
                raise ValueError(f"it contradicts itself: {rule}")
        return self

    def plan(self) -> Plan:
        """What the cache was asked to be."""
        return Plan(**{name: getattr(self, name) for name in Plan.model_fields})

    def sha256(self) -> str:
        """Of all that stands in the manifest's file before its last field, which is this."""
        return checksum(self.model_dump(mode="json"))

    def save(self, cache: Path) -> None:
        """Publish the manifest; its last field is the SHA-256 of all that stands before it."""
        publish_checked(cache / MANIFEST, self.model_dump(mode="json"))

    @classmethod
    def load(cls, cache: Path) -> Manifest:
        """Read the manifest of the cache folder `cache`; ValueError when there is none or it is not one."""
        file = cache / MANIFEST
        if not file.is_file():
            hint = "it is not finished: run encode again" if cache.is_dir() else "run encode first"
            raise ValueError(f"cache.path: no latent cache at {cache}: {hint}")
        return parse(cls, read(file), file, remedy=f"delete {cache} and write it anew")


def parse(model: type[Model], payload: bytes, file: Path, *, remedy: str) -> Model:
    """The `model` that `publish_checked` wrote as `payload` of `file`; ValueError names the file, and the field or what
    to do."""
    text = checked(payload)
    if text is None:
        raise ValueError(f"{file}: damaged or edited: its SHA-256 is not the one it ends with: {remedy}")
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        what = f"{model.__name__.lower()} of format version 1"
        raise ValueError(f"{file}: {field + ': ' if field else ''}{message}: not a {what}") from None


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
