"""What people use today, on the same cached latents: models of the FLOPs of ours, and the recipes they come with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, DiTTransformer2DModel, ModelMixin, UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.models.embeddings import LabelEmbedding, TimestepEmbedding
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from data.cache.manifest import Manifest
from pipeline.unet import LatentUNet


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a peer is trained to predict the noise of DDPM's linear schedule, at uniform timesteps.

    `network` is UNet2DModel or DiTTransformer2DModel; `attention` counts the lowest levels of the U-Net that have it;
    `rate` is the shape of the learning rate after a warm-up of `warmup` steps, or of a tenth of a shorter training;
    `average` says whether samples are drawn from averaged weights (diffusers' EMAModel with its warm-up).
    """

    name: str
    source: str
    network: Literal["unet", "dit"]
    attention: int
    betas: tuple[float, float]
    weight_decay: float
    rate: Literal["constant", "cosine"]
    warmup: int
    average: bool


RECIPES = (
    Recipe(
        name="diffusers' example",
        source="diffusers 0.42, examples/unconditional_image_generation/train_unconditional.py, with classes",
        network="unet",
        attention=1,
        betas=(0.95, 0.999),
        weight_decay=1e-6,
        rate="cosine",
        warmup=500,
        average=True,
    ),
    Recipe(
        name="DiT",
        source="github.com/facebookresearch/DiT, train.py: AdamW, constant rate, no decay; EMA",
        network="dit",
        attention=0,
        betas=(0.9, 0.999),
        weight_decay=0.0,
        rate="constant",
        warmup=0,
        average=True,
    ),
    Recipe(
        name="course",
        source="what courses teach: DDPM, epsilon, linear betas, a U-Net with attention, AdamW, cosine rate",
        network="unet",
        attention=2,
        betas=(0.9, 0.999),
        weight_decay=0.01,
        rate="cosine",
        warmup=500,
        average=False,
    ),
)
DROPOUT = 0.1  # of labels, for guidance


