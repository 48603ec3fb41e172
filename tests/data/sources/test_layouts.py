"""The ways in which people lay out images in folders and zip files, and what is said of them."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from data.sources.base import NO_CLASS
from pipeline.config import Cache, Config, Data, check_outputs
from pipeline.config_file import dump_config
from tests.helpers.pictures import PICTURES, REDS, opened, picture, reds, write_folder, write_tar, write_zip
from tests.helpers.world import run_stage, tree


def inside(prefix: str, pictures: dict[str, bytes] = PICTURES) -> dict[str, bytes]:
    return {f"{prefix}/{key}": payload for key, payload in pictures.items()}


@pytest.mark.parametrize("prefix", ["pets", "a/b", "train"])
def test_one_top_folder_is_entered_which_is_said(tmp_path: Path, prefix: str, spread: Callable[[Path], str]) -> None:
    contents = {**inside(prefix), f"{prefix}/classes.txt": b"dog\ncat\n", "README.md": b""}
    images = opened(spread(write_folder(tmp_path / "images", contents)))
    assert images.classes == ("dog", "cat")
    assert reds(images) == REDS
    top = prefix.split("/")[0]
    assert images.notes[0] == f"all images are in {top}: its folders are the classes"


def test_a_folder_that_is_the_only_class_is_not_entered(tmp_path: Path) -> None:
    pictures = {"cat/1.png": picture(1), "cat/old/2.png": picture(2)}
    assert opened(write_folder(tmp_path, pictures)).classes == ("cat",)


def test_a_list_of_classes_keeps_the_top_folder_a_class(tmp_path: Path) -> None:
    contents = {"cat/a/1.png": picture(1), "cat/b/2.png": picture(2), "classes.txt": b"cat\ndog\n"}
    assert reds(opened(write_folder(tmp_path, contents))) == [("cat", 1), ("cat", 2)]


@pytest.mark.parametrize(
    "parts", [("train", "val"), ("Train", "TEST"), ("train2017", "val2017"), ("train_images", "test_set", "dev")]
)
@pytest.mark.parametrize("prefix", ["", "pets/"])
def test_parts_of_a_data_set_are_not_taken_for_classes(tmp_path: Path, parts: tuple[str, ...], prefix: str) -> None:
    for part in parts:
        write_folder(tmp_path / prefix / part, PICTURES)
    with pytest.raises(
        ValueError, match=rf"look like splits of a data set.*data\.source={tmp_path}/{prefix}{parts[0]};"
    ):
        opened(tmp_path)
    assert reds(opened(tmp_path / prefix / parts[0])) == REDS


def test_parts_in_a_zip_file_are_read_by_the_url_that_is_suggested(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "pets.zip", inside("train") | inside("test"))
    with pytest.raises(ValueError, match=r"data\.source=(\S+);") as caught:
        opened(path)
    url = str(caught.value).split("data.source=")[1].split(";")[0]
    assert reds(opened(url)) == REDS


def test_parts_without_classes_are_refused_too(tmp_path: Path) -> None:
    write_folder(tmp_path, inside("train") | {"test/1.png": picture(1)})
    with pytest.raises(ValueError, match="test, train look like splits"):
        opened(tmp_path)


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    pictures = {"train/1.png": picture(1), "bus/1.png": picture(2), "car/1.png": picture(3)}
    assert opened(write_folder(tmp_path / "a", pictures)).classes == ("bus", "car", "train")
    named = {**inside("train"), **inside("val"), "classes.txt": b"train\nval\n"}
    assert opened(write_folder(tmp_path / "b", named)).classes == ("train", "val")


def test_images_in_one_flat_folder_are_one_class_which_is_said(tmp_path: Path, spread: Callable[[Path], str]) -> None:
    contents = {"1.png": picture(1), "2.png": picture(2), "notes.txt": b"", "classes.txt": b"cat\ndog\n"}
    images = opened(spread(write_folder(tmp_path / "images", contents)))
    assert reds(images) == [("images", 1), ("images", 2)]
    assert images.notes == [
        "skipped: 1 .txt (such as notes.txt)",
        "no image has a class: all get one class, images, for an unconditional model",
    ]


def test_images_beside_class_folders_have_no_class_which_is_said(root: Path, spread: Callable[[Path], str]) -> None:
    write_folder(root, {"top.png": picture(9)})
    images = opened(spread(root))
    assert images.classes == ("cat", "dog")
    assert images.labels[list(images.keys).index("top.png")] == NO_CLASS
    assert images.notes == ["1 image has no class (such as top.png): they train as unlabelled images"]
    before = images.fingerprint()
    (root / "top.png").rename(root / "cat" / "top.png")
    assert opened(root).fingerprint() != before


def test_images_are_told_by_their_contents_where_the_suffix_says_nothing(
    root: Path, spread: Callable[[Path], str]
) -> None:
    named = {"cat/0": picture(1), "dog/photo.jpg_large": picture(2, ".jpg"), "fish/a.b": picture(3, ".webp")}
    images = opened(spread(write_folder(root, named)))
    assert len(images.keys) == 8
    assert images.classes == ("cat", "dog", "fish")
    assert not images.load(range(8)).failures
    assert images.notes == []


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".avif", ".apng", ".jp2", ".qoi", ".pbm"])
def test_formats_that_pillow_reads_safely_are_images(root: Path, suffix: str) -> None:
    write_folder(root, {f"bird/1{suffix}": picture(50, suffix)})
    images = opened(root)
    assert images.classes == ("bird", "cat", "dog")
    assert not images.load(range(6)).failures


def test_a_folder_of_which_nothing_is_read_is_no_class_and_said(root: Path) -> None:
    write_folder(root, {"bird/1.heic": b"\0\0\0\x18ftypheic", "bird/2.heic": b"\0\0\0\x18ftypheic"})
    images = opened(root)
    assert images.classes == ("cat", "dog")
    assert images.notes == ["skipped: 2 .heic (such as bird/1.heic), 1 without images (folders) (such as bird)"]


def test_archives_beside_class_folders_are_passed_over_and_counted(root: Path) -> None:
    write_tar(root / "images.tar", {"1.png": picture(1)})
    write_folder(
        root, {"metadata.parquet": b"PAR1", "data/1.png": picture(1), "data/x.parquet": b"PAR1", "a.zip": b"PK"}
    )
    images = opened(root)
    assert images.classes == ("cat", "data", "dog")
    expected = "skipped: 2 .parquet (such as data/x.parquet), 1 .tar (such as images.tar), 1 .zip (such as a.zip)"
    assert sorted(images.notes[0].removeprefix("skipped: ").split(", ")) == sorted(
        expected.removeprefix("skipped: ").split(", ")
    )


def test_images_without_classes_beside_archives_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "1.tar", {"1.png": picture(1), "1.cls": b"0"})
    write_folder(tmp_path, {"preview.png": picture(2)})
    with pytest.raises(ValueError, match=rf"images \(such as preview\.png\) and archives .*{tmp_path}/\*\.tar"):
        opened(tmp_path)
    assert reds(opened(tmp_path / "*.tar")) == [("0", 1)]


def test_outputs_among_the_images_are_refused_before_anything_is_written(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root.parent)
    before = tree(root)
    config = Config(data=Data(source=str(root)), cache=Cache(path=Path("elsewhere")))
    check_outputs(config, Path("runs/a"))
    for run, cache in (("images/runs/a", "elsewhere"), ("images", "elsewhere"), ("runs/a", "images/cat/../cache")):
        inside = config.changed(cache=Cache(path=Path(cache)))
        with pytest.raises(ValueError, match=r"(--run|cache\.path) = images.* inside data\.source"):
            check_outputs(inside, Path(run))
    (root.parent / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    result = run_stage("encode", root.parent / "config.yaml", root / "run")
    assert result.exit_code == 2
    assert "--run = " in result.stderr
    assert tree(root) == before


def test_two_members_of_one_name_in_a_zip_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "1.zip"
    with zipfile.ZipFile(path, "w") as archive, warnings.catch_warnings(action="ignore"):
        for red in (1, 2):
            archive.writestr("cat/1.png", picture(red))
    with pytest.raises(ValueError, match=r"1\.zip: two members are called cat/1\.png"):
        opened(path)


def test_folders_that_are_written_with_backslashes_are_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "1.zip", {"cat\\1.png": picture(1), "dog\\1.png": picture(2)})
    with pytest.raises(ValueError, match=r"1\.zip: its paths have \\"):
        opened(path)
