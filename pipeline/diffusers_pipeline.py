"""A trained model as a pipeline of diffusers: classes go in, images come out.

`load_pipeline` makes one from the folder of a run. `latentmill export` writes the class and everything of this project
that it uses into one Python file beside the weights, so that diffusers loads it where latentmill is not installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from difflib import get_close_matches
from operator import index
from pathlib import Path
from typing import Any
from unicodedata import normalize

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import FrozenDict
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import logging

from pipeline.compatibility import SAMPLERS, check_sampler, check_sampler_options, usable_guidance
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.device import pick_device, sampling_dtype
from pipeline.guidance import Guidance, GuidedModel
from pipeline.latents import Normalization
from pipeline.noise import NoiseProcess
from pipeline.sampling import image_generators, sampling_loop
from pipeline.training.checkpoint import Checkpoint, checkpoint_at
from pipeline.training.run_folder import CONFIG
from pipeline.vae import FrozenVae

_NOT_GIVEN = FrozenDict()  # diffusers takes an argument without a default for a model
_logger = logging.get_logger(__name__)


class LatentMillPipeline(DiffusionPipeline):
    """Draws images of given classes: a U-Net denoises latents, and the decoder of a VAE makes images of them.

    `labels` maps the name of each class to its number. `config.sample` has the values of what a call leaves out.
    """

    model_cpu_offload_seq = "unet->vae"
    # (seed, indices) -> the generators with which `latentmill sample` draws its images of that seed and these numbers
    image_generators = staticmethod(image_generators)

    def __init__(
        self,
        unet: ModelMixin,
        vae: ModelMixin,
        *,
        id2label: dict[str, str] = _NOT_GIVEN,
        noise: dict[str, Any] = _NOT_GIVEN,
        normalization: dict[str, Any] = _NOT_GIVEN,
        without_class: float = 0.0,
        sample: dict[str, Any] = _NOT_GIVEN,
    ) -> None:
        """Take the models and what model_index.json holds: the names of the classes that were trained, by number; the
        fields of NoiseProcess and Normalization; the share of images trained without their class; and the default
        arguments of a call, with `guidance`, the fields of Guidance, and `guidance_by_class`, scales by name."""
        super().__init__()
        self.register_modules(unet=unet.to(memory_format=torch.channels_last), vae=vae)
        self.register_to_config(
            id2label=id2label, noise=noise, normalization=normalization, without_class=without_class, sample=sample
        )
        self.labels = {name: int(number) for number, name in id2label.items()}
        self._process = NoiseProcess(**noise)
        self._normalization = Normalization(**normalization)

    def get_label_ids(self, label: int | str | Iterable[int | str]) -> list[int]:
        """Return the numbers of classes that are given as names or numbers; ValueError for an unknown one."""
        wanted = [label] if isinstance(label, int | str) else list(label)
        by_name = {normalize("NFC", name): number for name, number in self.labels.items()} | self.labels
        numbers: list[int] = []
        for each in wanted:
            number = by_name.get(each, by_name.get(normalize("NFC", each))) if isinstance(each, str) else index(each)
            if number is None or number not in self.labels.values():
                names = [*self.labels]
                known = dict.fromkeys([*get_close_matches(str(each), names, n=3), *names[:10]])
                listed = ", ".join(map(repr, known)) + (", ..." if len(known) < len(names) else "")
                raise ValueError(f"class_labels: no class {each!r}: choose from {listed}, or their numbers")
            numbers.append(number)
        if not numbers:
            raise ValueError("class_labels: give at least one class")
        return numbers

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Iterable[int | str],
        guidance_scale: float | Sequence[float] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        *,
        sampler: str | None = None,
        eta: float | None = None,
        shift: float | None = None,
    ) -> Any:
        """Draw an image for each of `class_labels`, numbers or names: ImagePipelineOutput or, without `return_dict`, a
        tuple of the images.

        `guidance_scale` is one number or one for each image: 1 is the model with classes, 0 the one without. A list of
        generators has one for each image, which then does not depend on the others. `sampler` is one of `SAMPLERS`;
        `eta` and `shift` are those of the config. The images are PIL images, or for `output_type` np float32 `B H W 3`
        in 0..1, for pt `B 3 H W` in 0..1, and for latent the latents `B C h w` that the VAE decodes. ValueError, in one
        line, for arguments that are not possible.
        """
        labels = self.get_label_ids(class_labels)
        given = {"num_inference_steps": num_inference_steps, "sampler": sampler, "eta": eta, "shift": shift}
        chosen = {**self.config.sample, **{name: value for name, value in given.items() if value is not None}}
        self._check(chosen, output_type)
        steps, device = chosen["num_inference_steps"], self._execution_device
        full = self.unet.dtype == torch.float32
        model = GuidedModel(
            self.unet,
            self._process,
            torch.tensor(labels, device=device),
            self._scales(labels, guidance_scale, chosen["guidance"]["form"]),
            Guidance(**chosen["guidance"]),
            half=sampling_dtype(self.config.sample["precision"], device) if full else self.unet.dtype,
        )
        size = self.unet.config["sample_size"]
        evaluations = 2 * steps - 1 if chosen["sampler"] == "heun" else steps
        with self.progress_bar(total=evaluations) as bar:
            latents = sampling_loop(
                model,
                self._process.levels(steps, shift=chosen["shift"]),
                chosen["sampler"],
                shape=(self.unet.config["in_channels"], size, size),
                generators=_one_for_each(generator, len(labels)),
                device=device,
                eta=chosen["eta"],
                on_clean=lambda clean: bar.update(),
            )
        images = self._normalization.denormalize(latents)
        if output_type != "latent":
            pixels = self.vae.decode(images.to(self.vae.dtype).contiguous()).sample.float()
            images = VaeImageProcessor().postprocess(pixels, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check(self, chosen: dict[str, Any], output_type: str) -> None:
        """Raise ValueError for arguments of a call that are not possible."""
        steps, sampler, eta, shift = (chosen[name] for name in ("num_inference_steps", "sampler", "eta", "shift"))
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type = {output_type!r}: give pil, np, pt or latent")
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"num_inference_steps = {steps}: give a whole number, at least 1")
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler = {sampler!r}: give one of {', '.join(SAMPLERS)}")
        if not 0 <= eta <= 1:
            raise ValueError(f"eta = {eta}: give a number from 0 to 1")
        if shift is not None and not shift > 0:
            raise ValueError(f"shift = {shift}: give a number above 0")
        form = chosen["guidance"]["form"]
        check_sampler_options(sampler, eta=eta, form=form)
        _checked(check_sampler, sampler, self._process.schedule, steps=steps, shift=shift, form=form)

    def _scales(self, labels: list[int], given: float | Sequence[float] | None, form: str) -> list[float]:
        """Return the guidance scale of each image, with a warning where the model does not support the given one."""
        if isinstance(given, Sequence):
            scales = list(given)
        elif given is not None:
            scales = [given] * len(labels)
        else:
            by_class, other = self.config.sample["guidance_by_class"], self.config.sample["guidance_scale"]
            scales = [by_class.get(self.config.id2label[str(number)], other) for number in labels]
        if len(scales) != len(labels):
            raise ValueError(
                f"guidance_scale: {len(scales)} scales for {len(labels)} images: give one number or one each"
            )
        if not all(scale >= 0 for scale in scales):
            raise ValueError(f"guidance_scale = {given}: give numbers of at least 0")
        trained = {"without_class": self.config.without_class, "classes": self.unet.config["num_classes"]}
        usable = {scale: _checked(usable_guidance, scale, form, **trained) for scale in scales}
        for _, line in usable.values():
            if line:
                _logger.warning(_by_arguments(line))
        return [usable[scale][0] for scale in scales]


def _checked(check: Callable[..., Any], *values: Any, **options: Any) -> Any:
    """Return what a check of `sample` keys of a config returns; its ValueError names arguments of a call instead."""
    try:
        return check(*values, **options)
    except ValueError as error:
        raise ValueError(_by_arguments(str(error))) from None


def _by_arguments(message: str) -> str:
    for key, argument in (
        ("sample.scheduler", "sampler"),
        ("sample.steps", "num_inference_steps"),
        ("sample.guidance =", "guidance_scale ="),
        ("sample.", ""),
    ):
        message = message.replace(key, argument)
    return message


def _one_for_each(given: torch.Generator | Sequence[torch.Generator] | None, count: int) -> list[torch.Generator]:
    """Return a generator for each image: the given ones, or the same one for all, which is torch's own by default."""
    generators = list(given) if isinstance(given, Sequence) else [given or torch.default_generator] * count
    if len(generators) != count:
        raise ValueError(f"generator: {len(generators)} generators for {count} images: give one, or one for each image")
    if any(generator.device.type != "cpu" for generator in generators):
        raise ValueError("generator: give generators of the CPU, torch.Generator(): their noise suits every device")
    return generators


