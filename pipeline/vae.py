"""The frozen first stage: pixels to the moments of a posterior, and latents back to pixels.

`pixels` are float32 `B 3 H W` in -1..1; moments of one view are `B 2C h w`, mean then standard deviation; `latents` are
`B C h w` as the VAE's decoder takes them, unscaled.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.manifest import VaeIdentity

BUNDLED = Path(__file__).parent / "bundled_vae"


def to_pixels(images: Tensor) -> Tensor:
    """uint8 `B H W 3` in 0..255 to float32 `B 3 H W` in -1..1, the input range of diffusers' autoencoders."""
    return images.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1


def to_images(pixels: Tensor) -> Tensor:
    """The inverse of `to_pixels`, with values outside -1..1 cut off and the rest rounded to the nearest level."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


class FrozenVae:
    """A pre-trained autoencoder of diffusers (AutoencoderKL or AutoencoderTiny) that is never trained here."""

    def __init__(self, source: str, device: torch.device | str = "cpu") -> None:
        """`source` is `bundled`, a folder in diffusers' format, or a hub id. ValueError when it cannot be loaded."""
        self.source = source
        self.device = torch.device(device)
        self.model = _load(source).requires_grad_(False).eval().to(self.device, memory_format=torch.channels_last)
        self.downsampling = 2 ** (len(self.model.config["block_out_channels"]) - 1)

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Moments of the posterior; a VAE without a posterior (AutoencoderTiny) has the standard deviation 0."""
        encoded = self.model.encode(pixels.to(self.device).contiguous(memory_format=torch.channels_last))
        if hasattr(encoded, "latent_dist"):
            return torch.cat([encoded.latent_dist.mean, encoded.latent_dist.std], dim=1)
        return torch.cat([encoded.latents, torch.zeros_like(encoded.latents)], dim=1)

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels of unscaled latents."""
        return self.model.decode(latents.to(self.device).contiguous(memory_format=torch.channels_last)).sample

    def identity(self) -> VaeIdentity:
        """What a cache records of this VAE; the hash covers every weight's name, type, shape and value."""
        sha = hashlib.sha256()
        for name, weight in sorted(self.model.state_dict().items()):
            sha.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
            sha.update(weight.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        return VaeIdentity(
            source=self.source,
            class_name=type(self.model).__name__,
            weights_sha256=sha.hexdigest(),
            scaling_factor=float(self.model.config.get("scaling_factor") or 1.0),
            shift_factor=float(self.model.config.get("shift_factor") or 0.0),
            downsampling=self.downsampling,
            latents_mean=self._per_channel("latents_mean"),
            latents_std=self._per_channel("latents_std"),
        )

    def _per_channel(self, name: str) -> tuple[float, ...] | None:
        """A field of the config that has one number a latent channel, or None; ValueError where that is not so."""
        values, channels = self.model.config.get(name), self.model.config["latent_channels"]
        if values is None:
            return None
        if len(values) != channels or (name == "latents_std" and min(values) <= 0):
            raise ValueError(
                f"vae.source: {self.source}: {name} = {list(values)}: not one for each of {channels} channels"
            )
        return tuple(float(value) for value in values)

    def check(self, cached: VaeIdentity, cache: Path) -> None:
        """ValueError when `cached`, the VAE of the cache at `cache`, is not this one."""
        ours = self.identity()
        if ours.weights_sha256 != cached.weights_sha256:
            raise ValueError(
                f"vae.source: {self.source} is not the VAE that made {cache} ({cached.source}, weights"
                f" {cached.weights_sha256[:12]}, here {ours.weights_sha256[:12]}): use that one or encode again"
            )


def _load(source: str) -> Any:
    from diffusers import AutoencoderKL, AutoencoderTiny

    folder = BUNDLED if source == "bundled" else Path(source)
    where: str | Path = folder if folder.exists() else source
    classes = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
    try:
        name = AutoencoderKL.load_config(where).get("_class_name")
        if name not in classes:
            raise ValueError(f"vae.source: {source} is of class {name}; this project reads {' and '.join(classes)}")
        return classes[name].from_pretrained(where, use_safetensors=True, low_cpu_mem_usage=False)
    except OSError as error:  # what diffusers and the hub raise for a missing folder, file or network
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"vae.source: cannot load a VAE from {source!r}: {reason}") from error
