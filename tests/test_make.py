"""What make starts, by what it would run: values with spaces and quotes, and what each target depends on."""

from __future__ import annotations

import os
import shlex
import subprocess

import pytest

from tests.helpers.imports import ROOT


def dry_run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What make says, wherever it is called from: a make around these tests hands none of its own flags on."""
    clean = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    command = ["make", "--dry-run", *arguments]
    return subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, timeout=60)


def started(*arguments: str) -> list[list[str]]:
    """The commands of stages that `make` would run, in words as the shell reads them."""
    done = dry_run(*arguments)
    assert done.returncode == 0, done.stderr
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    return [words[words.index("-m") + 2 :] if "-m" in words else words for words in commands if "--config" in words]


@pytest.mark.parametrize("processes", ["NPROC=1", "NPROC=3"])
def test_values_with_spaces_quotes_and_dollars_arrive_as_they_are(processes: str) -> None:
    config, run = "my configs/a $x.yaml", "my runs/it's $(HOME)"
    pairs = ["data.source=my $images", "train.lr=1e-3", "sample.classes=[cat, it's]", "name=a;b&c", "x.y=*", "z=#FFF"]
    words = [shlex.quote(pair) for pair in pairs]
    commands = started("train", processes, f"CONFIG={config}", f"RUN={run}", f"SET={' '.join(words)}")
    given = ["--config", config, *(word for pair in pairs for word in ("--set", pair)), "--run", run]
    assert [command[-len(given) :] for command in commands] == [given] * 2
    assert [command[-len(given) - 1] for command in commands] == ["encode", "train"]


def test_a_quote_around_a_value_is_as_good_as_one_around_the_pair() -> None:
    for text in ("data.source='my images' train.lr=1", '"data.source=my images" train.lr=1'):
        (command,) = started("encode", f"SET={text}")
        assert command[-4:] == ["--set", "data.source=my images", "--set", "train.lr=1"]


def test_a_quote_that_is_not_closed_is_refused() -> None:
    done = dry_run("encode", "SET=data.source='my images")
    assert done.returncode == 2
    assert "SET: data.source='my images: a quote is not closed" in done.stderr


@pytest.mark.parametrize("target", ["all", "sample"])
def test_images_take_three_stages_and_settings_are_given_once(target: str) -> None:
    commands = started(target, "SET=sample.guidance=3")
    assert [command[1] for command in commands] == ["encode", "train", "sample"]
    assert all(command[-1] == "sample.guidance=3" for command in commands)


def test_decode_has_something_to_do() -> None:
    commands = started("decode")
    assert [command[1] for command in commands] == ["encode", "train", "sample", "decode"]
    assert ["--latents" in command for command in commands] == [False, False, True, False]


@pytest.mark.parametrize("target", ["encode", "train", "sample", "decode", "all"])
def test_flags_are_given_to_the_target_that_is_named(target: str) -> None:
    commands = started(target, "FLAGS=--some thing")
    assert [command[-2:] == ["--some", "thing"] for command in commands] == [False] * (len(commands) - 1) + [True]


@pytest.mark.parametrize(
    ("flags", "stages"),
    [
        ("", ["encode", "train", "evaluate"]),
        ("--protocol imagenet-50k", ["encode", "train", "evaluate"]),
        ("--images samples.npz", ["evaluate"]),
        ("--repeat=receipt.json", ["evaluate"]),
    ],
)
def test_options_of_an_evaluation_are_given_to_it_alone(flags: str, stages: list[str]) -> None:
    commands = started("eval", "NPROC=1", f"FLAGS={flags}")
    assert [words[1] for words in commands] == stages
    given = flags.split()
    assert [words[-len(given) :] == given for words in commands if given] == [False] * (len(stages) - 1) * bool(
        given
    ) + ([True] * bool(given))


def test_an_export_gets_its_folder_and_flags_and_the_stages_before_it_do_not() -> None:
    commands = started("export", "TO=my exports/it's", "FLAGS=--push me/solids")
    assert [command[1] for command in commands] == ["encode", "train", "export"]
    assert commands[-1][-4:] == ["--to", "my exports/it's", "--push", "me/solids"]
    assert not any("--push" in command for command in commands[:-1])


def test_a_demo_gets_its_run_and_trains_nothing() -> None:
    done = dry_run("demo", "RUN=my runs/it's", "FLAGS=--port 0")
    *_, words = [shlex.split(line) for line in done.stdout.splitlines()]
    assert words[1:] == ["demo", "--run", "my runs/it's", "--port", "0"]
    assert started("demo") == []  # no stage with a config


@pytest.mark.parametrize(
    ("count", "start"), [("1", "latentmill train"), ("2", "--nproc_per_node 2 -m -- stages train")]
)
def test_make_starts_as_many_processes_as_asked_for(count: str, start: str) -> None:
    assert start in dry_run("train", f"NPROC={count}").stdout
