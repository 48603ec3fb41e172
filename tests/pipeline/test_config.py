from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest

from pipeline.compatibility import SAMPLERS
from pipeline.config import Config, Sample
from pipeline.config_file import _TEXT_KEYS, dump_config, load_config
from tests.helpers.imports import ROOT

SOLIDS = ROOT / "configs/solids.yaml"
DISCRETE = ("noise.schedule=linear", "noise.prediction=v")


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


WORDS = [
    *("010", "007", "no", "yes", "On", "null", "~", "1e3", "1_000", "12:30", "2020-01-01", "0x10", "1.0", ".5", ".inf"),
    *("+1", "-1", "1e-3", "0o7", "0b1", "index:2", "cat", "n01440764", "кот", "猫", "a b", "a#b", "<<", "=", "cat.1"),
]
QUOTED = [
    "",
    "a, b",
    "it's",
    'say "x"',
    "a: b",
    "#x",
    "[x]",
    "x\ny",
    "\t",
    "  x ",
    "é",
    "e\u0301",
    "*x",
    "&x",
    "!x",
    "🐶",
]


@pytest.mark.parametrize("word", WORDS)
def test_classes_are_what_was_written(tmp_path: Path, word: str) -> None:
    assert load(tmp_path, f"sample: {{classes: [{word}, cat]}}").sample.classes == (word, "cat")
    assert load(tmp_path, f"sample:\n  classes:\n    - {word}\n    - cat\n").sample.classes == (word, "cat")
    for text in (f"[{word}]", word, f'"{word}"', f"['{word}']", f"!!str {word}"):
        assert load(tmp_path, "", f"sample.classes={text}").sample.classes == (word,)
        assert load(tmp_path, f"sample:\n  classes: {text}\n").sample.classes == (word,)
    assert load(tmp_path, "", f"sample={{classes: [{word}]}}").sample.classes == (word,)


@pytest.mark.parametrize("name", [*WORDS, *QUOTED])
def test_any_name_of_a_class_is_dumped_and_loaded_as_it_is(tmp_path: Path, name: str) -> None:
    config = Config(sample=Sample(classes=(name, "cat")))
    assert load(tmp_path, dump_config(config)) == config
    assert load(tmp_path, "", f"sample.classes=[{json.dumps(name, ensure_ascii=False)}]").sample.classes == (name,)


def test_an_alias_or_a_merged_key_stands_for_classes_as_they_were_written(tmp_path: Path) -> None:
    text = "train: {seed: &n 010}\nsample: {seed: 3, classes: [*n, 1]}\n"
    assert load(tmp_path, text).sample.classes == ("010", "1")
    merged = "sample: {<<: {classes: [010, no]}, steps: 3}\n"
    assert load(tmp_path, merged).sample.classes == ("010", "no")


@pytest.mark.parametrize(
    ("text", "classes"),
    [("2", ("2",)), ("cat", ("cat",)), ("cat, 010", ("cat", "010")), ("", ()), ("[]", ()), ("#1", ("#1",))],
)
def test_classes_need_no_brackets(tmp_path: Path, text: str, classes: tuple[str, ...]) -> None:
    assert load(tmp_path, "", f"sample.classes={text}").sample.classes == classes


@pytest.mark.parametrize("text", ["[[cat]]", "{cat: 1}", "[cat: 1]"])
def test_classes_of_another_shape_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"small\.yaml: sample\.classes\.0 = [^\n]+\Z"):
        load(tmp_path, "", f"sample.classes={text}")


@pytest.mark.parametrize(("text", "number"), [("010", 10), ("0123", 123), ("1_000", 1000), ("+5", 5), ("08", 8)])
def test_whole_numbers_are_decimal(tmp_path: Path, text: str, number: int) -> None:
    assert load(tmp_path, f"train:\n  seed: {text}\n").train.seed == number
    assert load(tmp_path, "", f"train.seed={text}").train.seed == number
    assert load(tmp_path, "", f"train.lr={text}").train.lr == number


