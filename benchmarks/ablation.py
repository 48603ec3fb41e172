"""Is a change of the recipe an improvement? Two configs on one cache: equal training time, the same draws, n seeds.

    python -m benchmarks.ablation --config configs/solids.yaml --a train.optimizer=adamw --b train.optimizer=muon \
        --minutes 4 --minutes 10 --seeds 2 --to runs/ablation/muon

Further `--b` are measured against the same a. First all train a few steps in turn, which gives the images that each
sees in a minute of one CPU core (or of the GPU, where there is one): four minutes on two cores are two by the clock.
These rates need a machine that does nothing else, and are kept in `rates.json`. Then each trains for every budget from
nothing, for as many images as it can see in that time and with its learning rate planned for them, and its samples are
measured as `latentmill evaluate` does. Prints a table, and writes `ablation.json` and `ablation.png`. What is there
already is not done again: an interrupted ablation goes on, also on a faster machine, with the images of `rates.json`.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from benchmarks.make_all import steps
from data.storage import publish_json
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.evaluation.figures import Selected
from pipeline.evaluation.kernel import kernel_difference, mean_similarity
from pipeline.evaluation.measure import Row
from pipeline.training.distributed import connect
from pipeline.training.trainer import Trainer
from stages.cli import LocalPath
from stages.encode import encode, parse_job
from stages.evaluate import Evaluation
from stages.train import train

ROUNDS, ROUND_SECONDS = 8, 3.0  # of which the median is a variant's speed; the first round is a warm-up
NAMES = "abcdefghijkl"


@dataclass(frozen=True)
class Trained:
    """A finished run of one variant, measured."""

    variant: str
    minutes: float
    seed: int
    images: int
    took: float  # seconds of training by the clock
    figures: dict[str, Any]
    heldout_loss: float | None
    evaluation: Evaluation

    @property
    def samples(self) -> Row:
        return self.evaluation.rows[0]


@click.command()
@click.option("--config", "file", type=LocalPath(), default=Path("configs/solids.yaml"))
@click.option("--set", "common", multiple=True, help="Override a key of both configs: key=value.")
@click.option("--a", "first", default="", help="Overrides of the first config, with spaces between them.")
@click.option("--b", "others", multiple=True, required=True, help="Overrides of another, each against the first.")
@click.option("--minutes", multiple=True, type=float, default=(4.0,), show_default=True, help="CPU minutes.")
@click.option("--seeds", default=1, show_default=True, help="Trainings of each, of seeds 0, 1, ...")
@click.option("--images", default=500, show_default=True, help="Samples that are measured of each training.")
@click.option("--to", type=LocalPath(), default=Path("runs/ablation"), show_default=True)
def main(
    file: Path,
    common: tuple[str, ...],
    first: str,
    others: tuple[str, ...],
    minutes: tuple[float, ...],
    seeds: int,
    images: int,
    to: Path,
) -> None:
    fixed = [*common, f"evaluate.images={images}"]
    variants = dict(zip(NAMES, (first, *others), strict=False))
    configs = {name: load_config(file, [*fixed, *own.split()]) for name, own in variants.items()}
    encode(configs["a"], parse_job(None))
    rates = kept_rates(to / "rates.json", configs)
    runs = [
        trained(configs[name], name, rates[name], budget, seed, to)
        for budget in sorted(minutes)
        for seed in range(seeds)
        for name in variants
    ]
    differences = [
        difference(baseline, run)
        for baseline in runs
        if baseline.variant == "a"
        for run in runs
        if run is not baseline and (run.minutes, run.seed) == (baseline.minutes, baseline.seed)
    ]
    result = {
        "config": str(file),
        "common": list(common),
        "variants": variants,
        "images_per_minute": rates,
        "samples": images,
        "runs": [
            {"variant": r.variant, "minutes": r.minutes, "seed": r.seed, "images": r.images, "seconds": r.took}
            | {"heldout_loss": r.heldout_loss, **{n: e for n, e in r.figures.items() if isinstance(e, dict)}}
            for r in runs
        ],
        "differences": differences,
    }
    publish_json(to / "ablation.json", result)
    print_table(runs, differences)
    draw(runs, to / "ablation.png")


def kept_rates(file: Path, configs: dict[str, Config]) -> dict[str, float]:
    """Return what `measure_rates` says of all `configs`, from `file` for those that it knows."""
    kept: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
    if missing := {name: config for name, config in configs.items() if name not in kept}:
        kept |= measure_rates(missing)
        publish_json(file, kept)
    return kept


def measure_rates(configs: dict[str, Config]) -> dict[str, float]:
    """Return the images that each config sees in a minute of one core or of the GPU.

    They are medians over rounds in which the configs take turns, since the machine's speed drifts.
    """
    accelerator = connect(next(iter(configs.values())).train.precision)
    rates: dict[str, list[float]] = {name: [] for name in configs}
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: Trainer(config, Path(folder) / name, accelerator, None) for name, config in configs.items()}
        counts = dict.fromkeys(trainers, 2)  # steps in a round
        for number in range(ROUNDS + 1):
            for name, trainer in trainers.items():
                started = time.perf_counter()
                for _ in range(counts[name]):
                    trainer.train_step()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                taken = time.perf_counter() - started
                if number:
                    rates[name].append(per_minute(counts[name] * trainer.batch_size, taken))
                else:
                    counts[name] = max(round(counts[name] * ROUND_SECONDS / taken), 1)
    return {name: statistics.median(each) for name, each in rates.items()}


def per_minute(images: int, seconds: float) -> float:
    """Return how many images a minute of one core sees, or one of the GPU; training uses all cores, or one GPU."""
    return 60 * images / seconds / (1 if torch.cuda.is_available() else torch.get_num_threads())


def trained(config: Config, name: str, rate: float, minutes: float, seed: int, to: Path) -> Trained:
    """Train `name` for `minutes` of one core and measure it, or read what was measured."""
    batch = config.train.batch_size
    assert batch != "auto"
    run = to / f"{name}-{minutes:g}min-seed{seed}"
    before = load_config(run / "config.yaml") if (run / "config.yaml").exists() else None
    fitting = max(int(rate * minutes / batch), 1) * batch
    images = before.train.images if before else fitting  # by the rate of then
    settings = {"images": images, "seed": seed, "preview_every": images, "checkpoint_every": images}
    settings["warmup"] = min(config.train.warmup, images // 10)
    config = config.changed(train=config.train.changed(**settings))
    if before and any(getattr(before, part) != getattr(config, part) for part in ("cache", "model", "noise", "train")):
        raise ValueError(f"{run}: a run of other settings: delete it, or give another --to")
    train(config, run)
    evaluation = Evaluation(config, run, None, samples_only=True)
    figures = evaluation.receipt()["figures"]["samples"]
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = [line["heldout_loss"] for line in log if "heldout_loss" in line]
    return Trained(name, minutes, seed, images, steps(log), figures, losses[-1] if losses else None, evaluation)


def difference(a: Trained, b: Trained) -> dict[str, Any]:
    """What b has more than a of the same time and seed: the kernel distance, sample by sample of the same draws."""
    reference = a.evaluation.training.features
    similarity = mean_similarity(reference, a.evaluation.network.device)
    # features lie in the order of their pixels; here in that of their index, which the draws depend on
    one, other = (Selected(r.samples.features, np.argsort(r.samples.features.indices)) for r in (b, a))
    estimate = kernel_difference(one, other, reference, similarity, a.evaluation.network.device)
    loss = b.heldout_loss - a.heldout_loss if a.heldout_loss and b.heldout_loss else None
    return {"variant": b.variant, "minutes": b.minutes, "seed": b.seed, "heldout_loss": loss, **asdict(estimate)}


def print_table(runs: list[Trained], differences: list[dict[str, Any]]) -> None:
    """Every training, and below them what each has more than a."""
    for r in runs:
        shown = [f"{name.rsplit('-', 1)[0]} {_shown(name, r.figures[name])}" for name in _figures(r)]
        shown += [f"held-out loss {r.heldout_loss:.4f}"] if r.heldout_loss else []
        print(
            f"{r.minutes:g} CPU min, seed {r.seed}: {r.variant}, {r.images:,} images in {r.took:.0f} s",
            *shown,
            sep="  ",
        )
    for each in differences:
        low, high = (1000 * bound for bound in each["interval"])
        value = f"{1000 * each['value']:+.1f} ({low:+.1f} to {high:+.1f})"
        print(f"{each['minutes']:g} CPU min  seed {each['seed']}  {each['variant']} - a  KD x 1000 {value}")


def draw(runs: list[Trained], file: Path) -> None:
    """Kernel distance against training time, with intervals: a line a variant through the mean of its seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for color, name in enumerate(sorted({r.variant for r in runs})):
        mine = [r for r in runs if r.variant == name]
        kd = [1000 * np.array([e["value"], *e["interval"]]) for e in (r.figures[_figures(r)[0]] for r in mine)]
        values, low, high = np.array(kd).T
        minutes = np.array([r.minutes for r in mine])
        axis.errorbar(minutes, values, [values - low, high - values], fmt="o", capsize=3, color=f"C{color}")
        times = sorted({*minutes})
        axis.plot(times, [values[minutes == t].mean() for t in times], color=f"C{color}", label=name)
    axis.set(xlabel="CPU minutes of training", ylabel="kernel distance x 1000 (lower is better)", ylim=(0, None))
    axis.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def _figures(run: Trained) -> list[str]:
    """The names of the kernel distance and of the probe's accuracy, which has none where there are no classes."""
    network = run.evaluation.network.name
    return [name for name in (f"KD-{network}", f"accuracy-{network}") if name in run.figures]


def _shown(name: str, estimate: dict[str, Any]) -> str:
    scale, digits = (1000, 1) if name.startswith("KD") else (1, 3)
    low, high = (f"{scale * bound:.{digits}f}" for bound in estimate["interval"])
    return f"{scale * estimate['value']:.{digits}f} ({low} to {high})"


if __name__ == "__main__":
    main()
