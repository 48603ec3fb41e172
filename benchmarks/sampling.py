"""Samplers, numbers of steps, their spacing and forms of guidance on one trained run: the tables of docs/sampling.md.

    python -m benchmarks.sampling --config configs/cifar10.yaml --set data.source=path/to/cifar10 --run runs/cifar10 \
        --guide runs/cifar10-short

Draws `--images` samples with every setting, from the same noise, and measures them as `latentmill evaluate` does.
`--guide` is a run that was trained for less time, for guidance by a weaker model. Speed is that of `--timed` samples,
drawn alone. What was measured is kept in `--to` and not measured again, so an interrupted table goes on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch

from data.storage import publish_json
from pipeline.config import Config, Sample
from pipeline.config_file import load_config
from pipeline.device import pick_device
from pipeline.sampling import draw_samples
from pipeline.training.checkpoint import checkpoint_at
from stages.cli import LocalPath
from stages.evaluate import Evaluation

FLOW = ("euler", "euler_ancestral", "heun", "dpm++", "unipc")
DISCRETE = ("ddim", "ddpm", "heun", "dpm++", "unipc")
STEPS = (5, 10, 20, 40, 100, 250)
SCALES = (1.5, 2.0, 3.0, 4.0, 6.0)
FORMS: dict[str, dict[str, Any]] = {
    "cfg": {},
    "interval [0.2, 5]": {"guidance_interval": (0.2, 5.0)},
    "interval [0.3, 2]": {"guidance_interval": (0.3, 2.0)},
    "linear": {"guidance_schedule": "linear"},
    "cosine": {"guidance_schedule": "cosine"},
    "rescale 0.5": {"guidance_rescale": 0.5},
    "apg": {"guidance_form": "apg"},
    "cfg_zero": {"guidance_form": "cfg_zero"},
    "cfg++": {"guidance_form": "cfg++", "scheduler": "euler", "steps": 20},  # not for samplers of a higher order
}
SHIFTS = (0.5, 0.7, 1.0, 1.5, 2.0, 3.0)
CFGPP_SCALES = (0.4, 0.7, 1.0, 1.5, 2.0)  # of CFG++, which moves further for the same scale


class Setting(NamedTuple):
    """A row of a table: its name, and what differs from the config's `sample` section."""

    name: str
    changes: dict[str, Any]


@click.command(help=__doc__)
@click.option("--config", "file", type=LocalPath(), default=Path("configs/cifar10.yaml"), show_default=True)
@click.option("--set", "overrides", multiple=True, help="Override a key of the config: key=value.")
@click.option("--run", type=LocalPath(), required=True)
@click.option("--guide", type=LocalPath(), help="A run that was trained for less time.")
@click.option("--images", default=2000, show_default=True, help="Samples of each setting.")
@click.option("--timed", default=32, show_default=True, help="Samples that the speed is measured with; 0: no speed.")
@click.option("--part", type=click.Choice(["samplers", "spacing", "guidance"]), help="Only one table.")
@click.option("--to", type=LocalPath(), default=Path("runs/sampling"), show_default=True)
def main(
    file: Path,
    overrides: tuple[str, ...],
    run: Path,
    guide: Path | None,
    images: int,
    timed: int,
    part: str | None,
    to: Path,
) -> None:
    config = load_config(file, [*overrides, f"evaluate.images={images}"])
    tables = {"samplers": list(samplers(config)), "spacing": list(spacing(config)), "guidance": list(guidance(guide))}
    for name in [part] if part else tables:
        kept_file = to / f"{name}.json"
        kept: dict[str, Any] = json.loads(kept_file.read_text()) if kept_file.exists() else {}
        for setting in tables[name]:
            entry = kept.setdefault(setting.name, {"changes": {k: str(v) for k, v in setting.changes.items()}})
            changed = config.changed(sample=config.sample.changed(**setting.changes))
            if "figures" not in entry:
                entry["figures"] = measured(changed, run)
            if timed and "images_per_second" not in entry:
                entry["images_per_second"] = speed(changed.sample, run, timed)
            publish_json(kept_file, kept)
            print(row(setting.name, entry), flush=True)
        print(table(name, kept))


