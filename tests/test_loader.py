from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from data import loader
from data.cache import LatentCache
from data.loader import LatentLoader, batch_indices, epoch_order

CPU = torch.device("cpu")


def make_loader(cache: LatentCache, batch_size: int = 12, rank: int = 0, world_size: int = 1) -> LatentLoader:
    return LatentLoader(cache, seed=3, batch_size=batch_size, rank=rank, world_size=world_size, device=CPU)


@pytest.mark.parametrize("count", [1, 2, 73])
def test_an_epoch_is_a_permutation(count: int) -> None:
    for epoch in range(5):
        np.testing.assert_array_equal(np.sort(epoch_order(count, 0, epoch)), np.arange(count))


def test_orders_of_other_epochs_and_seeds_differ() -> None:
    orders = {epoch_order(73, seed, epoch).tobytes() for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_an_order_is_a_function_of_its_arguments() -> None:
    first = epoch_order(73, 1, 2).copy()
    epoch_order.cache_clear()
    np.testing.assert_array_equal(epoch_order(73, 1, 2), first)


@pytest.mark.parametrize("batch_size", [1, 7, 73, 100, 200])
def test_batches_in_a_row_cover_every_image_once_an_epoch(batch_size: int) -> None:
    count, epochs = 73, 6
    steps = range(-(-count * epochs // batch_size))
    stream = np.concatenate([batch_indices(count, seed=0, step=step, batch_size=batch_size) for step in steps])
    assert len(stream) == len(steps) * batch_size
    for epoch in range(epochs):
        part = stream[epoch * count : (epoch + 1) * count]
        np.testing.assert_array_equal(np.sort(part), np.arange(count))


def test_a_batch_does_not_depend_on_the_batches_before_it() -> None:
    in_turn = [batch_indices(73, seed=0, step=step, batch_size=10) for step in range(30)]
    for step in (29, 0, 14, 7):
        np.testing.assert_array_equal(batch_indices(73, seed=0, step=step, batch_size=10), in_turn[step])


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_parts_of_all_processes_make_up_the_batch_of_one(cache: LatentCache, world_size: int) -> None:
    alone = make_loader(cache)
    ranks = [make_loader(cache, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in (0, 5, 6):  # step 6 goes over from the first epoch of 73 to the second
        parts, whole = [rank.batch(step) for rank in ranks], alone.batch(step)
        assert {len(part.indices) for part in parts} == {12 // world_size}
        np.testing.assert_array_equal(np.concatenate([part.indices for part in parts]), whole.indices)
        assert torch.equal(torch.cat([part.moments for part in parts]), whole.moments)
        assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)


def test_a_batch_that_processes_cannot_share_equally_is_refused(cache: LatentCache) -> None:
    with pytest.raises(ValueError, match=r"train\.batch_size = 10 .* 4 processes"):
        make_loader(cache, batch_size=10, world_size=4)


@pytest.mark.parametrize("resident", [True, False])
def test_a_batch_holds_what_the_cache_holds(
    cache: LatentCache, moments: NDArray[np.float32], monkeypatch: pytest.MonkeyPatch, resident: bool
) -> None:
    monkeypatch.setattr(loader, "_free_memory", lambda device: 2**40 if resident else 0)
    batches = make_loader(cache)
    assert batches.resident == resident
    for step in range(8):
        batch = batches.batch(step)
        rows = cache.rows[batch.indices]
        np.testing.assert_array_equal(batch.moments.numpy(), moments[rows].astype(np.float16))
        np.testing.assert_array_equal(batch.labels.numpy(), rows % 2)
        assert batch.moments.dtype == torch.float16
        assert batch.labels.dtype == torch.int64


def test_a_changed_batch_leaves_the_cache_as_it_is(cache: LatentCache) -> None:
    batches = make_loader(cache)
    first = batches.batch(0)
    copy = first.moments.clone()
    first.moments.zero_()
    first.indices[:] = 0
    again = batches.batch(0)
    assert torch.equal(again.moments, copy)
    assert len(set(again.indices.tolist())) == 12
