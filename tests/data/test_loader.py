from __future__ import annotations

import hashlib
import weakref
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from numpy.typing import NDArray

from data import loader
from data.cache.reader import LatentCache
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


@pytest.mark.parametrize(
    ("arguments", "order"),
    [
        ((1, 0, 0), [0]),
        ((12, 0, 0), [0, 7, 6, 1, 9, 3, 8, 10, 5, 2, 4, 11]),
        ((12, 0, 1), [1, 10, 11, 4, 2, 7, 0, 8, 9, 5, 3, 6]),
        ((12, 7, 0), [0, 1, 9, 3, 11, 5, 2, 6, 10, 7, 8, 4]),
        ((20, 2**62, 3), [11, 3, 0, 19, 1, 8, 4, 15, 5, 10, 16, 13, 9, 12, 17, 2, 6, 7, 14, 18]),
        ((12, 0, 0, 4, 12), [10, 4, 8, 11, 5, 0, 6, 7, 2, 9, 1, 3]),
        ((12, 0, 1, 4, 6), [2, 0, 4, 1, 3, 5, 7, 9, 6, 10, 8, 11]),
        ((20, 7, 2, 8, 5), [19, 17, 0, 16, 18, 2, 4, 3, 1, 5, 10, 8, 7, 9, 6, 15, 14, 13, 11, 12]),
    ],
)
def test_orders_stay_what_they_were(arguments: tuple[int, ...], order: list[int]) -> None:
    """numpy does not promise its permutations: with others, a run would go on with images that it has just seen."""
    function = epoch_order if len(arguments) == 3 else streamed_order
    assert function(*arguments).tolist() == order


def test_long_orders_stay_what_they_were() -> None:
    orders = epoch_order(100_000, 1, 2), streamed_order(100_000, 1, 2, 1024, 65_536)
    digests = [hashlib.sha256(order.astype("<i8").tobytes()).hexdigest()[:16] for order in orders]
    assert digests == ["4841afebb60542f5", "0810743a64878186"]


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


@pytest.mark.parametrize(
    ("limits", "expected"),
    [((65_536, 2**30), 73), ((20, 2**30), 20), ((65_536, 48 * 10), 10), ((65_536, 48 * 10 - 1), 9), ((65_536, 1), 1)],
)
def test_a_window_is_no_longer_than_an_epoch_and_bounded_in_rows_and_bytes(
    cache: LatentCache, monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], expected: int
) -> None:
    assert cache.manifest.row_bytes == 48
    monkeypatch.setattr(loader, "WINDOW_ROWS", limits[0])
    monkeypatch.setattr(loader, "WINDOW_BYTES", limits[1])
    for world_size in (1, 4):  # and the order does not depend on the number of processes, or on the machine
        batches = make_loader(cache, world_size=world_size, access="streamed")
        assert batches.window_rows == expected
        np.testing.assert_array_equal(batches.order(2), streamed_order(73, 3, 2, 32, expected))


@pytest.mark.parametrize(("batch_size", "world_size"), [(4, 1), (12, 1), (12, 4), (80, 2)])
def test_no_more_than_two_windows_are_held_at_once(
    cache: LatentCache, monkeypatch: pytest.MonkeyPatch, batch_size: int, world_size: int
) -> None:
    """One in use and one that is read ahead, and of each this process's share; a batch is the least that there is."""
    read, held = LatentLoader._read_window, weakref.WeakValueDictionary()
    limit = max(20, batch_size) // world_size

    def watched(self: LatentLoader, number: int) -> NDArray[np.floating]:
        assert len(held) <= 1
        held[number] = window = read(self, number)
        assert len(window) <= limit
        return window

    monkeypatch.setattr(LatentLoader, "_read_window", watched)
    batches = make_loader(cache, batch_size, world_size=world_size, access="streamed")
    used = [batches.batch(step) for step in range(40)]
    assert len({len(batch.moments) for batch in used}) == 1


def test_a_small_set_is_streamed_at_once(cache: LatentCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the limits as they are: before the first step no more than two epochs are read, and not as many rows as fit
    into a window."""
    monkeypatch.setattr(loader, "WINDOW_ROWS", 65_536)
    asked, read = [], cache.load

    def counted(indices: NDArray[np.int64]) -> NDArray[np.floating]:
        asked.append(len(indices) * cache.manifest.row_bytes)
        return read(indices)

    monkeypatch.setattr(cache, "load", counted)
    batches = make_loader(cache, access="streamed")
    batches.batch(0)
    batches._batches._thread.shutdown()
    batches._windows._thread.shutdown()
    assert 0 < sum(asked) <= 2 * batches.size


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


def test_processes_that_share_a_machine_map_the_cache_which_it_then_holds_once(cache: LatentCache) -> None:
    assert make_loader(cache).access == "resident"
    assert make_loader(cache, sharing=2).access == "mapped"


@pytest.mark.parametrize(("reserved", "access"), [(0, "resident"), (10**6, "memory")])
def test_a_gpu_holds_the_cache_where_the_model_has_room_beside_it(
    cache: LatentCache, monkeypatch: pytest.MonkeyPatch, reserved: int, access: str
) -> None:
    size = len(cache) * cache.manifest.row_bytes
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * size + 10**6, 2**40))
    assert loader._choose_access(size, torch.device("cuda"), 1, reserved, None) == access


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
