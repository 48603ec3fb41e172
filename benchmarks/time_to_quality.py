"""Quality against training time: this project's recipe and what people use today, on the same latents and cores.

    python -m benchmarks.time_to_quality --config configs/cifar10.yaml --set data.source=path/to/cifar10

Ours trains anew for each of the times, since its learning rate is planned for the end. The peers are an example of
diffusers, DiT's recipe and what courses teach, each on a network of our FLOPs (`benchmarks/peers.py`). They train once,
as long as the longest time, and are measured on the way, where a rate that falls in a cosine has not fallen yet: what
counts is when ours is as good as they are at the end. Each peer's learning rate is the best of `RATES` after a short
training, and its guidance and steps of DDIM the best of `GUIDANCES` and `STEPS` at the end; ours takes the config's.
Minutes are those of one CPU core, or of the GPU. Every set of samples is measured by the code of
`latentmill evaluate --images`. Prints a table, and writes `time_to_quality.json` and `time_to_quality.png`.

The images that each sees in a minute are measured first, one after the other, and kept in `rates.json`: this needs a
machine that does nothing else. What is there already is not done again, so an interrupted night goes on where it was,
also on a faster machine, with the images of `rates.json`.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from benchmarks.ablation import kept_rates, per_minute, trained
from benchmarks.peers import RECIPES, Peer, Recipe, build, matching, predict, step_flops
from data.cache.reader import LatentCache
from data.sources.generated import write_npz
from data.storage import publish, publish_json
from data.text import digest
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.device import pick_device
from pipeline.noise import Level, NoiseProcess
from pipeline.sampling import image_generators, sampling_loop
from pipeline.training.distributed import connect
from pipeline.training.setup import build_model, normalization_of
from pipeline.unet import LatentUNet
from pipeline.vae import FrozenVae, to_images
from stages.cli import LocalPath
from stages.encode import encode, parse_job
from stages.evaluate import Evaluation

RATES = (1e-4, 3e-4, 1e-3)
GUIDANCES, STEPS = (1.5, 2.0, 3.0, 4.0, 6.0), (20, 50)
CHOSEN_WITH = 300  # samples that a learning rate, a guidance or a number of steps is chosen with
BATCH = 250
ROUNDS, STEPS_A_ROUND = 8, 5  # of which the median is a peer's images/s
STEPS_A_STATE = 500  # after which an interrupted training goes on


@click.command()
@click.option("--config", "file", type=LocalPath(), default=Path("configs/cifar10.yaml"))
@click.option("--set", "overrides", multiple=True, help="Override a key of the config: key=value.")
@click.option("--minutes", multiple=True, type=float, default=(5, 10, 20, 40, 60), show_default=True)
@click.option("--ours", multiple=True, type=float, default=(12, 15), show_default=True, help="Further ones of ours.")
@click.option("--sweep", default=5.0, show_default=True, help="CPU minutes of training for each rate of a peer.")
@click.option("--images", default=1000, show_default=True, help="Samples that are measured each time.")
@click.option("--to", type=LocalPath(), default=Path("runs/time_to_quality"), show_default=True)
def main(
    file: Path,
    overrides: tuple[str, ...],
    minutes: tuple[float, ...],
    ours: tuple[float, ...],
    sweep: float,
    images: int,
    to: Path,
) -> None:
    config = load_config(file, [*overrides, f"evaluate.images={images}"])
    encode(config, parse_job(None))
    contests = [Contest(recipe, config, to) for recipe in RECIPES]
    rates = all_rates(to / "rates.json", config, contests)
    curves = {each.recipe.name: each.curve(sorted(minutes), sweep, images, rates) for each in contests}
    curves["ours"] = []
    for budget in sorted({*minutes, *ours}):
        run = trained(config, "ours", rates["ours"], budget, config.train.seed, to)
        curves["ours"].append({"minutes": budget, "images": run.images, **_figures(run.figures)})
    publish_json(to / "time_to_quality.json", {"config": str(file), "overrides": list(overrides), "curves": curves})
    print_table(curves)
    plot(curves, to / "time_to_quality.png")


def all_rates(file: Path, config: Config, contests: list[Contest]) -> dict[str, float]:
    """Return the images that each recipe sees in a minute, measured before anything else, so that a machine that is
    busy later gives nobody fewer images."""
    kept: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
    if missing := [contest for contest in contests if contest.folder.name not in kept]:
        publish_json(file, kept | {contest.folder.name: contest.measure_rate() for contest in missing})
    kept = kept_rates(file, {"ours": config})
    print("images a minute:", ", ".join(f"{name} {rate:,.0f}" for name, rate in kept.items()), flush=True)
    return kept


class Contest:
    """One peer: its learning rate, its training, and its samples at each time."""

    def __init__(self, recipe: Recipe, config: Config, to: Path) -> None:
        self.recipe, self.config = recipe, config
        cache = LatentCache(config.cache.path)
        self.manifest, channels = cache.manifest, cache.manifest.latent_channels
        self.normalization = normalization_of(config, self.manifest, None)
        means = torch.from_numpy(cache.read(np.arange(len(cache))))[:, :, :channels].float()
        views, labels = means.shape[1], torch.from_numpy(cache.labels)
        self.latents, self.labels = self.normalization.normalize(means.flatten(0, 1)), labels.repeat_interleave(views)
        ours: LatentUNet = build_model(config, self.manifest)
        self.options = matching(recipe, ours, self.manifest)
        network = build(recipe, self.options)
        self.said = {"parameters": network.num_parameters(), "flops": step_flops(network, ours)}
        settings = [recipe, self.options, config.data, config.vae, config.cache]
        settings += [config.train.batch_size, config.train.precision]
        name = "".join(letter for letter in recipe.name if letter.isalnum())
        self.folder = to / f"{name}-{digest(map(repr, settings))[:8]}"
        self.vae = FrozenVae(config.vae.source, pick_device())
        assert config.train.batch_size != "auto"
        self.batch_size = config.train.batch_size

    def measure_rate(self) -> float:
        """Return the images that it sees in a minute: the median over rounds, the first of which warms up."""
        peer, seconds_a_round = self._peer(RATES[0], 10**6), []
        for _ in range(ROUNDS + 1):
            started = time.perf_counter()
            for _ in range(STEPS_A_ROUND):
                peer.step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds_a_round.append(time.perf_counter() - started)
        return per_minute(STEPS_A_ROUND * self.batch_size, statistics.median(seconds_a_round[1:]))

    def curve(self, minutes: list[float], sweep: float, images: int, rates: dict[str, float]) -> list[dict[str, Any]]:
        """The figures at each time, with the best learning rate, guidance and steps, at the speed in `rates`."""
        self.rate = rates[self.folder.name]
        start: dict[str, Any] = {"guidance": 2.0, "steps": STEPS[0]}
        by_rate = {lr: self._distance(self._train(lr, [sweep])[0], CHOSEN_WITH, **start) for lr in RATES}
        lr = min(by_rate, key=by_rate.__getitem__)
        places = self._train(lr, minutes)
        best = start
        for key, values in (("guidance", GUIDANCES), ("steps", STEPS)):
            choices = [{**best, key: value} for value in values]
            best = min(choices, key=lambda choice: self._distance(places[-1], CHOSEN_WITH, **choice))
        print(f"{self.recipe.name}: rate {lr:g}, guidance {best['guidance']:g}, {best['steps']} steps", flush=True)
        said = {"lr": lr, "by_rate": by_rate, **best, **self.said}
        return [
            {"minutes": budget, **self._trained(place), **said} | _figures(self._measure(place, images, **best))
            for budget, place in zip(minutes, places, strict=True)
        ]

    def _train(self, lr: float, minutes: list[float]) -> list[Path]:
        """Train once, for as many steps as fit into the last of `minutes`; the weights to draw with at each time."""
        folder = self.folder / f"rate{lr:g}-{'-'.join(f'{budget:g}' for budget in minutes)}min"
        places = [folder / f"{budget:g}min.safetensors" for budget in minutes]
        if all(place.exists() for place in places):
            return places
        due = {
            max(round(budget * self.rate / self.batch_size), 1): place
            for budget, place in zip(minutes, places, strict=True)
        }
        peer, state = self._peer(lr, max(due)), folder / "state.safetensors"
        if state.exists():
            peer.load(safetensors.torch.load_file(state))
        while peer.done < max(due):
            peer.step()
            if place := due.get(peer.done):
                publish_json(place.with_suffix(".json"), {"steps": peer.done})
                publish(place, safetensors.torch.save(peer.weights()))
            if peer.done in due or peer.done % STEPS_A_STATE == 0:
                publish(state, safetensors.torch.save(peer.state()))
                print(f"{self.recipe.name}: rate {lr:g}, {peer.done:,} of {max(due):,} steps", flush=True)
        return places

    def _peer(self, lr: float, steps: int) -> Peer:
        return Peer(
            self.recipe,
            self.options,
            self.latents,
            self.labels,
            lr=lr,
            steps=steps,
            batch_size=self.batch_size,
            null=len(self.manifest.classes),
            accelerator=connect(self.config.train.precision),
        )

    def _trained(self, place: Path) -> dict[str, Any]:
        """Images seen until `place`."""
        return {"images": json.loads(place.with_suffix(".json").read_text())["steps"] * self.batch_size}

    def _distance(self, place: Path, images: int, **choice: Any) -> float:
        return float(_figures(self._measure(place, images, **choice))["kernel_distance"]["value"])

    def _measure(self, place: Path, images: int, *, guidance: float, steps: int) -> dict[str, Any]:
        """The figures of samples, as `latentmill evaluate --images` has them."""
        file = place.with_name(f"{place.stem}-guidance{guidance:g}-steps{steps}-{images}.npz")
        if not file.exists():
            network = build(self.recipe, self.options).eval()
            network.load_state_dict(safetensors.torch.load_file(place))
            classes = np.arange(images) % len(self.manifest.classes)
            pixels = self._samples(network, torch.from_numpy(classes), guidance, steps)
            write_npz(file, pixels, classes, self.config.data.image_size)
        figures: dict[str, Any] = Evaluation(self.config, self.folder, str(file), samples_only=True).receipt()[
            "figures"
        ]["samples"]
        return figures

    @torch.inference_mode()
    def _samples(self, network: nn.Module, labels: Tensor, guidance: float, steps: int) -> Iterator[np.ndarray]:
        """uint8 `B S S 3`, a batch at a time, by DDIM, in float32 as ours."""
        noise, null = NoiseProcess(schedule="linear", prediction="epsilon"), len(self.manifest.classes)
        device = self.vae.device
        network, labels = network.to(device), labels.to(device)

        def denoise(classes: Tensor, x: Tensor, timestep: Tensor, level: Level) -> tuple[Tensor, Tensor]:
            prediction = predict(network, x, timestep, labels=classes, null=null, guidance=guidance)
            return 2 * (noise.clean(x, prediction, level),)

        for chunk in torch.arange(len(labels)).split(BATCH):
            latents = sampling_loop(
                partial(denoise, labels[chunk]),
                noise.levels(steps),
                "ddim",
                shape=(self.manifest.latent_channels, *self.manifest.shape[1:]),  # of which shape[0] has stds, too
                generators=image_generators(0, chunk.tolist()),
                device=device,
            )
            yield to_images(self.vae.decode(self.normalization.denormalize(latents))).cpu().numpy()


def _figures(figures: dict[str, Any]) -> dict[str, Any]:
    """What is said of each time: the kernel distance and the probe, with their intervals."""
    names = {"KD-": "kernel_distance", "accuracy-": "accuracy"}
    return {said: value for key, value in figures.items() for start, said in names.items() if key.startswith(start)}


def print_table(curves: dict[str, list[dict[str, Any]]]) -> None:
    """Kernel distance x 1000 of each recipe at each time, and when ours is as good as the best peer at last."""
    times = [each["minutes"] for each in curves["ours"]]
    print("CPU minutes".ljust(24), *(f"{minutes:>12g}" for minutes in times))
    for name, curve in curves.items():
        shown = {each["minutes"]: _shown(each["kernel_distance"]) for each in curve}
        print(name.ljust(24), *(shown.get(minutes, "").rjust(12) for minutes in times))
    peers = {name: curve[-1]["kernel_distance"]["value"] for name, curve in curves.items() if name != "ours"}
    best = min(peers, key=peers.__getitem__)
    sooner = [each["minutes"] for each in curves["ours"] if each["kernel_distance"]["value"] <= peers[best]]
    last = curves["ours"][-1]["minutes"]
    when = f"in {sooner[0]:g}" if sooner else "in none of these times"
    print(f"what the best peer, {best}, has after {last:g} CPU minutes, ours has {when}")


def plot(curves: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Kernel distance against training time, with intervals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for name, curve in curves.items():
        distances = [each["kernel_distance"] for each in curve]
        rows = [[d["value"], *(d["interval"] or 2 * [d["value"]])] for d in distances]
        values, low, high = 1000 * np.array(rows).T
        minutes = [each["minutes"] for each in curve]
        axis.errorbar(minutes, values, [values - low, high - values], fmt="o-", capsize=3, label=name)
    axis.set(xlabel="CPU minutes of training", ylabel="kernel distance x 1000 (lower is better)", yscale="log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("")
    axis.set_yticks([10, 20, 50, 100, 200, 500])
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(file, dpi=120)


def _shown(estimate: dict[str, Any]) -> str:
    low, high = estimate["interval"] or (estimate["value"], estimate["value"])  # none where samples are copies
    return f"{1000 * estimate['value']:.1f} ±{500 * (high - low):.1f}"


if __name__ == "__main__":
    main()
