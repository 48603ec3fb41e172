"""The command line. Each stage is imported only when it runs, so that help answers at once."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from pipeline.config import Config


class LocalPath(click.Path):
    """A path, in which ~ is the user's home: a shell leaves it in `--run=~/x`, and make in RUN='~/x'."""

    def __init__(self, **options: Any) -> None:
        super().__init__(path_type=Path, **options)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(os.path.expanduser(value), param, ctx)


class _InOrder(click.Group):
    """Lists commands in the order of this file, which is that of the pipeline."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="latentmill", message="%(prog)s %(version)s")
def main() -> None:
    """Class-conditional latent diffusion: images -> latent cache -> model -> samples -> images.

    Most commands read one config file (--config). Running a command again continues unfinished work; if nothing is
    left to do, it does nothing.
    """


def _errors_in_one_line(command: Callable[..., None]) -> Callable[..., None]:
    """Report an error in one line: exit status 2 for a mistake of the user, 1 for a failure; --debug adds the trace."""

    @functools.wraps(command)
    def wrapped(*args: Any, debug: bool, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except Exception as error:  # the one place where any exception becomes a line
            from data.text import printable

            if debug or isinstance(error, click.ClickException | click.exceptions.Exit | click.Abort):
                raise
            user_error = isinstance(error, ValueError)
            text = str(error) if user_error else f"{type(error).__name__}: {error} (--debug shows where)"
            rank = int(os.environ.get("RANK", "0"))
            where = f" in process {rank}" if rank else ""
            click.echo(f"error{where}: {printable(' '.join(text.split()))}", err=True)
            sys.exit(2 if user_error else 1)

    return click.option("--debug", is_flag=True, help="Show the trace of an error.")(wrapped)


def _stage(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that all stages share; the stage gets the checked config and the folder of the run."""

    @functools.wraps(command)
    def wrapped(config: Path, overrides: tuple[str, ...], run: Path | None, **kwargs: Any) -> None:
        from pipeline.config import check_outputs
        from pipeline.config_file import load_config

        checked = load_config(config, overrides)
        run = run or Path("runs") / checked.name
        check_outputs(checked, run)
        command(checked, run, **kwargs)

    wrapped = click.option("--run", type=LocalPath(), help="Folder of the run  [default: runs/NAME]")(wrapped)
    wrapped = click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the config."
    )(wrapped)
    config = click.option(
        "--config",
        type=LocalPath(),
        default=Path("configs/solids.yaml"),
        show_default=True,
        help="YAML file of the experiment.",
    )
    return _errors_in_one_line(config(wrapped))


_npz_option = click.option("--npz", is_flag=True, help="Also write samples.npz, the format of ADM's evaluator.")
_cache_option = click.option("--cache", type=LocalPath(), help="A cache other than the config's.")


@main.command()
@click.option("--job", metavar="I/N", help="Write only the I-th of N shares, such as 3/16: one job of a SLURM array.")
@click.option("--extend", is_flag=True, help="Encode the images that were added to the data set.")
@click.option("--retry-failed", is_flag=True, help="Try again to read images that failed.")
@_stage
def encode(config: Config, run: Path, job: str | None, **kwargs: bool) -> None:
    """Encode the images once and write the latent cache."""
    from stages.encode import encode, parse_job

    encode(config, parse_job(job), **kwargs)


@main.command()
@click.option("--repair", is_flag=True, help="Encode the damaged shards again.")
@_cache_option
@_stage
def verify(config: Config, run: Path, cache: Path | None, repair: bool) -> None:
    """Check every file of the cache against its SHA-256."""
    from stages.verify import verify

    verify(config, cache, repair=repair)


@main.command()
@_cache_option
@_stage
def info(config: Config, run: Path, cache: Path | None) -> None:
    """Describe the cache, with images beside their reconstructions."""
    from stages.info import info

    info(config, cache)


@main.command()
@click.argument("source", type=LocalPath())
@click.argument("target", type=LocalPath())
@click.option("--format", "format_", type=click.Choice(["zarr", "webdataset"]), help="[default: the other one]")
@_errors_in_one_line
def convert(source: Path, target: Path, format_: str | None) -> None:
    """Write the cache SOURCE in the other format to TARGET."""
    from stages.convert import convert

    convert(source, target, format_)


@main.command()
@_stage
def train(config: Config, run: Path) -> None:
    """Train on the cache, or resume from the newest checkpoint."""
    from stages.train import train

    train(config, run)


@main.command()
@click.argument("run", type=LocalPath(exists=True, file_okay=False))
@click.option("--width", type=float, required=True, help="Standard deviation, as a fraction of the run, such as 0.15.")
@click.option("--images", type=int, help="Images seen at which the average ends  [default: the last snapshot]")
@click.option("--to", type=LocalPath(), help="Folder of the new run  [default: RUN-emaWIDTH]")
@_errors_in_one_line
def ema(run: Path, width: float, images: int | None, to: Path | None) -> None:
    """Compute a weight average of another width from a RUN.

    The run was trained with train.ema=power; the average becomes a run of its own, for sample and decode.
    """
    from stages.ema import ema

    ema(run, width, images, to)


