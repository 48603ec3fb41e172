"""The frozen first stage: pixels to the moments of a posterior, and latents back to pixels.

`pixels` are float32 `B 3 H W` in -1..1; moments of one view are `B 2C h w`, mean then standard deviation; `latents` are
`B C h w` as the VAE's decoder takes them, unscaled.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.cache.manifest import VaeIdentity

BUNDLED = Path(__file__).parent / "bundled_vae"
_PROBE = 128  # pixels a side of the image that shows how many of them become one latent position
_WEIGHTS = "diffusion_pytorch_model"
_HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
ROUNDING = 0.01  # of the standard deviation of latents, that a precision may change them by


def to_pixels(images: Tensor) -> Tensor:
    """uint8 `B H W 3` in 0..255 to float32 `B 3 H W` in -1..1, the input range of diffusers' autoencoders."""
    return images.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1


def to_images(pixels: Tensor) -> Tensor:
    """The inverse of `to_pixels`, with values outside -1..1 cut off and the rest rounded to the nearest level."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


class FrozenVae:
    """A pre-trained autoencoder of diffusers that is never trained here: any that maps an RGB image to a grid of
    latents and back, AutoencoderKL, AutoencoderTiny, AutoencoderDC and others.

    It computes in `precision`: fp32, or under autocast to fp16 or bf16. `downsampling` pixels a side become one latent
    position of `latent_channels`; `image_size` is the one size that it takes, or None.
    """

    precision = "fp32"
    _bearable: str | None = None

    def __init__(self, source: str, device: torch.device | str = "cpu") -> None:
        """`source` is `bundled`, a folder in diffusers' format or a hub id: `owner/name`, `owner/name/vae` for a folder
        in it, and either with `@revision` behind it. That of a hub is remembered with the commit that was loaded.

        ValueError, with the way out where there is one, when it cannot be loaded or is no VAE of RGB images.
        """
        self.device = torch.device(device)
        model, self.source = _load(source)
        self.model = model.requires_grad_(False).eval().to(self.device)
        self._of_tokens = type(self.model).__name__ == "AutoencoderRAE"
        of_videos = any(parameter.ndim == 5 for parameter in self.model.parameters())
        # tokens are read in the order in which they lie, and kernels of videos have no other layout
        self._layout = torch.contiguous_format if self._of_tokens or of_videos else torch.channels_last
        self.model.to(memory_format=self._layout)
        try:
            self._try_out()
        except (TypeError, ValueError, RuntimeError) as error:  # what models raise that are made for something else
            what = f"{type(self.model).__name__} does not map an image to a grid of latents and back"
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(f"vae.source: {source}: {what}: {reason}") from error

    def _try_out(self) -> None:
        """Measure what becomes of an image; ValueError where it is not one again."""
        self.image_size: int | None = None
        size = _PROBE
        for _ in range(2):
            moments = self.encode(torch.zeros(1, 3, size, size))
            images = self.decode(moments[:, : moments.shape[1] // 2])
            if images.shape == (1, 3, size, size):
                break
            size = self.image_size = images.shape[-1]  # the one that it makes of all others
        else:
            raise ValueError(f"images of {size} pixels become {tuple(images.shape)}")
        self.latent_channels, self.downsampling = moments.shape[1] // 2, size // moments.shape[-1]

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Moments of the posterior, float32; an autoencoder without one, as AutoencoderTiny, has the standard deviation
        0."""
        with self._autocast():
            encoded = self.model.encode(pixels.to(self.device).contiguous(memory_format=self._layout))
        if hasattr(encoded, "latent_dist"):
            return torch.cat([encoded.latent_dist.mean, encoded.latent_dist.std], dim=1).float()
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent
        return torch.cat([latents, torch.zeros_like(latents)], dim=1).float()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, _HALF.get(self.precision), enabled=self.precision in _HALF)

    def rounding(self, pixels: Tensor, precision: str) -> float:
        """How far the moments of `pixels` in `precision` lie from those in fp32: the root mean square of the
        difference, as a share of the standard deviation of the means; NaN or infinite where they are."""
        moments = {}
        before = self.precision
        for self.precision in ("fp32", precision):
            moments[self.precision] = self.encode(pixels)
        self.precision = before
        exact, rounded = moments["fp32"], moments[precision]
        spread = exact[:, : exact.shape[1] // 2].std()
        return float((rounded - exact).square().mean().sqrt() / spread)

    def bearable_precision(self, pixels: Tensor) -> str:
        """The first of fp16, which has the finer steps, and bf16 in which the moments of `pixels` are finite and lie
        within `ROUNDING` of those in fp32; fp32 where there is none. The images that it is asked of first decide, so
        that held-out images are encoded as those of training."""
        if self._bearable is None:
            self._bearable = next((name for name in _HALF if self.rounding(pixels, name) <= ROUNDING), "fp32")
        return self._bearable

    def encoding_bytes(self, batch_size: int, image_size: int) -> int:
        """About the memory that `encode` takes for a batch: a few feature maps of the first level, in float32."""
        first = next(module for module in self.model.modules() if isinstance(module, nn.Conv2d))
        return 6 * 4 * batch_size * image_size**2 * first.out_channels

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels of unscaled latents."""
        with self._autocast():
            decoded = self.model.decode(latents.to(self.device).contiguous(memory_format=self._layout))
        return decoded.sample.float()

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
            scaling_factor=float(self._said("scaling_factor") or 1.0),
            shift_factor=float(self._said("shift_factor") or 0.0),
            downsampling=self.downsampling,
            latents_mean=self._per_channel("latents_mean"),
            latents_std=self._per_channel("latents_std"),
        )

    def _said(self, name: str) -> Any:
        """A field of the config about the distribution of latents; those of AutoencoderRAE are normalised already."""
        return None if self._of_tokens else self.model.config.get(name)

    def _per_channel(self, name: str) -> tuple[float, ...] | None:
        """A field of the config that has one number a latent channel, or None; ValueError where that is not so."""
        values, channels = self._said(name), self.latent_channels
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


def _load(source: str) -> tuple[Any, str]:
    """The model, and `source` with the commit of the hub that it is of."""
    from diffusers.utils import logging

    folder = BUNDLED if source == "bundled" else Path(source)
    place = {"pretrained_model_name_or_path": folder} if folder.exists() else _on_the_hub(source)
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # of an error that it raises, diffusers prints most beforehand
    try:
        if folder.exists() or folder.is_absolute() or source.startswith("."):
            _check_folder(folder)
        kind, commit = _class_of(place)
        if folder.exists():
            return _with_weights(kind, place, [_variant(folder)]), source
        pinned = {**place, "revision": commit or place.get("revision")}
        model = _with_weights(kind, pinned, [None, "fp16"])
        return model, f"{source.partition('@')[0]}@{commit}" if commit else source
    # what diffusers and the hub raise for files and networks, too, and for a library that a model needs
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split("\n")[: 2 if isinstance(error, RuntimeError) else 1])
        if isinstance(error, OSError) and not folder.exists() and _is_pipeline(place):
            reason = f"it is a whole pipeline: give {source}/vae"
        raise ValueError(f"vae.source: cannot load a VAE from {source!r}: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)


def _check_folder(folder: Path) -> None:
    """ValueError, with the way out, where `folder` is none, or none of a model in diffusers' format."""
    if folder.is_file():
        way = f"AutoencoderKL.from_single_file({str(folder)!r}).save_pretrained('new-folder')"
        raise ValueError(f"it is a single file: give a folder in diffusers' format, which {way} of diffusers writes")
    if not folder.exists():
        raise ValueError("there is no such folder")
    if not (folder / "config.json").is_file():
        if (folder / "vae" / "config.json").is_file():
            raise ValueError(f"it is a whole pipeline: give {folder / 'vae'}")
        raise ValueError("there is no config.json in it: give a folder in diffusers' format")


def _on_the_hub(source: str) -> dict[str, Any]:
    """What diffusers is told of a hub id, `owner/name` or `owner/name/folder`, with or without `@revision`."""
    name, _, revision = source.partition("@")
    owner, *rest = name.split("/", 2)
    place = {"revision": revision} if revision else {}
    if len(rest) == 2 and owner not in ("", ".", ".."):
        return {"pretrained_model_name_or_path": f"{owner}/{rest[0]}", "subfolder": rest[1], **place}
    return {"pretrained_model_name_or_path": name, **place}


def _is_pipeline(place: dict[str, Any]) -> bool:
    """Whether a hub id is that of a pipeline, whose VAE is in a folder of its own."""
    from diffusers import AutoencoderKL

    if "subfolder" not in place:
        with contextlib.suppress(OSError):
            return "_class_name" in AutoencoderKL.load_config(**place, subfolder="vae")
    return False


def _class_of(place: dict[str, Any]) -> tuple[Any, str | None]:
    """The class of diffusers that a config.json is of, and the commit of the hub that it is from; ValueError where it
    is no autoencoder of RGB images."""
    from diffusers import AutoencoderKL
    from diffusers.models import autoencoders

    config, commit = AutoencoderKL.load_config(**place, return_commit_hash=True)
    name = str(config.get("_class_name"))
    kind = getattr(autoencoders, name, None)
    if not isinstance(kind, type):
        raise ValueError(f"it is of class {name}, which is no autoencoder of diffusers")
    taken, returned = (config.get(key, 3) for key in ("in_channels", "out_channels"))
    if (taken, returned) != (3, 3):
        raise ValueError(f"it takes images of {taken} channels and returns {returned}; images here are RGB, of 3")
    return kind, commit


def _variant(folder: Path) -> str | None:
    """Which weights are in a VAE's folder: None for the plain ones, or the variant of the only ones, such as fp16."""
    names = sorted(file.name for file in folder.glob(f"{_WEIGHTS}.*"))
    if {f"{_WEIGHTS}.safetensors", f"{_WEIGHTS}.safetensors.index.json"} & {*names}:
        return None
    for name in names:
        if name.endswith(".safetensors") and name.count(".") == 2:
            return name.split(".")[1]
    if any(name.endswith(".bin") for name in names):
        way = f"AutoencoderKL.from_pretrained({str(folder)!r}, use_safetensors=False).save_pretrained('new-folder')"
        raise ValueError(
            f"its weights are .bin, pickles, which are never loaded: if you trust them, {way} converts them"
        )
    raise ValueError(f"there is no {_WEIGHTS}.safetensors beside its config.json")


def _with_weights(kind: Any, place: dict[str, Any], variants: list[str | None]) -> Any:
    """The model, in float32, with the first of `variants` of its weights that can be read."""
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
            raise ValueError(f"{len(missing)} of its weights are missing, the first of them {missing[0]}")
        if variant:
            print(f"vae.source: {place['pretrained_model_name_or_path']} has weights of the variant {variant} alone")
        return model
    assert first
    raise first
