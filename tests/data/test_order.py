from __future__ import annotations

import numpy as np
import pytest

from ldm_vae.data.loader import MicroBatches
from ldm_vae.data.order import Stream, generator_at, index_at, noise_at, permute


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 100, 1499])
def test_each_sample_comes_exactly_once_an_epoch(size: int) -> None:
    for epoch in range(3):
        seen = [index_at(epoch * size + i, size=size, seed=5) for i in range(size)]
        assert sorted(seen) == list(range(size))


def test_epochs_and_seeds_have_different_orders() -> None:
    orders = {tuple(index_at(e * 50 + i, size=50, seed=s) for i in range(50)) for e in range(4) for s in range(4)}
    assert len(orders) == 16


def test_the_order_of_a_hundred_million_samples_needs_no_memory_and_has_no_pattern() -> None:
    size = 100_000_000
    offsets = [permute(i, size, key=9) for i in range(2000)]
    assert len(set(offsets)) == 2000
    assert abs(np.mean(offsets) / size - 0.5) < 0.03
    assert abs(np.corrcoef(offsets[:-1], offsets[1:])[0, 1]) < 0.1


def test_random_numbers_of_one_position_do_not_depend_on_its_batch() -> None:
    together = noise_at(3, [10, 11, 12], (4, 2, 2), Stream.POSTERIOR)
    alone = noise_at(3, [11], (4, 2, 2), Stream.POSTERIOR)
    assert np.array_equal(together[1], alone[0])
    assert not np.array_equal(alone[0], noise_at(3, [11], (4, 2, 2), Stream.CROP)[0])
    assert abs(noise_at(3, list(range(500)), (100,), Stream.POSTERIOR).std() - 1) < 0.01


def test_streams_of_neighbouring_positions_are_independent() -> None:
    draws = np.array([generator_at(0, p, Stream.CROP).random(50) for p in range(200)])
    correlation = np.corrcoef(draws)
    assert np.abs(correlation[~np.eye(200, dtype=bool)]).max() < 0.75
    assert abs(draws.mean() - 0.5) < 0.01


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)])
def test_a_global_batch_holds_the_same_positions_however_it_is_split(processes: int, accumulation: int) -> None:
    steps: dict[int, list[int]] = {}
    for rank in range(processes):
        order = MicroBatches(
            first_step=3, last_step=6, batch_size=8, rank=rank, num_processes=processes, accumulation=accumulation
        )
        micro_batches = list(order)
        assert len(micro_batches) == len(order) == 3 * accumulation
        for i, positions in enumerate(micro_batches):
            assert len(positions) == 8 // processes // accumulation
            steps.setdefault(3 + i // accumulation, []).extend(positions)
    assert {s: sorted(p) for s, p in steps.items()} == {s: list(range(8 * s, 8 * s + 8)) for s in (3, 4, 5)}
