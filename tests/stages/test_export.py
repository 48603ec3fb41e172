"""What export writes is loaded by plain diffusers, and gives the images of `latentmill sample`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from diffusers import DiffusionPipeline
from PIL import Image

from data.storage import publish_checked
from pipeline.config import Sample
from pipeline.diffusers_pipeline import load_pipeline
from pipeline.sampling import draw_samples, image_generators
from pipeline.training.checkpoint import newest_checkpoint
from stages.cli import main
from stages.export import _grid
from tests.helpers.hub import local_hub
from tests.helpers.models import CPU
from tests.helpers.world import CLASSES, World, run_stage, succeed, train_on

# what a process runs first in which latentmill, although it is installed, cannot be imported
_WITHOUT_LATENTMILL = """
import sys
class Missing:
    def find_spec(self, name, *rest):
        if name.split(".")[0] in ("data", "pipeline", "stages"):
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Missing())
try:
    import pipeline
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("latentmill can be imported here")
"""
_DRAW = """
from diffusers import DiffusionPipeline
place, out = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(place, trust_remote_code=True)
image = pipe(class_labels=["cat"], generator=pipe.image_generators(0, [0])).images[0]
image.save(out)
"""


def start(folder: Path, code: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """A process without latentmill that runs `code` in `folder`, where the cache of the hub is."""
    variables = {"PATH": os.environ["PATH"], "HOME": str(folder), "HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-I", "-c", _WITHOUT_LATENTMILL + code, *map(str, arguments)],
        cwd=folder,
        env={**variables, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0, printed
    return printed


@pytest.fixture(scope="module")
def exported(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "pets"
    succeed("export", world.config, world.run, more=("--to", str(folder)))
    return folder


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Any]:
    """Loads an export in this process, with modules in a folder of its own."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])

    def loaded(folder: Path) -> Any:
        pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return loaded


def sampled(world: World) -> list[Image.Image]:
    """The images that `latentmill sample` drew, in their order."""
    return [Image.open(file) for file in sorted((world.samples / "images").iterdir())]


def differ(images: list[Image.Image], others: list[Image.Image]) -> int:
    """The largest difference of images, in levels of 8 bits."""
    pairs = zip(images, others, strict=True)
    return max(int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max()) for a, b in pairs)


def test_plain_diffusers_draws_what_sample_drew(world: World, exported: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exported, tmp_path / "moved" / "elsewhere")
    both = [start(tmp_path, _DRAW, folder, tmp_path / f"{number}.png") for number in range(2)]  # one cache of modules
    for number, process in enumerate(both):
        printed = finish(process)
        assert "Traceback" not in printed
        assert "Expected types" not in printed
        assert differ([Image.open(tmp_path / f"{number}.png")], sampled(world)[:1]) <= 1


def test_all_images_are_those_of_sample(world: World, exported: Path, load: Callable[[Path], Any]) -> None:
    pipe, expected = load(exported), sampled(world)
    labels = np.tile(np.arange(len(CLASSES)), len(expected) // len(CLASSES))
    generators = image_generators(0, range(len(labels)))
    assert differ(pipe(labels, generator=generators).images, expected) <= 1
    assert differ(pipe([labels[3]], generator=pipe.image_generators(0, [3])).images, expected[3:4]) <= 1
    assert differ(pipe(labels).images, expected) > 1  # other noise


NOISE = {
    "flow": ("noise.shift=2", "sample.shift=3"),
    "zero terminal SNR": ("noise.schedule=scaled_linear", "noise.prediction=v", "noise.zero_terminal_snr=true"),
    "epsilon": ("noise.schedule=linear", "noise.prediction=epsilon"),
    "x0": ("noise.schedule=cosine", "noise.prediction=x0"),
}


@pytest.mark.parametrize("process", NOISE)
def test_every_sampler_and_process_draws_the_same_latents(
    world: World, process: str, tmp_path: Path, load: Callable[[Path], Any]
) -> None:
    settings = ("noise.timesteps=uniform", *NOISE[process], "sample.guidance=1.5", "sample.guidance_rescale=0.3")
    given = train_on(world, tmp_path, CLASSES, *settings)
    succeed("export", world.config, tmp_path / "run", *given, more=("--to", str(tmp_path / "out")))
    pipe, (checkpoint, _) = load(tmp_path / "out"), newest_checkpoint(tmp_path / "run")
    assert checkpoint
    samplers = ["euler", "euler_ancestral", "heun", "dpm++", "unipc", *(["ddim", "ddpm"] if process != "flow" else [])]
    shift = 3.0 if process == "flow" else None
    for sampler in samplers:
        eta = 0.5 if sampler in ("euler", "ddim") else 0.0
        drawn = Sample(scheduler=sampler, steps=3, guidance=1.5, guidance_rescale=0.3, eta=eta, shift=shift, seed=4)  # type: ignore[arg-type]
        labels = torch.tensor([1, 0, 1])
        expected = checkpoint.normalization.denormalize(
            draw_samples(checkpoint.ema_model(), checkpoint.state.noise, drawn, labels, indices=range(3), device=CPU)
        )
        generators = pipe.image_generators(4, range(3))
        latents = pipe(labels, None, generators, 3, "latent", sampler=sampler, eta=eta).images
        torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-4)


