"""The objective, the average of the weights, checkpoints, and runs that are interrupted."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data.manifest import Manifest
from pipeline.checkpoint import checkpoint_folders, load_training_state, newest_checkpoint, save_checkpoint
from pipeline.ema import Ema
from pipeline.noise import NoiseProcess
from pipeline.objective import Draws, Normalization, coordinate_seed, diffusion_loss, draw_latents, lr_at
from pipeline.unet import LatentUNet
from stages.config import Config, load_config
from stages.train import Trainer, _decay_groups, build_model, train
from tests.small_world import World, make_vae, run_stage, succeed, tree
from tests.test_unet import build, inputs, scramble, scrambled

FLOW = NoiseProcess("flow", "flow")
CPU = torch.device("cpu")


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draws(count: int = 8, *, seed: int = 0, step: int = 0, views: int = 2, label_dropout: float = 0.1) -> Draws:
    return Draws.at(
        FLOW, seed=seed, step=step, shape=(count, 4, 4, 4), views=views, label_dropout=label_dropout, device=CPU
    )


def columns(drawn: Draws) -> list[Tensor]:
    return [drawn.views, drawn.posterior, drawn.times, drawn.noise, drawn.dropped]


# The objective.


def test_normalised_latents_have_zero_mean_and_unit_variance_and_come_back() -> None:
    latents = normals(64, 2, 4, 4) * torch.tensor([3.0, 0.2])[:, None, None] + torch.tensor([-5.0, 1.0])[:, None, None]
    mean, std = (f(latents, dim=(0, 2, 3)) for f in (torch.mean, lambda x, dim: x.std(dim, correction=0)))
    normalization = Normalization(tuple(mean.tolist()), tuple(std.tolist()))
    normal = normalization.normalize(latents)
    assert torch.allclose(normal.mean(dim=(0, 2, 3)), torch.zeros(2), atol=1e-4)
    assert torch.allclose(normal.var(dim=(0, 2, 3), correction=0), torch.ones(2), atol=1e-4)
    assert torch.allclose(normalization.denormalize(normal), latents, atol=1e-5)


def test_draws_are_a_function_of_seed_and_step() -> None:
    assert all(torch.equal(a, b) for a, b in zip(columns(draws()), columns(draws()), strict=True))
    for other in (draws(seed=1), draws(step=1), draws(seed=-1, step=1)):
        assert not torch.equal(other.noise, draws().noise)
        assert not torch.equal(other.times, draws().times)
    assert not torch.equal(draws().noise, draws().posterior)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_parts_of_the_processes_are_the_whole(processes: int) -> None:
    size = 8 // processes
    parts = [columns(draws().part(slice(i * size, (i + 1) * size))) for i in range(processes)]
    assert all(
        torch.equal(torch.cat(part), all_of)
        for part, all_of in zip(zip(*parts, strict=True), columns(draws()), strict=True)
    )


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_as_many_labels_are_dropped_as_asked_for(share: float) -> None:
    dropped = torch.cat([draws(1000, step=step, label_dropout=share).dropped for step in range(4)])
    assert dropped.float().mean().item() == pytest.approx(share, abs=0.02 if 0 < share < 1 else 0)


def test_the_views_are_drawn_alike_often() -> None:
    views = torch.cat([draws(1000, step=step).views for step in range(4)])
    assert views.float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert not draws(views=1).views.any()


def test_coordinates_that_look_alike_have_seeds_of_their_own() -> None:
    coordinates: list[tuple[int | str, ...]] = [(1, 23), (12, 3), (3, 12), ("1", 23), ("train", 1, 23), (0,), (1,)]
    seeds = [coordinate_seed(*each) for each in coordinates]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_latent_is_drawn_from_the_posterior_of_the_drawn_view() -> None:
    moments = torch.zeros(4000, 2, 8, 4, 4)
    moments[:, 0, :4], moments[:, 0, 4:] = -3, 0.5
    moments[:, 1, :4], moments[:, 1, 4:] = 5, 2.0
    drawn = draws(4000)
    latents = draw_latents(moments.half(), drawn, channels=4)
    assert latents.dtype == torch.float32
    for view, mean, std in ((0, -3, 0.5), (1, 5, 2.0)):
        chosen = latents[drawn.views == view]
        assert chosen.mean().item() == pytest.approx(mean, abs=0.02)
        assert chosen.std().item() == pytest.approx(std, rel=0.01)


def test_a_cache_of_means_gives_the_means() -> None:
    moments = normals(8, 2, 4, 4, 4)
    drawn = draws()
    assert torch.equal(draw_latents(moments, drawn, channels=4), moments[torch.arange(8), drawn.views])


def test_the_loss_is_the_squared_error_and_dropped_labels_are_the_null_class() -> None:
    latents, labels, drawn = normals(8, 4, 4, 4, seed=1), torch.arange(8) % 3, draws(label_dropout=0.5)
    asked: list[tuple[Tensor, ...]] = []
    model = build()  # says zero
    model.register_forward_pre_hook(lambda _, arguments: asked.append(arguments))
    loss = diffusion_loss(model, FLOW, latents, labels, drawn, model.null_class)
    x, times, classes = asked[0]
    assert loss.item() == pytest.approx((drawn.noise - latents).square().mean().item(), rel=1e-5)
    assert torch.allclose(x, latents + (drawn.times / 1000)[:, None, None, None] * (drawn.noise - latents), atol=1e-5)
    assert torch.equal(times, drawn.times)
    assert drawn.dropped.any()
    assert torch.equal(classes == 3, drawn.dropped)
    assert torch.equal(classes[~drawn.dropped], labels[~drawn.dropped])


def test_the_learning_rate_rises_stays_and_falls_to_zero() -> None:
    rates = [lr_at(i, peak=0.5, images=1000, warmup=100, decay=0.4) for i in range(1001)]
    assert 0 < rates[0] <= 0.5 / 100
    assert rates[99] == rates[600] == 0.5
    assert set(rates[99:601]) == {0.5}
    assert rates[800] == pytest.approx(0.25)
    assert rates[1000] == 0
    assert max(abs(a - b) for a, b in itertools.pairwise(rates)) <= 0.5 / 100 + 1e-9


def test_without_warmup_and_decay_the_learning_rate_is_constant() -> None:
    assert {lr_at(i, peak=0.5, images=10, warmup=0, decay=0.0) for i in range(11)} == {0.5}


# The average of the weights.


def test_the_average_is_a_weighted_sum_of_the_weights_so_far() -> None:
    model = nn.Linear(3, 2)
    ema = Ema(model, halflife=40)
    expected = model.weight.detach().clone()
    for step in range(1, 6):
        scramble(model, seed=step)
        ema.update(model, images_seen=1000 + 8 * step, batch_size=8)
        keep = 0.5 ** (8 / 40)
        expected = keep * expected + (1 - keep) * model.weight.detach()
    assert torch.allclose(ema.state_dict()["weight"], expected, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_after_its_halflife_in_images_half_is_forgotten(batch_size: int) -> None:
    model = nn.Linear(3, 2)
    nn.init.ones_(model.weight)
    ema = Ema(model, halflife=64)
    nn.init.zeros_(model.weight)
    for seen in range(batch_size, 64 + 1, batch_size):
        ema.update(model, images_seen=10_000 + seen, batch_size=batch_size)
    assert torch.allclose(ema.state_dict()["weight"], torch.tensor(0.5), atol=1e-5)


def test_early_in_a_run_the_average_forgets_faster() -> None:
    model = nn.Linear(3, 2)
    nn.init.ones_(model.weight)
    ema = Ema(model, halflife=10_000)
    nn.init.zeros_(model.weight)
    ema.update(model, images_seen=100, batch_size=10)  # halflife 10
    assert torch.allclose(ema.state_dict()["weight"], torch.tensor(0.5), atol=1e-5)


def test_the_average_does_not_move_the_model() -> None:
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    ema = Ema(model, halflife=8)
    scramble(model)
    after = model.weight.detach().clone()
    ema.update(model, images_seen=8, batch_size=8)
    assert torch.equal(model.weight, after)
    assert not torch.equal(after, before)


# Checkpoints.


def trained(steps: int = 2) -> tuple[LatentUNet, Ema, torch.optim.Optimizer]:
    """A tiny model after some steps, its average and its optimizer."""
    model = scrambled()
    ema = Ema(model, halflife=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        model(*inputs(seed=step)).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model, images_seen=3 * (step + 1), batch_size=3)
    return model, ema, optimizer


def save(run: Path, images_seen: int, *, keep: int = 9) -> Path:
    model, ema, optimizer = trained()
    state = {"images_seen": images_seen, "step": images_seen // 3}
    return save_checkpoint(run, model=model, ema=ema, optimizer=optimizer, state=state, keep=keep)


def test_a_checkpoint_brings_back_weights_average_and_optimizer(tmp_path: Path) -> None:
    model, ema, optimizer = trained()
    save_checkpoint(tmp_path, model=model, ema=ema, optimizer=optimizer, state={"images_seen": 6}, keep=1)
    checkpoint, passed_over = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.images_seen, passed_over) == (6, [])
    again = build(seed=1)
    its_ema, its_optimizer = Ema(again, halflife=16), torch.optim.AdamW(again.parameters(), lr=1e-2)
    load_training_state(checkpoint, again, its_ema, its_optimizer)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
        assert torch.equal(its_ema.state_dict()[name], ema.state_dict()[name])
    ours, theirs = optimizer.state_dict()["state"], its_optimizer.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    for i, state in ours.items():
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"} == theirs[i].keys()
        assert all(torch.equal(value, theirs[i][key]) for key, value in state.items())


def test_the_average_is_a_model_folder_of_its_own(tmp_path: Path) -> None:
    _, ema, _ = trained()
    model = LatentUNet.from_pretrained(save(tmp_path, 6) / "ema")
    assert all(torch.equal(value, ema.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_checkpoint_is_safetensors_and_json_alone(tmp_path: Path) -> None:
    files = tree(save(tmp_path, 6))
    assert {Path(name).suffix for name in files} == {".safetensors", ".json"}
    hashed = json.loads(files["state.json"])["sha256"]
    assert hashed.keys() == files.keys() - {"state.json"}


def test_the_newest_checkpoints_by_images_seen_are_kept(tmp_path: Path) -> None:
    for images_seen in (9, 99, 100, 1_000_000_000, 1_000_000_001):
        save(tmp_path, images_seen, keep=2)
    assert [int(folder.name) for folder in checkpoint_folders(tmp_path)] == [1_000_000_000, 1_000_000_001]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1000000000", "1000000001"]


def flip_a_byte(folder: Path) -> None:
    file = folder / "optimizer.safetensors"
    payload = bytearray(file.read_bytes())
    payload[-1] ^= 1
    file.write_bytes(payload)


def truncate(folder: Path) -> None:
    file = folder / "ema" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def lose_the_state(folder: Path) -> None:
    (folder / "state.json").unlink()


def lose_the_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def empty_the_state(folder: Path) -> None:
    (folder / "state.json").write_text("[]", encoding="utf-8")


DAMAGE = [flip_a_byte, truncate, lose_the_state, lose_the_weights, empty_the_state]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_with_a_line(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    save(tmp_path, 6)
    damage(save(tmp_path, 12))
    checkpoint, passed_over = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.images_seen == 6
    assert len(passed_over) == 1
    assert str(tmp_path / "checkpoints" / "000000012") in passed_over[0]


def test_where_every_checkpoint_is_damaged_there_is_none(tmp_path: Path) -> None:
    lose_the_state(save(tmp_path, 6))
    checkpoint, passed_over = newest_checkpoint(tmp_path)
    assert checkpoint is None
    assert len(passed_over) == 1


def test_saving_never_deletes_what_it_has_just_saved(tmp_path: Path) -> None:
    save(tmp_path, 6)
    lose_the_state(save(tmp_path, 12))
    save(tmp_path, 9, keep=1)  # the run went on from 6, with another checkpoint_every
    checkpoint, _ = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.images_seen == 9


def test_an_unfinished_checkpoint_is_never_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 6)
    monkeypatch.setattr("pipeline.checkpoint.publish_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 12)
    checkpoint, passed_over = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert (checkpoint.images_seen, passed_over) == (6, [])


# Runs that are interrupted.


def interrupt(monkeypatch: pytest.MonkeyPatch, config: Config, run: Path, *, at_step: int) -> None:
    """Train until step number `at_step` would begin."""
    update = Trainer._update

    def failing(self: Trainer) -> tuple[Tensor, Tensor]:
        if self.step == at_step:
            raise KeyboardInterrupt
        return update(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_update", failing)
        with pytest.raises(KeyboardInterrupt):
            train(config, run)


def log_of(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


@pytest.fixture
def config(world: World) -> Config:
    config = load_config(world.config)
    assert config.model.dropout > 0  # the one draw that takes torch's global generator
    return config


@pytest.mark.parametrize("at_step", [2, 7, 11])  # before any checkpoint; after a log line; in the last steps
def test_a_run_that_was_interrupted_ends_as_one_that_was_not(
    world: World, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_step: int
) -> None:
    run = tmp_path / "run"
    interrupt(monkeypatch, config, run, at_step=at_step)
    torch.manual_seed(99)  # a new process has another state
    train(config, run)
    assert tree(run / "checkpoints") == tree(world.run / "checkpoints")
    assert tree(run / "previews") == tree(world.run / "previews")
    assert log_of(run) == log_of(world.run)
    assert len(log_of(run)) == 6


@pytest.mark.parametrize("damage", [flip_a_byte, lose_the_state])
def test_a_run_goes_on_from_an_older_checkpoint_where_the_newest_is_damaged(
    world: World,
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
) -> None:
    run = tmp_path / "run"
    interrupt(monkeypatch, config, run, at_step=9)
    damage(run / "checkpoints" / "000000032")
    capsys.readouterr()
    train(config, run)
    printed = capsys.readouterr().out
    assert f"train: passed over {run / 'checkpoints' / '000000032'}" in printed
    assert "at 16 images" in printed
    assert tree(run / "checkpoints") == tree(world.run / "checkpoints")
    assert log_of(run) == log_of(world.run)


def test_a_run_without_dropout_can_be_interrupted_too(
    world: World, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = config.model_copy(update={"model": config.model.model_copy(update={"dropout": 0.0})})
    train(plain, tmp_path / "straight")
    interrupt(monkeypatch, plain, tmp_path / "broken", at_step=6)
    train(plain, tmp_path / "broken")
    straight = tree(tmp_path / "straight" / "checkpoints")
    assert straight == tree(tmp_path / "broken" / "checkpoints")
    assert straight != tree(world.run / "checkpoints")


def test_the_seed_changes_the_run(world: World, config: Config, tmp_path: Path) -> None:
    other = config.model_copy(update={"train": config.train.model_copy(update={"seed": 1, "images": 8})})
    same = config.model_copy(update={"train": config.train.model_copy(update={"images": 8})})
    train(other, tmp_path / "other")
    train(same, tmp_path / "same")
    assert log_of(tmp_path / "other")[0]["loss"] != log_of(tmp_path / "same")[0]["loss"]


def test_a_longer_run_continues_a_finished_one(world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    succeed("train", world.config, run, "train.images=16")
    assert "continuing" in succeed("train", world.config, run, "train.images=24")
    assert [line["images_seen"] for line in log_of(run)] == [8, 16, 24]


def test_a_log_line_that_a_crash_cut_off_is_dropped(world: World, tmp_path: Path) -> None:
    run = tmp_path / "run"
    succeed("train", world.config, run, "train.images=16")
    with open(run / "log.jsonl", "a", encoding="utf-8") as log:
        log.write('{"step": 5, "lo')
    succeed("train", world.config, run, "train.images=24")
    assert [line["images_seen"] for line in log_of(run)] == [8, 16, 24]


def change_the_vae(root: Path) -> tuple[str, ...]:
    make_vae(root / "another", seed=1)
    return (f"vae.source={root / 'another'}", f"cache.path={root / 'cache'}")


def change_the_size(root: Path) -> tuple[str, ...]:
    return ("data.image_size=32", "model.bottleneck=resnet", f"cache.path={root / 'cache'}")


@pytest.mark.parametrize("change", [change_the_vae, change_the_size])
def test_a_run_does_not_go_on_with_latents_of_another_kind(
    world: World, tmp_path: Path, change: Callable[[Path], tuple[str, ...]]
) -> None:
    """The pictures are the same, so their fingerprint is; the latents are not."""
    run = tmp_path / "run"
    succeed("train", world.config, run, "train.images=16", "model.bottleneck=resnet")
    before = tree(run / "checkpoints")
    overrides = ("model.bottleneck=resnet", *change(tmp_path))
    succeed("encode", world.config, run, *overrides)
    result = run_stage("train", world.config, run, *overrides)
    assert result.exit_code == 2, result.output
    assert tree(run / "checkpoints") == before


def test_every_weight_decays_but_biases_norms_positions_and_embeddings(config: Config, world: World) -> None:
    model = build_model(config, Manifest.load(world.cache))
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, rest = ({names[id(p)] for p in group["params"]} for group in _decay_groups(model, config))
    assert decayed | rest == set(names.values())
    assert not decayed & rest
    assert {"conv_in.weight", "time.0.weight"} <= decayed
    assert {"conv_in.bias", "classes.weight", "middle.positions", "norm_out.weight"} <= rest
