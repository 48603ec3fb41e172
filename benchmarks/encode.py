"""Images/s of the whole stage encode against the bare VAE encoder, and against a plain script.

    python -m benchmarks.encode path/to/cifar10

In turn, on the same images, with the same batch size and threads: (1) the VAE's encoder on tensors that lie in memory,
(2) `latentmill encode` as a user calls it, from listing the files to the finished cache, and (3) a script that decodes,
encodes one image after the other and saves one .npy an image. Then the peak memory of (2) for a tenth and for all of
the images.
"""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image

from data.cache.writer import Job
from data.sources.files import ImageFiles
from pipeline.config import Cache, Config
from pipeline.config_file import load_config
from pipeline.vae import FrozenVae, to_pixels
from stages.encode import encode

VIEWS = 2


@click.command()
@click.argument("photos", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--rounds", default=3, show_default=True)
@click.option("--seconds", default=20.0, show_default=True, help="Of the bare encoder, a round.")
@click.option("--workers", default=Cache().workers, show_default=True, help="cache.workers of the whole stage.")
@click.option("--memory/--no-memory", default=True, help="Measure the peak memory, too.")
@click.option("--json", "report", type=click.Path(path_type=Path), help="Also write the figures to this file.")
def main(photos: Path, rounds: int, seconds: float, workers: int, memory: bool, report: Path | None) -> None:
    """Measure on PHOTOS, a folder of class folders of 32x32 images such as CIFAR-10."""
    config = load_config(Path("configs/cifar10.yaml"), [f"data.source={photos}", f"cache.workers={workers}"])
    source = ImageFiles(str(photos), image_size=config.data.image_size)
    vae = FrozenVae(config.vae.source)
    files = [photos / key for key in source.keys]
    ways: dict[str, Callable[[], float]] = {
        "bare encoder": lambda: _bare(vae, source, config.cache.batch_size, seconds),
        "whole stage": lambda: _stage(config, len(files)),
        "plain script": lambda: _plain_script(vae, files, seconds / 2),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in ("bare encoder", "whole stage", "bare encoder", "plain script"):  # the machine's speed drifts
            rates[name].append(ways[name]())
            print(f"round {number + 1}  {name:13} {rates[name][-1]:8.0f} images/s", flush=True)
    bare = [statistics.mean(rates["bare encoder"][2 * i : 2 * i + 2]) for i in range(rounds)]
    ratios = [stage / around for stage, around in zip(rates["whole stage"], bare, strict=True)]
    medians = {name: statistics.median(values) for name, values in rates.items()}
    counts = (len(files) // 10, len(files)) if memory else ()
    peaks = {count: _peak_memory(photos, source, count) for count in counts}
    for name, value in medians.items():
        print(f"{name:13} {value:8.0f} images/s ({min(rates[name]):.0f} to {max(rates[name]):.0f})")
    rounded = ", ".join(f"{ratio:.3f}" for ratio in ratios)
    print(f"whole stage / bare encoder before and after it: {statistics.median(ratios):.3f} (rounds: {rounded})")
    print(f"whole stage / plain script: {medians['whole stage'] / medians['plain script']:.2f}")
    for count, peak in peaks.items():
        print(f"peak memory of encode, {count:,} images: {peak / 1024:.0f} MiB")
    if report:
        report.write_text(json.dumps({"images_per_second": rates, "peak_kib": peaks}, indent=2) + "\n")


def _bare(vae: FrozenVae, source: ImageFiles, batch_size: int, seconds: float) -> float:
    """The encoder alone, both views, over and over the same few batches of pixels in memory."""
    images = torch.from_numpy(source.load(range(8 * batch_size)).pixels)
    batches = [to_pixels(part).contiguous(memory_format=torch.channels_last) for part in images.split(batch_size)]
    mirrored = [batch.flip(-1) for batch in batches]
    vae.encode(batches[0])
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        for views in zip(batches, mirrored, strict=True):
            for pixels in views:
                vae.encode(pixels)
            done += batch_size
    return done / (time.perf_counter() - started)


def _stage(config: Config, count: int) -> float:
    """`latentmill encode` into a new folder, loading the VAE included."""
    with tempfile.TemporaryDirectory() as folder:
        here = config.changed(cache=config.cache.changed(path=Path(folder) / "cache"))
        started = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            encode(here, Job())
        return count / (time.perf_counter() - started)


def _plain_script(vae: FrozenVae, files: list[Path], seconds: float) -> float:
    """Decode, encode both views, save one .npy: one image after the other."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        for done, file in enumerate(files):
            with Image.open(file) as image:
                pixels = to_pixels(torch.from_numpy(np.array(image.convert("RGB")))[None])
            moments = torch.cat([vae.encode(pixels), vae.encode(pixels.flip(-1))])
            np.save(f"{folder}/{done:06d}.npy", moments.half().numpy())
            if time.perf_counter() - started > seconds:
                break
        return (done + 1) / (time.perf_counter() - started)


def _peak_memory(photos: Path, source: ImageFiles, count: int) -> int:
    """KiB that a process of its own holds at most while it encodes `count` of the images, of all classes."""
    with tempfile.TemporaryDirectory() as folder:
        step = len(source.keys) // count
        for key in source.keys[::step]:
            link = Path(folder) / "images" / key
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((photos / key).resolve())
        code = (
            "import resource; from click.testing import CliRunner; from stages.cli import main;"
            " done = CliRunner().invoke(main, ['encode', '--config', 'configs/cifar10.yaml',"
            f" '--set', 'data.source={folder}/images', '--set', 'cache.path={folder}/cache']);"
            " assert done.exit_code == 0, done.output;"
            " print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