def samplers(config: Config) -> Iterator[Setting]:
    """Yield every sampler at every number of steps, the reference (the plain sampler at 250 steps) first."""
    names = FLOW if config.noise.schedule == "flow" else DISCRETE
    pairs = [(names[0], STEPS[-1]), *((name, steps) for steps in STEPS for name in names)]
    for name, steps in dict.fromkeys(pairs):
        yield Setting(f"{name}, {steps} steps", {"scheduler": name, "steps": steps})


def spacing(config: Config) -> Iterator[Setting]:
    """Yield few steps of UniPC with every shift towards noise; none where the noise schedule has no shift."""
    for steps in STEPS[:2] if config.noise.schedule == "flow" else ():
        for shift in SHIFTS:
            changes = {"scheduler": "unipc", "steps": steps, "shift": shift}
            yield Setting(f"unipc, {steps} steps, shift {shift:g}", changes)


def guidance(guide: Path | None) -> Iterator[Setting]:
    """Yield every form of guidance at every scale."""
    yield Setting("none", {"guidance": 1.0})
    forms = {**FORMS, **({"weaker model": {"guide": guide}} if guide else {})}
    for scales in zip(SCALES, CFGPP_SCALES, strict=True):
        for name, changes in forms.items():
            scale = scales[name == "cfg++"]
            yield Setting(f"{name}, scale {scale:g}", {"guidance": scale, **changes})


def measured(config: Config, run: Path) -> dict[str, Any]:
    """Return the figures of samples that are drawn as `config` says."""
    figures: dict[str, Any] = Evaluation(config, run, None, samples_only=True).receipt()["figures"]["samples"]
    kinds = ("KD-", "FD-", "accuracy-", "precision-", "recall-")
    return {
        kind[:-1]: value
        for kind in kinds
        for name, value in figures.items()
        if name.startswith(kind) and "extrapolated" not in name
    }


def speed(settings: Sample, run: Path, count: int) -> float:
    """Return images/s of `count` samples in one batch, on this machine."""
    checkpoint, _ = checkpoint_at(run, "--run")
    device = pick_device()
    model = checkpoint.ema_model().to(device)
    guide = checkpoint_at(settings.guide, "--guide")[0].ema_model().to(device) if settings.guide else None
    labels = torch.arange(count) % len(checkpoint.state.classes)
    options: dict[str, Any] = {"indices": range(count), "device": device, "guide": guide}
    draw_samples(model, checkpoint.state.noise, settings.changed(steps=1), labels, **options)
    started = time.perf_counter()
    draw_samples(model, checkpoint.state.noise, settings, labels, **options).cpu()
    return count / (time.perf_counter() - started)


def table(name: str, kept: dict[str, Any]) -> str:
    """Return a table in Markdown: all settings, but of `guidance` the best scale of each form."""
    if name == "guidance":
        best: dict[str, str] = {}
        for setting, entry in kept.items():
            form = setting.split(", scale")[0]
            if form not in best or kd(entry) < kd(kept[best[form]]):
                best[form] = setting
        kept = {setting: kept[setting] for setting in best.values()}
    head = ["", "KD x 1000", "FD", "precision", "recall", "requested class found", "images/s"]
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *(row(*each) for each in kept.items())])


def kd(entry: dict[str, Any]) -> float:
    return float(entry["figures"]["KD"]["value"])


def row(name: str, entry: dict[str, Any]) -> str:
    """Return a row of a table, each figure with half of its 95 % interval."""
    cells = [name]
    for kind, scale, digits in (
        ("KD", 1000, 1),
        ("FD", 1, 1),
        ("precision", 1, 2),
        ("recall", 1, 2),
        ("accuracy", 1, 2),
    ):
        figure = entry["figures"][kind]
        low, high = figure["interval"] or 2 * [figure["value"]]
        cells.append(f"{scale * figure['value']:.{digits}f} ±{scale * (high - low) / 2:.{digits}f}")
    rate = entry.get("images_per_second")
    return "| " + " | ".join([*cells, f"{rate:.1f}" if rate else ""]) + " |"


if __name__ == "__main__":
    main()
