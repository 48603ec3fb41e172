"""Read a latent cache with plain zarr and numpy, without any module of latentmill.

python examples/read_a_cache.py caches/solids
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import zarr


def main(cache: Path) -> None:
    """Print what the cache holds, and check its normalisation against the manifest."""
    manifest = json.loads((cache / "manifest.json").read_text())
    # a slice of either is read from disk when it is taken
    moments, label = (zarr.open_array(cache / "latents.zarr" / name, mode="r") for name in ("moments", "label"))
    labels = np.asarray(label[:])
    print(f"{moments.shape} moments (image, view, mean and std, y, x) of {moments.dtype}, views {manifest['views']}")

    has_latents = labels != -1  # an image that could not be read has no latents
    for number, name in enumerate(manifest["classes"]):
        print(f"{name}: {np.sum(labels == number)} images")

    channels = moments.shape[2] // 2 if manifest["store"] == "moments" else moments.shape[2]
    means = np.asarray(moments[:])[has_latents, :, :channels].astype(np.float64)
    print("mean of each channel:", means.mean(axis=(0, 1, 3, 4)).round(3))
    np.testing.assert_allclose(means.mean(axis=(0, 1, 3, 4)), manifest["mean"], atol=1e-3)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "caches/solids"))