@pytest.mark.parametrize("text", ["12:30", "0x10", "0b11", "1:30.5", "2020-01-01"])
@pytest.mark.parametrize("key", ["train.images", "train.lr"])
def test_numbers_of_another_base_are_refused_and_not_guessed(tmp_path: Path, key: str, text: str) -> None:
    with pytest.raises(ValueError, match=rf"small\.yaml: {key} = [^\n]+\Z"):
        load(tmp_path, "", f"{key}={text}")


@pytest.mark.parametrize("word", ["007", "no", "1e3", "2020-01-01", "12:30", "0x10", "a: b", "@x", "a #b", "[x]", "*"])
def test_paths_and_names_are_what_was_written(tmp_path: Path, word: str) -> None:
    config = load(tmp_path, "", f"data.source={word}", f"cache.path={word}", f"name={word}", f"train.init={word}")
    assert (config.data.source, config.name) == (word, word)
    assert (str(config.cache.path), str(config.train.init)) == (word, word)
    assert load(tmp_path, dump_config(config)) == config
    assert load(tmp_path, "", f"data.source='{word}'", f'vae.source="{word}"').data.source == word


def test_a_path_in_a_file_is_what_was_written(tmp_path: Path) -> None:
    config = load(tmp_path, "name: 007\ndata: {source: 010}\ncache: {path: 1e3}\ntrain: {init: null}\n")
    assert (config.name, config.data.source, str(config.cache.path)) == ("007", "010", "1e3")
    assert config.train.init is None


def test_every_key_of_a_path_or_name_keeps_what_was_written() -> None:
    sections = [field.annotation for field in Config.model_fields.values() if field.annotation is not str]
    fields = [pair for each in (*sections, Config) for pair in each.model_fields.items()]  # type: ignore[union-attr]
    assert {
        name
        for name, field in fields
        if field.annotation in (str, str | None, float | str | None) or "Path" in str(field.annotation)
    } == {*_TEXT_KEYS}


def test_a_tilde_is_the_home_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    text = "data: {source: ~/photos}\nvae: {source: ~/vae}\ncache: {path: ~/cache}\ntrain: {init: ~/runs/x}\n"
    config = load(tmp_path, text)
    assert [config.data.source, config.vae.source] == [f"{tmp_path}/photos", f"{tmp_path}/vae"]
    assert [config.cache.path, config.train.init] == [tmp_path / "cache", tmp_path / "runs" / "x"]
    assert load(tmp_path, "", "data.source=s3://bucket/~/x").data.source == "s3://bucket/~/x"


@pytest.mark.parametrize(
    "color",
    ["white", "White", "#FFF", "#fff", "#FFFFFF", "rgb(255, 255, 255)", "rgb(100%,100%,100%)", "hsl(0,0%,100%)"],
)
def test_a_matte_is_any_colour_that_pillow_knows_and_equal_ones_are_the_same(tmp_path: Path, color: str) -> None:
    assert load(tmp_path, "", f"data.matte={color}") == Config(name="small")
    assert load(tmp_path, f"data: {{matte: '{color}'}}").data == Config().data
    assert load(tmp_path, "", "data.matte=rebeccapurple").data.matte == "#663399"


@pytest.mark.parametrize(
    "color", ["blurple", "#FFFF0080", "#FFF8", "rgba(1,2,3,4)", "rgb(300, 0, 0)", "#12345", "", "0", "x" * 200]
)
def test_a_matte_that_is_no_opaque_colour_is_refused_at_once(tmp_path: Path, color: str) -> None:
    with pytest.raises(ValueError, match=r"small\.yaml: data\.matte: [^\n]+\Z") as caught:
        load(tmp_path, f"data: {{matte: '{color}'}}")
    assert color[:20] in str(caught.value)


def test_a_matte_that_yaml_takes_for_a_remark_is_told_to_be_quoted(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.matte: .* needs quotes in YAML, as '#FFF'$"):
        load(tmp_path, "data:\n  matte: #FFF\n")


@pytest.mark.parametrize("text", ["name: a\nname: b\n", "train:\n  lr: 1\n  lr: 2\n"])
def test_a_key_given_twice_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"small\.yaml: line \d: \w+ is given twice$"):
        load(tmp_path, text)


