"""The denoiser: a U-Net whose bottleneck is a stack of transformer blocks.

It imports only torch and diffusers, so that this file can be copied next to exported weights.

Shapes: `B C H W` feature maps, `T = H W` tokens of width `D`, `E` width of the conditioning vector.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_Module = TypeVar("_Module", bound=nn.Module)
GROUP_WIDTH = 16  # channels per normalisation group, if the channel count allows it


@dataclass
class UNetOutput(BaseOutput):
    """Holds the prediction `sample`, `B C H W`, like the output of diffusers' own U-Nets."""

    sample: Tensor


def timestep_embedding(timesteps: Tensor, width: int, max_period: float = 10_000.0) -> Tensor:
    """Return sinusoidal features of `timesteps` (`B`, 0..1000): float32 `B width` (Vaswani et al. 2017, sec. 3.5)."""
    half = width // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=timesteps.device) / half)
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(channels, max(channels // GROUP_WIDTH, 1)), channels)


def _zero(module: _Module) -> _Module:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class ResidualBlock(nn.Module):
    """Applies GroupNorm, SiLU and a convolution, twice, and adds a shortcut.

    The condition scales and shifts the second norm (Dhariwal and Nichol 2021, section 3). The last convolution starts
    at zero.
    """

    def __init__(self, channels_in: int, channels: int, condition: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = _norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.modulation = _zero(nn.Linear(condition, 2 * channels))
        self.norm2 = _norm(channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _zero(nn.Conv2d(channels, channels, 3, padding=1))
        self.shortcut = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map `B C_in H W` and the condition `B E` to `B C H W`."""
        scale, shift = self.modulation(condition)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = F.silu(self.norm2(h) * (1 + scale) + shift)
        return self.shortcut(x) + self.conv2(self.dropout(h))


class TransformerBlock(nn.Module):
    """Applies self-attention and an MLP, each with AdaLN-Zero (Peebles and Xie 2023, section 3.2).

    The condition gives scale and shift of a LayerNorm and a gate on the result, all zero at the start.
    """

    def __init__(self, width: int, condition: int, head_width: int, dropout: float) -> None:
        super().__init__()
        self.heads = width // head_width
        self.modulation = _zero(nn.Linear(condition, 6 * width))
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(approximate="tanh"),
            nn.Dropout(dropout),
            nn.Linear(4 * width, width),
        )

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map tokens `B T D` and the condition `B E` to `B T D`."""
        scale1, shift1, gate1, scale2, shift2, gate2 = self.modulation(condition)[:, None].chunk(6, dim=-1)
        x = x + gate1 * self._attend(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)

    def _attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each B heads T D/heads
        return self.project(_attention(q, k, v).transpose(1, 2).flatten(2))


class TransformerBottleneck(nn.Module):
    """Applies `depth` transformer blocks to a feature map, as tokens with learned position embeddings."""

    def __init__(self, width: int, size: int, condition: int, depth: int, head_width: int, dropout: float) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, size * size, width) * 0.02)
        self.blocks = nn.ModuleList(TransformerBlock(width, condition, head_width, dropout) for _ in range(depth))
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map `B D H W` and the condition `B E` to `B D H W`."""
        tokens = x.flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            tokens = _run(block, tokens, condition, self.gradient_checkpointing)
        return tokens.transpose(1, 2).unflatten(2, x.shape[2:]).contiguous(memory_format=torch.channels_last)


class ResidualBottleneck(nn.Module):
    """Applies `depth` residual blocks: the traditional bottleneck, for comparison."""

    def __init__(self, width: int, condition: int, depth: int, dropout: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(width, width, condition, dropout) for _ in range(depth))
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map `B D H W` and the condition `B E` to `B D H W`."""
        for block in self.blocks:
            x = _run(block, x, condition, self.gradient_checkpointing)
        return x


class DownLevel(nn.Module):
    """Applies residual blocks at one resolution, each with a skip connection, then a strided convolution to half of it.

    `gradient_checkpointing` saves the blocks' activation memory at the cost of a second forward pass.
    """

    def __init__(self, width: int, channels: int, blocks: int, condition: int, dropout: float, *, last: bool) -> None:
        super().__init__()
        widths = [width] + [channels] * (blocks - 1)
        self.blocks = nn.ModuleList(ResidualBlock(w, channels, condition, dropout) for w in widths)
        self.downsample = None if last else nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, condition: Tensor, skips: list[Tensor]) -> Tensor:
        """Map `B C_in H W` and the condition `B E` to `B C H/2 W/2`; append every feature map to `skips`."""
        for block in self.blocks:
            x = _run(block, x, condition, self.gradient_checkpointing)
            skips.append(x)
        if self.downsample is not None:
            x = self.downsample(x)
            skips.append(x)
        return x


class UpLevel(nn.Module):
    """Applies residual blocks at one resolution, each with a skip connection as input, then upsampling.

    Upsampling is nearest-neighbour with a convolution to the `up_to` channels of the next level (None: no upsampling).
    """

    def __init__(
        self, width: int, skips: list[int], channels: int, condition: int, dropout: float, *, up_to: int | None
    ) -> None:
        super().__init__()
        widths = [width + skips[0]] + [channels + skip for skip in skips[1:]]
        self.blocks = nn.ModuleList(ResidualBlock(w, channels, condition, dropout) for w in widths)
        self.upsample = None if up_to is None else nn.Conv2d(channels, up_to, 3, padding=1)
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, condition: Tensor, skips: list[Tensor]) -> Tensor:
        """Map `B C_in H W` and the condition `B E` to `B C_up 2H 2W`; pop one feature map per block from `skips`."""
        for block in self.blocks:
            x = _run(block, torch.cat([x, skips.pop()], dim=1), condition, self.gradient_checkpointing)
        return x if self.upsample is None else self.upsample(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class LatentUNet(ModelMixin, ConfigMixin):
    """Predicts noise, x0, v or flow for noisy latents, given a timestep and a class.

    `num_classes` counts the real classes; the null class of classifier-free guidance has the index `num_classes`.
    With `patch_size` p, p x p latent positions become the channels of one position of the network.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        *,
        in_channels: int,
        sample_size: int,
        num_classes: int,
        patch_size: int = 1,
        channels: tuple[int, ...] = (64, 128, 256),
        blocks: int = 2,
        bottleneck: str = "transformer",
        depth: int = 4,
        head_width: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_model(sample_size, patch_size, channels, bottleneck, head_width)
        condition = 4 * channels[0]
        self.time = nn.Sequential(nn.Linear(channels[0], condition), nn.SiLU(), nn.Linear(condition, condition))
        self.classes = nn.Embedding(num_classes + 1, condition)
        nn.init.normal_(self.classes.weight, std=0.02)
        self.conv_in = nn.Conv2d(in_channels * patch_size**2, channels[0], 3, padding=1)
        last = len(channels) - 1
        width, skips = channels[0], [channels[0]]
        self.down = nn.ModuleList()
        for i, level in enumerate(channels):
            self.down.append(DownLevel(width, level, blocks, condition, dropout, last=i == last))
            skips += [level] * (blocks if i == last else blocks + 1)
            width = level
        self.middle = (
            TransformerBottleneck(
                width,
                sample_size // patch_size >> last,
                condition,
                depth,
                head_width,
                dropout,
            )
            if bottleneck == "transformer"
            else ResidualBottleneck(width, condition, depth, dropout)
        )
        self.up = nn.ModuleList()
        for i, level in reversed(list(enumerate(channels))):
            taken = [skips.pop() for _ in range(blocks + 1)]
            up_to = channels[i - 1] if i else None
            self.up.append(UpLevel(width, taken, level, condition, dropout, up_to=up_to))
            width = up_to or level
        self.norm_out = _norm(width)
        self.conv_out = _zero(nn.Conv2d(width, in_channels * patch_size**2, 3, padding=1))

    @property
    def null_class(self) -> int:
        """Return the class index that stands for "no class" in classifier-free guidance."""
        return int(self.config["num_classes"])

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        class_labels: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNetOutput | tuple[Tensor]:
        """Predict the target for noisy latents `sample` `B C H W`; the result has the same shape.

        `timestep`: `B` or a number, in 0..1000; `class_labels`: int64 `B`, None for the null class.
        """
        if class_labels is None:
            class_labels = torch.full((len(sample),), self.null_class, device=sample.device)
        times = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        embedding = timestep_embedding(times, self.config["channels"][0]).to(sample.dtype)
        condition = F.silu(self.time(embedding) + self.classes(class_labels))
        patch_size = self.config["patch_size"]
        x = self.conv_in(F.pixel_unshuffle(sample, patch_size))
        skips = [x]
        for level in self.down:
            x = level(x, condition, skips)
        x = self.middle(x, condition)
        for level in self.up:
            x = level(x, condition, skips)
        x = F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x))), patch_size)
        return UNetOutput(sample=x) if return_dict else (x,)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute attention of queries, keys and values `B heads T D/heads`; the result has the same shape and type.

    On a CPU it is computed in float32: for the few tokens of a bottleneck, the backward pass of the bfloat16 kernel
    takes several times as long.
    """
    if q.device.type != "cpu" or q.dtype == torch.float32:
        return F.scaled_dot_product_attention(q, k, v)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)


