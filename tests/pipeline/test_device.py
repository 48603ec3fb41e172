"""Which device a stage takes, and when it says that it would be the wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import pipeline.device
from pipeline.device import bf16_is_faster, halving, pick_device
from tests.helpers.world import World, run_stage


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with an NVIDIA driver and a torch that sees no GPU."""
    file = tmp_path / "version"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  470.57\n", encoding="ascii")
    monkeypatch.setattr(pipeline.device, "_DRIVER", file)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    return file


@pytest.mark.parametrize(("cuda", "why"), [(None, "without CUDA"), ("13.0", "CUDA 13.0, for which the driver")])
def test_a_gpu_that_torch_does_not_see_is_not_left_idle_in_silence(
    driver: Path, monkeypatch: pytest.MonkeyPatch, cuda: str | None, why: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(ValueError, match=why) as error:
        pick_device()
    assert "ACCELERATE_USE_CPU=true" in str(error.value)
    assert "make setup TORCH=" in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"), [("ACCELERATE_USE_CPU", "true"), ("CUDA_VISIBLE_DEVICES", ""), ("CUDA_VISIBLE_DEVICES", "-1")]
)
def test_the_cpu_is_taken_where_it_is_asked_for(
    driver: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert pick_device().type == "cpu"


def test_every_stage_stops_before_it_begins_on_the_wrong_device(driver: Path, world: World, tmp_path: Path) -> None:
    for stage, more in (("encode", ("cache.path=" + str(tmp_path / "new"),)), ("train", ()), ("sample", ())):
        result = run_stage(stage, world.config, tmp_path / "run" if stage != "sample" else world.run, *more)
        assert result.exit_code == 2, result.output
        assert "sees no GPU" in result.output


@pytest.mark.parametrize(
    ("cpu", "instructions", "gains"),
    [
        ("AMD EPYC 9R14", {"avx512_bf16": True}, True),
        ("Intel Xeon", {"avx512_bf16": True, "amx_bf16": False}, False),
        ("Intel Xeon", {"avx512_bf16": True, "amx_bf16": True}, True),
        ("AMD EPYC 7R32", {}, False),
    ],
)
def test_bf16_is_for_processors_on_which_it_is_quicker(
    monkeypatch: pytest.MonkeyPatch, cpu: str, instructions: dict[str, bool], gains: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": cpu, **instructions})
    assert bf16_is_faster(torch.device("cpu")) == gains


class Gpu:
    """A call with room for `room` items."""

    def __init__(self, room: int) -> None:
        self.room = room

    def __call__(self, batch: range) -> list[int]:
        if len(batch) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return list(batch)


@pytest.mark.parametrize("count", [0, 1, 7, 16, 37])
@pytest.mark.parametrize("room", [1, 3, 5, 16, 100])
def test_batches_are_halved_until_they_fit_and_nothing_is_lost_or_done_twice(
    count: int, room: int, capsys: pytest.CaptureFixture[str]
) -> None:
    batches = list(halving(Gpu(room), range(count), 16, "decode"))
    assert [item for batch in batches for item in batch] == list(range(count))
    assert all(0 < len(batch) <= min(room, 16) for batch in batches)
    told = capsys.readouterr().out.splitlines()
    assert len(told) <= 4
    if count >= 16 > room:
        assert told[0] == "decode: out of memory with batches of 16: going on with 8"
    if room >= 16:
        assert not told


def test_an_item_that_does_not_fit_alone_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        list(halving(Gpu(0), range(3), 4, "sample"))