@main.command()
@click.option("--latents", is_flag=True, help="Write latents only; decode makes the images later.")
@_npz_option
@_stage
def sample(config: Config, run: Path, latents: bool, npz: bool) -> None:
    """Draw images from the newest checkpoint.

    They are written as PNG files (see sample.image_format), with a contact sheet and a page. Several processes, as
    torchrun starts them, share the work.
    """
    from stages.decode import sample_images
    from stages.encode import parse_job
    from stages.sample import sample

    if latents and npz:
        raise ValueError("--npz: it holds images: leave out --latents")
    if latents:
        sample(config, run, job=parse_job(None))
    else:
        sample_images(config, run, npz=npz, job=parse_job(None))


@main.command()
@click.option("--cache", type=LocalPath(), help="Decode the first images of each class of this cache instead.")
@_npz_option
@_stage
def decode(config: Config, run: Path, cache: Path | None, npz: bool) -> None:
    """Decode samples that were drawn before, or a cache, to images.

    Several processes, as torchrun starts them, share the work.
    """
    from stages.decode import decode
    from stages.encode import parse_job
    from stages.sample import drawn_folder

    decode(config, cache or drawn_folder(config, run), excerpt=cache is not None, npz=npz, job=parse_job(None))


@main.command()
@click.option("--rows", metavar="KEY=V1,V2,...", help="Values of a key of sample  [default: guidance=1,2,3,4]")
@click.option("--columns", metavar="KEY=V1,V2,...", help="Values of another key  [default: steps=5,10,20,50]")
@click.option("--to", type=LocalPath(), help="PNG file to write  [default: one in runs/NAME/sweeps]")
@_stage
def sweep(config: Config, run: Path, rows: str | None, columns: str | None, to: Path | None) -> None:
    """Draw a picture that compares two settings of sample, one in rows and one in columns.

    All samples begin with the same noise. KEY is guidance, steps, class, seed, scheduler, guidance_form, ...: any key
    of the section sample; class=all stands for all classes.
    """
    from stages.sweep import sweep

    sweep(config, run, rows, columns, to)


@main.command()
@click.option(
    "--between-seeds",
    nargs=2,
    type=click.IntRange(min=0),
    metavar="SEED SEED",
    help="Go from the noise of one seed to that of another.",
)
@click.option("--between-classes", nargs=2, metavar="CLASS CLASS", help="Go from one class to another.")
@click.option("--frames", type=click.IntRange(min=2), default=25, show_default=True, help="Number of frames, at most.")
@click.option("--to", type=LocalPath(), help="File to write, .webp or .gif  [default: one in runs/NAME/animations]")
@_stage
def animate(config: Config, run: Path, **options: Any) -> None:
    """Draw an animation of how noise becomes images.

    Each frame shows the images that the model expects at a step, one of each class. Between two seeds or classes, all
    frames show samples. A PNG file beside the animation shows some of its frames side by side.
    """
    from stages.animate import animate

    animate(config, run, **options)


@main.command()
@click.option("--images", help="Measure these images instead: a folder, an archive or an .npz.")
@click.option(
    "--protocol",
    type=click.Choice(["imagenet-50k", "imagenet100-5k"]),
    help="Use the number of samples and the reference of this protocol.",
)
@click.option(
    "--repeat",
    "receipt",
    type=LocalPath(),
    help="Repeat the evaluation recorded in this JSON file, and compare the results.",
)
@_stage
def evaluate(config: Config, run: Path, images: str | None, protocol: str | None, receipt: Path | None) -> None:
    """Measure samples against real images.

    The metrics, and everything that is needed to reproduce them, are written to runs/NAME/eval.
    """
    from stages.evaluate import evaluate, repeat

    if receipt and (images or protocol):
        raise ValueError("--repeat: the receipt says what is measured: leave out --images and --protocol")
    if receipt:
        repeat(receipt)
    else:
        evaluate(config, run, images=images and os.path.expanduser(images), protocol=protocol)


@main.command()
@click.option("--to", type=LocalPath(), required=True, help="Folder of the export, which must be new or empty.")
@click.option("--push", metavar="REPO", help="Also upload it to this repository of the Hugging Face hub: owner/name.")
@_stage
def export(config: Config, run: Path, to: Path, push: str | None) -> None:
    """Write the model as a folder that diffusers loads.

    latentmill need not be installed there. The sample keys of the config are the defaults of the pipeline.
    """
    from stages.export import export

    export(config, run, to, push=push)


@main.command()
@click.option("--run", type=LocalPath(), help="Run that is selected first  [default: the first in runs/]")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=7860, show_default=True, help="Port of the page; 0: any."
)
@_errors_in_one_line
def demo(run: Path | None, port: int) -> None:
    """Serve a page on this machine that draws images.

    They come from the trained models in runs/; no other machine reaches the page.
    """
    from stages.demo import demo

    demo(run, port)


@main.command("config")
@_errors_in_one_line
def print_config() -> None:
    """Print every key of a config with its type, default and meaning."""
    from stages.config import config_reference

    click.echo(config_reference(), nl=False)


@main.command("train-vae")
@click.argument("photos", type=LocalPath())
@click.option("--to", type=LocalPath(), default=Path("pipeline/bundled_vae"), show_default=True)
@click.option("--steps", type=click.IntRange(min=1), default=5500, show_default=True)
@_errors_in_one_line
def train_vae(photos: Path, to: Path, steps: int) -> None:
    """Train the bundled VAE again.

    It learns from solids and from PHOTOS, a folder of class folders.
    """
    from stages.train_vae import train_vae

    train_vae(photos, to, steps=steps)
