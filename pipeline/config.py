"""The configuration: one YAML file an experiment, typed and checked, with `--set key=value` on top."""

from __future__ import annotations

import difflib
import os
import re
import reprlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from data.sources.urls import check_url
from data.storage import read
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
            raise ValueError(f"{_BRIEF.repr(value)} is no colour that Pillow knows, such as {known}") from None
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


_BRIEF = reprlib.Repr()  # of a value in an error: a few aliases in YAML can stand for gigabytes
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother = 2, 80, 80


_TEXTS = (
    "name",
    "heldout",
    "weights",
    "source",
    "path",
    "init",
    "matte",
    "image_column",
    "label_column",
)  # keys whose values stay as they are written


class _Loader(yaml.SafeLoader):
    """YAML whose numbers are decimal (`010` is ten, `1e-4` is a number, `12:30` is none), whose names stay as they are
    written, and in which a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"line {node.start_mark.line + 1}: {key} is given twice")
        self.flatten_mapping(node)
        node.value = [(key, _as_written(key.value, value)) for key, value in node.value]
        return super().construct_mapping(node, deep)


def _as_written(key: str, node: yaml.Node) -> yaml.Node:
    """The value of `key` with words that stay as they are written: a folder may be called 007, a class no or 1e3."""
    if key in _TEXTS and isinstance(node, yaml.ScalarNode) and node.tag != _NULL:
        return yaml.ScalarNode(_TEXT, node.value)
    if key != "classes":
        return node
    entries = [node]
    if isinstance(node, yaml.SequenceNode):
        entries = node.value
    elif isinstance(node, yaml.ScalarNode) and not node.style:  # without brackets or quotes: 2, or cat, dog
        entries = [yaml.ScalarNode(_TEXT, part.strip()) for part in node.value.split(",") if part.strip()]
    texts = [yaml.ScalarNode(_TEXT, entry.value) if isinstance(entry, yaml.ScalarNode) else entry for entry in entries]
    return yaml.SequenceNode("tag:yaml.org,2002:seq", texts)


_TEXT, _NULL, _INT, _FLOAT = (f"tag:yaml.org,2002:{kind}" for kind in ("str", "null", "int", "float"))
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INT, re.compile(r"^[-+]?[0-9][0-9_]*$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"^[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?$|^[-+]?\.(?i:inf)$|^\.(?i:nan)$"),
    list("-+.0123456789"),
)
_Loader.add_constructor(_INT, lambda loader, node: int(node.value.replace("_", "")))


def load_config(file: Path, overrides: Iterable[str] = ()) -> Config:
    """Read `file`, apply `key=value` overrides (values are YAML), check everything.

    ValueError names the file, the field and the value of the first thing that is wrong.
    """
    if not file.is_file():
        raise ValueError(f"--config: no such file: {file}")
    try:
        values = yaml.load(read(file).decode(), Loader=_Loader)
    except RecursionError:
        raise ValueError(f"{file}: nested too deeply") from None
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: {' '.join(str(error).split())}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"{file}: a config is a mapping of sections, this is a {type(values).__name__}")
    values = {key: {} if value is None else value for key, value in values.items()}  # a section without keys
    for override in overrides:
        _override(values, override)
    values.setdefault("name", file.stem)
    return check_config(values, str(file))


def check_config(values: Mapping[str, Any], where: str) -> Config:
    """The config of these sections; ValueError names what is wrong first, `where` they are from, and the field."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{where}: {_explain(error.errors()[0])}") from None


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


def dump_config(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"--set {override}: give key=value, such as train.lr=1e-3")
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ValueError(f"--set {override}: {section} is not a section")
    try:
        values.update(_given(last, text))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"--set {override}: {' '.join(str(error).split())}") from None


def _given(key: str, text: str) -> dict[str, Any]:
    """`key` and its value on the command line, which is YAML but for two things: a path may hold what YAML gives a
    meaning, unless it is quoted, and a value that begins with # is no remark."""
    literal = text.startswith("#") or (key in _TEXTS and text not in ("", "~", "null") and text[0] not in "'\"")
    loader = _Loader("" if literal else text)
    value = yaml.ScalarNode(_TEXT, text) if literal else loader.get_single_node() or yaml.ScalarNode(_NULL, "")
    return loader.construct_document(yaml.MappingNode("tag:yaml.org,2002:map", [(yaml.ScalarNode(_TEXT, key), value)]))


def _explain(error: Any) -> str:
    # a section, a field, and a place in it; the rest is pydantic's name for one of several types
    loc = [part for depth, part in enumerate(error["loc"]) if depth < 2 or isinstance(part, int)]
    *parents, last = [str(part) for part in loc] or [""]
    field = ".".join([*parents, last])
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(last, _fields(parents), n=1, cutoff=0.5)
        return f"unknown key {field}" + (f": did you mean {'.'.join([*parents, close[0]])}?" if close else "")
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] != "value_error":
        return f"{field} = {_BRIEF.repr(error['input'])}: {message}"
    return f"{field}: {message}" if field else message


def _fields(parents: list[str]) -> list[str]:
    section: Any = Config
    for parent in parents:
        section = section.model_fields[parent].annotation
    return list(section.model_fields)
