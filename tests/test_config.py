from __future__ import annotations

from pathlib import Path

import pytest

from stages.config import Config, dump_config, load_config

ROOT = Path(__file__).parent.parent


def load(tmp_path: Path, text: str, *overrides: str) -> Config:
    file = tmp_path / "small.yaml"
    file.write_text(text, encoding="utf-8")
    return load_config(file, overrides)


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.name)
def test_every_config_of_the_repository_loads(file: Path) -> None:
    assert load_config(file).name == file.stem


def test_an_empty_config_is_the_defaults_under_the_name_of_its_file(tmp_path: Path) -> None:
    assert load(tmp_path, "") == Config(name="small")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trian:\n  lr: 1\n", "unknown key trian: did you mean train?"),
        ("train:\n  batchsize: 1\n", "unknown key train.batchsize: did you mean train.batch_size?"),
        ("model:\n  chanels: [8]\n", "unknown key model.chanels: did you mean model.channels?"),
        ("train:\n  qqqq: 1\n", "unknown key train.qqqq"),
    ],
)
def test_an_unknown_key_suggests_the_nearest(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match="unknown key") as error:
        load(tmp_path, text)
    assert str(error.value) == f"{tmp_path / 'small.yaml'}: {message}"


def test_an_unknown_key_on_the_command_line_is_refused_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown key train\.lrr: did you mean train\.lr\?"):
        load(tmp_path, "", "train.lrr=1")


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", "1.e-4", "+1e-4"])
def test_numbers_with_an_exponent_are_numbers(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, f"train:\n  lr: {text}\n").train.lr == 1e-4
    assert load(tmp_path, "", f"train.lr={text}").train.lr == 1e-4


def test_numbers_may_have_underscores_and_words_stay_words(tmp_path: Path) -> None:
    config = load(tmp_path, "name: 1e-4x\ntrain:\n  images: 40_000\n")
    assert (config.name, config.train.images) == ("1e-4x", 40_000)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.lr=-1", ("train.lr", "-1")),
        ("train.lr=fast", ("train.lr", "'fast'")),
        ("train.lr=.nan", ("train.lr", "nan")),
        ("train.batch_size=0", ("train.batch_size", "0")),
        ("train.batch_size=1.5", ("train.batch_size", "1.5")),
        ("train.seed=9223372036854775808", ("train.seed", "9223372036854775808")),
        ("train.label_dropout=1.5", ("train.label_dropout", "1.5")),
        ("model.channels=[8,0]", ("model.channels.1", "0")),
        ("model.channels=[]", ("model.channels", "[]")),
        ("noise.schedule=sigmoid", ("noise.schedule", "'sigmoid'")),
        ("sample.guidance=.inf", ("sample.guidance", "inf")),
        ("cache.dtype=int8", ("cache.dtype", "'int8'")),
        ("train=3", ("train", "3")),
    ],
)
def test_a_wrong_value_is_refused_with_file_field_and_value(
    tmp_path: Path, override: str, parts: tuple[str, str]
) -> None:
    with pytest.raises(ValueError, match=r"\A[^\n]*\Z") as error:
        load(tmp_path, "", override)
    assert str(error.value).startswith(f"{tmp_path / 'small.yaml'}: {parts[0]} = {parts[1]}: ")


def test_overrides_win_over_the_file_and_later_ones_over_earlier_ones(tmp_path: Path) -> None:
    text = "train:\n  lr: 1\n  images: 5000\n"
    config = load(tmp_path, text, "train.lr=2", "train.lr=3", "model.channels=[8, 16]", "name=other", "cache.flip=no")
    assert (config.train.lr, config.train.images, config.model.channels) == (3, 5000, (8, 16))
    assert (config.name, config.cache.flip) == ("other", False)


def test_a_section_without_keys_can_be_overridden(tmp_path: Path) -> None:
    text = "train:\n  # lr: 1e-3\n"
    assert load(tmp_path, text).train == Config().train
    assert load(tmp_path, text, "train.lr=2").train.lr == 2


@pytest.mark.parametrize("override", ["train.lr", "=1", "name.first=1"])
def test_a_malformed_override_is_named(tmp_path: Path, override: str) -> None:
    with pytest.raises(ValueError, match=rf"^--set {override}: "):
        load(tmp_path, "name: x\n", override)


def test_an_override_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--set model\.channels=\[8: [^\n]*$"):
        load(tmp_path, "", "model.channels=[8")


def test_classes_may_be_given_by_number(tmp_path: Path) -> None:
    assert load(tmp_path, "", "sample.classes=[0, cat]").sample.classes == ("0", "cat")


@pytest.mark.parametrize("text", ["name: a\nname: b\n", "train:\n  lr: 1\n  lr: 2\n"])
def test_a_key_given_twice_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"small\.yaml: line \d: \w+ is given twice$"):
        load(tmp_path, text)


@pytest.mark.parametrize(("text", "kind"), [("[1, 2]", "list"), ("hello", "str"), ("3", "int")])
def test_a_config_that_is_no_mapping_is_refused(tmp_path: Path, text: str, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"small\.yaml: a config is a mapping of sections, this is a {kind}$"):
        load(tmp_path, text)


@pytest.mark.parametrize("text", ["a: [1", "a: b: c", "\tname: x", "a: !!python/object:os.system 1", "a: *b"])
def test_broken_yaml_is_an_error_in_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"small\.yaml: [^\n]+\Z"):
        load(tmp_path, text)


def test_aliases_that_stand_for_a_billion_values_are_an_error_in_one_line(tmp_path: Path) -> None:
    lists = ["- &0 [lol, lol]"] + [f"- &{i + 1} [{', '.join([f'*{i}'] * 10)}]" for i in range(9)]
    with pytest.raises(ValueError, match=r"train\.lr = \[") as caught:
        load(tmp_path, "train:\n  lr:\n" + "".join(f"    {line}\n" for line in lists))
    assert len(str(caught.value)) < 500


def test_a_config_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--config: no such file: .*none\.yaml$"):
        load_config(tmp_path / "none.yaml")


def test_what_is_dumped_is_loaded_to_the_same(tmp_path: Path) -> None:
    text = """
        name: "007"
        data: {source: /photos/a b, image_size: 32}
        cache: {path: "caches/ä", format: zarr, store: mean, dtype: float32}
        model: {channels: [8, 24], bottleneck: resnet, dropout: 0.25}
        noise: {schedule: cosine, prediction: v, timesteps: uniform}
        train: {lr: 1e-05, betas: [0.8, 0.9], images: 1_000_000}
        sample: {scheduler: ddim, classes: ["1", "on", "null", cat], guidance: 1.5}
    """
    config = load(tmp_path, text)
    assert load(tmp_path, dump_config(config)) == config
    assert config.sample.classes == ("1", "on", "null", "cat")


@pytest.mark.parametrize("prediction", ["epsilon", "v", "flow"])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "flow"])
@pytest.mark.parametrize("scheduler", ["ddpm", "ddim", "euler"])
def test_parts_that_do_not_fit_are_refused(tmp_path: Path, schedule: str, prediction: str, scheduler: str) -> None:
    overrides = [f"noise.schedule={schedule}", f"noise.prediction={prediction}", f"sample.scheduler={scheduler}"]
    if len({schedule == "flow", prediction == "flow", scheduler == "euler"}) == 1:
        assert load(tmp_path, "", *overrides).noise.schedule == schedule
        return
    with pytest.raises(ValueError, match=rf"small\.yaml: .*{schedule}[^\n]*\Z"):
        load(tmp_path, "", *overrides)
