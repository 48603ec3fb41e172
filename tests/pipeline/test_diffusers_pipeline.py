"""A run as a pipeline of diffusers: what a call takes, and what it gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.config_file import load_config
from pipeline.diffusers_pipeline import load_pipeline, pipeline_of
from pipeline.sampling import draw_samples
from pipeline.training.checkpoint import newest_checkpoint
from tests.helpers.models import CPU
from tests.helpers.world import CLASSES, World, train_on


@pytest.fixture(scope="module")
def pipe(world: World) -> Any:
    made = load_pipeline(world.run)
    made.set_progress_bar_config(disable=True)
    return made


def test_classes_are_names_or_numbers(pipe: Any) -> None:
    assert pipe.labels == {"cat": 0, "dog & <fox>": 1}
    assert pipe.config.id2label == {"0": "cat", "1": "dog & <fox>"}
    assert pipe.get_label_ids(["cat", 1, np.int64(1), "dog & <fox>"]) == [0, 1, 1, 1]
    assert pipe.get_label_ids("cat") == pipe.get_label_ids(0) == [0]
    for unknown in ("cats", 2, -1, "0"):
        with pytest.raises(ValueError, match=r"^class_labels: no class '?.*'?: choose from 'cat', 'dog & <fox>', or"):
            pipe([0, unknown])
    with pytest.raises(ValueError, match=r"^class_labels: give at least one class$"):
        pipe([])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_inference_steps": -1}, "num_inference_steps = -1: give a whole number, at least 1"),
        ({"num_inference_steps": 2.5}, "num_inference_steps = 2.5: "),
        ({"guidance_scale": -1}, "guidance_scale = -1: give numbers of at least 0"),
        ({"guidance_scale": [1, 2, 3]}, "guidance_scale: 3 scales for 2 images"),
        ({"sampler": "eular"}, "sampler = 'eular': give one of ddpm, ddim, euler, "),
        ({"sampler": "ddim"}, "sampler: ddim cannot sample a model trained on the flow schedule: use euler"),
        ({"sampler": "heun", "eta": 0.5}, "eta = 0.5 is only for ddim and euler"),
        ({"eta": 2}, "eta = 2: give a number from 0 to 1"),
        ({"shift": 0}, "shift = 0: give a number above 0"),
        ({"output_type": "jpg"}, "output_type = 'jpg': give pil, np, pt or latent"),
        ({"generator": [torch.Generator()]}, "generator: 1 generators for 2 images"),
    ],
)
def test_what_is_not_possible_is_refused_in_one_line(pipe: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r".+") as caught:
        pipe(["cat", 1], **given)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_every_type_of_output_is_the_same_images(pipe: Any) -> None:
    def drawn(kind: str) -> Any:
        return pipe([0, 1], None, pipe.image_generators(0, [0, 1]), output_type=kind, return_dict=False)[0]

    pixels = drawn("np")
    assert pixels.shape == (2, 16, 16, 3)
    assert pixels.dtype == np.float32
    assert 0 <= pixels.min() < pixels.max() <= 1
    np.testing.assert_array_equal(drawn("pt").permute(0, 2, 3, 1).numpy(), pixels)
    np.testing.assert_array_equal((pixels * 255).round().astype(np.uint8), np.stack([*map(np.asarray, drawn("pil"))]))
    assert drawn("latent").shape == (2, 4, 4, 4)
    one = pipe([0, 1], generator=torch.Generator().manual_seed(3), output_type="np").images
    again = pipe([0, 1], generator=torch.Generator().manual_seed(3), output_type="np").images
    np.testing.assert_array_equal(one, again)


@pytest.mark.parametrize("form", ["cfg", "apg", "cfg_zero", "cfg++"])
def test_the_form_of_guidance_is_that_of_the_config(world: World, form: str) -> None:
    config, (checkpoint, _) = load_config(world.config), newest_checkpoint(world.run)
    assert checkpoint
    guidance = {"guidance_form": form, "guidance_schedule": "linear", "guidance_interval": (0.1, 5.0)}
    settings = config.sample.changed(**guidance, scheduler="euler", guidance=3.0, steps=4)
    labels = torch.tensor([0, 1])
    expected = checkpoint.normalization.denormalize(
        draw_samples(checkpoint.ema_model(), checkpoint.state.noise, settings, labels, indices=range(2), device=CPU)
    )
    pipe = pipeline_of(checkpoint, config.changed(sample=settings))
    latents = pipe(labels, generator=pipe.image_generators(0, range(2)), output_type="latent").images
    torch.testing.assert_close(latents, expected)


def test_without_a_null_class_guidance_is_one_and_a_warning_says_so(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_on(world, tmp_path, CLASSES, "train.label_dropout=0")
    pipe = load_pipeline(tmp_path / "run")
    assert pipe.config.sample["guidance_scale"] == 1

    def drawn(**given: Any) -> torch.Tensor:
        return pipe([0, 1], generator=pipe.image_generators(0, [0, 1]), output_type="latent", **given).images

    warnings: list[str] = []
    monkeypatch.setattr("pipeline.diffusers_pipeline._logger.warning", warnings.append)
    one = drawn()
    assert warnings == []
    assert torch.equal(drawn(guidance_scale=4.0), one)
    assert [line[:36] for line in warnings] == ["guidance_scale = 1, not 4: it needs "]
    with pytest.raises(ValueError, match=r"^guidance_scale = 0: it needs the null class"):
        drawn(guidance_scale=0.0)
