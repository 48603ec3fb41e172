"""Write a trained model as a folder that diffusers loads where latentmill is not installed, and upload it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers

import pipeline.unet
from data.storage import probe, read, staged_folder, strip_checksum, write_staged
from data.text import counted
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.diffusers_pipeline import LatentMillPipeline, pipeline_of
from pipeline.evaluation.receipt import table_of
from pipeline.standalone import standalone_source
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.run_folder import CONFIG, EVAL
from stages.decode import recorded
from stages.sample import require_checkpoint, resolve_sample_settings

_PICTURE = "samples.png"
_LISTED = 100  # classes named in the model card
_CARD = """---
library_name: diffusers
license: unknown
tags:
- class-conditional
- latent-diffusion
- image-generation
- latentmill
---

# {title}

A latent diffusion model that draws images of {classes}, {size}x{size} pixels each. It is a U-Net of {parameters:,}
parameters and a VAE, and was trained with latentmill.
{picture}
## Use

It needs torch and diffusers, and not latentmill:

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained({place}, trust_remote_code=True)
images = pipe(class_labels=[{first}] * 4, guidance_scale={sample.guidance:g}).images
images[0].save("sample.png")
```

`trust_remote_code=True` lets diffusers run the two files of code beside the weights, `{modules[0]}` and
`{modules[1]}`. `class_labels` are names or numbers of classes. Without other arguments, the pipeline
draws with guidance {sample.guidance:g} in {sample.steps} steps of {sample.scheduler}; `num_inference_steps` and
`sampler` change that. With `generator=pipe.image_generators(0, range(4))`, it draws the same four images each time.

Classes: {names}.

## Training

- Data: {images:,} images of `{data}`.
- Length: {images_seen:,} images seen in batches of {batch_size}, which is {epochs:.1f} epochs. The weights are an
  average over the training.
- VAE: {vae}, not trained here.

Settings that differ from latentmill's defaults:

```yaml
{settings}
```

## Evaluation

{figures}

## Licence

Not stated. It depends on the licences of the training images and of the VAE. Whoever publishes this model writes it
here and in the field `license` above. The code is that of latentmill, under the MIT licence.
"""


def export(config: Config, run: Path, to: Path, *, push: str | None = None) -> Path:
    """Export the averaged weights of the newest checkpoint of `run` to the new or empty folder `to`; return its path.

    A call of the exported pipeline samples as `config.sample` says, unless its arguments say otherwise. `push` is a
    repository of the Hugging Face hub to which the folder is uploaded. ValueError for a folder that holds something.
    """
    to = Path(os.path.abspath(to))
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ValueError(f"--to {to}: it is not empty: choose a new or an empty folder")
    if push:
        _check_login(push)
    checkpoint = require_checkpoint(run)
    config, _ = resolve_sample_settings(config, checkpoint)
    pipe = pipeline_of(checkpoint, config)
    probe(to.parent, "--to")
    with staged_folder(to) as staged:
        modules = _write_pipeline(pipe, checkpoint, staged)
        picture = _grid(run, checkpoint)
        if picture:
            write_staged(staged / _PICTURE, [read(picture / "grid.png")])
        card = _card(config, run, checkpoint, pipe, place=push or to.name, modules=modules, picture=picture)
        write_staged(staged / "README.md", [card.encode()])
    print(f"export: {checkpoint.images_seen:,} images seen, {counted(len(pipe.labels), 'class')}: {to}")
    print(f"export: the licence in {to / 'README.md'} is unknown: only you can fill it in")
    if push:
        _upload(to, push)
    return to


def _write_pipeline(pipe: LatentMillPipeline, checkpoint: Checkpoint, folder: Path) -> list[str]:
    """Write models, code and model_index.json; return the names of the files of code.

    diffusers copies these files into one folder for all models, so their names contain a hash of their contents.
    """
    heading = (
        f"Draws images from a class-conditional latent diffusion model. Written by latentmill {version('latentmill')}"
        " from its own\nsource, which is under the MIT licence, Copyright (c) 2026 the latentmill authors."
    )
    sampling = standalone_source("pipeline.diffusers_pipeline", "LatentMillPipeline", heading).encode()
    network = read(Path(pipeline.unet.__file__))
    names = [
        f"{name}_{hashlib.sha256(code).hexdigest()[:12]}"
        for name, code in (("latentmill", sampling), ("latent_unet", network))
    ]
    files = [f"{names[0]}.py", f"unet/{names[1]}.py"]
    for file, code in zip(files, (sampling, network), strict=True):
        write_staged(folder / file, [code])
    pipe.vae.register_to_config(_name_or_path=_shown(checkpoint.state.vae.source))  # else a path of this machine
    pipe.unet.save_pretrained(folder / "unet")
    pipe.vae.save_pretrained(folder / "vae")
    values = {name: value for name, value in pipe.config.items() if not name.startswith("_")}
    index = {
        "_class_name": [names[0], type(pipe).__name__],
        "_diffusers_version": diffusers.__version__,
        **values,
        "unet": [names[1], type(pipe.unet).__name__],
        "vae": ["diffusers", type(pipe.vae).__name__],
    }
    write_staged(folder / "model_index.json", [(json.dumps(index, indent=2) + "\n").encode()])
    return files


def _shown(source: str) -> str:
    """Return the last part of a path or URL, which may be private or contain a password; a hub id is not changed."""
    path = Path(source).expanduser()
    if "://" in source or path.is_absolute() or path.exists():
        return source.partition("?")[0].rstrip("/").rpartition("/")[2]
    return source


def _grid(run: Path, checkpoint: Checkpoint) -> Path | None:
    """Return the newest folder of samples of these weights that has a contact sheet."""
    folders = sorted((file.parent for file in run.glob("samples/*/grid.png")), key=lambda each: each.stat().st_mtime)
    for folder in reversed(folders):
        if recorded(folder).get("ema_sha256") == checkpoint.ema_sha256:
            return folder
    return None


def _receipt(run: Path, checkpoint: Checkpoint) -> dict[str, Any] | None:
    """Return the newest receipt of an evaluation of these weights."""
    for file in sorted((run / EVAL).glob("*.json"), key=lambda each: each.stat().st_mtime, reverse=True):
        receipt = json.loads(strip_checksum(read(file)) or b"{}")
        if (receipt.get("weights") or {}).get("sha256") == checkpoint.ema_sha256:
            return receipt
    return None


def _card(
    config: Config,
    run: Path,
    checkpoint: Checkpoint,
    pipe: LatentMillPipeline,
    *,
    place: str,
    modules: Sequence[str],
    picture: Path | None,
) -> str:
    """Return the model card, README.md: what the model draws, how it is used, and how it was trained and measured."""
    state, names = checkpoint.state, [*pipe.labels]
    source = state.vae.source
    trained = load_config(run / CONFIG) if (run / CONFIG).exists() else config
    receipt = _receipt(run, checkpoint)
    return _CARD.format(
        title=_text(trained.name),
        classes=counted(len(names), "class"),
        size=state.image_size,
        parameters=pipe.unet.num_parameters(),
        picture=_caption(picture) if picture else "",
        place=json.dumps(place),
        first=json.dumps(names[0], ensure_ascii=False),
        sample=config.sample,
        modules=modules,
        names=", ".join(map(_text, names[:_LISTED])) + (f", ... ({len(names):,} in all)" if names[_LISTED:] else ""),
        images=state.cache.committed,
        data=_shown(trained.data.source),
        images_seen=checkpoint.images_seen,
        batch_size=state.train["batch_size"],
        epochs=checkpoint.images_seen / state.cache.committed,
        vae="the small one of latentmill" if source == "bundled" else f"{state.vae.class_name} of `{_shown(source)}`",
        settings=_settings(config, trained),
        figures=_figures(receipt) if receipt else "These weights have not been evaluated.",
    )


def _caption(folder: Path) -> str:
    """Return the contact sheet of a folder of samples in Markdown, with a caption."""
    drawn = recorded(folder)["sample"]
    how = f"guidance {drawn['guidance']:g} in {drawn['steps']} steps of {drawn['scheduler']}"
    return f"\n![Samples of the model, by class]({_PICTURE})\n\nSamples that were not selected, with {how}.\n"


def _settings(config: Config, trained: Config) -> str:
    """Return model, noise, training and sampling settings as YAML, without paths of this machine."""
    sections = trained.model_dump(mode="json", include={"model", "noise", "train"}, exclude_defaults=True)
    sections |= config.model_dump(mode="json", include={"sample"}, exclude_defaults=True)
    if init := sections.get("train", {}).get("init"):
        sections["train"]["init"] = _shown(init)
    lines = []
    for section, values in sections.items():
        lines += [f"{section}:", *(f"  {key}: {json.dumps(value)}" for key, value in values.items())]
    return "\n".join(lines)


def _figures(receipt: dict[str, Any]) -> str:
    """Return the table of a receipt in Markdown, and what it was measured with."""
    header, *lines = table_of(receipt)
    rows = [header, ["---"] * len(header), *lines]
    drawn = receipt["samples"]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return (
        f"Measured by `latentmill evaluate` with the network {receipt['network']['name']}, for samples with guidance"
        f" {drawn['guidance']:g} in {drawn['steps']} steps of {drawn['scheduler']}, against the {receipt['reference']}."
        " Lower is better for KD, the kernel distance, and FD, the Fréchet distance, which depends on the number of"
        f" images. ± is half the width of a 95 % interval.\n\n{table}"
    )


def _text(name: str) -> str:
    """Return a name as text of Markdown, where some characters mean something."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>()#|" else c for c in name)


def _check_login(repository: str) -> None:
    """Raise ValueError if `repository` is no name of one, or if nobody is logged in."""
    from huggingface_hub import get_token

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"--push {repository}: give owner/name, such as me/solids")
    if not get_token():
        raise ValueError(f"--push {repository}: not logged in: run `hf auth login`, or set HF_TOKEN to a token")


def _upload(folder: Path, repository: str) -> None:
    from huggingface_hub import HfApi

    print(f"export: uploading to {repository}; to repeat it: hf upload {repository} {folder}", flush=True)
    api = HfApi()
    created = api.create_repo(repository, private=True, exist_ok=True)
    api.upload_folder(repo_id=created.repo_id, folder_path=folder, commit_message="Export from latentmill")
    print(f"export: uploaded: {created}, private if it is new")
