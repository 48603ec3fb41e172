"""Draw one picture of a grid of samples from the same noise, in which one setting changes from row to row and another
from column to column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from data.storage import probe
from data.text import counted, digest
from pipeline.compatibility import usable_guidance
from pipeline.config import Config, Sample
from pipeline.config_file import override_config
from pipeline.device import halving, pick_device
from pipeline.pictures import grid, save_png
from pipeline.training.checkpoint import Checkpoint
from pipeline.vae import FrozenVae
from stages.sample import (
    NOT_DRAWN,
    Drawing,
    choose_classes,
    require_checkpoint,
    resolve_sample_settings,
    sources_of,
    summary,
)

SMALLEST = 96  # pixels of an image in a picture
MAX_VALUES = 100  # more rows or columns would be a picture of gigabytes
_DEFAULTS = {"guidance": "1,2,3,4", "steps": "5,10,20,50", "seed": "0,1,2,3"}
_WITHOUT_EFFECT = NOT_DRAWN | {"per_class", "guidance_by_class"}  # on a cell


@dataclass(frozen=True)
class Axis:
    """The values of one key of the section `sample` along an axis: as `--set` takes them, or of classes the numbers."""

    key: str
    values: list[str]
    captions: list[str]


@dataclass(frozen=True)
class Cell:
    """How the sample in a cell is drawn; its guidance scale is `scale`."""

    settings: Sample
    label: int
    scale: float


def sweep(config: Config, run: Path, rows: str | None, columns: str | None, to: Path | None = None) -> Path:
    """Draw a sample for each pair of a value in `rows` and one in `columns`, such as `guidance=1,2,3`.

    Each sample has the index 0 and is the one that `sample` draws first with these settings and this class alone.
    Return the path of the picture: `to`, or one in the run's folder. ValueError for a value that is not possible.
    """
    if to and to.suffix != ".png":
        raise ValueError(f"--to = {to}: give a name that ends in .png")
    checkpoint = require_checkpoint(run)
    config, chosen = resolve_sample_settings(config, checkpoint)
    axes = read_axes(checkpoint, rows, columns)
    cells = make_cells(config, checkpoint, axes, chosen[0])
    described = [checkpoint.ema_sha256]
    for settings in {(cell.settings.guide, cell.settings.start_from): cell.settings for cell in cells}.values():
        described += sources_of(settings, checkpoint).values()
    for cell in cells:
        described.append(f"{cell.label} {cell.scale} {cell.settings.model_dump_json(exclude=_WITHOUT_EFFECT)}")
    name = f"{checkpoint.images_seen}-{axes[0].key}-{axes[1].key}-{digest(described)[:8]}.png"
    path = to or run / "sweeps" / name
    if path.exists() and not to:
        print(f"sweep: all done: {path}")
        return path
    probe(path.parent, "--to" if to else "--run")
    images = draw_cells(config, checkpoint, cells)
    across = len(axes[1].values)
    pictures = [Image.fromarray(image) for image in images]
    lines = [pictures[i : i + across] for i in range(0, len(pictures), across)]
    title = _title(axes, cells, checkpoint.state.classes)
    save_png(grid(lines, axes[0].captions, axes[1].captions, title=title, smallest=SMALLEST), path)
    print(f"sweep: {counted(len(cells), 'sample')} in {path}")
    return path


def read_axes(checkpoint: Checkpoint, rows: str | None, columns: str | None) -> tuple[Axis, Axis]:
    """Read the options --rows and --columns; if one is left out, it is guidance or steps, whichever is not given.

    For a model on which guidance has no effect, the seed replaces it. ValueError for what is no axis.
    """
    state = checkpoint.state
    idle = usable_guidance(2, "cfg", without_class=state.without_class, classes=len(state.classes))[1]
    first = "seed" if idle else "guidance"
    rows = rows or _default("steps" if columns and _key(columns) == first else first)
    columns = columns or _default(first if _key(rows) == "steps" else "steps")
    if _key(rows) == _key(columns):
        raise ValueError(f"--columns {columns}: {_key(rows)} is also the key of the rows: give another one")
    return _read_axis(checkpoint, "--rows", rows), _read_axis(checkpoint, "--columns", columns)


def _default(key: str) -> str:
    return f"{key}={_DEFAULTS[key]}"


def _key(text: str) -> str:
    key = text.partition("=")[0].strip().removeprefix("sample.")
    return "class" if key == "classes" else key


def _read_axis(checkpoint: Checkpoint, option: str, text: str) -> Axis:
    """Read KEY=V1,V2,...: values are YAML; classes are names or indices, and `all` stands for all classes."""
    key, values = _key(text), f"[{text.partition('=')[2]}]"
    try:
        node = yaml.compose(values, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{option} {text}: {' '.join(str(error).split())}") from None
    if not key or not isinstance(node, yaml.SequenceNode) or not node.value:
        raise ValueError(f"{option} {text}: give KEY=V1,V2,..., such as guidance=1,2,3")
    if key in _WITHOUT_EFFECT:
        raise ValueError(
            f"{option} {text}: {key} does not change a sample: give another key, such as guidance or steps"
        )
    texts = [values[each.start_mark.index : each.end_mark.index] for each in node.value]
    if key == "class":
        axis = _class_axis(checkpoint, option, tuple(str(each.value) for each in node.value))
    else:
        words = [each.tag.endswith(":str") and text[:1].isalpha() for each, text in zip(node.value, texts, strict=True)]
        captions = [text if word else f"{key} {text}" for text, word in zip(texts, words, strict=True)]
        axis = Axis(key, texts, captions)
    if len(axis.values) > MAX_VALUES:
        raise ValueError(f"{option}: {len(axis.values):,} values: give at most {MAX_VALUES}")
    return axis


def _class_axis(checkpoint: Checkpoint, option: str, wanted: tuple[str, ...]) -> Axis:
    names, counts = checkpoint.state.classes, checkpoint.state.class_counts
    every = wanted == ("all",) and "all" not in names
    kinds = choose_classes(() if every else wanted, names, counts, option)
    return Axis("class", [str(kind) for kind in kinds], [names[kind] for kind in kinds])


def make_cells(config: Config, checkpoint: Checkpoint, axes: tuple[Axis, Axis], label: int) -> list[Cell]:
    """Return the cells, row by row; `label` is the class where it is no axis."""
    return [
        _cell(config, checkpoint, {axes[0].key: row, axes[1].key: column}, label)
        for row in axes[0].values
        for column in axes[1].values
    ]


def _cell(config: Config, checkpoint: Checkpoint, values: dict[str, str], label: int) -> Cell:
    where = " ".join(f"{key}={value}" for key, value in values.items())
    label = int(values.pop("class", label))
    state = checkpoint.state
    settings = override_config(config, [f"sample.{key}={value}" for key, value in values.items()], where).sample
    settings.check(state.noise.schedule)
    scale = settings.guidance
    if "guidance" not in values:
        scale = settings.guidance_by_class.get(state.classes[label], scale)
    if not settings.guide:
        _, why = usable_guidance(
            scale, settings.guidance_form, without_class=state.without_class, classes=len(state.classes)
        )
        if why:
            raise ValueError(f"{where}: {why.partition(': ')[2]}: give another key")
    return Cell(settings, label, scale)


def draw_cells(config: Config, checkpoint: Checkpoint, cells: Sequence[Cell]) -> NDArray[np.uint8]:
    """Draw the sample of each cell: images `N H W 3`. Cells that share the other settings are drawn in one batch."""
    vae = FrozenVae(config.vae.source, pick_device())
    vae.check(checkpoint.state.vae, checkpoint.path)
    kinds = np.unique(
        [cell.label for cell in cells]
    )  # of each class, an image of start_from is that of its first sample
    groups: dict[str, list[int]] = {}
    for number, cell in enumerate(cells):
        groups.setdefault(cell.settings.model_dump_json(exclude={"guidance", "seed"}), []).append(number)
    latents: dict[int, torch.Tensor] = {}
    model = None
    with tqdm(total=len(cells), unit=" images", desc="sweep", mininterval=1) as bar:
        for members in groups.values():
            settings = cells[members[0]].settings
            drawing = Drawing(settings, checkpoint, kinds, model=model)
            model = drawing.model
            drawn: list[torch.Tensor] = []
            for part in halving(partial(_draw, drawing, cells, kinds), members, drawing.batch_size, "sweep"):
                bar.update(len(part))
                drawn.extend(part)
            latents |= dict(zip(members, drawn, strict=True))
    return vae.decode_images(torch.stack([latents[i] for i in range(len(cells))]))


def _title(axes: tuple[Axis, Axis], cells: Sequence[Cell], classes: Sequence[str]) -> str:
    """Return the keys of the axes and the settings that all cells share."""
    keys = [axis.key for axis in axes]
    scales = {cell.scale for cell in cells}
    settings = cells[0].settings.changed(guidance=min(scales))
    shared = summary(settings, without={*keys, *(["guidance"] if len(scales) > 1 else [])})
    name = [] if "class" in keys else [classes[cells[0].label]]
    return " \u00d7 ".join(keys) + ": " + ", ".join([*name, *shared])


def _draw(drawing: Drawing, cells: Sequence[Cell], kinds: NDArray[np.int64], members: Sequence[int]) -> torch.Tensor:
    """Draw the samples of the cells `members`, given by number: latents `B C h w`. `kinds` are the drawing's labels."""
    return drawing(
        np.searchsorted(kinds, [cells[i].label for i in members]),
        indices=[0] * len(members),
        seeds=[cells[i].settings.seed for i in members],
        scales=[cells[i].scale for i in members],
    )
