"""The typed and checked configuration of an experiment: one YAML file, with `--set key=value` overrides."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from data.cache.manifest import Record
from data.sources.urls import check_url
from data.text import brief
from pipeline.compatibility import check_noise, check_sampler, check_sampler_options, check_weighting, check_width

Seed = Annotated[int, Field(ge=0, lt=2**63)]
LocalPath = Annotated[Path, AfterValidator(lambda path: Path(os.path.expanduser(path)))]
PathOrUrl = Annotated[str, AfterValidator(lambda place: check_url(os.path.expanduser(place)))]  # or a short name


class Section(Record):
    """Holds the keys of one section of a config."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class Data(Section):
    """Where the images come from, and how they are read (docs/data.md)."""

    source: PathOrUrl = "solids"
    """Folder, archive, Parquet or label file, glob pattern or URL of the images; solids: render a
    synthetic data set."""
    image_size: PositiveInt = 64
    """Width and height of the square images, in pixels: others are cropped and resized."""
    count: PositiveInt = 6_000
    """Number of images to render; only for source: solids."""
    seed: Seed = 0
    """Random seed of the rendered images; only for source: solids."""
    image_column: str | None = None
    """Column (Parquet) or file suffix (tar) that holds the images; null: detect it, needed if there are several."""
    label_column: str | None = None
    """Column that holds the class (Parquet files and label files); null: detect it by its usual names."""
    heldout: float | str | None = None
    """Images held out from training: a fraction such as 0.02, or a path or URL of other images; null: none."""
    matte: str = "#ffffff"
    """Background colour for transparent images: any colour that Pillow knows, stored as #rrggbb."""

    @field_validator("heldout", mode="before")
    @classmethod
    def _fraction_or_source(cls, value: Any) -> Any:
        try:
            share = float(value)
        except (TypeError, ValueError):
            return check_url(os.path.expanduser(value)) if isinstance(value, str) else value
        if not 0 < share < 1:
            raise ValueError(
                f"{value}: give a fraction above 0 and below 1, such as 0.02; for a folder of that name give ./{value}"
            )
        return share

    @field_validator("matte", mode="before")
    @classmethod
    def _color(cls, value: Any) -> str:
        from PIL import ImageColor

        if value is None:
            raise ValueError("no colour is given; a colour that begins with # needs quotes in YAML, as '#FFF'")
        try:
            rgb = ImageColor.getrgb(str(value))
        except ValueError:
            known = "white, '#FFF' or rgb(255, 0, 0)"
            raise ValueError(f"{brief(value)} is not a colour that Pillow knows, such as {known}") from None
        if len(rgb) != 3 or max(rgb) > 255:
            raise ValueError(f"{value!r}: give only red, green and blue, each up to 255: the background is opaque")
        return "#{:02x}{:02x}{:02x}".format(*rgb)


class Vae(Section):
    """The frozen autoencoder that maps images to latents and back."""

    source: PathOrUrl = "bundled"
    """bundled: the VAE that comes with the project; or a folder in diffusers' format, or a hub id
    (owner/name[/vae])."""


class Cache(Section):
    """Where and how the encoded latents are stored (docs/cache-format.md)."""

    path: LocalPath = Path("caches/solids")
    """Folder of the latent cache."""
    format: Literal["zarr", "webdataset"] = "zarr"
    """File format of the shards: zarr arrays or webdataset tars."""
    store: Literal["moments", "mean"] = "moments"
    """What is stored per image: moments: mean and std of the VAE's posterior; mean: only the mean, half the size."""
    dtype: Literal["float16", "float32"] = "float16"
    """Number type of the stored latents."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Precision of the VAE; auto: fp32 on a CPU; on a GPU the first of fp16, bf16 with at most 1 % error, else fp32."""
    flip: bool = True
    """Also store the latents of the mirrored image, because flipping a latent is not exact."""
    batch_size: PositiveInt = 64
    """Images per forward pass of the VAE."""
    workers: NonNegativeInt | Literal["auto"] = "auto"
    """Worker processes that read images and, on a CPU, encode them; auto: one per core; 0: only the main process."""
    max_failures: NonNegativeInt = 100
    """Encode stops when more images than this are unreadable."""


Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class Model(Section):
    """The U-Net: each level halves the resolution, and the bottleneck works on the lowest one."""

    patch_size: PositiveInt = 1
    """Side of the square of latent positions merged into one position of the U-Net."""
    channels: tuple[PositiveInt, ...] = Field((64, 128, 256), min_length=1)
    """Channels of each level, highest resolution first; the number of entries is the number of levels."""
    blocks: PositiveInt = 2
    """Residual blocks per level of the down path; the up path has one more per level."""
    bottleneck: Literal["transformer", "resnet"] = "transformer"
    """Type of the blocks at the lowest resolution."""
    depth: PositiveInt = 4
    """Number of blocks in the bottleneck."""
    head_width: PositiveInt = 64
    """Channels per attention head; must divide the channels of the lowest level."""
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    """Dropout probability in all blocks; 0: no dropout."""