@pytest.mark.parametrize(("text", "kind"), [("[1, 2]", "list"), ("hello", "str"), ("3", "int")])
def test_a_config_that_is_no_mapping_is_refused(tmp_path: Path, text: str, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"small\.yaml: a config must be a mapping of sections, this is a {kind}$"):
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
    if (schedule == "flow") == (prediction == "flow") and (schedule != "flow" or scheduler == "euler"):
        assert load(tmp_path, "", *overrides).noise.schedule == schedule
        return
    with pytest.raises(ValueError, match=rf"small\.yaml: .*{schedule}[^\n]*\Z"):
        load(tmp_path, "", *overrides)


def test_held_out_images_are_a_share_or_a_place_as_written(tmp_path: Path) -> None:
    for text, value in (("0.1", 0.1), ("'0.1'", 0.1), ("1e-2", 0.01), ("val", "val"), ("./0.1", "./0.1"), ("~", None)):
        config = load(tmp_path, f"data: {{heldout: {text}}}\n")
        assert config.data.heldout == value
        assert load(tmp_path, dump_config(config)) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sample.scheduler=ddim"], "sample.scheduler: ddim cannot sample .* flow schedule: use euler,"),
        (["sample.scheduler=ddpm"], "use euler_ancestral, which is the same for it"),
        (["sample.eta=0.5", "sample.scheduler=unipc"], r"eta = 0.5 is only for ddim and euler"),
        (["sample.start=0.6"], "start = 0.6 and start_from = None belong together"),
        (["sample.start_from=caches/x"], "belong together"),
        (
            ["sample.guidance_form=cfg++", "sample.scheduler=heun"],
            "cfg[+][+] does not work with scheduler heun: use ddim",
        ),
        (
            ["sample.guidance_form=cfg_zero", "sample.guide=runs/x"],
            "sample: guide does not work with guidance_form cfg_zero",
        ),
        (["sample.guidance_form=apg", "sample.guidance_rescale=0.5"], "guidance_rescale does not work with .* apg"),
        (["sample.guidance_interval=[3, 0.2]"], r"guidance_interval = \[3, 0.2\]: give the lower"),
        (["sample.guidance_interval=[-1, 2]"], "sample.guidance_interval.0 = -1"),
        (["sample.steps=-3"], "sample.steps = -3"),
        ([*DISCRETE, "sample.shift=2"], "sample.shift = 2 is only for schedule flow"),
        ([*DISCRETE, "sample.guidance_form=cfg_zero"], "cfg_zero is only for models trained on the flow schedule"),
        ([*DISCRETE, "sample.steps=1001"], "sample.steps = 1001: .* linear schedule takes at most 1000 steps"),
        (
            [*DISCRETE, "sample.start=0.5", "sample.start_from=x", "sample.steps=501"],
            "sample.steps = 501: .* at most 500 steps",
        ),
    ],
)
def test_samplers_and_guidance_that_do_not_fit_are_refused_in_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_config(SOLIDS, overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim", "euler", "euler_ancestral", "heun", "dpm++", "unipc"])
def test_every_sampler_draws_from_every_schedule_and_prediction_but_ddpm_and_ddim_from_flow(scheduler: str) -> None:
    for prediction in ("epsilon", "x0", "v"):
        overrides = ["noise.schedule=cosine", f"noise.prediction={prediction}", f"sample.scheduler={scheduler}"]
        assert load_config(SOLIDS, overrides).sample.scheduler == scheduler
    if scheduler not in ("ddpm", "ddim"):
        assert load_config(SOLIDS, [f"sample.scheduler={scheduler}"]).sample.scheduler == scheduler


def test_classes_with_a_guidance_of_their_own_are_named_as_text() -> None:
    config = load_config(SOLIDS, ["sample.guidance_by_class={no: 3, 007: 1.5, cat: 0}"])
    assert config.sample.guidance_by_class == {"no": 3.0, "007": 1.5, "cat": 0.0}


def test_the_samplers_of_a_config_are_those_of_the_pipeline() -> None:
    assert get_args(Sample.model_fields["scheduler"].annotation) == SAMPLERS
