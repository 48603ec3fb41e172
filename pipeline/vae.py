"""The frozen VAE: encodes pixels to the mean and std of a posterior, and decodes latents to pixels.

`pixels` are float32 `B 3 H W` in -1..1; moments of one view are `B 2C h w`, mean then standard deviation; `latents` are
`B C h w` without scaling, as the VAE's decoder expects them.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data.cache.manifest import VaeIdentity

BUNDLED = Path(__file__).parent / "bundled_vae"
_PROBE = 128  # size in pixels of the test image that is encoded to measure the downsampling factor
_WEIGHTS = "diffusion_pytorch_model"
_HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
MAX_ROUNDING_ERROR = 0.01  # largest accepted error of a precision, as a fraction of the latents' standard deviation


def to_pixels(images: Tensor) -> Tensor:
    """Convert uint8 `B H W 3` in 0..255 to float32 `B 3 H W` in -1..1, the input range of diffusers' autoencoders."""
    return images.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1


def to_images(pixels: Tensor) -> Tensor:
    """Convert pixels back to uint8 `B H W 3`: clamp to -1..1, and round to the nearest level."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


class FrozenVae:
    """Wraps a pre-trained autoencoder of diffusers, which is never trained here.

    Any class works that maps an RGB image to a grid of latents and back: AutoencoderKL, AutoencoderTiny, AutoencoderDC
    and others. `precision` is fp32, or fp16 or bf16 for autocast. `downsampling` x `downsampling` pixels become one
    latent position with `latent_channels` channels; `image_size` is the only size that the model accepts, or None.
    """

    precision = "fp32"
    _tolerated: str | None = None

    def __init__(self, source: str, device: torch.device | str = "cpu") -> None:
        """Load the VAE from `source`: `bundled`, a folder in diffusers' format, or a hub id.

        A hub id is `owner/name`, or `owner/name/vae` for a subfolder, with an optional `@revision`; the commit that is
        loaded is recorded. ValueError, with a fix if there is one, if it cannot be loaded or is no VAE of RGB images.
        """
        self.device = torch.device(device)
        model, self.source = _load(source)
        self.model = model.requires_grad_(False).eval().to(self.device)
        self._of_tokens = type(self.model).__name__ == "AutoencoderRAE"
        of_videos = any(parameter.ndim == 5 for parameter in self.model.parameters())
        # token models depend on the memory layout, and 5-D video kernels have no channels_last
        self._layout = torch.contiguous_format if self._of_tokens or of_videos else torch.channels_last
        self.model.to(memory_format=self._layout)
        try:
            self._measure_shapes()
        except (TypeError, ValueError, RuntimeError) as error:  # raised by models for other inputs
            what = f"{type(self.model).__name__} does not map an image to a grid of latents and back"
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(f"vae.source: {source}: {what}: {reason}") from error

    def _measure_shapes(self) -> None:
        """Encode and decode a test image to find latent shape and image size; ValueError if the result is no image."""
        self.image_size: int | None = None
        size = _PROBE
        for _ in range(2):
            moments = self.encode(torch.zeros(1, 3, size, size))
            images = self.decode(moments[:, : moments.shape[1] // 2])
            if images.shape == (1, 3, size, size):
                break
            size = self.image_size = images.shape[-1]  # the model returns only this size: try it
        else:
            raise ValueError(f"images of {size} pixels become {tuple(images.shape)}")
        self.latent_channels, self.downsampling = moments.shape[1] // 2, size // moments.shape[-1]

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode pixels to the posterior's moments, float32; the std is 0 for models without one (AutoencoderTiny)."""
        with self._autocast():
            encoded = self.model.encode(pixels.to(self.device).contiguous(memory_format=self._layout))
        if hasattr(encoded, "latent_dist"):
            return torch.cat([encoded.latent_dist.mean, encoded.latent_dist.std], dim=1).float()
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent
        return torch.cat([latents, torch.zeros_like(latents)], dim=1).float()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, _HALF.get(self.precision), enabled=self.precision in _HALF)

    def rounding_error(self, pixels: Tensor, precision: str) -> float:
        """Return the error of the moments of `pixels` in `precision` against fp32: the root mean square difference, as
        a fraction of the standard deviation of the means; it can be NaN or infinite."""
        moments = {}
        before = self.precision
        for self.precision in ("fp32", precision):
            moments[self.precision] = self.encode(pixels)
        self.precision = before
        exact, rounded = moments["fp32"], moments[precision]
        spread = exact[:, : exact.shape[1] // 2].std()
        return float((rounded - exact).square().mean().sqrt() / spread)

    def tolerated_precision(self, pixels: Tensor) -> str:
        """Return the first of fp16 and bf16 whose error on `pixels` is at most `MAX_ROUNDING_ERROR`, else fp32.

        fp16 comes first because it has the smaller rounding error. The result of the first call is kept, so that
        held-out images are encoded like the training images.
        """
        if self._tolerated is None:
            errors = ((name, self.rounding_error(pixels, name)) for name in _HALF)
            self._tolerated = next((name for name, error in errors if error <= MAX_ROUNDING_ERROR), "fp32")
        return self._tolerated

    def encoding_bytes(self, batch_size: int, image_size: int) -> int:
        """Estimate the memory that `encode` needs for a batch: a few feature maps of the first level, in float32."""
        first = next(module for module in self.model.modules() if isinstance(module, nn.Conv2d))
        return 6 * 4 * batch_size * image_size**2 * first.out_channels

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents without scaling `B C h w` to pixels `B 3 H W`, float32."""
        with self._autocast():
            decoded = self.model.decode(latents.to(self.device).contiguous(memory_format=self._layout))
        return decoded.sample.float()

    def decode_images(self, latents: Tensor, batch_size: int = 16) -> NDArray[np.uint8]:
        """Decode latents `N C h w`, `batch_size` at a time, to images, uint8 `N H W 3`."""
        return torch.cat([to_images(self.decode(each)) for each in latents.split(batch_size)]).cpu().numpy()

    def identity(self) -> VaeIdentity:
        """Return what a cache records about this VAE; the hash covers every weight's name, type, shape and value."""
        sha = hashlib.sha256()
        for name, weight in sorted(self.model.state_dict().items()):
            sha.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
            sha.update(weight.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
        return VaeIdentity(
            source=self.source,
            class_name=type(self.model).__name__,
            weights_sha256=sha.hexdigest(),
            scaling_factor=float(self._config_value("scaling_factor") or 1.0),
            shift_factor=float(self._config_value("shift_factor") or 0.0),
            downsampling=self.downsampling,
            latents_mean=self._per_channel("latents_mean"),
            latents_std=self._per_channel("latents_std"),
        )

    def _config_value(self, name: str) -> Any:
        """Return a scale of the latents from the VAE's config; None for AutoencoderRAE: it normalises itself."""
        return None if self._of_tokens else self.model.config.get(name)

    def _per_channel(self, name: str) -> tuple[float, ...] | None:
        """Return a config field with one number per latent channel, or None if absent; ValueError for other lengths."""
        values, channels = self._config_value(name), self.latent_channels
        if values is None:
            return None
        if len(values) != channels or (name == "latents_std" and min(values) <= 0):
            raise ValueError(
                f"vae.source: {self.source}: {name} = {list(values)}: needs one value for each of {channels} channels"
            )
        return tuple(float(value) for value in values)

    def check(self, cached: VaeIdentity, cache: Path) -> None:
        """Raise ValueError if `cached`, the VAE of the cache at `cache`, is not this one."""
        ours = self.identity()
        if ours.weights_sha256 != cached.weights_sha256:
            raise ValueError(
                f"vae.source: {self.source} is not the VAE that made {cache} ({cached.source}, weights"
                f" {cached.weights_sha256[:12]}, here {ours.weights_sha256[:12]}): use that VAE or encode again"
            )


def _load(source: str) -> tuple[Any, str]:
    """Load the model; return it and `source`, with the commit if it is from the hub."""
    from diffusers.utils import logging

    folder = BUNDLED if source == "bundled" else Path(source)
    place = {"pretrained_model_name_or_path": folder} if folder.exists() else _on_the_hub(source)
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # diffusers also prints most of the errors that it raises
    try:
        if folder.exists() or folder.is_absolute() or source.startswith("."):
            _check_folder(folder)
        kind, commit = _class_of(place)
        if folder.exists():
            return _with_weights(kind, place, [_variant(folder)]), source
        pinned = {**place, "revision": commit or place.get("revision")}
        model = _with_weights(kind, pinned, [None, "fp16"])
        return model, f"{source.partition('@')[0]}@{commit}" if commit else source
    # diffusers and the hub raise these, also for file and network errors and for a missing library
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split("\n")[: 2 if isinstance(error, RuntimeError) else 1])
        if isinstance(error, OSError) and not folder.exists() and _is_pipeline(place):
            reason = f"it is a whole pipeline: use {source}/vae"
        raise ValueError(f"vae.source: cannot load a VAE from {source!r}: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)


def _check_folder(folder: Path) -> None:
    """Raise ValueError, with the fix, if `folder` is not a folder that contains a model in diffusers' format."""
    if folder.is_file():
        way = f"AutoencoderKL.from_single_file({str(folder)!r}).save_pretrained('new-folder')"
        raise ValueError(f"it is a single file: give a folder in diffusers' format; create one with {way} in Python")
    if not folder.exists():
        raise ValueError("there is no such folder")
    if not (folder / "config.json").is_file():
        if (folder / "vae" / "config.json").is_file():
            raise ValueError(f"it is a whole pipeline: use {folder / 'vae'}")
        raise ValueError("it contains no config.json: give a folder in diffusers' format")


def _on_the_hub(source: str) -> dict[str, Any]:
    """Convert a hub id, `owner/name` or `owner/name/folder`, optionally with `@revision`, to diffusers' arguments."""
    name, _, revision = source.partition("@")
    owner, *rest = name.split("/", 2)
    place = {"revision": revision} if revision else {}
    if len(rest) == 2 and owner not in ("", ".", ".."):
        return {"pretrained_model_name_or_path": f"{owner}/{rest[0]}", "subfolder": rest[1], **place}
    return {"pretrained_model_name_or_path": name, **place}


def _is_pipeline(place: dict[str, Any]) -> bool:
    """Return whether a hub id is a whole pipeline, with its VAE in the subfolder `vae`."""
    from diffusers import AutoencoderKL

    if "subfolder" not in place:
        with contextlib.suppress(OSError):
            return "_class_name" in AutoencoderKL.load_config(**place, subfolder="vae")
    return False


def _class_of(place: dict[str, Any]) -> tuple[Any, str | None]:
    """Return the diffusers class that config.json names, and the hub commit; ValueError if it is not an autoencoder of
    RGB images."""
    from diffusers import AutoencoderKL
    from diffusers.models import autoencoders

    config, commit = AutoencoderKL.load_config(**place, return_commit_hash=True)
    name = str(config.get("_class_name"))
    kind = getattr(autoencoders, name, None)
    if not isinstance(kind, type):
        raise ValueError(f"it is of class {name}, which is not an autoencoder of diffusers")
    taken, returned = (config.get(key, 3) for key in ("in_channels", "out_channels"))
    if (taken, returned) != (3, 3):
        raise ValueError(f"it maps {taken} image channels to {returned}: use a VAE of RGB images, with 3 channels")
    return kind, commit


def _variant(folder: Path) -> str | None:
    """Return which weights a folder contains: None for the default ones, else the variant, such as fp16."""
    names = sorted(file.name for file in folder.glob(f"{_WEIGHTS}.*"))
    if {f"{_WEIGHTS}.safetensors", f"{_WEIGHTS}.safetensors.index.json"} & {*names}:
        return None
    for name in names:
        if name.endswith(".safetensors") and name.count(".") == 2:
            return name.split(".")[1]
    if any(name.endswith(".bin") for name in names):
        way = f"AutoencoderKL.from_pretrained({str(folder)!r}, use_safetensors=False).save_pretrained('new-folder')"
        raise ValueError(
            f"its weights are .bin files (pickle), which are never loaded: if you trust them, convert them with {way}"
        )
    raise ValueError(f"there is no {_WEIGHTS}.safetensors next to its config.json")


def _with_weights(kind: Any, place: dict[str, Any], variants: list[str | None]) -> Any:
    """Load the model in float32, with the first of `variants` of its weights that can be read."""
    first: OSError | None = None
    for variant in variants:
        try:
            model, loaded = kind.from_pretrained(
                **place, variant=variant, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
            )
        except OSError as error:
            first = first or error
            continue
        if missing := sorted(loaded["missing_keys"]):
            raise ValueError(f"{len(missing)} of its weights are missing, the first is {missing[0]}")
        if variant:
            print(f"vae.source: {place['pretrained_model_name_or_path']} has only weights of the variant {variant}")
        return model
    assert first
    raise first
