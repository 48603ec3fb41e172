"""Inception-v3 for the Fréchet inception distance: TensorFlow's graph of 2015, as converted by torch-fidelity.

The architecture is that of Szegedy et al. 2015 (arXiv:1512.00567). Where the graph behind all published FIDs differs
from the paper, this follows the graph: average pools do not count the padding, and the last block has a maximum pool.
Tensors have the same names as in torch-fidelity's file `weights-inception-2015-12-05-6726825d.pth`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SIZE = 299
_CLASSES = 1008


class InceptionV3(nn.Module):
    """Computes the 2048 features of the layer `pool_3`."""

    resize = "the whole image to 299x299, bilinear as TensorFlow 1 has it (no half pixels, no antialias), not rounded"

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, padding="same")
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3)
        self.Mixed_5b = _MixedA(192, 32)
        self.Mixed_5c = _MixedA(256, 64)
        self.Mixed_5d = _MixedA(288, 64)
        self.Mixed_6a = _ReductionA(288)
        self.Mixed_6b = _MixedB(768, 128)
        self.Mixed_6c = _MixedB(768, 160)
        self.Mixed_6d = _MixedB(768, 160)
        self.Mixed_6e = _MixedB(768, 192)
        self.Mixed_7a = _ReductionB(768)
        self.Mixed_7b = _MixedC(1280, _average)
        self.Mixed_7c = _MixedC(2048, _maximum)
        self.fc = nn.Linear(2048, _CLASSES)

    def preprocess(self, images: Tensor) -> Tensor:
        """Resize float32 `B 3 H W` in 0..255 to `B 3 299 299` in -1..1."""
        return (resize_as_tensorflow1(images, _SIZE) - 128) / 128

    def forward(self, pixels: Tensor) -> Tensor:
        """Compute features `B 2048` of images from `preprocess`."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(pixels)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6a(x)
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(x))))
        x = self.Mixed_7a(x)
        return self.Mixed_7c(self.Mixed_7b(x)).mean(dim=(2, 3))

    def classifier(self) -> tuple[Tensor, Tensor]:
        """Return weight `K D` and bias `K` of the layer that maps features to logits; the bias is 0, as in the original
        Inception score."""
        return self.fc.weight, torch.zeros_like(self.fc.bias)


def resize_as_tensorflow1(images: Tensor, size: int) -> Tensor:
    """Resize bilinearly to `size` x `size`; output i reads at i * old / new, without half-pixel offset or antialias."""
    return _resize_axis(_resize_axis(images, size, 3), size, 2)


def _resize_axis(images: Tensor, size: int, dim: int) -> Tensor:
    old = images.shape[dim]
    scale = torch.tensor(old / size, dtype=torch.float32, device=images.device)  # rounded like TensorFlow 1
    place = torch.arange(size, dtype=torch.float32, device=images.device) * scale
    low = place.long()
    near, far = images.index_select(dim, low), images.index_select(dim, (low + 1).clamp(max=old - 1))
    share = (place - low).view([-1 if axis == dim else 1 for axis in range(4)])
    return near + (far - near) * share


class _Conv(nn.Module):
    def __init__(
        self, channels: int, out: int, kernel: int | tuple[int, int], *, stride: int = 1, padding: str = "valid"
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _maximum(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


class _MixedA(nn.Module):
    def __init__(self, channels: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = _Conv(channels, 64, 1)
        self.branch5x5_1 = _Conv(channels, 48, 1)
        self.branch5x5_2 = _Conv(48, 64, 5, padding="same")
        self.branch3x3dbl_1 = _Conv(channels, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding="same")
        self.branch3x3dbl_3 = _Conv(96, 96, 3, padding="same")
        self.branch_pool = _Conv(channels, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(_average(x))], dim=1)


class _ReductionA(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3 = _Conv(channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = _Conv(channels, 64, 1)
        self.branch3x3dbl_2 = _Conv(64, 96, 3, padding="same")
        self.branch3x3dbl_3 = _Conv(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], dim=1)


class _MixedB(nn.Module):
    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        across, down = (1, 7), (7, 1)
        self.branch1x1 = _Conv(channels, 192, 1)
        self.branch7x7_1 = _Conv(channels, inner, 1)
        self.branch7x7_2 = _Conv(inner, inner, across, padding="same")
        self.branch7x7_3 = _Conv(inner, 192, down, padding="same")
        self.branch7x7dbl_1 = _Conv(channels, inner, 1)
        self.branch7x7dbl_2 = _Conv(inner, inner, down, padding="same")
        self.branch7x7dbl_3 = _Conv(inner, inner, across, padding="same")
        self.branch7x7dbl_4 = _Conv(inner, inner, down, padding="same")
        self.branch7x7dbl_5 = _Conv(inner, 192, across, padding="same")
        self.branch_pool = _Conv(channels, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_average(x))], dim=1)


class _ReductionB(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch3x3_1 = _Conv(channels, 192, 1)
        self.branch3x3_2 = _Conv(192, 320, 3, stride=2)
        self.branch7x7x3_1 = _Conv(channels, 192, 1)
        self.branch7x7x3_2 = _Conv(192, 192, (1, 7), padding="same")
        self.branch7x7x3_3 = _Conv(192, 192, (7, 1), padding="same")
        self.branch7x7x3_4 = _Conv(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        three = self.branch3x3_2(self.branch3x3_1(x))
        return torch.cat([three, self.branch7x7x3_4(seven), F.max_pool2d(x, 3, stride=2)], dim=1)


class _MixedC(nn.Module):
    def __init__(self, channels: int, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        across, down = (1, 3), (3, 1)
        self.branch1x1 = _Conv(channels, 320, 1)
        self.branch3x3_1 = _Conv(channels, 384, 1)
        self.branch3x3_2a = _Conv(384, 384, across, padding="same")
        self.branch3x3_2b = _Conv(384, 384, down, padding="same")
        self.branch3x3dbl_1 = _Conv(channels, 448, 1)
        self.branch3x3dbl_2 = _Conv(448, 384, 3, padding="same")
        self.branch3x3dbl_3a = _Conv(384, 384, across, padding="same")
        self.branch3x3dbl_3b = _Conv(384, 384, down, padding="same")
        self.branch_pool = _Conv(channels, 192, 1)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        three, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branches = [self.branch1x1(x), self.branch3x3_2a(three), self.branch3x3_2b(three)]
        branches += [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double), self.branch_pool(self.pool(x))]
        return torch.cat(branches, dim=1)