class Noise(Section):
    """The diffusion process: noise schedule, prediction target, and distribution of the training timesteps."""

    schedule: Literal["linear", "scaled_linear", "cosine", "flow"] = "flow"
    """Noise schedule; flow: flow matching."""
    prediction: Literal["epsilon", "x0", "v", "flow"] = "flow"
    """What the model predicts: noise, clean latent, v, or for flow (and only there) noise - latent."""
    timesteps: Literal["uniform", "logit_normal"] = "logit_normal"
    """Distribution of the timesteps in training."""
    zero_terminal_snr: bool = False
    """Rescale a discrete schedule so that its last step is pure noise."""
    shift: PositiveFloat = 1.0
    """Timestep shift of schedule flow; 1: none; above 1: more steps at high noise, for large or smooth latents."""

    @model_validator(mode="after")
    def _pairs(self) -> Noise:
        check_noise(self.schedule, self.prediction, self.zero_terminal_snr, self.shift)
        return self


class Train(Section):
    """Training (docs/training.md). All lengths and intervals are in images seen, not in steps or epochs."""

    images: PositiveInt = 40_000
    """Length of the run, in images seen."""
    init: LocalPath | None = None
    """Run folder or checkpoint to fine-tune: start from its averaged weights; null: start from random weights."""
    batch_size: PositiveInt | Literal["auto"] = 16
    """Images per optimizer step, over all processes; auto: as many as fit into memory, with at least 1000 steps."""
    accumulate: PositiveInt = 1
    """Gradient accumulation: micro-batches per step and process, to save memory."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    compile: bool = False
    """Use torch.compile: faster steps after about a minute of compilation."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Mixed precision; auto: bf16 where faster, else fp32."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for matrices and kernels, AdamW for the rest."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate, for both optimizers."""
    schedule: Literal["constant", "cosine", "trapezoid", "inverse_sqrt"] = "trapezoid"
    """Learning-rate schedule after the warm-up; trapezoid: constant, then linear decay to 0."""
    warmup: NonNegativeInt = 1_000
    """Length of the linear learning-rate warm-up, in images; 0: none."""
    decay: float = Field(0.4, ge=0.0, le=1.0)
    """trapezoid: fraction of the run, at its end, with linear decay to 0."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay of matrices and kernels; 0: none."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's decay rates of the two moment estimates."""
    grad_clip: PositiveFloat = 1.0
    """Gradients are scaled down to at most this norm over all parameters."""
    weighting: Literal["plain", "min_snr", "learned"] = "plain"
    """Loss weight per noise level; plain: 1; min_snr: min(SNR, 5) in x0; learned: the inverse of a learned error."""
    normalization: Literal["cache", "vae"] = "cache"
    """How latents are normalised: cache: per-channel mean and std of the training set; vae: the VAE's
    scaling factor."""
    access: Literal["auto", "resident", "memory", "mapped", "streamed"] = "auto"
    """How latents are read: held on the device, in main memory, memory-mapped, or streamed; auto: the
    first that fits."""
    label_dropout: float = Field(0.1, ge=0.0, le=1.0)
    """Probability that a label becomes the null class, for guidance."""
    ema: Literal["exponential", "power"] = "exponential"
    """Weight average: EMA, or two power-function averages."""
    ema_halflife: PositiveInt = 2_000
    """exponential: half-life of the EMA, in images."""
    ema_widths: tuple[float, float] = (0.05, 0.10)
    """power: standard deviations, as fractions of the run."""
    seed: Seed = 0
    """Random seed of weights, image order, noise and timesteps."""
    log_every: PositiveInt = 800
    """Interval of log lines, in images."""
    preview_every: PositiveInt = 10_000
    """Interval of preview images and of the held-out loss, in images."""
    eval_every: NonNegativeInt = 0
    """Interval of a quick score of 500 samples, in images; 0: never, as it takes time."""
    checkpoint_every: PositiveInt = 10_000
    """Interval of checkpoints, in images."""
    keep: PositiveInt = 2
    """Number of newest checkpoints to keep."""
    keep_every: NonNegativeInt = 0
    """Also keep every n-th checkpoint; 0: none."""
    tracker: Literal["none", "wandb", "tensorboard"] = "none"
    """Experiment tracker, besides log.jsonl."""

    @model_validator(mode="after")
    def _parts(self) -> Train:
        if self.batch_size != "auto" and self.batch_size % self.accumulate:
            raise ValueError(f"accumulate = {self.accumulate} does not divide batch_size = {self.batch_size}")
        if self.optimizer == "muon" and self.precision == "fp16":
            raise ValueError(
                "optimizer muon does not work with precision fp16, whose loss scale supports one optimizer: use bf16"
            )
        if self.warmup > self.images:
            raise ValueError(f"warmup = {self.warmup} is longer than the run, images = {self.images}: shorten it")
        if self.schedule == "inverse_sqrt" and not self.warmup:
            raise ValueError("schedule inverse_sqrt decays from the end of the warm-up: give warmup, such as 10000")
        for width in self.ema_widths:
            check_width(width, "ema_widths")
        return self


