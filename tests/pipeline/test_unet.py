from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.unet import LatentUNet, TransformerBlock, TransformerBottleneck, _attention
from tests.helpers.models import CLASSES, build, scramble, scrambled


def inputs(count: int = 3, size: int = 4, channels: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, channels, size, size, generator=generator)
    return x, torch.linspace(50, 950, count), torch.arange(count) % CLASSES


@pytest.mark.parametrize("bottleneck", ["transformer", "resnet"])
@pytest.mark.parametrize("size", [4, 8])
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize(("channels", "in_channels"), [((8,), 4), ((8, 16), 3), ((24, 8, 16), 16)])
def test_the_prediction_has_the_shape_of_the_latents(
    channels: tuple[int, ...], in_channels: int, blocks: int, size: int, bottleneck: str
) -> None:
    model = build(channels=channels, in_channels=in_channels, blocks=blocks, sample_size=size, bottleneck=bottleneck)
    x, times, classes = inputs(2, size, in_channels)
    assert model(x, times, classes).sample.shape == x.shape
    assert model(x, 7, classes, return_dict=False)[0].shape == x.shape


def test_patches_are_the_channels_of_a_network_without_them() -> None:
    model = scrambled(patch_size=2, sample_size=8)
    plain = build(in_channels=16, sample_size=4)
    plain.load_state_dict(model.state_dict())
    x, times, classes = inputs(3, 8)
    expected = plain(F.pixel_unshuffle(x, 2), times, classes).sample
    torch.testing.assert_close(model(x, times, classes).sample, F.pixel_shuffle(expected, 2))


def test_the_resolution_halves_on_the_way_down_and_returns_on_the_way_up() -> None:
    model = build(channels=(8, 16, 24), sample_size=8)
    shapes: list[tuple[int, ...]] = []
    tokens: list[tuple[int, ...]] = []
    for level in (*model.down, *model.up):
        level.blocks[-1].register_forward_hook(lambda _m, _i, output: shapes.append(tuple(output.shape[1:])))
    for block in (m for m in model.modules() if isinstance(m, TransformerBlock)):
        block.register_forward_hook(lambda _m, _i, output: tokens.append(tuple(output.shape[1:])))
    model(*inputs(1, 8))
    assert shapes == [(8, 8, 8), (16, 4, 4), (24, 2, 2), (24, 2, 2), (16, 4, 4), (8, 8, 8)]
    assert tokens == [(2 * 2, 24)] * 2


@pytest.mark.parametrize("bottleneck", ["transformer", "resnet"])
def test_the_prediction_is_zero_at_the_start(bottleneck: str) -> None:
    assert not build(bottleneck=bottleneck)(*inputs()).sample.any()


def test_a_transformer_block_is_the_identity_at_the_start() -> None:
    torch.manual_seed(0)
    x, condition = torch.randn(2, 5, 16), torch.randn(2, 32)
    assert torch.equal(TransformerBlock(16, 32, 8, 0.0)(x, condition), x)


