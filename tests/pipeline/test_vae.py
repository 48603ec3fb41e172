from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder, AutoencoderTiny
from torch import Tensor, nn

from data.cache.manifest import VaeIdentity
from data.sources.solids import render
from pipeline.vae import FrozenVae, to_images, to_pixels
from pipeline.vae_init import SIGMA, anchored_autoencoder
from tests.helpers.world import make_vae


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vae(tmp_path_factory.mktemp("vae"), seed=0)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("taesd")
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    ).save_pretrained(path)
    return path


def pictures(count: int = 2, size: int = 16) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_all_levels_return_from_pixels_to_images() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(1, 1, 1, 3)
    pixels = to_pixels(images)
    assert (pixels.min(), pixels.max()) == (-1, 1)
    assert torch.equal(to_images(pixels), images)


def test_pixels_and_images_have_the_same_orientation() -> None:
    images = torch.zeros(1, 2, 3, 3, dtype=torch.uint8)
    images[0, 1, 2, 0] = 255  # red, below, on the right
    pixels = to_pixels(images)
    assert pixels.shape == (1, 3, 2, 3)
    assert pixels[0, 0, 1, 2] == 1


def test_values_outside_the_range_are_cut_off_and_the_rest_is_rounded() -> None:
    pixels = torch.tensor([-9.0, 9.0, 0.6 / 127.5 - 1]).reshape(1, 3, 1, 1)
    assert to_images(pixels).flatten().tolist() == [0, 255, 1]


def test_moments_are_mean_and_standard_deviation_of_the_posterior(folder: Path) -> None:
    posterior = AutoencoderKL.from_pretrained(folder).encode(pictures()).latent_dist
    moments = FrozenVae(str(folder)).encode(pictures())
    assert torch.allclose(moments[:, :4], posterior.mean, atol=1e-5)
    assert torch.allclose(moments[:, 4:], posterior.std, atol=1e-5)
    assert (moments[:, 4:] > 0).all()


def test_decode_takes_latents_unscaled(folder: Path) -> None:
    plain = AutoencoderKL.from_pretrained(folder)
    mode = plain.encode(pictures()).latent_dist.mode()
    assert torch.allclose(FrozenVae(str(folder)).decode(mode), plain.decode(mode).sample, atol=1e-5)


def test_a_vae_without_a_posterior_has_the_standard_deviation_zero(tiny_folder: Path) -> None:
    moments = FrozenVae(str(tiny_folder)).encode(pictures())
    expected = AutoencoderTiny.from_pretrained(tiny_folder).encode(pictures()).latents
    assert torch.allclose(moments[:, :4], expected, atol=1e-5)
    assert not moments[:, 4:].any()


@pytest.mark.parametrize("kind", ["folder", "tiny_folder"])
def test_downsampling_is_that_of_the_latents(kind: str, request: pytest.FixtureRequest) -> None:
    vae = FrozenVae(str(request.getfixturevalue(kind)))
    assert 16 // vae.encode(pictures()).shape[-1] == vae.downsampling == vae.identity().downsampling


def test_no_weight_can_be_trained(folder: Path) -> None:
    model = FrozenVae(str(folder)).model
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def test_the_identity_is_a_function_of_the_weights_alone(folder: Path, tmp_path: Path) -> None:
    first = FrozenVae(str(folder))
    moved = FrozenVae(str(make_vae(tmp_path / "elsewhere", seed=0)))
    moved.check(first.identity(), tmp_path)
    assert moved.identity().weights_sha256 == first.identity().weights_sha256


