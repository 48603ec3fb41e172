"""The configuration: one YAML file an experiment, typed and checked, with `--set key=value` on top."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from data.sources.urls import check_url
from data.text import brief
from pipeline.compatibility import check_noise, check_sampler, check_weighting, check_width

Seed = Annotated[int, Field(ge=0, lt=2**63)]
LocalPath = Annotated[Path, AfterValidator(lambda path: Path(os.path.expanduser(path)))]
Place = Annotated[str, AfterValidator(lambda place: check_url(os.path.expanduser(place)))]  # a path, a URL or a name


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Data(Section):
    """The images: a folder, archives or a URL (docs/data.md), or `solids`, which are drawn from a seed."""

    source: Place = "solids"
    image_size: PositiveInt = 64
    count: PositiveInt = 6_000  # of solids; a folder has as many as it has
    seed: Seed = 0  # of solids
    image_column: str | None = None  # the column of images of Parquet files, or the suffix of those of tars, of several
    label_column: str | None = None  # the column of classes of Parquet files and lists, where it is called otherwise
    heldout: float | str | None = None  # images never trained on: a share such as 0.02, or a path or URL of others
    matte: str = "#ffffff"  # colour behind transparent images: any that Pillow knows, kept as #rrggbb

    @field_validator("heldout", mode="before")
    @classmethod
    def _share_or_place(cls, value: Any) -> Any:
        try:
            share = float(value)
        except (TypeError, ValueError):
            return check_url(os.path.expanduser(value)) if isinstance(value, str) else value
        if not 0 < share < 1:
            raise ValueError(
                f"{value}: a share is above 0 and below 1, such as 0.02; a folder of that name is ./{value}"
            )
        return share

    @field_validator("matte", mode="before")
    @classmethod
    def _color(cls, value: Any) -> str:
        from PIL import ImageColor

        if value is None:
            raise ValueError("no colour is there; one that begins with # needs quotes in YAML, as '#FFF'")
        try:
            rgb = ImageColor.getrgb(str(value))
        except ValueError:
            known = "white, '#FFF' or rgb(255, 0, 0)"
            raise ValueError(f"{brief(value)} is no colour that Pillow knows, such as {known}") from None
        if len(rgb) != 3 or max(rgb) > 255:
            raise ValueError(f"{value!r}: give red, green and blue alone, up to 255: what lies behind is opaque")
        return "#{:02x}{:02x}{:02x}".format(*rgb)


class Vae(Section):
    """The frozen autoencoder: `bundled`, a folder in diffusers' format or a hub id, as owner/name or owner/name/vae."""

    source: Place = "bundled"


class Cache(Section):
    """Where and how latents are kept."""

    path: LocalPath = Path("caches/solids")
    format: Literal["zarr", "webdataset"] = "zarr"
    store: Literal["moments", "mean"] = "moments"
    dtype: Literal["float16", "float32"] = "float16"
    # in which the VAE computes; auto: on a GPU fp16, or else bf16, if latents are within 1 % of those in fp32
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    flip: bool = True  # also keep the latents of the mirrored image: a latent itself cannot be mirrored
    batch_size: PositiveInt = 64
    # processes that read images ahead of the VAE and, on a CPU, encode them; auto: one a core; 0: none but this one
    workers: NonNegativeInt | Literal["auto"] = "auto"
    max_failures: NonNegativeInt = 100  # images that may be unreadable before encode gives up


Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class Model(Section):
    """The U-Net; its levels halve the resolution, the bottleneck works on the lowest."""

    patch_size: PositiveInt = 1  # latent positions a side that become one position of the network
    channels: tuple[PositiveInt, ...] = Field((64, 128, 256), min_length=1)
    blocks: PositiveInt = 2  # residual blocks a level on the way down
    bottleneck: Literal["transformer", "resnet"] = "transformer"
    depth: PositiveInt = 4  # blocks in the bottleneck
    head_width: PositiveInt = 64  # channels an attention head
    mlp: Literal["gelu", "swiglu"] = "gelu"
    qk_norm: bool = False
    dropout: float = Field(0.0, ge=0.0, lt=1.0)


class Noise(Section):
    """What is learnt: the noise schedule, the target of the prediction, and how timesteps are drawn."""

    schedule: Literal["linear", "scaled_linear", "cosine", "flow"] = "flow"
    prediction: Literal["epsilon", "x0", "v", "flow"] = "flow"
    timesteps: Literal["uniform", "logit_normal"] = "logit_normal"
    zero_terminal_snr: bool = False  # rescale a discrete schedule until its last step is pure noise
    shift: PositiveFloat = 1.0  # flow: above 1, more timesteps with much noise, for large or smooth latents

    @model_validator(mode="after")
    def _pairs(self) -> Noise:
        check_noise(self.schedule, self.prediction, self.zero_terminal_snr, self.shift)
        return self