def test_defaults_are_those_of_the_config_and_arguments_replace_them(
    world: World, tmp_path: Path, load: Callable[[Path], Any]
) -> None:
    changed = ("sample.guidance=3", "sample.steps=4", "sample.scheduler=heun", "sample.guidance_by_class={cat: 1.5}")
    succeed("export", world.config, world.run, *changed, more=("--to", str(tmp_path / "out")))
    pipe = load(tmp_path / "out")

    def latents(**given: Any) -> torch.Tensor:
        return pipe([0, 1], generator=pipe.image_generators(0, [0, 1]), output_type="latent", **given).images

    same = latents(guidance_scale=[1.5, 3.0], num_inference_steps=4, sampler="heun", eta=0.0)
    assert torch.equal(latents(), same)
    others = ({"guidance_scale": 3.0}, {"num_inference_steps": 5}, {"sampler": "euler"}, {"shift": 2.0})
    assert not any(torch.equal(latents(**other), same) for other in others)


def test_two_exports_share_a_cache_of_modules(
    world: World, exported: Path, tmp_path: Path, load: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    succeed("export", world.config, world.run, more=("--to", str(tmp_path / "same")))
    assert {file.name for file in exported.rglob("*.py")} == {file.name for file in (tmp_path / "same").rglob("*.py")}
    monkeypatch.setattr("stages.export.version", lambda name: "9.9")  # other code
    succeed("export", world.config, world.run, more=("--to", str(tmp_path / "other")))
    one, other = load(exported), load(tmp_path / "other")
    assert type(one).__module__ != type(other).__module__
    assert type(load(exported)).__module__ == type(one).__module__
    assert len([*(tmp_path / "modules").rglob("latentmill_*.py")]) == 2
    labels, generators = [0], one.image_generators(0, [0])
    assert (
        differ(one(labels, generator=generators).images, other(labels, generator=one.image_generators(0, [0])).images)
        == 0
    )


def test_a_run_in_python_is_the_same_pipeline(world: World, exported: Path, load: Callable[[Path], Any]) -> None:
    pipe, other = load_pipeline(world.run), load(exported)
    drawn = [each(["cat"] * 2, generator=image_generators(1, [0, 1])).images for each in (pipe, other)]
    assert differ(*drawn) <= 1
    assert pipe.config.sample == other.config.sample
    with pytest.raises(ValueError, match=r"^run: no intact checkpoint in"):
        load_pipeline(exported)


def test_an_average_of_another_width_is_exported(world: World, tmp_path: Path, load: Callable[[Path], Any]) -> None:
    given = train_on(world, tmp_path, CLASSES, "train.ema=power")
    run = tmp_path / "run-ema0.1"
    made = CliRunner().invoke(main, ["ema", str(tmp_path / "run"), "--width", "0.1"])
    assert made.exit_code == 0, made.output
    succeed("sample", world.config, run, *given)
    succeed("export", world.config, run, *given, more=("--to", str(tmp_path / "out")))
    pipe = load(tmp_path / "out")
    images = [Image.open(file) for file in sorted(run.glob("samples/*/images/*.png"))]
    assert differ(pipe([0, 1] * 3, generator=pipe.image_generators(0, range(6))).images, images) <= 1


@pytest.mark.parametrize("key", ["guide", "start_from"])
def test_a_second_model_and_images_to_start_from_are_refused(world: World, tmp_path: Path, key: str) -> None:
    more = ["sample.start=0.5"] if key == "start_from" else []
    given = (f"sample.{key}={world.run}", *more)
    result = run_stage("export", world.config, world.run, *given, more=("--to", str(tmp_path / "out")))
    assert result.exit_code == 2
    assert (
        f"error: sample.{key} = {world.run}: a pipeline holds one model and no images: set it to null" in result.stderr
    )
    assert [*tmp_path.iterdir()] == []


def test_a_folder_that_holds_something_is_refused_and_kept(world: World, tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine")
    for place in (tmp_path, tmp_path / "note"):
        result = run_stage("export", world.config, world.run, more=("--to", str(place)))
        assert result.exit_code == 2
        assert (
            result.stderr.splitlines()[-1] == f"error: --to {place}: it is not empty: choose a new or an empty folder"
        )
    assert (tmp_path / "note").read_text() == "mine"
    assert [*tmp_path.iterdir()] == [tmp_path / "note"]


def test_a_failed_export_leaves_nothing(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*values: object, **options: object) -> str:
        raise OSError("no")

    monkeypatch.setattr("stages.export._card", fail)
    result = run_stage("export", world.config, world.run, more=("--to", str(tmp_path / "out")))
    assert result.exit_code == 1
    assert [*tmp_path.iterdir()] == []


def test_an_export_holds_no_pickle_and_no_path_of_this_machine(world: World, exported: Path) -> None:
    names = {str(file.relative_to(exported)) for file in exported.rglob("*") if file.is_file()}
    code = {name for name in names if name.endswith(".py")}
    weights = "diffusion_pytorch_model.safetensors"
    models = {f"{model}/{name}" for model in ("unet", "vae") for name in (weights, "config.json")}
    assert names - code == {"README.md", "model_index.json", "samples.png", *models}
    for name in names - {f"{model}/{weights}" for model in ("unet", "vae")} - {"samples.png"}:
        assert str(world.config.parent) not in (exported / name).read_text(encoding="utf-8"), name


def test_the_card_says_what_the_model_is(world: World, exported: Path) -> None:
    card = (exported / "README.md").read_text(encoding="utf-8")
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head)["library_name"] == "diffusers"
    assert yaml.safe_load(head)["license"] == "unknown"
    for words in (
        "2 classes, 16x16 pixels",
        "48 images seen",
        "11 images of `images`",
        "dog & \\<fox\\>",
        "samples.png",
    ):
        assert words in body
    assert (exported / "samples.png").read_bytes() == (world.samples / "grid.png").read_bytes()


def test_the_card_has_the_newest_figures_of_these_weights(world: World, tmp_path: Path) -> None:
    run = shutil.copytree(world.run, tmp_path / "run")
    checkpoint, _ = newest_checkpoint(run)
    assert checkpoint
    common = {"reference": "training images", "network": {"name": "Net"}}
    for time, (kernel, weights) in enumerate(((3, checkpoint.ema_sha256), (2, checkpoint.ema_sha256), (1, "other"))):
        figures = {"samples": {"images": 40, "copies": 0, "KD-Net": {"value": kernel, "interval": None}}}
        drawn = {"guidance": 2.5, "steps": 30, "scheduler": "heun"}
        file = run / "eval" / f"{time}.json"
        publish_checked(file, {**common, "figures": figures, "samples": drawn, "weights": {"sha256": weights}})
        os.utime(file, (time, time))
    for samples in (run / "samples").iterdir():  # of other weights
        said = json.loads((samples / "samples.json").read_text(encoding="utf-8"))
        del said["sha256"]
        publish_checked(samples / "samples.json", {**said, "ema_sha256": "other"})
    succeed("export", world.config, run, more=("--to", str(tmp_path / "out")))
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| KD-Net x1000 | 2,000 |" in card
    assert "with guidance 2.5 in 30 steps of heun, against the training images" in card
    assert "samples.png" not in card


def test_the_hub_gets_an_export_and_diffusers_loads_it_from_there(world: World, tmp_path: Path) -> None:
    with local_hub("hf_secret") as (address, repositories):
        online = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
        arguments = (
            "export",
            "--config",
            world.config,
            "--run",
            world.run,
            "--to",
            tmp_path / "out",
            "--push",
            "me/pets",
        )
        done = subprocess.run(
            [sys.executable, "-m", "stages", *map(str, arguments)],
            env={**os.environ, **online, "HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_XET": "1"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert f"uploaded: {address}/me/pets" in done.stdout
        files = {
            str(f.relative_to(tmp_path / "out")): f.read_bytes() for f in (tmp_path / "out").rglob("*") if f.is_file()
        }
        assert repositories == {"me/pets": files}
        finish(start(tmp_path, _DRAW, "me/pets", tmp_path / "hub.png", **online))
    assert differ([Image.open(tmp_path / "hub.png")], sampled(world)[:1]) <= 1


def test_without_a_token_nothing_is_exported(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    result = run_stage("export", world.config, world.run, more=("--to", str(tmp_path / "out"), "--push", "me/pets"))
    assert result.exit_code == 2
    assert "error: --push me/pets: not logged in: run `hf auth login`, or set HF_TOKEN to a token" in result.stderr
    result = run_stage("export", world.config, world.run, more=("--to", str(tmp_path / "out"), "--push", "pets"))
    assert "error: --push pets: give owner/name, such as me/solids" in result.stderr
    assert [*tmp_path.iterdir()] == []


def test_model_index_names_the_code_by_its_contents(exported: Path) -> None:
    index = json.loads((exported / "model_index.json").read_text(encoding="utf-8"))
    for module, file in ((index["_class_name"][0], "."), (index["unet"][0], "unet")):
        code = (exported / file / f"{module}.py").read_bytes()
        assert module.endswith(hashlib.sha256(code).hexdigest()[:12])


def test_samples_without_a_record_are_no_picture_of_the_card(world: World, tmp_path: Path) -> None:
    run = Path(shutil.copytree(world.run, tmp_path / "run"))
    checkpoint, _ = newest_checkpoint(run)
    assert checkpoint
    assert (_grid(run, checkpoint) or tmp_path).name == world.samples.name
    next(run.glob("samples/*/samples.json")).unlink()
    assert _grid(run, checkpoint) is None