def _run(block: nn.Module, x: Tensor, condition: Tensor, recompute: bool) -> Tensor:
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, x, condition, use_reentrant=False)
    return block(x, condition)


def check_model(sample_size: int, patch_size: int, channels: tuple[int, ...], bottleneck: str, head_width: int) -> None:
    """Raise ValueError, naming the config field, if a `LatentUNet` cannot have these widths at this latent size."""
    if bottleneck not in ("transformer", "resnet"):
        raise ValueError(f"model.bottleneck: {bottleneck!r}: use transformer or resnet")
    if channels[0] % 2:
        raise ValueError(f"model.channels: the first width, {channels[0]}, is odd, but it must be even")
    if sample_size % patch_size:
        raise ValueError(f"model.patch_size: {patch_size} does not divide {sample_size}x{sample_size} latents")
    sample_size //= patch_size
    factor = 2 ** (len(channels) - 1)
    if sample_size % factor:
        raise ValueError(
            f"model.channels: {len(channels)} levels halve {sample_size}x{sample_size} latents {len(channels) - 1}"
            f" times: {sample_size} is not a multiple of {factor}; use fewer levels or another data.image_size"
        )
    if bottleneck == "transformer" and channels[-1] % head_width:
        raise ValueError(
            f"model.head_width: {head_width} does not divide the {channels[-1]} channels of the lowest level"
        )
