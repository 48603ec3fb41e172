"""Draw four images of one class from a trained run and save them side by side.

python examples/sample_in_python.py runs/solids torus torus.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from diffusers.utils import make_image_grid

from pipeline.diffusers_pipeline import load_pipeline


def main(run: Path, name: str, file: Path) -> None:
    """Sample `name`, one of the classes of `run`, and save the picture to `file`."""
    pipe = load_pipeline(run)
    generators = pipe.image_generators(0, range(4))  # seed 0: the same images each time
    images = pipe([name] * 4, guidance_scale=2.0, num_inference_steps=25, generator=generators).images
    make_image_grid(images, rows=1, cols=4).save(file)
    print(f"four samples of {name}: {file}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
