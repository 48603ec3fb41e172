"""Initialise a small `AutoencoderKL` so that it trains quickly, with "anchor" and "carrier" channels.

Anchors. GroupNorm divides a feature map by its standard deviation over the image, so the value of a flat region (most
of a small image) depends on everything else in the image; a small autoencoder spends its first hours learning to undo
this. Here the first two channels of every normalised feature map are the constants +k and -k, produced by the bias of
the convolution before. With one group they fix the mean of the map to 0 and its standard deviation to SIGMA
(k = SIGMA * sqrt(C / 2)) for any image, and GroupNorm with a weight of SIGMA is nearly the identity. The network trains
like one without normalisation and is still a plain `AutoencoderKL`.

Carriers. At the start, the next six channels pass the colours and their negatives (SiLU(x) - SiLU(-x) = x) to the
latents and back, so that training begins with averaged colours instead of grey, and no latent channel collapses.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

SIGMA = 10.0  # much larger than the activations (near 1), which then add about 1 % to the variance
_ANCHORS = slice(0, 2)
_CARRIERS = slice(2, 8)
_LOG_VARIANCE = -4.0  # initial log variance of the posterior: with diffusers' 0, noise would hide the first signals


def anchored_autoencoder(channels: tuple[int, ...], *, latent_channels: int) -> AutoencoderKL:
    """Create an `AutoencoderKL` with anchors and carriers; each level except the last halves the resolution.

    Anchors never change: the weights and biases that form them get no gradient.
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
            _restore_scale(module)
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
    _connect_colours(vae)
    return vae


def _anchor(conv: nn.Conv2d, *, reads_anchors: bool = True, gain: float = 1.0, level: float = 1.0) -> None:
    """Make the first two outputs of `conv` the constants +-`level` * k, and make it ignore anchors in its input."""
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


def _restore_scale(norm: nn.GroupNorm) -> None:
    """Set the weight of `norm` to SIGMA, to restore the scale of the other channels, and output 0 for the anchors."""
    mask = torch.ones(norm.num_channels)
    mask[_ANCHORS] = 0
    nn.init.constant_(norm.weight, SIGMA)
    _freeze(norm.weight, mask)
    _freeze(norm.bias, mask)


def _freeze(parameter: Tensor, mask: Tensor) -> None:
    """Set the entries where `mask` is 0 to zero, now and in every gradient."""
    with torch.no_grad():
        parameter.mul_(mask)
    parameter.register_hook(lambda gradient: gradient * mask)


def _carry(conv: nn.Conv2d, *, corner: tuple[int, int] | None = None) -> None:
    """Make `conv` pass the carriers unchanged: by the kernel's centre, or as the mean over a window of it."""
    middle = conv.kernel_size[0] // 2
    window = slice(*corner) if corner else slice(middle, middle + 1)
    _write(conv, _CARRIERS, _CARRIERS, torch.eye(6), window)


def _connect_colours(vae: AutoencoderKL) -> None:
    """Connect the colours to the first latent channels through the carriers, in encoder and decoder."""
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
