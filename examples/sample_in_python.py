"""Draw four images of one class from a trained run and save them side by side.

python examples/sample_in_python.py runs/solids torus torus.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pipeline.config import Sample
from pipeline.device import pick_device
from pipeline.sampling import draw_samples
from pipeline.training.checkpoint import newest_checkpoint
from pipeline.vae import FrozenVae, to_images


def main(run: Path, name: str, file: Path) -> None:
    """Sample `name`, one of the classes of `run`, and save the picture to `file`."""
    checkpoint, _ = newest_checkpoint(run)
    if checkpoint is None:
        raise SystemExit(f"{run}: no checkpoint: train first")
    state, device = checkpoint.state, pick_device()
    model, vae = checkpoint.ema_model().to(device), FrozenVae(state.vae.source, device)
    vae.check(state.vae, checkpoint.path)  # another VAE would decode to noise

    labels = torch.full((4,), state.classes.index(name))
    settings = Sample(steps=25, guidance=2.0, seed=0)
    normalised = draw_samples(model, state.noise, settings, labels, indices=range(4), device=device)
    latents = checkpoint.normalization.denormalize(normalised)
    images = to_images(vae.decode(latents)).cpu().numpy()  # uint8, B H W 3
    Image.fromarray(np.concatenate(list(images), axis=1)).save(file)
    print(f"four samples of {name}: {file}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
