"""DINOv2's vision transformer ViT-L/14, whose class token gives the features of FD-DINOv2.

Oquab et al. 2023 (arXiv:2304.07193), without registers. Tensors have the same names as in the file
`dinov2_vitl14_pretrain.pth`. Images are prepared as in EDM2's FD-DINOv2 (Karras et al. 2024, calculate_metrics.py),
which follows Stein et al. 2023 (arXiv:2306.04675) except that resized images are not rounded.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SIZE, _PATCH = 224, 14
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DinoV2(nn.Module):
    """Computes the class token `B D` after the last normalisation; the default is ViT-L/14 with D = 1024."""

    resize = "the whole image to 224x224, bicubic with antialias, neither rounded nor clipped"

    def __init__(self, width: int = 1024, depth: int = 24, heads: int = 16, grid: int = 37) -> None:
        """Create the network; `grid` is the number of patches per side in the last training phase (518 pixels)."""
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid**2, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))  # only for training, but in the file
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, _PATCH, stride=_PATCH)})
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def preprocess(self, images: Tensor) -> Tensor:
        """Resize float32 `B 3 H W` in 0..255 to `B 3 224 224` and normalise with the mean and std of ImageNet."""
        resized = F.interpolate(images, size=(_SIZE, _SIZE), mode="bicubic", antialias=True) / 255
        return (resized - images.new_tensor(_MEAN).view(3, 1, 1)) / images.new_tensor(_STD).view(3, 1, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Compute features `B D` of images from `preprocess`."""
        patches = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches], dim=1) + self._positions()
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens[:, 0])

    def _positions(self) -> Tensor:
        """Interpolate position embeddings to 16x16 patches, `1 T D`, with the original code's offset of 0.1."""
        token, grid = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        side, wanted = round(grid.shape[1] ** 0.5), _SIZE // _PATCH
        scale = (wanted + 0.1) / side
        grid = grid.transpose(1, 2).unflatten(2, (side, side))
        grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
        return torch.cat([token, grid.flatten(2).transpose(1, 2)], dim=1)


class _Block(nn.Module):
    """Applies attention and an MLP, each with a norm before and a scale per channel after."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.ls1 = nn.ParameterDict({"gamma": torch.ones(width)})
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        layers = {"fc1": nn.Linear(width, 4 * width), "gelu": nn.GELU(), "fc2": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ls2 = nn.ParameterDict({"gamma": torch.ones(width)})

    def forward(self, tokens: Tensor) -> Tensor:
        queries, keys, values = self.attn["qkv"](self.norm1(tokens)).unflatten(2, (3, self.heads, -1)).unbind(2)
        mixed = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (queries, keys, values)))
        tokens = tokens + self.attn["proj"](mixed.transpose(1, 2).flatten(2)) * self.ls1["gamma"]
        return tokens + self.mlp(self.norm2(tokens)) * self.ls2["gamma"]