def test_attention_is_that_of_torch() -> None:
    block = TransformerBlock(16, 32, 8, 0.0)
    scramble(block)
    reference = nn.MultiheadAttention(16, num_heads=2, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(block.qkv.weight)
        reference.in_proj_bias.copy_(block.qkv.bias)
        reference.out_proj.weight.copy_(block.project.weight)
        reference.out_proj.bias.copy_(block.project.bias)
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(block._attend(x), reference(x, x, x)[0], atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
def test_attention_in_bfloat16_is_that_in_float32_rounded_at_its_end(autocast: bool) -> None:
    q, k, v = torch.randn(3, 2, 4, 16, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        attended = _attention(q, k, v)
    weights = (q.double() @ k.double().mT / 8**0.5).softmax(dim=-1)
    assert attended.dtype == torch.bfloat16
    assert torch.allclose(attended.double(), weights @ v.double(), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("bottleneck", ["transformer", "resnet"])
def test_no_parameter_is_dead(bottleneck: str) -> None:
    model = scrambled(bottleneck=bottleneck, channels=(8, 16, 16))
    model(*inputs()).sample.square().mean().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_every_parameter_moves_within_a_few_steps_from_the_start() -> None:
    model = build()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    x, times, classes = inputs()
    for _ in range(6):  # zero layers open one after another
        (model(x, times, classes).sample - x).square().mean().backward()
        optimizer.step()
    assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]


def test_timestep_and_class_change_the_prediction() -> None:
    model = scrambled()
    x, times, classes = inputs()
    here = model(x, times, classes).sample
    assert (model(x, times + 1, classes).sample - here).abs().amax(dim=(1, 2, 3)).min() > 1e-4
    assert (model(x, times, (classes + 1) % CLASSES).sample - here).abs().amax(dim=(1, 2, 3)).min() > 1e-3


def test_without_labels_the_class_is_the_null_class() -> None:
    model = scrambled()
    x, times, _ = inputs()
    null = torch.full((len(x),), model.null_class)
    assert torch.equal(model(x, times).sample, model(x, times, null).sample)


def test_the_null_class_is_a_row_of_its_own() -> None:
    model = scrambled()
    assert model.null_class == CLASSES
    assert len(model.classes.weight) == CLASSES + 1
    x = inputs(1)[0].expand(CLASSES + 1, -1, -1, -1)
    out = model(x, 500, torch.arange(CLASSES + 1)).sample
    assert (out[:CLASSES] - out[model.null_class]).abs().amax(dim=(1, 2, 3)).min() > 1e-3


def test_positions_alone_break_the_symmetry_of_the_bottleneck() -> None:
    bottleneck = TransformerBottleneck(width=16, size=3, condition=32, depth=2, head_width=8, dropout=0.0)
    scramble(bottleneck)
    generator = torch.Generator().manual_seed(1)
    x, condition = torch.randn(1, 16, 3, 3, generator=generator), torch.randn(1, 32, generator=generator)
    order = torch.randperm(9, generator=generator)

    def shuffled(maps: Tensor) -> Tensor:
        return maps.flatten(2)[:, :, order].unflatten(2, (3, 3))

    assert (bottleneck(shuffled(x), condition) - shuffled(bottleneck(x, condition))).abs().max() > 1e-2
    nn.init.zeros_(bottleneck.positions)
    assert torch.allclose(bottleneck(shuffled(x), condition), shuffled(bottleneck(x, condition)), atol=1e-4)


@pytest.mark.parametrize("bottleneck", ["transformer", "resnet"])
def test_gradient_checkpointing_changes_no_gradient(bottleneck: str) -> None:
    gradients, calls = [], []
    for recompute in (False, True):
        model = scrambled(bottleneck=bottleneck, dropout=0.2).train()
        if recompute:
            model.enable_gradient_checkpointing()
        blocks = [block for name, block in model.named_modules() if name.split(".")[-2:-1] == ["blocks"]]
        count = [0] * len(blocks)
        for i, block in enumerate(blocks):
            block.register_forward_pre_hook(lambda _m, _i, i=i, count=count: count.__setitem__(i, count[i] + 1))
        torch.manual_seed(5)
        model(*inputs()).sample.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        calls.append(count)
    assert calls == [[1] * len(calls[0]), [2] * len(calls[0])]
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-4, atol=1e-6), name


def test_a_saved_model_comes_back_by_plain_diffusers(tmp_path: Path) -> None:
    model = scrambled(channels=(8, 16), sample_size=8)
    model.save_pretrained(tmp_path)
    again = LatentUNet.from_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert torch.equal(again(*inputs(size=8)).sample, model(*inputs(size=8)).sample)


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"channels": (8, 16, 16), "sample_size": 6}, "model.channels"),
        ({"patch_size": 3}, "model.patch_size"),
        ({"patch_size": 2, "channels": (8, 16, 16)}, "model.channels"),
        ({"channels": (8, 12)}, "model.head_width"),
        ({"channels": (9, 16)}, "model.channels"),  # half of the timestep's features are sines, half cosines
        ({"bottleneck": "mlp"}, "model.bottleneck"),
    ],
)
def test_an_impossible_size_is_refused_by_the_name_of_its_field(overrides: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: "):
        build(**overrides)


@pytest.mark.parametrize("bottleneck", ["transformer", "resnet"])
def test_a_row_does_not_depend_on_the_other_rows(bottleneck: str) -> None:
    model = scrambled(bottleneck=bottleneck)
    x, times, classes = inputs(4)
    together = model(x, times, classes).sample
    for i in range(4):
        alone = model(x[i : i + 1], times[i : i + 1], classes[i : i + 1]).sample
        assert torch.allclose(alone, together[i : i + 1], rtol=1e-5, atol=1e-5 * together.abs().max().item())