class Sample(Section):
    """How samples are drawn from a trained model, also for previews and evaluation."""

    scheduler: Literal["ddpm", "ddim", "euler", "euler_ancestral", "heun", "dpm++", "unipc"] = "unipc"
    """Sampler (docs/sampling.md); ddpm and ddim: not for schedule flow."""
    steps: PositiveInt = 20
    """Sampling steps; for the discrete schedules at most 1000."""
    eta: float = Field(0.0, ge=0.0, le=1.0)
    """ddim and euler: share of the noise that each step replaces; 0: none; 1: as in ddpm and euler_ancestral."""
    shift: PositiveFloat | None = None
    """Timestep shift of schedule flow in sampling; null: that of training."""
    guidance: NonNegativeFloat = 2.0
    """Guidance scale; 1: conditional model; 0: unconditional model."""
    guidance_by_class: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    """Guidance scales of single classes, by name; the others take guidance."""
    guidance_form: Literal["cfg", "apg", "cfg_zero", "cfg++"] = "cfg"
    """How guidance is computed (docs/sampling.md); cfg_zero: for schedule flow; cfg++: not for heun, dpm++, unipc."""
    guidance_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How guidance changes over the steps, with the same mean; linear and cosine grow from none at pure noise."""
    guidance_interval: tuple[NonNegativeFloat, NonNegativeFloat] | None = None
    """Noise levels sigma / alpha between which there is guidance, such as [0.2, 3]; null: everywhere."""
    guidance_rescale: float = Field(0.0, ge=0.0, le=1.0)
    """How far the standard deviation of a guided prediction is moved back to that of the conditional one; 0: not."""
    guide: LocalPath | None = None
    """Run folder or checkpoint of a weaker model that guides instead of the unconditional one; null: none."""
    start: float = Field(1.0, gt=0.0, le=1.0)
    """Time at which sampling starts; 1: pure noise; below: noise is added to the images of start_from."""
    start_from: LocalPath | None = None
    """Latent cache of images to start from, in turn the images of each class; needs start below 1."""
    per_class: PositiveInt = 10
    """Samples per class."""
    classes: tuple[str, ...] = ()
    """Classes to draw: names or indices; a name takes precedence, so write index:2 for index 2 if a class
    is named 2; empty: all classes."""
    seed: Seed = 0
    """Random seed of the initial noise; each sample depends only on the seed, its class and its number."""
    batch_size: PositiveInt = 256
    """Samples drawn at a time on a GPU at most, halved where memory runs out; a CPU draws at most 32 on each core."""
    compile: bool = False
    """Use torch.compile: faster steps after about a minute of compilation."""
    image_format: Literal["png", "webp", "jpeg"] = "png"
    """Format of the image files; png and webp are lossless; jpeg: quality 95, without colour subsampling."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", exclude_if=lambda value: value == "auto")
    """Precision of the model; auto: bf16 on a GPU that supports it, else fp32 (same bits for any batch
    size on a CPU)."""

    def check(self, schedule: str) -> None:
        """Raise ValueError if these settings cannot draw from a model trained on the noise schedule `schedule`."""
        form, shift = self.guidance_form, self.shift
        check_sampler(self.scheduler, schedule, steps=self.steps, start=self.start, shift=shift, form=form)

    @model_validator(mode="after")
    def _parts(self) -> Sample:
        form = self.guidance_form
        check_sampler_options(self.scheduler, eta=self.eta, form=form)
        if (self.start < 1) != (self.start_from is not None):
            raise ValueError(
                f"start = {self.start:g} and start_from = {self.start_from} belong together: give a start below 1, such"
                " as 0.6, and a latent cache of images"
            )
        if form in ("cfg_zero", "cfg++") and self.guide is not None:
            raise ValueError(f"guide does not work with guidance_form {form}: use cfg or apg")
        if form in ("apg", "cfg++") and self.guidance_rescale:
            raise ValueError(f"guidance_rescale does not work with guidance_form {form}: use cfg or cfg_zero")
        if self.guidance_interval and not self.guidance_interval[0] < self.guidance_interval[1]:
            low, high = self.guidance_interval
            raise ValueError(
                f"guidance_interval = [{low:g}, {high:g}]: give the lower noise level first, such as [0.2, 3]"
            )
        return self