def with_config(folder: Path, to: Path, **changes: object) -> Path:
    """A copy of the VAE in `folder` with other fields in its config."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text(encoding="utf-8"))
    (to / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    return to


def test_the_identity_has_mean_and_std_per_channel_where_the_config_has_them(folder: Path, tmp_path: Path) -> None:
    assert FrozenVae(str(folder)).identity().latents_mean is None
    fields = {"latents_mean": [0.5, -1.0, 0.0, 2.0], "latents_std": [1.0, 2.0, 3.0, 0.25], "scaling_factor": 0.5}
    identity = FrozenVae(str(with_config(folder, tmp_path / "vae", **fields))).identity()
    assert identity.latents_mean == (0.5, -1.0, 0.0, 2.0)
    assert identity.latents_std == (1.0, 2.0, 3.0, 0.25)
    assert VaeIdentity(**identity.model_dump(mode="json")) == identity


@pytest.mark.parametrize(
    "fields", [{"latents_mean": [0.5]}, {"latents_std": [1.0, 1.0, 0.0, 1.0]}, {"latents_std": [1.0] * 5}]
)
def test_a_mean_or_std_that_does_not_fit_the_channels_is_refused(
    folder: Path, tmp_path: Path, fields: dict[str, list[float]]
) -> None:
    vae = FrozenVae(str(with_config(folder, tmp_path / "vae", **fields)))
    with pytest.raises(ValueError, match=rf"^vae.source: .*{next(iter(fields))} = .* 4 channels"):
        vae.identity()


def test_one_changed_weight_is_another_vae(folder: Path, tmp_path: Path) -> None:
    vae = FrozenVae(str(folder))
    cached = vae.identity()
    with torch.no_grad():
        vae.model.decoder.conv_in.weight[1, 0, 1, 1] += 1e-6
    with pytest.raises(ValueError, match=r"^vae.source: .* is not the VAE that made"):
        vae.check(cached, tmp_path)


def test_a_vae_that_cannot_be_loaded_is_a_value_error_in_one_line(tmp_path: Path) -> None:
    for source in (str(tmp_path), str(tmp_path / "nothing"), "nobody/nothing"):
        with pytest.raises(ValueError, match=r"^vae.source: cannot load a VAE from [^\n]*$"):
            FrozenVae(source)


def test_a_model_that_is_no_vae_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"^vae.source: .* is of class UNet2DModel"):
        FrozenVae(str(tmp_path))


def refusal(source: Path | str) -> str:
    with pytest.raises(
        ValueError, match=rf"^vae\.source: cannot load a VAE from {re.escape(repr(str(source)))}: .*\Z"
    ) as e:
        FrozenVae(str(source))
    return str(e.value).split(": ", 2)[2]


@pytest.mark.parametrize("index", [True, False])
def test_of_a_whole_pipeline_the_folder_of_its_vae_is_named(folder: Path, tmp_path: Path, index: bool) -> None:
    shutil.copytree(folder, tmp_path / "vae")
    if index:
        (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}', encoding="utf-8")
    assert refusal(tmp_path) == f"it is a whole pipeline: use {tmp_path / 'vae'}"
    FrozenVae(str(tmp_path / "vae"))


def test_half_precision_weights_are_read_where_they_are_the_only_ones(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = AutoencoderKL.from_pretrained(folder)
    plain.to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    vae = FrozenVae(str(tmp_path))
    assert f"{tmp_path} has only weights of the variant fp16" in capsys.readouterr().out
    assert vae.model.dtype == torch.float32
    expected = AutoencoderKL.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, expected[name].half().float()) for name, value in vae.model.state_dict().items())
    plain.float().save_pretrained(tmp_path)
    FrozenVae(str(tmp_path))
    assert not capsys.readouterr().out


def test_pickled_weights_are_never_loaded_and_a_way_to_convert_them_works(folder: Path, tmp_path: Path) -> None:
    AutoencoderKL.from_pretrained(folder).save_pretrained(tmp_path / "bin", safe_serialization=False)
    reason = refusal(tmp_path / "bin")
    assert reason.startswith("its weights are .bin files (pickle), which are never loaded")
    way = re.search(r"AutoencoderKL\.from_pretrained.*\)", reason)
    assert way is not None
    eval(way[0].replace("new-folder", str(tmp_path / "new")), {"AutoencoderKL": AutoencoderKL})
    assert (
        FrozenVae(str(tmp_path / "new")).identity().weights_sha256 == FrozenVae(str(folder)).identity().weights_sha256
    )


@pytest.mark.parametrize("name", ["vae.safetensors", "vae.ckpt", "vae.pt"])
def test_a_single_file_is_refused_with_the_way_to_a_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    assert refusal(tmp_path / name).startswith("it is a single file: give a folder in diffusers' format")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"in_channels": 1, "out_channels": 1}, "it maps 1 image channels to 1: use a VAE of RGB images"),
        ({"in_channels": 4}, "it maps 4 image channels to 3"),
        ({"_class_name": "UNet2DModel"}, "it is of class UNet2DModel, which is not an autoencoder of diffusers"),
        ({"_class_name": None}, "it is of class None"),
        ({"block_out_channels": [8, 8, 32]}, "size mismatch for "),
        ({"layers_per_block": 3}, "of its weights are missing, the first is decoder."),
        ({"down_block_types": ["Nonsense"] * 3}, "Nonsense does not exist"),
    ],
)
def test_a_config_of_another_model_is_refused(
    folder: Path, tmp_path: Path, changes: dict[str, object], reason: str
) -> None:
    assert reason in refusal(with_config(folder, tmp_path / "vae", **changes))


def test_files_that_are_missing_or_damaged_are_named(folder: Path, tmp_path: Path) -> None:
    assert refusal(tmp_path / "nothing") == "there is no such folder"
    assert "no config.json" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    assert "config.json" in refusal(tmp_path)
    shutil.copy(folder / "config.json", tmp_path)
    assert refusal(tmp_path) == "there is no diffusion_pytorch_model.safetensors next to its config.json"
    weights = (folder / "diffusion_pytorch_model.safetensors").read_bytes()
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(weights[:-100])
    assert "diffusion_pytorch_model.safetensors" in refusal(tmp_path)


def test_a_decoder_that_returns_images_of_another_size_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^vae.source: .*AutoencoderTiny does not map an image to a grid of latents"):
        FrozenVae(str(tmp_path))


OTHERS: dict[str, tuple[dict[str, Any], int, int]] = {  # options of a tiny one, its downsampling, its channels
    "AsymmetricAutoencoderKL": (
        {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "down_block_out_channels": (8, 8),
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "up_block_out_channels": (8, 8),
            "norm_num_groups": 4,
        },
        2,
        4,
    ),
    "AutoencoderDC": (
        {
            "latent_channels": 8,
            "attention_head_dim": 4,
            "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
            "encoder_block_out_channels": (8, 8),
            "decoder_block_out_channels": (8, 8),
            "encoder_layers_per_block": (1, 1),
            "decoder_layers_per_block": (1, 1),
            "encoder_qkv_multiscales": ((), (5,)),
            "decoder_qkv_multiscales": ((), (5,)),
            "scaling_factor": 0.4,
        },
        2,
        8,
    ),
    "AutoencoderKLFlux2": (
        {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "block_out_channels": (8, 8),
            "norm_num_groups": 4,
            "latent_channels": 6,
        },
        2,
        6,
    ),
    "AutoencoderKLHunyuanImage": (
        {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 4,
            "block_out_channels": (64, 64),
            "layers_per_block": 1,
            "spatial_compression_ratio": 2,
            "sample_size": 32,
        },
        2,
        4,
    ),
    "VQModel": ({"block_out_channels": (8,), "norm_num_groups": 4, "num_vq_embeddings": 8}, 1, 3),
    "AutoencoderRAE": (
        {
            "encoder_hidden_size": 64,
            "encoder_num_hidden_layers": 1,
            "decoder_hidden_size": 16,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 16,
            "encoder_input_size": 28,
            "patch_size": 8,
            "scaling_factor": 2.0,
        },
        8,
        64,
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_every_autoencoder_that_maps_an_image_to_a_grid_is_taken(tmp_path: Path, name: str) -> None:
    """What it makes of an image is what the class itself makes of it."""
    options, downsampling, channels = OTHERS[name]
    if name == "AutoencoderRAE":
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    getattr(diffusers, name)(**options).save_pretrained(tmp_path)
    vae, size = FrozenVae(str(tmp_path)), 16
    assert (vae.downsampling, vae.latent_channels) == (downsampling, channels)
    moments = vae.encode(pictures(size=size))
    latents = moments[:, :channels]
    assert latents.shape == (2, channels, size // downsampling, size // downsampling)
    assert moments[:, channels:].any() == hasattr(vae.model.encode(pictures()), "latent_dist")
    images = vae.decode(latents)
    assert images.shape == (2, 3, size, size)
    assert torch.allclose(images, vae.model.decode(latents.contiguous()).sample, atol=1e-5)
    assert vae.image_size == (16 if name == "AutoencoderRAE" else None)
    scaling = 1.0 if name == "AutoencoderRAE" else vae.model.config.get("scaling_factor") or 1.0
    assert vae.identity().scaling_factor == scaling  # that of the RAE is in its latents already


@pytest.mark.parametrize(("scale", "bearable"), [(1.0, "fp16"), (1e6, "bf16"), (math.nan, "fp32")])
def test_of_half_precisions_that_one_is_chosen_which_the_vae_bears(folder: Path, scale: float, bearable: str) -> None:
    """fp16, which is the finer one, unless it overflows; neither where nothing is finite."""
    vae = FrozenVae(str(folder))
    vae.model.encoder.conv_in.weight.mul_(scale)
    assert vae.tolerated_precision(pictures()) == bearable
    assert vae.precision == "fp32"
    assert (vae.rounding_error(pictures(), "bf16") > vae.rounding_error(pictures(), "fp16")) == (scale == 1)


def test_an_autoencoder_of_videos_is_refused(tmp_path: Path) -> None:
    AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",), block_out_channels=(32,), layers_per_block=1
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^vae.source: .*AutoencoderKLTemporalDecoder does not map an image"):
        FrozenVae(str(tmp_path))


def test_on_a_hub_a_folder_and_a_variant_are_found(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cache of a hub, offline: a whole pipeline whose VAE has half-precision weights alone."""
    snapshot = tmp_path / "models--somebody--pipeline" / "snapshots" / ("0" * 40)
    AutoencoderKL.from_pretrained(folder).to(torch.float16).save_pretrained(snapshot / "vae", variant="fp16")
    (snapshot / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}', encoding="utf-8")
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40, encoding="utf-8")
    for name in ("huggingface_hub.constants.HF_HUB_CACHE", "diffusers.utils.constants.HF_MODULES_CACHE"):
        monkeypatch.setattr(name, str(tmp_path))
    assert refusal("somebody/pipeline") == "it is a whole pipeline: use somebody/pipeline/vae"
    vae = FrozenVae("somebody/pipeline/vae")
    assert vae.downsampling == FrozenVae(str(folder)).downsampling
    assert "somebody/pipeline has only weights of the variant fp16" in capsys.readouterr().out
    pinned = f"somebody/pipeline/vae@{'0' * 40}"  # the name of main may move on, this one does not
    assert vae.identity().source == pinned
    (refs / "main").write_text("1" * 40, encoding="utf-8")
    assert FrozenVae(pinned).identity() == vae.identity()
    refusal("somebody/pipeline/vae")


