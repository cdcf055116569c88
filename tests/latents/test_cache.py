"""Shards that are written once, checked, and read as the images would be."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ldm_vae.errors import DataError
from ldm_vae.latents.cache import LatentCache, Plan, begin, summarise, unfinished, write_index, write_shard
from ldm_vae.latents.scaling import as_stored

PLAN = Plan(
    vae="v", data="d", num_images=10, resolution=8, flip=True, latent_shape=(2, 3, 3), classes=("a", "b"), shard_size=4
)
BAD = {2, 3, 8, 9}


def moments_of(index: int) -> torch.Tensor:
    """(E, 2c, h, w)."""
    return torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(index))


def write(folder: Path, shard: int, bad: set[int] = BAD) -> None:
    good = [i for i in PLAN.indices(shard) if i not in bad]
    write_shard(
        folder,
        shard,
        moments=as_stored(torch.stack([moments_of(i) for i in good])).numpy() if good else np.empty(0),
        indices=good,
        labels=[i % 2 if i else -1 for i in good],
        bad_images={f"image {i}": "bad" for i in PLAN.indices(shard) if i in bad},
    )


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    begin(folder, PLAN)
    for shard in range(3):
        write(folder, shard)
    write_index(folder, summarise(folder, PLAN))
    return folder


def test_each_image_comes_back_and_a_bad_one_is_replaced_by_the_next(cache: Path) -> None:
    opened = LatentCache(cache)
    assert len(opened) == 10
    next_good = {2: 4, 3: 4, 8: 0, 9: 0}
    for copy in (opened, pickle.loads(pickle.dumps(opened))):
        for index in range(10):
            source = next_good.get(index, index)
            moments, label, _ = copy.load(index)
            assert np.array_equal(moments, as_stored(moments_of(source)[0]))
            assert np.array_equal(copy.load(index, mirrored=True)[0], as_stored(moments_of(source)[1]))
            assert label == (source % 2 if source else None)


def test_statistics_and_bad_images_are_those_of_all_shards(cache: Path) -> None:
    summary = summarise(cache, PLAN)
    good = torch.cat([moments_of(i) for i in range(10) if i not in BAD])
    assert summary.statistics.mean == pytest.approx(good[:, :2].mean(dim=(0, 2, 3)).numpy(), abs=1e-3)
    assert summary.bad_images == {f"image {i}": "bad" for i in BAD}
    assert LatentCache(cache).statistics.count == summary.statistics.count == 12 * 9


def test_rounding_is_that_of_float16_and_never_infinite() -> None:
    moments = torch.tensor([1.0, 1 + 2**-12, 1e6, -1e6, 0.1])
    assert as_stored(moments).tolist() == pytest.approx([1.0, 1.0, 65504, -65504, 0.1], rel=2**-11)


def test_finished_shards_are_not_made_again(cache: Path) -> None:
    assert unfinished(cache, PLAN) == []
    (cache / "shard-00001.json").unlink()  # killed between the two files
    file = cache / "shard-00002.safetensors"
    assert unfinished(cache, PLAN) == [1]
    (cache / "shard-00000.safetensors").write_bytes(b"cut short")
    assert unfinished(cache, PLAN) == [0, 1]
    assert not file.exists()  # all of its images are bad


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: damage(c / "shard-00001.safetensors"), "shard-00001.safetensors is missing or damaged: remove it"),
        (lambda c: (c / "shard-00000.safetensors").unlink(), "shard-00000.safetensors is missing or damaged"),
        (lambda c: (c / "index.json").unlink(), "is not finished: run the command that makes it again"),
        (lambda c: (c / "index.json").write_text("{"), "index.json is damaged"),
        (lambda c: (c / "plan.json").write_text("{}"), "plan.json is damaged"),
        (lambda c: (c / "plan.json").unlink(), "is not a cache of latents: make one with training/cache_latents.py"),
    ],
)
def test_a_damaged_or_unfinished_cache_is_refused_with_what_to_do(spoil: Any, message: str, cache: Path) -> None:
    spoil(cache)
    with pytest.raises(DataError, match=message):
        LatentCache(cache)


def test_a_process_verifies_only_its_share(cache: Path) -> None:
    damage(cache / "shard-00001.safetensors")
    LatentCache(cache, shards_to_verify=lambda shard: shard != 1)


def test_latents_of_something_else_are_refused_and_the_shard_size_of_the_first_run_stands(cache: Path) -> None:
    from dataclasses import replace

    assert begin(cache, replace(PLAN, shard_size=7)) == PLAN
    with pytest.raises(DataError, match=r"holds latents of something else \(vae, resolution differ\): remove it"):
        begin(cache, replace(PLAN, vae="w", resolution=16))


def test_a_cache_of_nothing_but_bad_images_is_an_error(tmp_path: Path) -> None:
    begin(tmp_path, PLAN)
    for shard in range(3):
        write(tmp_path, shard, bad=set(range(10)))
    with pytest.raises(DataError, match="no usable image: all 10"):
        summarise(tmp_path, PLAN)
    assert json.loads((tmp_path / "shard-00000.json").read_text())["count"] == 0
