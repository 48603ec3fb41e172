"""Images/s of encode and of training on an idle machine, and beside processes that keep cores busy.

    python -m benchmarks.busy_machine path/to/cifar10 [--against path/to/another/checkout]

All are the commands that a user calls, in processes of their own: encode of a data set, from listing the files to the
finished cache, and training steps (the median of log.jsonl), by the threads of one process and by two processes of a
thread each, as with NPROC=2. With `--against`, the same commands are run in
another checkout of this repository, in turn with this one, so that a change is measured on the same machine and hour.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import click

HERE = Path(__file__).parent.parent
STEPS = 200
BATCH = 32


@click.command()
@click.argument("photos", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--against", type=click.Path(path_type=Path, exists=True), help="Another checkout to measure beside this."
)
@click.option("--images", default=10_000, show_default=True, help="Images to encode.")
@click.option("--busy", default=1, show_default=True, help="Processes that keep a core busy each.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the config.")
@click.option("--json", "report", type=click.Path(path_type=Path), help="Also write the figures to this file.")
def main(
    photos: Path,
    against: Path | None,
    images: int,
    busy: int,
    rounds: int,
    overrides: tuple[str, ...],
    report: Path | None,
) -> None:
    """Measure on PHOTOS, a folder of class folders of 32x32 images such as CIFAR-10."""
    rates: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        _link(photos.resolve(), work / "images", images)
        for number in range(rounds):
            for beside in (0, busy):
                for checkout in [path for path in (against, HERE) if path]:
                    ways: dict[str, Callable[[], float]] = {
                        "encode": partial(_encode, checkout, work, images, overrides),
                        "train": partial(_train, checkout, work, overrides, processes=1),
                    }
                    if checkout == HERE:
                        ways["train, NPROC=2"] = partial(_train, checkout, work, overrides, processes=2)
                    for what, measure in ways.items():
                        with _busy(beside):
                            rate = measure()
                        name = f"{what}, {'idle' if not beside else f'{beside} busy'}, {_name(checkout)}"
                        rates.setdefault(name, []).append(rate)
                        print(f"round {number + 1}  {name:40} {rate:8.1f} images/s", flush=True)
    for name, values in sorted(rates.items()):
        print(f"{name:40} {statistics.median(values):8.1f} images/s ({min(values):.1f} to {max(values):.1f})")
    if report:
        report.write_text(json.dumps(rates, indent=2) + "\n")


def _name(checkout: Path) -> str:
    return "this checkout" if checkout == HERE else checkout.name


def _link(photos: Path, folder: Path, count: int) -> None:
    """`count` of the images, of all classes, as links."""
    files = sorted(file.relative_to(photos) for file in photos.rglob("*") if file.is_file())
    for file in files[:: max(1, len(files) // count)][:count]:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).symlink_to(photos / file)


@contextlib.contextmanager
def _busy(count: int) -> Iterator[None]:
    """Other processes at work, at the same priority as ours."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def _encode(checkout: Path, work: Path, images: int, overrides: tuple[str, ...]) -> float:
    subprocess.run(["rm", "-r", "-f", str(work / "cache"), str(work / "cache-heldout")], check=True)
    started = time.perf_counter()
    _stage(checkout, "encode", work, overrides)
    return images / (time.perf_counter() - started)


def _train(checkout: Path, work: Path, overrides: tuple[str, ...], *, processes: int) -> float:
    subprocess.run(["rm", "-r", "-f", str(work / "run")], check=True)
    _stage(checkout, "train", work, overrides, processes)
    lines = map(json.loads, (work / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines())
    return statistics.median([line["images_per_second"] for line in lines if "images_per_second" in line][1:])


def _stage(checkout: Path, stage: str, work: Path, overrides: tuple[str, ...], processes: int = 1) -> None:
    settings = (
        f"data.source={work}/images",
        f"cache.path={work}/cache",
        f"train.images={STEPS * BATCH}",
        f"train.batch_size={BATCH}",
        f"train.log_every={STEPS * BATCH // 10}",
        "train.preview_every=1000000",
        "train.checkpoint_every=1000000",
        "sample.steps=1",
        "sample.per_class=1",
        *overrides,
    )
    launcher = ["-m", "stages"]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    if processes > 1:  # as the Makefile does
        launcher = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={processes}",
            "-m",
            "--",
            "stages",
        ]
        threads = max((os.cpu_count() or 1) // processes, 1)
        environment |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, *launcher, stage, "--config", "configs/cifar10.yaml", "--run", str(work / "run")]
    for setting in settings:
        command += ["--set", setting]
    subprocess.run(
        command, cwd=checkout, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


if __name__ == "__main__":
    main()