def test_the_bundled_vae_reconstructs_solids_better_than_their_average_colours() -> None:
    vae = FrozenVae("bundled")
    pixels = to_pixels(torch.from_numpy(render(range(8), seed=321, size=64)))
    decoded = vae.decode(vae.encode(pixels)[:, : vae.model.config["latent_channels"]])
    averages = nn.functional.avg_pool2d(pixels, vae.downsampling)
    averages = nn.functional.interpolate(averages, scale_factor=vae.downsampling)
    assert (decoded - pixels).square().mean() < (averages - pixels).square().mean()


def anchored() -> AutoencoderKL:
    torch.manual_seed(0)
    return anchored_autoencoder((16, 32, 64), latent_channels=4)


def inputs_of_norms(vae: AutoencoderKL, pixels: Tensor) -> list[tuple[nn.GroupNorm, Tensor]]:
    seen: list[tuple[nn.GroupNorm, Tensor]] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, arguments: seen.append((module, arguments[0])))
        for module in vae.modules()
        if isinstance(module, nn.GroupNorm)
    ]
    vae(pixels)
    for hook in hooks:
        hook.remove()
    return seen


def train_a_little(vae: AutoencoderKL) -> None:
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-2, weight_decay=0)
    for _ in range(3):
        (vae(pictures(), sample_posterior=True).sample - pictures()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("trained", [False, True])
def test_every_normalised_map_holds_the_anchors_before_and_after_training(trained: bool) -> None:
    vae = anchored()
    if trained:
        train_a_little(vae)
    seen = inputs_of_norms(vae, pictures())
    assert len(seen) == len([module for module in vae.modules() if isinstance(module, nn.GroupNorm)])
    for norm, x in seen:
        constant = SIGMA * (norm.num_channels / 2) ** 0.5
        assert torch.allclose(x[:, 0], torch.tensor(constant), rtol=1e-5)
        assert torch.allclose(x[:, 1], torch.tensor(-constant), rtol=1e-5)


def test_with_anchors_normalisation_is_nearly_the_identity() -> None:
    for norm, x in inputs_of_norms(anchored(), pictures()):
        y = norm(x)
        assert not y[:, :2].any()
        assert (y[:, 2:] - x[:, 2:]).square().mean() < 0.2**2 * x[:, 2:].square().mean()


def test_training_begins_with_average_colours() -> None:
    vae = anchored()
    colour = torch.tensor([0.8, -0.4, 0.1])[None, :, None, None].expand(1, 3, 32, 32)
    decoded = vae.decode(vae.encode(colour).latent_dist.mode()).sample
    inside = decoded[:, :, 8:-8, 8:-8].mean(dim=(2, 3))
    assert torch.allclose(inside, colour[:, :, 0, 0], atol=0.3)


def test_what_is_saved_is_a_plain_autoencoder(tmp_path: Path) -> None:
    vae = anchored()
    train_a_little(vae)
    vae.save_pretrained(tmp_path)
    again = AutoencoderKL.from_pretrained(tmp_path)
    assert type(again) is AutoencoderKL
    assert torch.equal(again(pictures()).sample, vae(pictures()).sample)
