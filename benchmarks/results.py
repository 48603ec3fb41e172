"""What the design brings, each choice against what it replaces: docs/results.md and its pictures.

    python -m benchmarks.results [--minutes 10] [--images 500]     # make results

On the default data set, with the default config but for one choice each (its learning rate among what is the same,
which was chosen for the default): the same training time, in minutes of one CPU core or of the GPU, and the same draws.
Latents against pixels; latents from the cache against the VAE in the loop; the transformer bottleneck against residual
blocks of the same FLOPs; flow matching against epsilon and v; the samplers; guidance. What is there already is not done
again, so an interrupted night goes on, also on another machine: the images that each way sees in a minute are measured
first and kept. It needs a machine that does nothing else.
"""

from __future__ import annotations

import contextlib
import io
import math
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from benchmarks.ablation import Trained, kept_rates, trained
from benchmarks.pixels import SOURCE, without_vae
from data.cache.manifest import Manifest
from data.storage import publish
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.flops import Cost
from pipeline.pictures import contact_sheet, save_png
from pipeline.training.setup import build_model
from pipeline.unet import LatentUNet
from stages.cli import LocalPath
from stages.encode import encode, parse_job
from stages.evaluate import Evaluation

PIXELS = (
    f"vae.source={SOURCE}",
    "cache.path=caches/results-pixels",
    "cache.store=mean",
    "cache.workers=0",
    "cache.precision=fp32",
)
DISCRETE = ("noise.timesteps=uniform", "sample.scheduler=ddim")
WAYS = {  # overrides of the config
    "latents (the default)": (),
    "pixels, 4x4 of them as the channels of one position": (*PIXELS, "model.patch_size=4"),
    "pixels, the same network at full resolution": PIXELS,
    "residual blocks in the bottleneck": ("model.bottleneck=resnet",),
    "epsilon, linear schedule": (*DISCRETE, "noise.prediction=epsilon", "noise.schedule=linear"),
    "v, cosine schedule": (*DISCRETE, "noise.prediction=v", "noise.schedule=cosine"),
}
DEFAULT, EPSILON = "latents (the default)", "epsilon, linear schedule"
SAMPLERS = {
    EPSILON: [("ddpm", 1000), *(("ddim", n) for n in (250, 100, 50, 25, 10))],
    DEFAULT: [("euler", n) for n in (100, 50, 25, 10, 5)],
}
COSTS = ("forward and backward pass of an image", "its activations", "images a minute")
GUIDANCES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
GUIDANCE_PICTURE = "results-guidance.png"
RATED = "machine.txt"  # in the folder of the runs: where the images a minute, rates.json beside it, were measured


@click.command()
@click.option("--config", "file", type=LocalPath(), default=Path("configs/solids.yaml"))
@click.option("--set", "overrides", multiple=True, help="Override a key of all configs: key=value.")
@click.option("--minutes", default=10.0, show_default=True, help="CPU minutes of training of each way.")
@click.option("--images", default=500, show_default=True, help="Samples that are measured each time.")
@click.option("--runs", type=LocalPath(), default=Path("runs/results"), show_default=True)
@click.option("--to", type=LocalPath(), default=Path("docs"), show_default=True)
def main(file: Path, overrides: tuple[str, ...], minutes: float, images: int, runs: Path, to: Path) -> None:
    common = [*overrides, f"evaluate.images={images}"]
    ways = {way: load_config(file, [*common, *own]) for way, own in WAYS.items()}
    ways["residual blocks in the bottleneck"] = same_flops(ways["residual blocks in the bottleneck"], ways[DEFAULT])
    if not (runs / RATED).exists():
        publish(runs / RATED, machine().encode())
    rated = (runs / RATED).read_text()
    results = {way: result(way, config, minutes, runs) for way, config in ways.items()}
    options = [f"--minutes {minutes:g}", f"--images {images}", *(f"--set {override}" for override in overrides)]
    parts = [
        f"# Results of the design\n\nMade by\n\n    python -m benchmarks.results {' '.join(options)}\n\n"
        f"on {machine()}, with {images} samples each and one seed of training. The images that each way sees in a"
        f" minute are those of {rated}. Kernel distances are x 1000, by EfficientNet-Lite0 against the training images,"
        " with intervals of 95 % over samples ([evaluation.md](evaluation.md)).\n",
        f"## What is learnt, and by what, after {minutes:g} minutes of training each\n",
        table(["", *COSTS, "images seen", "kernel distance", "shows its class"], list(results.values())),
        "\n## Training on latents from the cache, or with the VAE in the loop (float32)\n",
        f"```\n{vae_in_the_loop(file, overrides, runs)}\n```",
        "\n## Samplers\n",
        table(
            ["model", "sampler", "steps", "kernel distance", "shows its class"],
            [
                sampler_line(way, ways[way], minutes, runs, scheduler, steps)
                for way, choices in SAMPLERS.items()
                for scheduler, steps in choices
            ],
        ),
        "\n## Guidance\n",
        table(
            ["guidance", "kernel distance", "precision", "recall", "shows its class"],
            guidance_lines(ways[DEFAULT], minutes, runs, to),
        ),
        f"\n![one sample of each class at guidance {', '.join(f'{g:g}' for g in GUIDANCES)}]({GUIDANCE_PICTURE})\n",
    ]
    publish(to / "results.md", "\n".join(parts).encode())
    print("\n".join(parts))


