"""Quality against training time: this project's recipe and what people use today, on the same latents and cores.

    python -m benchmarks.time_to_quality --config configs/cifar10.yaml --set data.source=path/to/cifar10

Ours trains anew for each of the times, since its learning rate is planned for the end. The peers are an example of
diffusers, DiT's recipe and what courses teach, each on a network of our FLOPs (`benchmarks/peers.py`). They train once,
as long as the longest time, and are measured on the way. Each peer's learning rate is the best of `RATES` after a short
training, and its guidance and steps of DDIM the best of `GUIDANCES` and `STEPS` at the end; ours takes the config's.
Minutes are those of one CPU core, or of the GPU. Every set of samples is measured by the code of
`latentmill evaluate --images`. Prints a table, and writes
`time_to_quality.json` and `time_to_quality.png`.

What is there already is not done again, so an interrupted night goes on at the peer that it came to. It needs a machine
that does nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from benchmarks.ablation import measure_rates, seconds, trained
from benchmarks.peers import RECIPES, Peer, Recipe
from data.cache import LatentCache
from data.generated import write_npz
from data.storage import publish, publish_json
from pipeline.noise import NoiseProcess
from pipeline.sampling import draw, image_generators, make_scheduler
from pipeline.unet import LatentUNet
from pipeline.vae import FrozenVae, to_images
from stages.cli import LocalPath
from stages.config import Config, load_config
from stages.encode import encode, parse_job
from stages.evaluate import Evaluation
from stages.launch import connect
from stages.start import build_model, normalization_of

RATES = (1e-4, 3e-4, 1e-3)
GUIDANCES, STEPS = (1.5, 2.0, 3.0, 4.0), (20, 50)
CHOSEN_WITH = 300  # samples that a learning rate, a guidance or a number of steps is chosen with
BATCH = 50


@click.command()
@click.option("--config", "file", type=LocalPath(), default=Path("configs/cifar10.yaml"))
@click.option("--set", "overrides", multiple=True, help="Override a key of the config: key=value.")
@click.option("--minutes", multiple=True, type=float, default=(5, 10, 12, 15, 20, 40, 60), show_default=True)
@click.option("--sweep", default=5.0, show_default=True, help="CPU minutes of training for each rate of a peer.")
@click.option("--images", default=1000, show_default=True, help="Samples that are measured each time.")
@click.option("--to", type=LocalPath(), default=Path("runs/time_to_quality"), show_default=True)
def main(
    file: Path, overrides: tuple[str, ...], minutes: tuple[float, ...], sweep: float, images: int, to: Path
) -> None:
    config = load_config(file, [*overrides, f"evaluate.images={images}"])
    encode(config, parse_job(None))
    rate = measure_rates({"ours": config})["ours"]
    curves: dict[str, list[dict[str, Any]]] = {"ours": []}
    for budget in sorted(minutes):
        run = trained(config, "ours", rate, budget, config.train.seed, to)
        curves["ours"].append({"minutes": budget, "images": run.images, **_figures(run.figures)})
    for recipe in RECIPES:
        curves[recipe.name] = Contest(recipe, config, to).curve(sorted(minutes), sweep, images)
    publish_json(to / "time_to_quality.json", {"config": str(file), "overrides": list(overrides), "curves": curves})
    print_table(curves)
    plot(curves, to / "time_to_quality.png")


class Contest:
    """One peer: its learning rate, its training, and its samples at each time."""

    def __init__(self, recipe: Recipe, config: Config, to: Path) -> None:
        self.recipe, self.config = recipe, config
        self.folder = to / recipe.name.replace(" ", "-").replace("'", "")
        cache = LatentCache(config.cache.path)
        self.manifest, channels = cache.manifest, cache.manifest.latent_channels
        self.normalization = normalization_of(config, self.manifest, None)
        means = torch.from_numpy(cache.read(np.arange(len(cache))))[:, :, :channels].float()
        views, self.labels = means.shape[1], torch.from_numpy(cache.labels)
        self.latents = self.normalization.normalize(means.flatten(0, 1))
        self.labels_of_latents = self.labels.repeat_interleave(views)
        self.ours: LatentUNet = build_model(config, self.manifest)
        self.vae = FrozenVae(config.vae.source)

    def curve(self, minutes: list[float], sweep: float, images: int) -> list[dict[str, Any]]:
        """The figures at each time, with the best rate, guidance and steps."""
        start: dict[str, Any] = {"guidance": 2.0, "steps": STEPS[0]}
        tried = {lr: self._train(lr, [sweep], f"rate-{lr:g}") for lr in RATES}
        by_rate = {lr: self._distance(peer, places[0], CHOSEN_WITH, **start) for lr, (peer, places) in tried.items()}
        lr = min(by_rate, key=by_rate.__getitem__)
        peer, places = self._train(lr, minutes, "best")
        choices: list[dict[str, Any]] = [{"guidance": g, "steps": s} for g, s in product(GUIDANCES, STEPS)]
        best = min(choices, key=lambda choice: self._distance(peer, places[-1], CHOSEN_WITH, **choice))
        print(f"{self.recipe.name}: rate {lr:g}, guidance {best['guidance']:g}, {best['steps']} steps", flush=True)
        said = {"lr": lr, "by_rate": by_rate, **best}
        return [
            {"minutes": budget, **said, **_figures(self._measure(peer, place, images, **best))}
            for budget, place in zip(minutes, places, strict=True)
        ]

    def _train(self, lr: float, minutes: list[float], name: str) -> tuple[Peer, list[Path]]:
        """Train once, to the last of `minutes`; the weights that samples are drawn from, at each of them."""
        accelerator = connect(self.config.train.precision)
        batch = self.config.train.batch_size
        assert batch != "auto"
        places = [self.folder / name / f"{budget:g}min.safetensors" for budget in minutes]

        def peer(steps: int) -> Peer:
            columns = self.latents, self.labels_of_latents
            options: dict[str, Any] = {"lr": lr, "steps": steps, "batch_size": batch, "accelerator": accelerator}
            return Peer(self.recipe, self.ours, self.manifest, *columns, **options)

        if all(place.exists() for place in places):
            return peer(1), places
        made = peer(int(seconds(minutes[-1]) / _seconds_a_step(peer(10**6))))
        spent, due = 0.0, list(zip(minutes, places, strict=True))
        while due:
            started = time.perf_counter()
            made.step()
            spent += time.perf_counter() - started
            if spent >= seconds(due[0][0]):
                publish(due.pop(0)[1], safetensors.torch.save(_weights(made)))
                print(f"{self.recipe.name}: rate {lr:g}, {spent / 60:.0f} minutes by the clock", flush=True)
        return made, places

    def _distance(self, peer: Peer, place: Path, images: int, **choice: Any) -> float:
        return _figures(self._measure(peer, place, images, **choice))["kernel_distance"]["value"]

    def _measure(self, peer: Peer, place: Path, images: int, *, guidance: float, steps: int) -> dict[str, Any]:
        """The figures of samples, as `latentmill evaluate --images` has them."""
        file = place.with_name(f"{place.stem}-guidance{guidance:g}-steps{steps}-{images}.npz")
        if not file.exists():
            peer.model.load_state_dict(safetensors.torch.load(place.read_bytes()))
            classes = np.arange(images) % len(self.manifest.classes)
            pixels = self._samples(peer, torch.from_numpy(classes), guidance, steps)
            write_npz(file, pixels, classes, self.config.data.image_size)
        figures: dict[str, Any] = Evaluation(self.config, self.folder, str(file)).receipt()["figures"]["samples"]
        return figures

    @torch.inference_mode()
    def _samples(self, peer: Peer, labels: Tensor, guidance: float, steps: int) -> Iterator[np.ndarray]:
        """uint8 `B S S 3`, a batch at a time, by DDIM."""
        peer.model.eval()
        noise = NoiseProcess(schedule="linear", prediction="epsilon")
        for chunk in torch.arange(len(labels)).split(BATCH):
            latents = draw(
                partial(peer.predict, labels=labels[chunk], guidance=guidance),
                make_scheduler("ddim", noise, steps),
                shape=self.manifest.shape,
                generators=image_generators(0, chunk.tolist()),
                device=torch.device("cpu"),
            )
            yield to_images(self.vae.decode(self.normalization.denormalize(latents))).cpu().numpy()


def _seconds_a_step(peer: Peer, steps: int = 20) -> float:
    peer.step()
    started = time.perf_counter()
    for _ in range(steps):
        peer.step()
    return (time.perf_counter() - started) / steps


def _weights(peer: Peer) -> dict[str, Tensor]:
    """The average, where the recipe has one."""
    if not peer.recipe.average:
        return {name: value.contiguous() for name, value in peer.model.state_dict().items()}
    peer.average.store(peer.model.parameters())
    peer.average.copy_to(peer.model.parameters())
    weights = {name: value.clone().contiguous() for name, value in peer.model.state_dict().items()}
    peer.average.restore(peer.model.parameters())
    return weights


def _figures(figures: dict[str, Any]) -> dict[str, Any]:
    """What is said of each time: the kernel distance and the probe, with their intervals."""
    names = {"KD-": "kernel_distance", "accuracy-": "accuracy"}
    return {said: value for key, value in figures.items() for start, said in names.items() if key.startswith(start)}


def print_table(curves: dict[str, list[dict[str, Any]]]) -> None:
    """Kernel distance x 1000 of each recipe at each time, and when ours is as good as the best peer at last."""
    print("CPU minutes".ljust(24), *(f"{each['minutes']:>12g}" for each in curves["ours"]))
    for name, curve in curves.items():
        print(name.ljust(24), *(_shown(each["kernel_distance"]).rjust(12) for each in curve))
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
        values, low, high = 1000 * np.array([[d["value"], *d["interval"]] for d in distances]).T
        minutes = [each["minutes"] for each in curve]
        axis.errorbar(minutes, values, [values - low, high - values], fmt="o-", capsize=3, label=name)
    axis.set(xlabel="CPU minutes of training", ylabel="kernel distance x 1000 (lower is better)", ylim=(0, None))
    axis.legend()
    figure.savefig(file, dpi=120)


def _shown(estimate: dict[str, Any]) -> str:
    low, high = estimate["interval"]
    return f"{1000 * estimate['value']:.1f} ±{500 * (high - low):.1f}"


if __name__ == "__main__":
    main()
