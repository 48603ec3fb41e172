"""What training at scale takes, on paper: FLOPs and memory of the real models, counted on the meta device.

    python -m benchmarks.scaling [--utilisation 0.35]

Prints the table of docs/scaling.md: for ImageNet-100 at 128x128 and ImageNet at 256x256, on one and eight H100, what
encode and train compute, keep and read, and how long that takes if GPUs reach a share `--utilisation` of the peak of
their data sheet. `python -m benchmarks.train_large` measures that share.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click
import torch
from diffusers import AutoencoderKL
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.flops import Cost, fitting_rows, peak_flops
from pipeline.unet import LatentUNet

GPU, MEMORY = "H100", 80e9
# the autoencoder of the configs, stabilityai/sd-vae-ft-ema: its config, from its model card's repository
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
DOWNSAMPLING, LATENT_CHANNELS = 8, 4
SETS = (  # config, images, classes
    ("imagenet100-128", 126_689, 100),
    ("imagenet256", 1_281_167, 1000),
)


@dataclass(frozen=True)
class Scale:
    """One config on `gpus` GPUs."""

    config: Config
    images: int
    classes: int
    gpus: int
    utilisation: float

    @property
    def model(self) -> LatentUNet:
        size = self.config.data.image_size // DOWNSAMPLING
        with torch.device("meta"):
            return LatentUNet(
                in_channels=LATENT_CHANNELS,
                sample_size=size,
                num_classes=self.classes,
                **self.config.model.model_dump(),
            )

    def rows(self) -> dict[str, str]:
        """What the table says."""
        model, train = self.model, self.config.train
        cost, flops = Cost.of(model), self.gpus * self.utilisation * (peak_flops(GPU, half=True) or 0)
        assert train.batch_size != "auto"
        views = 1 + self.config.cache.flip
        latent = views * 2 * LATENT_CHANNELS * (self.config.data.image_size // DOWNSAMPLING) ** 2 * 2  # float16
        rate, encoding = flops / cost.flops, flops / (views * encoder_flops(self.config.data.image_size))
        room = fitting_rows(model, int(MEMORY), averages=1, half=True)
        middle = sum(parameter.numel() for parameter in model.middle.parameters()) / model.num_parameters()
        lowest = self.config.data.image_size // DOWNSAMPLING // 2 ** (len(self.config.model.channels) - 1)
        tokens = lowest**2
        fixed, checkpoint = (4 * copies * model.num_parameters() for copies in (5, 4))
        return {
            "parameters, of which in the bottleneck": f"{model.num_parameters() / 1e6:.0f} M, {middle:.0%}",
            "tokens of the bottleneck": f"{tokens:,}",
            "GMAC of a forward pass": f"{cost.flops / 6e9:.1f}",
            "GFLOP per image, forward and backward": f"{cost.flops / 1e9:.0f}",
            "kept for the backward pass, per image": f"{cost.kept_bytes / 2e6:.0f} MB",
            "weights, gradients, moments, average": f"{fixed / 1e9:.1f} GB",
            "checkpoint": f"{checkpoint / 1e9:.1f} GB",
            "images that a GPU has room for": f"{room:,}",
            "batch per GPU": f"{train.batch_size // self.gpus:,}",
            "cache": f"{self.images * latent / 1e9:.1f} GB",
            "encode": f"{encoding:,.0f} images/s, {_time(self.images / encoding)}",
            "train": f"{rate:,.0f} images/s",
            "read by training": f"{rate * latent / 1e6:,.0f} MB/s",
            f"{train.images / 1e6:.0f} million images": _time(train.images / rate),
        }


def encoder_flops(image_size: int) -> int:
    """Of the VAE's encoder on one image."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        AutoencoderKL(**VAE, norm_num_groups=32).encode(torch.empty(1, 3, image_size, image_size))
    return counter.get_total_flops()


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


@click.command()
@click.option("--utilisation", default=0.35, show_default=True, help="Share of the peak that GPUs reach.")
def main(utilisation: float) -> None:
    columns = {
        f"{name}, {gpus} {GPU}": Scale(load_config(Path(f"configs/{name}.yaml")), images, classes, gpus, utilisation)
        for name, images, classes in SETS
        for gpus in (1, 8)
    }
    tables = {title: scale.rows() for title, scale in columns.items()}
    print("| |", " | ".join(tables), "|")
    print("|---" * (len(tables) + 1) + "|")
    names = list(dict.fromkeys(name for table in tables.values() for name in table))
    for name in names:
        print(f"| {name} |", " | ".join(table.get(name, "") for table in tables.values()), "|")


if __name__ == "__main__":
    main()