def result(way: str, config: Config, minutes: float, runs: Path) -> list[str]:
    """A line of the first table: a run of its own, and its figures."""
    with without_vae() if config.vae.source == SOURCE else contextlib.nullcontext():
        encode(config, parse_job(None))
        run = run_of(way, config, minutes, runs)
    cost = Cost.of(build_model(config, Manifest.load(config.cache.path)))
    costs = [f"{cost.flops / 1e9:.2f} GFLOP", f"{cost.kept_bytes / 1e6:.1f} MB", f"{run.images / minutes:,.0f}"]
    return [way, *costs, f"{run.images:,}", *shown(run.figures, "KD", "accuracy")]


def run_of(way: str, config: Config, minutes: float, runs: Path) -> Trained:
    """The run of a way, trained where it is not there yet."""
    name = "".join(c if c.isalnum() else "-" for c in way)
    rate = kept_rates(runs / "rates.json", {name: config})[name]
    return trained(config, name, rate, minutes, config.train.seed, runs)


def same_flops(config: Config, target: Config) -> Config:
    """`config` with the depth of the bottleneck whose FLOPs come closest to those of `target`."""
    encode(target, parse_job(None))
    manifest = Manifest.load(target.cache.path)
    wanted = Cost.of(build_model(target, manifest)).flops

    def distance(depth: int) -> float:
        with torch.device("meta"):
            model = LatentUNet(
                in_channels=manifest.latent_channels,
                sample_size=manifest.shape[1],
                num_classes=len(manifest.classes),
                **(config.model.model_dump() | {"depth": depth}),
            )
        return abs(math.log(Cost.of(model).flops / wanted))

    model = config.model.changed(depth=min(range(1, 33), key=distance))
    return config.changed(model=model)


def vae_in_the_loop(file: Path, overrides: tuple[str, ...], runs: Path) -> str:
    """What `benchmarks.train_step` says of the two, which is kept."""
    kept = runs / "train_step.txt"
    if not kept.exists():
        settings = [part for override in (*overrides, "train.precision=fp32") for part in ("--set", override)]
        images = load_config(file, overrides).data.source
        options = ["--config", str(file), *settings, "--images", images, "--rounds", "6"]
        command = [sys.executable, "-m", "benchmarks.train_step", *options]
        publish(kept, subprocess.run(command, check=True, capture_output=True).stdout)
    lines = kept.read_text().splitlines()
    return "\n".join(line for line in lines if line.startswith(("real loop  ", "VAE in the loop  ", "real loop / VAE")))


def sampler_line(way: str, config: Config, minutes: float, runs: Path, scheduler: str, steps: int) -> list[str]:
    """The figures of the same run, drawn otherwise."""
    _, receipt = drawn(way, config, minutes, runs, scheduler=scheduler, steps=steps)
    figures = receipt["figures"]["samples"]
    return [way, scheduler, f"{steps}", *shown(figures, "KD", "accuracy")]


def guidance_lines(config: Config, minutes: float, runs: Path, to: Path) -> list[list[str]]:
    """The figures of the same run at each guidance; publishes a picture of one sample a class."""
    lines, pictures, rows = [], [], []
    for guidance in GUIDANCES:
        evaluation, receipt = drawn(DEFAULT, config, minutes, runs, guidance=guidance)
        figures = receipt["figures"]["samples"]
        lines.append([f"{guidance:g}", *shown(figures, "KD", "precision", "recall", "accuracy")])
        count = len(evaluation.sources[0].classes)
        pictures.append(evaluation.rows[0].images.load(range(count)).pixels)
        rows += [guidance] * count
    labels = [GUIDANCES.index(each) for each in rows]
    save_png(contact_sheet(np.concatenate(pictures), labels, [f"{g:g}" for g in GUIDANCES]), to / GUIDANCE_PICTURE)
    return lines


def drawn(way: str, config: Config, minutes: float, runs: Path, **sample: Any) -> tuple[Evaluation, dict[str, Any]]:
    """The run of a way with other settings of `sample`, and its receipt."""
    run = run_of(way, config, minutes, runs)
    changed = config.changed(sample=config.sample.changed(**sample))
    evaluation = Evaluation(changed, run.evaluation.run, None, samples_only=True)
    with contextlib.redirect_stdout(io.StringIO()):
        return evaluation, evaluation.receipt()


def shown(figures: dict[str, Any], *kinds: str) -> list[str]:
    """Figures with the half of their intervals: kernel distances x 1000."""
    cells = []
    for kind in kinds:
        figure = next(value for name, value in figures.items() if name.startswith(f"{kind}-"))
        scale, digits = (1000, 1) if kind == "KD" else (1, 3)
        low, high = figure["interval"] or (figure["value"], figure["value"])  # none where samples are copies
        cells.append(f"{scale * figure['value']:.{digits}f} ±{scale * (high - low) / 2:.{digits}f}")
    return cells


def table(head: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown."""
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *lines]) + "\n"


def machine() -> str:
    """What the figures are measured on; a minute is one of the GPU, if there is one, or else of one core."""
    if torch.cuda.is_available():
        return f"a GPU ({torch.cuda.get_device_name()}, torch {torch.__version__})"
    cores, capability = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    return f"one of {cores} cores ({platform.machine()}, {capability}, torch {torch.__version__})"


if __name__ == "__main__":
    main()