def load_pipeline(run: Path | str) -> LatentMillPipeline:
    """Return the newest checkpoint of a run as a pipeline, on this machine's GPU if it has one.

    `run` may also be a checkpoint folder. What a call leaves out comes from the section `sample` of the run's config.
    ValueError if there is no checkpoint, or if its VAE is not here.
    """
    checkpoint, skipped = checkpoint_at(Path(run), "run")
    for line in skipped:
        print(f"skipped {line}")
    return pipeline_of(checkpoint, load_config(checkpoint.path.parents[1] / CONFIG)).to(pick_device())


def pipeline_of(checkpoint: Checkpoint, config: Config) -> LatentMillPipeline:
    """Return the averaged model of `checkpoint` and the VAE of `config` as a pipeline that samples as `config` says.

    ValueError for settings that the model or a pipeline does not support, and for another VAE than the run's.
    """
    state, settings = checkpoint.state, config.sample
    for key in ("guide", "start_from"):
        if value := getattr(settings, key):
            raise ValueError(f"sample.{key} = {value}: a pipeline holds one model and no images: set it to null")
    settings.check(state.noise.schedule)
    if unknown := settings.guidance_by_class.keys() - {*state.classes}:
        raise ValueError(f"sample.guidance_by_class: no class {min(unknown)!r}: give names of the run's classes")
    guidance, line = usable_guidance(
        settings.guidance, settings.guidance_form, without_class=state.without_class, classes=len(state.classes)
    )
    if line:
        print(line)
    vae = FrozenVae(config.vae.source)
    vae.check(state.vae, checkpoint.path)
    trained = {str(i): name for i, name in enumerate(state.classes) if state.class_counts[i]}
    return LatentMillPipeline(
        checkpoint.ema_model(),
        vae.model,
        id2label=trained,
        noise=asdict(state.noise),
        normalization=asdict(state.normalization),
        without_class=state.without_class,
        sample={
            "guidance_scale": guidance,
            "guidance_by_class": {} if line else settings.guidance_by_class,
            "guidance": {
                "form": settings.guidance_form,
                "schedule": settings.guidance_schedule,
                "interval": settings.guidance_interval,
                "rescale": settings.guidance_rescale,
            },
            "num_inference_steps": settings.steps,
            "sampler": settings.scheduler,
            "eta": settings.eta,
            "shift": settings.shift,
            "precision": settings.precision,
        },
    )
