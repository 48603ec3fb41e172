"""Does an export work in a fresh environment, with torch and diffusers alone?

    python -m benchmarks.fresh_export --run runs/solids [PIP-OPTION]...

Exports the run, makes a virtual environment with this one's versions of torch, diffusers and NumPy, without accelerate
and latentmill, loads the export there, offline and with an empty cache, and compares its images with those of
`load_pipeline` here. Pip options are passed on, such as `--extra-index-url https://download.pytorch.org/whl/cpu`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import venv
from importlib.metadata import version
from pathlib import Path

import click
import numpy as np

from pipeline.config_file import load_config
from pipeline.diffusers_pipeline import load_pipeline
from stages.cli import LocalPath
from stages.export import export

PACKAGES = ("torch", "diffusers", "numpy", "pillow", "safetensors")
SEED, COUNT = 0, 4
DRAW = """
import importlib.util, sys
import numpy as np
from diffusers import DiffusionPipeline
assert not any(importlib.util.find_spec(name) for name in ("pipeline", "stages", "accelerate"))
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
labels = [*pipe.labels.values()][:1] * int(sys.argv[3])
images = pipe(labels, generator=pipe.image_generators(int(sys.argv[2]), range(len(labels)))).images
np.save(sys.argv[4], np.stack([np.asarray(image) for image in images]))
"""


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--run", type=LocalPath(), default=Path("runs/solids"), show_default=True)
@click.argument("pip_options", nargs=-1, type=click.UNPROCESSED)
def main(run: Path, pip_options: tuple[str, ...]) -> None:
    """Export a run, load it in a fresh environment, and compare the images."""
    here = load_pipeline(run).to("cpu")
    labels = [*here.labels.values()][:1] * COUNT
    ours = here(labels, generator=here.image_generators(SEED, range(COUNT))).images
    with tempfile.TemporaryDirectory() as work:
        folder = export(load_config(run / "config.yaml"), run, Path(work) / "export")
        venv.create(Path(work) / "venv", with_pip=True)
        python = Path(work) / "venv" / "bin" / "python"
        wanted = [f"{name}=={version(name)}" for name in PACKAGES]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted, *pip_options], check=True)
        listed = subprocess.run([python, "-m", "pip", "list", "--format=json"], check=True, capture_output=True).stdout
        print("installed:", ", ".join(f"{each['name']} {each['version']}" for each in json.loads(listed)))
        environment = {"PATH": os.environ["PATH"], "HF_HOME": f"{work}/hub", "HF_HUB_OFFLINE": "1"}
        drawn = Path(work) / "drawn.npy"
        subprocess.run(
            [python, "-I", "-c", DRAW, folder, str(SEED), str(COUNT), drawn], check=True, cwd=work, env=environment
        )
        theirs = np.load(drawn)
    difference = np.abs(theirs.astype(int) - np.stack([np.asarray(image) for image in ours]).astype(int)).max()
    print(f"largest difference of {COUNT} images: {difference} of 255")
    sys.exit(int(difference > 1))


if __name__ == "__main__":
    main()