class Train(Section):
    """Training on one clock: images seen. All lengths below are in images. docs/training.md says more of most keys."""

    images: PositiveInt = 40_000
    init: LocalPath | None = None  # a run or checkpoint whose averaged weights this run begins with: fine-tuning
    batch_size: PositiveInt | Literal["auto"] = 16  # of all processes; auto: as many as there is memory for
    accumulate: PositiveInt = 1  # parts in which a process takes its share of a batch, to need less memory
    gradient_checkpointing: bool = False  # less memory for a second forward pass
    compile: bool = False
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 where that is quicker
    optimizer: Literal["adamw", "muon", "muon_all"] = "adamw"
    lr: PositiveFloat = 1e-3
    schedule: Literal["constant", "cosine", "trapezoid", "inverse_sqrt"] = "trapezoid"  # of the learning rate
    warmup: NonNegativeInt = 1_000
    decay: float = Field(0.4, ge=0.0, le=1.0)  # trapezoid: share of the run, at its end, in which the rate falls to 0
    weight_decay: NonNegativeFloat = 0.01
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    grad_clip: PositiveFloat = 1.0
    weighting: Literal["plain", "min_snr", "learned"] = "plain"  # of the loss at each noise level
    direction: NonNegativeFloat = 0.0  # weight of 1 - the cosine between prediction and target
    contrastive: NonNegativeFloat = 0.0  # weight of the error to the target of another image, which is to be large
    normalization: Literal["cache", "vae"] = "cache"  # by the full set's mean and std, or the VAE's scaling factor
    access: Literal["auto", "resident", "memory", "mapped", "streamed"] = "auto"  # see docs/training.md
    label_dropout: float = Field(0.1, ge=0.0, le=1.0)  # share of labels replaced by the null class
    ema: Literal["exponential", "power"] = "exponential"
    ema_halflife: PositiveInt = 2_000  # exponential
    ema_widths: tuple[float, float] = (0.05, 0.10)  # power: standard deviations, as shares of the run
    seed: Seed = 0
    log_every: PositiveInt = 800
    preview_every: PositiveInt = 10_000
    eval_every: NonNegativeInt = 0  # a quick score of 500 samples; 0: never, for drawing them takes time
    checkpoint_every: PositiveInt = 10_000
    keep: PositiveInt = 2  # newest checkpoints that stay
    keep_every: NonNegativeInt = 0  # every n-th checkpoint that stays, too; 0: none
    tracker: Literal["none", "wandb", "tensorboard"] = "none"

    @model_validator(mode="after")
    def _parts(self) -> Train:
        if self.batch_size != "auto" and self.batch_size % self.accumulate:
            raise ValueError(f"accumulate = {self.accumulate} does not divide batch_size = {self.batch_size}")
        if self.optimizer == "muon" and self.precision == "fp16":
            raise ValueError(
                "optimizer muon does not go with precision fp16, whose loss scale serves one optimizer: bf16"
            )
        if self.warmup > self.images:
            raise ValueError(f"warmup = {self.warmup} is longer than the run, images = {self.images}: warm up for less")
        if self.schedule == "inverse_sqrt" and not self.warmup:
            raise ValueError("schedule inverse_sqrt falls from the end of the warm-up: give warmup, such as 10000")
        for width in self.ema_widths:
            check_width(width, "ema_widths")
        return self


class Sample(Section):
    """What is drawn from a trained model."""

    scheduler: Literal["ddpm", "ddim", "euler"] = "euler"
    steps: PositiveInt = 25
    guidance: NonNegativeFloat = 2.0  # 1 is the conditional model, 0 the unconditional one
    per_class: PositiveInt = 10
    classes: tuple[str, ...] = ()  # names as they are written, or indices as 2 or index:2; none means all
    seed: Seed = 0
    batch_size: PositiveInt = 50
    # auto: bf16 on a GPU that computes it; fp32 on a CPU, where bits would depend on the size of a batch
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", exclude_if=lambda value: value == "auto")


class Evaluate(Section):
    """What samples are measured with, and how many (docs/evaluation.md)."""

    # auto: inception or dinov2, whose weights are on this machine, else effnet_lite0, which needs no download
    network: Literal["auto", "effnet_lite0", "inception", "dinov2"] = "auto"
    weights: LocalPath | None = None  # a file with the network's weights; else they are downloaded once
    images: PositiveInt = 5_000  # samples, as many of each class
    reference: Literal["training", "heldout"] = "training"  # real images that they are compared with


class Config(Section):
    """One experiment."""

    name: str = "solids"
    data: Data = Data()
    vae: Vae = Vae()
    cache: Cache = Cache()
    model: Model = Model()
    noise: Noise = Noise()
    train: Train = Train()
    sample: Sample = Sample()
    evaluate: Evaluate = Evaluate()

    @model_validator(mode="after")
    def _sections_fit(self) -> Config:
        if self.evaluate.reference == "heldout" and self.data.heldout is None:
            raise ValueError("evaluate.reference = heldout: no images are held out: give data.heldout")
        check_weighting(self.train.weighting, self.noise.zero_terminal_snr)
        check_sampler(self.sample.scheduler, self.sample.steps, self.noise.schedule)
        return self


def check_outputs(config: Config, run: Path) -> None:
    """ValueError when the cache or the run would lie among the images, which the next encode would take for images."""
    images = Path(config.data.source).expanduser()
    if not images.is_dir():  # an archive, a pattern, a URL or solids
        return
    for name, path in (("cache.path", config.cache.path), ("--run", run)):
        if path.expanduser().resolve().is_relative_to(images.resolve()):
            raise ValueError(
                f"{name} = {path}: it lies inside data.source = {config.data.source}, where what is written would be"
                " taken for images: choose a folder elsewhere"
            )


def heldout_path(config: Config) -> Path | None:
    """Where the latents of the held-out images are kept: beside the cache."""
    return config.cache.path.with_name(config.cache.path.name + "-heldout") if config.data.heldout else None


def features_path(config: Config) -> Path:
    """Where features of the images of the caches are kept: beside them."""
    return config.cache.path.with_name(config.cache.path.name + "-features")


def parts_of(config: Config) -> list[Config]:
    """`config` once for each of its caches: that of the images of training and, where some are held out, theirs."""
    heldout = heldout_path(config)
    others = [config.model_copy(update={"cache": config.cache.model_copy(update={"path": heldout})})] if heldout else []
    return [config, *others]
