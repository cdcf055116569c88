from __future__ import annotations

import numpy as np

from ldm_vae.codec.contexts import check_trees
from ldm_vae.codec.fit_contexts import fit_contexts
from ldm_vae.codec.fit_trees import MAX_LEAVES, grow_tree
from ldm_vae.codec.loops import NUM_FEATURES

COUNT = 20_000


def noise(rng: np.random.Generator) -> np.ndarray:
    return rng.integers(-20, 20, size=(COUNT, NUM_FEATURES)).astype(np.int32)


def every_eighth() -> np.ndarray:
    return np.arange(COUNT) % 8 == 7


def test_a_tree_asks_for_what_decides_the_tokens() -> None:
    """Feature 4 above 7 makes them larger, and below that feature 2 above -3 does."""
    rng = np.random.default_rng(0)
    features = noise(rng)
    mean = np.where(features[:, 4] > 7, 9.0, np.where(features[:, 2] > -3, 3.0, 0.5))
    tokens = np.minimum(rng.poisson(mean), 52).astype(np.uint8)
    nodes, counts = grow_tree(features, tokens, every_eighth())
    assert nodes.tolist() == [[4, 7, 4], [2, -3, 3], [-1, 0, 0], [-1, 1, 0], [-1, 2, 0]]
    assert counts.sum(axis=1).tolist() == [int((mean == m).sum()) for m in (0.5, 3.0, 9.0)]
    assert counts.sum(axis=0).tolist() == np.bincount(tokens, minlength=53).tolist()


def test_splits_that_held_out_symbols_do_not_confirm_are_taken_back() -> None:
    """What is grown on has a pattern that what is held out has not."""
    rng = np.random.default_rng(1)
    features, held = noise(rng), every_eighth()
    tokens = np.where(held, rng.integers(4, size=COUNT), np.where(features[:, 0] > 0, 3, 0)).astype(np.uint8)
    assert len(grow_tree(features, tokens, np.zeros(COUNT, bool))[0]) > 1
    nodes, _ = grow_tree(features, tokens, held)
    assert nodes.tolist() == [[-1, 0, 0]]


def test_what_features_do_not_say_grows_no_tree() -> None:
    rng = np.random.default_rng(2)
    tokens = rng.integers(10, size=COUNT).astype(np.uint8)
    nodes, _ = grow_tree(np.zeros((COUNT, NUM_FEATURES), np.int32), tokens, every_eighth())
    assert nodes.tolist() == [[-1, 0, 0]]


def test_trees_are_bounded_and_can_be_walked() -> None:
    rng = np.random.default_rng(3)
    features = np.sort(rng.integers(2000, size=(COUNT, NUM_FEATURES)), axis=0).astype(np.int32)
    tokens = (features[:, 0] // 40 % 50).astype(np.uint8)  # fifty levels along one feature
    nodes, counts = grow_tree(features, tokens, every_eighth())
    assert 20 <= len(counts) <= MAX_LEAVES
    check_trees(np.zeros(1, np.int32), nodes, num_tables=len(counts))


def test_the_same_symbols_give_the_same_contexts() -> None:
    """Whatever order the threads end in."""
    volumes = [np.random.default_rng(i).poisson(2, size=(4, 40, 40)) for i in range(9)]
    first, second = (fit_contexts(volumes) for _ in range(2))
    for name in ("taps", "weights", "roots", "nodes", "frequencies"):
        assert np.array_equal(getattr(first, name), getattr(second, name))
