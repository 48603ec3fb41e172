"""Where the time of `make all` goes: the three stages from nothing, and what in each of them is not the model.

    python -m benchmarks.make_all [--config configs/solids.yaml] [--json FILE]

Runs encode, train and sample in processes of their own with an empty cache and an empty run, as `make all` does after
the installation. Training steps are what log.jsonl says, drawing and decoding are what sample says; imports are
measured by a process that only imports. To see what a CPU without AVX-512 takes, set ATEN_CPU_CAPABILITY=avx2 and
ONEDNN_MAX_CPU_ISA=AVX2 in the environment.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from data.storage import publish_json
from stages.cli import LocalPath

STAGES = {"encode": "stages.encode", "train": "stages.train", "sample": "stages.decode"}  # and what each imports


@click.command()
@click.option("--config", "file", type=LocalPath(), default=Path("configs/solids.yaml"))
@click.option("--set", "overrides", multiple=True, help="Override a key of the config: key=value.")
@click.option("--json", "report", type=LocalPath(), help="Also write the figures to this file.")
def main(file: Path, overrides: tuple[str, ...], report: Path | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        settings = [*overrides, f"cache.path={folder}/cache"]
        options = ["--config", str(file), *(part for each in settings for part in ("--set", each))]
        imports = {stage: seconds([sys.executable, "-c", f"import {name}"])[0] for stage, name in STAGES.items()}
        wall, said = {}, {}
        for stage in STAGES:
            command = [sys.executable, "-m", "stages", stage, *options, "--run", f"{folder}/run"]
            wall[stage], said[stage] = seconds(command)
            print(f"{stage}: {wall[stage]:.0f} s", flush=True)
        log = [json.loads(line) for line in (Path(folder) / "run" / "log.jsonl").read_text().splitlines()]
    shares = parts(wall, imports, steps(log), said["sample"])
    total = sum(wall.values())
    for name, part in shares.items():
        print(f"{name:32} {part:7.1f} s  {part / total:6.1%}")
    print(f"{'all':32} {total:7.1f} s")
    if report:
        isa = os.environ.get("ONEDNN_MAX_CPU_ISA", "all instructions")
        publish_json(report, {"config": str(file), "instructions": isa, "seconds": shares, "all": total})


def parts(wall: dict[str, float], imports: dict[str, float], steps: float, said: str) -> dict[str, float]:
    """Seconds of each part; those of all parts add up to those of the stages."""
    found = re.search("sample: ([0-9,]+) images in .*, ([0-9.]+) images/s", said)
    assert found, said
    sampling = float(found[1].replace(",", "")) / float(found[2])
    return {
        "imports": sum(imports.values()),
        "encode": wall["encode"] - imports["encode"],
        "train: steps": steps,
        "train: previews, checkpoints": wall["train"] - imports["train"] - steps,
        "sample: drawing and decoding": sampling,
        "sample: the rest": wall["sample"] - imports["sample"] - sampling,
    }


def steps(log: list[dict[str, float]]) -> float:
    """Seconds of all training steps: of every window of the log, its images by its images/s."""
    lines = [line for line in log if "loss" in line]
    before = [0, *(line["images_seen"] for line in lines)]
    return sum((line["images_seen"] - b) / line["images_per_second"] for b, line in zip(before, lines, strict=False))


def seconds(command: list[str]) -> tuple[float, str]:
    """What a command takes, and what it says."""
    started = time.perf_counter()
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    return time.perf_counter() - started, said


if __name__ == "__main__":
    main()