class Evaluate(Section):
    """How samples are measured against real images (docs/evaluation.md)."""

    network: Literal["auto", "effnet_lite0", "inception", "dinov2"] = "auto"
    """Feature network; auto: inception or dinov2 if its weights are on this machine, else effnet_lite0 (no
    download)."""
    weights: LocalPath | None = None
    """File with the network's weights; null: use the cached or published file."""
    images: PositiveInt = 5_000
    """Number of samples to draw, the same number of each class."""
    reference: Literal["training", "heldout"] = "training"
    """Real images that samples are compared with."""


class Config(Section):
    """One experiment: all sections of a config file."""

    name: str = "solids"
    """Name of the experiment and of its run folder; default: the config file's name without .yaml."""
    data: Data = Data()
    """Where the images come from."""
    vae: Vae = Vae()
    """The frozen autoencoder."""
    cache: Cache = Cache()
    """Where and how latents are stored."""
    model: Model = Model()
    """The U-Net."""
    noise: Noise = Noise()
    """The diffusion process."""
    train: Train = Train()
    """Training."""
    sample: Sample = Sample()
    """Sampling."""
    evaluate: Evaluate = Evaluate()
    """Evaluation."""

    @model_validator(mode="after")
    def _sections_fit(self) -> Config:
        if self.evaluate.reference == "heldout" and self.data.heldout is None:
            raise ValueError("evaluate.reference = heldout: there are no held-out images: give data.heldout")
        check_weighting(self.train.weighting, self.noise.zero_terminal_snr)
        self.sample.check(self.noise.schedule)
        return self


def check_outputs(config: Config, run: Path) -> None:
    """Raise ValueError if the cache or the run is inside the image folder, where its files could be read as images."""
    images = Path(config.data.source).expanduser()
    if not images.is_dir():  # an archive, a pattern, a URL or solids
        return
    for name, path in (("cache.path", config.cache.path), ("--run", run)):
        if path.expanduser().resolve().is_relative_to(images.resolve()):
            raise ValueError(
                f"{name} = {path}: it is inside data.source = {config.data.source}, where written files would be"
                " mistaken for images: choose another folder"
            )


def heldout_path(config: Config) -> Path | None:
    """Return the cache folder of the held-out images, which is beside `cache.path`; None if none are held out."""
    return config.cache.path.with_name(config.cache.path.name + "-heldout") if config.data.heldout else None


def features_path(config: Config) -> Path:
    """Return the folder of the images' evaluation features, which is beside `cache.path`."""
    return config.cache.path.with_name(config.cache.path.name + "-features")


def cache_configs(config: Config) -> list[Config]:
    """Return one config per cache: for the training images and, if there are any, for the held-out images."""
    heldout = heldout_path(config)
    others = [config.changed(cache=config.cache.changed(path=heldout))] if heldout else []
    return [config, *others]
