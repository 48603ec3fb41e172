"""A start for `AutoencoderKL` from which it learns quickly, though it is small.

Anchors. GroupNorm divides a feature map by its own standard deviation over the image, so the level of a flat region,
which is most of what a small image holds, depends on everything else in the picture; a small autoencoder spends its
first hours on undoing that. Here the first two channels of every normalised feature map hold the constants +k and
-k, written by the bias of the convolution before. With one group, mean 0 and standard deviation SIGMA of the map are
then theirs (k = SIGMA * sqrt(C / 2)), whatever the image, and GroupNorm with a weight of SIGMA is nearly the identity.
The network trains like one without normalisation and is still a plain `AutoencoderKL`.

Carriers. The next six channels start by carrying the colours and their negatives (SiLU(x) - SiLU(-x) = x) down to the
latents and up again, so that training begins with averaged colours instead of grey, and no latent channel collapses.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

SIGMA = 10.0  # against activations near 1: their share of the variance is then a hundredth
_ANCHORS = slice(0, 2)
_CARRIERS = slice(2, 8)
_LOG_VARIANCE = -4.0  # of the posterior at the start: with diffusers' 0 the noise would drown the first signals


def anchored_autoencoder(channels: tuple[int, ...], *, latent_channels: int) -> AutoencoderKL:
    """An `AutoencoderKL` with anchors and carriers; each level but the last halves the resolution.

    Anchors stay as they are: the entries that form them get no gradient.
    """
    levels = len(channels)
    vae = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=1,
        mid_block_add_attention=False,
        sample_size=64,
    )
    for module in vae.modules():
        if isinstance(module, nn.GroupNorm):
            _silence(module)
        elif isinstance(module, ResnetBlock2D):
            _anchor(module.conv1, gain=2**0.5)  # SiLU halves the variance, as ReLU does (He et al. 2015)
            _anchor(module.conv2, gain=0.1, level=0.0)  # its sum with the shortcut keeps the shortcut's anchors
            if module.conv_shortcut is not None:
                _anchor(module.conv_shortcut)
                _carry(module.conv_shortcut)
    for down in vae.encoder.down_blocks[:-1]:
        _anchor(down.downsamplers[0].conv)
        _carry(down.downsamplers[0].conv, corner=(0, 2))  # a window of 2x2: diffusers pads on the far sides alone
    for up in vae.decoder.up_blocks[:-1]:
        _anchor(up.upsamplers[0].conv)
        _carry(up.upsamplers[0].conv)
    _colours_through(vae)
    return vae


def _anchor(conv: nn.Conv2d, *, reads_anchors: bool = True, gain: float = 1.0, level: float = 1.0) -> None:
    """Make the first two outputs of `conv` the constants +-`level` * k, and let it ignore anchors in its input."""
    assert conv.bias is not None
    nn.init.normal_(conv.weight, std=gain * conv.weight[0].numel() ** -0.5)
    constant = level * SIGMA * (conv.out_channels / 2) ** 0.5
    mask = torch.ones_like(conv.weight)
    mask[_ANCHORS] = 0
    if reads_anchors:
        mask[:, _ANCHORS] = 0
    _freeze(conv.weight, mask)
    _freeze(conv.bias, torch.cat([torch.zeros(2), torch.ones(conv.out_channels - 2)]))
    with torch.no_grad():
        conv.bias.zero_()
        conv.bias[_ANCHORS] = torch.tensor([constant, -constant])


def _silence(norm: nn.GroupNorm) -> None:
    """Give back the scale that the anchors take, and let no anchor through."""
    mask = torch.ones(norm.num_channels)
    mask[_ANCHORS] = 0
    nn.init.constant_(norm.weight, SIGMA)
    _freeze(norm.weight, mask)
    _freeze(norm.bias, mask)


def _freeze(parameter: Tensor, mask: Tensor) -> None:
    """Zero the entries where `mask` is zero, now and in every gradient."""
    with torch.no_grad():
        parameter.mul_(mask)
    parameter.register_hook(lambda gradient: gradient * mask)


def _carry(conv: nn.Conv2d, *, corner: tuple[int, int] | None = None) -> None:
    """Pass the carriers through unchanged: the centre of the kernel, or the mean over a window of it."""
    middle = conv.kernel_size[0] // 2
    window = slice(*corner) if corner else slice(middle, middle + 1)
    _write(conv, _CARRIERS, _CARRIERS, torch.eye(6), window)


def _colours_through(vae: AutoencoderKL) -> None:
    """Colours into the first latent channels and out of them."""
    both_signs = torch.cat([torch.eye(3), -torch.eye(3)])
    colours, centre = slice(0, 3), slice(1, 2)
    for half in (vae.encoder, vae.decoder):
        _anchor(half.conv_in, reads_anchors=False)
        _write(half.conv_in, _CARRIERS, colours, both_signs, centre)
        _write(half.conv_out, colours, _CARRIERS, both_signs.T, centre)
    latent_channels = vae.config["latent_channels"]
    for conv in (vae.quant_conv, vae.post_quant_conv):
        nn.init.dirac_(conv.weight)
        nn.init.zeros_(conv.bias)
    with torch.no_grad():
        vae.encoder.conv_out.weight[latent_channels:].mul_(0.1)
        vae.encoder.conv_out.bias.zero_()
        vae.encoder.conv_out.bias[latent_channels:] = _LOG_VARIANCE


def _write(conv: nn.Conv2d, out: slice, into: slice, matrix: Tensor, window: slice) -> None:
    """Set the outputs `out` of `conv` to `matrix` times the inputs `into`, averaged over the kernel's `window`."""
    area = (window.stop - window.start) ** 2
    with torch.no_grad():
        conv.weight[out] = 0
        conv.weight[out, into, window, window] = matrix[:, :, None, None] / area
