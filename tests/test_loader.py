from __future__ import annotations

from typing import Any

import numpy as np
import psutil
import pytest
import torch
from numpy.typing import NDArray

from data import loader
from data.cache import LatentCache
from data.loader import LatentLoader, epoch_order, streamed_order

CPU = torch.device("cpu")
WAYS = ("resident", "memory", "mapped", "streamed")


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of 20 images: a small cache has several, and they go over the ends of epochs."""
    monkeypatch.setattr(loader, "WINDOW_ROWS", 20)


def make_loader(
    cache: LatentCache, batch_size: int = 12, rank: int = 0, world_size: int = 1, **more: Any
) -> LatentLoader:
    return LatentLoader(cache, seed=3, batch_size=batch_size, rank=rank, world_size=world_size, device=CPU, **more)


@pytest.mark.parametrize("count", [1, 2, 73])
def test_an_epoch_is_a_permutation(count: int) -> None:
    for epoch in range(5):
        np.testing.assert_array_equal(np.sort(epoch_order(count, 0, epoch)), np.arange(count))
        np.testing.assert_array_equal(np.sort(streamed_order(count, 0, epoch, 32, 20)), np.arange(count))


def test_orders_of_other_epochs_and_seeds_differ() -> None:
    for order in (epoch_order, lambda count, seed, epoch: streamed_order(count, seed, epoch, 32, 20)):
        orders = {order(73, seed, epoch).tobytes() for seed in range(4) for epoch in range(4)}
        assert len(orders) == 16


def test_an_order_is_a_function_of_its_arguments() -> None:
    first, streamed = epoch_order(73, 1, 2).copy(), streamed_order(73, 1, 2, 32, 20).copy()
    epoch_order.cache_clear()
    streamed_order.cache_clear()
    np.testing.assert_array_equal(epoch_order(73, 1, 2), first)
    np.testing.assert_array_equal(streamed_order(73, 1, 2, 32, 20), streamed)


def test_a_window_of_a_streamed_epoch_is_of_few_shards() -> None:
    """640 images in 20 shards of 32: a window of 20 images lies in two shards at most."""
    for start in range(0, 640, 20):
        window = streamed_order(640, 0, 0, 32, 20)[start : start + 20]
        assert len(np.unique(window // 32)) <= 2
        assert (window != np.sort(window)).any()


@pytest.mark.parametrize("access", ["mapped", "streamed"])
@pytest.mark.parametrize("batch_size", [1, 7, 73, 100, 200])
def test_batches_in_a_row_cover_every_image_once_an_epoch(cache: LatentCache, batch_size: int, access: str) -> None:
    batches, count, epochs = make_loader(cache, batch_size, access=access), 73, 6
    steps = range(-(-count * epochs // batch_size))
    stream = np.concatenate([batches.indices(step) for step in steps])
    assert len(stream) == len(steps) * batch_size
    for epoch in range(epochs):
        part = stream[epoch * count : (epoch + 1) * count]
        np.testing.assert_array_equal(np.sort(part), np.arange(count))


@pytest.mark.parametrize("access", WAYS)
def test_a_batch_does_not_depend_on_the_batches_before_it(cache: LatentCache, access: str) -> None:
    batches = make_loader(cache, access=access)
    in_turn = [batches.batch(step).moments for step in range(30)]
    for step in (29, 0, 14, 7):
        assert torch.equal(make_loader(cache, access=access).batch(step).moments, in_turn[step])
        assert torch.equal(batches.batch(step).moments, in_turn[step])


@pytest.mark.parametrize("access", WAYS)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_parts_of_all_processes_make_up_the_batch_of_one(cache: LatentCache, world_size: int, access: str) -> None:
    alone = make_loader(cache, access=access)
    ranks = [make_loader(cache, rank=rank, world_size=world_size, access=access) for rank in range(world_size)]
    for step in (0, 5, 6):  # step 6 goes over from the first epoch of 73 to the second
        parts, whole = [rank.batch(step) for rank in ranks], alone.batch(step)
        assert {len(part.indices) for part in parts} == {12 // world_size}
        np.testing.assert_array_equal(np.concatenate([part.indices for part in parts]), whole.indices)
        assert torch.equal(torch.cat([part.moments for part in parts]), whole.moments)
        assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)


def test_a_batch_that_processes_cannot_share_equally_is_refused(cache: LatentCache) -> None:
    with pytest.raises(ValueError, match=r"train\.batch_size = 10 .* 4 processes"):
        make_loader(cache, batch_size=10, world_size=4)


@pytest.mark.parametrize("access", WAYS)
def test_a_batch_holds_what_the_cache_holds(cache: LatentCache, moments: NDArray[np.float32], access: str) -> None:
    batches = make_loader(cache, access=access)
    for step in range(8):
        batch = batches.batch(step)
        rows = cache.rows[batch.indices]
        np.testing.assert_array_equal(batch.moments.numpy(), moments[rows].astype(np.float16))
        np.testing.assert_array_equal(batch.labels.numpy(), rows % 2)
        assert batch.moments.dtype == torch.float16
        assert batch.labels.dtype == torch.int64


@pytest.mark.parametrize("access", WAYS[:3])
def test_the_order_does_not_depend_on_where_latents_are_held(cache: LatentCache, access: str) -> None:
    expected = make_loader(cache, access="mapped")
    for step in range(8):
        np.testing.assert_array_equal(make_loader(cache, access=access).indices(step), expected.indices(step))


@pytest.mark.parametrize(
    ("available", "total", "access"),
    [(2**40, 2**40, "resident"), (0, 2**40, "mapped"), (0, 0, "streamed")],
)
def test_latents_are_held_where_there_is_room_and_it_is_said(
    cache: LatentCache, monkeypatch: pytest.MonkeyPatch, available: int, total: int, access: str
) -> None:
    memory = psutil.virtual_memory()._replace(available=available, total=total)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    batches = make_loader(cache)
    assert batches.access == access
    said = {"resident": "held on cpu", "mapped": "memory-mapped", "streamed": "shuffled by shard"}[access]
    assert said in batches.describe()


@pytest.mark.parametrize(
    ("streamed", "room", "access"),
    [(True, 2**40, "streamed"), (False, 0, "mapped"), (False, 2**40, "resident"), (None, 0, "streamed")],
)
def test_a_run_keeps_its_order_on_a_machine_with_other_memory(
    cache: LatentCache, monkeypatch: pytest.MonkeyPatch, streamed: bool | None, room: int, access: str
) -> None:
    memory = psutil.virtual_memory()._replace(available=room, total=room)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert make_loader(cache, streamed=streamed).access == access


def test_an_error_of_reading_ahead_is_raised_when_its_batch_is_asked_for(
    cache: LatentCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, read = make_loader(cache, access="mapped"), cache.read
    third = batches.indices(2)

    def fail(indices: NDArray[np.int64]) -> NDArray[np.floating]:
        if np.array_equal(indices, third):
            raise OSError("the disk is gone")
        return read(indices)

    monkeypatch.setattr(cache, "read", fail)
    batches.batch(0)
    batches.batch(1)  # reads ahead
    with pytest.raises(OSError, match="the disk is gone"):
        batches.batch(2)


@pytest.mark.parametrize("access", WAYS)
def test_a_changed_batch_leaves_the_cache_as_it_is(cache: LatentCache, access: str) -> None:
    batches = make_loader(cache, access=access)
    first = batches.batch(0)
    copy = first.moments.clone()
    first.moments.zero_()
    first.indices[:] = 0
    again = make_loader(cache, access=access).batch(0)
    assert torch.equal(again.moments, copy)
    assert len(set(again.indices.tolist())) == 12