class Peer:
    """A model in training by a recipe."""

    def __init__(
        self,
        recipe: Recipe,
        options: dict[str, Any],
        latents: Tensor,
        labels: Tensor,
        *,
        lr: float,
        steps: int,
        batch_size: int,
        null: int,
        accelerator: Accelerator,
    ) -> None:
        """A new network with `options`; `latents` are the normalised means of all images, `N C h w`; `null` is the
        class of a dropped label; the rate is planned for `steps`."""
        torch.manual_seed(0)
        self.recipe, self.accelerator, self.null = recipe, accelerator, null
        self.latents, self.labels, self.batch_size = latents.to(accelerator.device), labels, batch_size
        self.done = 0  # steps
        self.order: Tensor | None = None  # of the images in this epoch
        model = build(recipe, options)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=lr, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
        )
        warmup = min(recipe.warmup, steps // 10)
        rate = get_scheduler(recipe.rate, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
        self.model, self.optimizer, self.rate = accelerator.prepare(model, optimizer, rate)
        warming: dict[str, Any] = {"use_ema_warmup": True, "inv_gamma": 1.0, "power": 0.75}
        self.average = EMAModel(self.model.parameters(), decay=0.9999, foreach=True, **warming)
        self.schedule = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")

    def step(self) -> None:
        """One step of the optimizer. All that is random in it is a function of its number."""
        self.model.train()
        epoch, batch = divmod(self.done, len(self.labels) // self.batch_size)
        if batch == 0 or self.order is None:
            self.order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(epoch))
        rows = self.order[batch * self.batch_size :][: self.batch_size]
        torch.manual_seed(self.done)
        clean, labels = self.latents[rows], self.labels[rows].to(self.latents.device)
        noise = torch.randn_like(clean)
        times = torch.randint(0, 1000, (len(clean),), device=clean.device)
        labels = torch.where(torch.rand(len(labels), device=labels.device) < DROPOUT, self.null, labels)
        with self.accelerator.autocast():
            prediction = self.model(self.schedule.add_noise(clean, noise, times), times, class_labels=labels).sample
        self.accelerator.backward(F.mse_loss(prediction.float(), noise))
        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.rate.step()
        self.optimizer.zero_grad()
        if self.recipe.average:
            self.average.step(self.model.parameters())
        self.done += 1

    def state(self) -> dict[str, Tensor]:
        """All that a later `load` goes on from, to the same bits."""
        moments = self.optimizer.state_dict()["state"]
        parts = {
            "": self.model.state_dict(),
            "average.": dict(enumerate(self.average.shadow_params)),
            **{f"moments.{i}.": each for i, each in moments.items()},
        }
        return {f"{part}{name}": value.contiguous() for part, each in parts.items() for name, value in each.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state` of the same recipe, options and length."""
        self.model.load_state_dict({name: state[name] for name in self.model.state_dict()})
        for i, average in enumerate(self.average.shadow_params):
            average.copy_(state[f"average.{i}"])
        moments = {
            i: {
                "step": state[f"moments.{i}.step"],
                # laid out in memory as the weight is, which torch's fused step relies on
                **{
                    name: torch.empty_like(weight).copy_(state[f"moments.{i}.{name}"])
                    for name in ("exp_avg", "exp_avg_sq")
                },
            }
            for i, weight in enumerate(self.average.shadow_params)
        }
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        self.done = int(state["moments.0.step"])
        self.average.optimization_step = self.done
        for _ in range(self.done):
            self.rate.step()

    def weights(self) -> dict[str, Tensor]:
        """What samples are drawn with: the average, where the recipe has one."""
        if self.recipe.average:
            self.average.store(self.model.parameters())
            self.average.copy_to(self.model.parameters())
        weights = {name: value.clone().contiguous() for name, value in self.model.state_dict().items()}
        if self.recipe.average:
            self.average.restore(self.model.parameters())
        return weights


def build(recipe: Recipe, options: dict[str, Any]) -> ModelMixin:
    """A new network with the weights that its recipe begins with. Attention is the plain one: the backward pass of
    torch's bfloat16 kernel takes several times as long on a CPU."""
    model = DiTTransformer2DModel(**options) if recipe.network == "dit" else UNet2DModel(**options)
    if recipe.network == "dit":
        _begin_as_dit(model)
    for module in model.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())
    return model.to(memory_format=torch.channels_last)


def _begin_as_dit(model: nn.Module) -> None:
    """The first weights of DiT (Peebles and Xie 2023), which diffusers' class is not made with; and labels are dropped
    once an image, by whoever trains it, and not in every block."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    for name, module in model.named_modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0
            nn.init.normal_(module.embedding_table.weight, std=0.02)
        elif isinstance(module, TimestepEmbedding):
            nn.init.normal_(module.linear_1.weight, std=0.02)
            nn.init.normal_(module.linear_2.weight, std=0.02)
        elif name.endswith(("norm1.linear", "proj_out_1", "proj_out_2")):  # of AdaLN-Zero, and the last ones
            nn.init.zeros_(module.weight)


def predict(model: nn.Module, x: Tensor, timestep: Tensor, *, labels: Tensor, null: int, guidance: float) -> Tensor:
    """The noise in `x`, with classifier-free guidance."""
    times = timestep.expand(2 * len(x)).to(x.device)
    both = torch.cat([labels, torch.full_like(labels, null)])
    conditional, other = model(torch.cat([x, x]), times, class_labels=both).sample.chunk(2)
    return other + guidance * (conditional - other)


def matching(recipe: Recipe, ours: LatentUNet, manifest: Manifest) -> dict[str, Any]:
    """Arguments of the network of `recipe` that comes closest to ours in FLOPs and then in parameters."""
    if recipe.network == "dit":
        return _closest(DiTTransformer2DModel, dit_options(manifest), ours)
    return _closest(UNet2DModel, unet_options(recipe.attention, ours, manifest), ours)


def dit_options(manifest: Manifest) -> list[dict[str, Any]]:
    """DiTs of patches 2x2 and heads 64 wide, about as deep for their width as those of the paper: width / 32 blocks."""
    return [
        {
            "num_attention_heads": heads,
            "attention_head_dim": 64,
            "num_layers": depth,
            "in_channels": manifest.latent_channels,
            "sample_size": manifest.shape[1],
            "patch_size": 2,
            "num_embeds_ada_norm": len(manifest.classes),
        }
        for heads in range(2, 9)
        for depth in range(heads, 4 * heads + 1)
    ]


def unet_options(attention: int, ours: LatentUNet, manifest: Manifest) -> list[dict[str, Any]]:
    """UNet2DModels of as many levels as ours, with attention in the lowest `attention` of them."""
    widths = range(64, 321, 16)
    choices = ((first, last, n) for first in widths[::2] for last in widths if last >= first for n in (1, 2))
    return [_unet_options(choice, attention, len(ours.config["channels"]), manifest) for choice in choices]


def _unet_options(choice: tuple[int, int, int], attention: int, levels: int, manifest: Manifest) -> dict[str, Any]:
    first, last, blocks = choice
    plain = levels - attention
    return {
        "sample_size": manifest.shape[1],
        "in_channels": manifest.latent_channels,
        "out_channels": manifest.latent_channels,
        "num_class_embeds": len(manifest.classes) + 1,
        "layers_per_block": blocks,
        "norm_num_groups": 16,
        "block_out_channels": tuple(
            round(first * (last / first) ** (i / (levels - 1)) / 16) * 16 for i in range(levels)
        ),
        "down_block_types": ("DownBlock2D",) * plain + ("AttnDownBlock2D",) * attention,
        "up_block_types": ("AttnUpBlock2D",) * attention + ("UpBlock2D",) * plain,
    }


def step_flops(model: nn.Module, ours: LatentUNet) -> float:
    """Of one image's forward and backward pass, on latents of the size of ours."""
    channels, size = ours.config["in_channels"], ours.config["sample_size"]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        twin = type(model).from_config(model.config)  # type: ignore[attr-defined]
        x, times, labels = torch.empty(1, channels, size, size), torch.empty(1), torch.zeros(1).long()
        twin(x, times, class_labels=labels)
    return 3.0 * counter.get_total_flops()


def _closest(kind: Any, options: list[dict[str, Any]], ours: LatentUNet) -> dict[str, Any]:
    flops, size = step_flops(ours, ours), ours.num_parameters()

    def distance(arguments: dict[str, Any]) -> float:
        with torch.device("meta"):
            peer = kind(**arguments)
        return 4 * abs(math.log(step_flops(peer, ours) / flops)) + abs(math.log(peer.num_parameters() / size))

    return min(options, key=distance)
