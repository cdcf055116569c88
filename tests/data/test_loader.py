from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_vae.data.conversion import to_images
from ldm_vae.data.loader import CropDataset, MicroBatches, collate, load_batches
from ldm_vae.data.order import index_at
from ldm_vae.data.sources import open_source
from ldm_vae.data.workers import default_workers
from ldm_vae.errors import DataError


def test_a_crop_is_a_part_of_its_image_perhaps_mirrored(photos: Path) -> None:
    source = open_source(str(photos))
    crops = CropDataset(source, seed=4, resolution=24)
    mirrored = 0
    for position in range(24):
        row = crops[position]
        assert row.image is not None
        image, at, met = torch.from_numpy(row.image), row.position, row.bad_images
        assert (image.shape, at, met) == ((3, 24, 24), position, {})
        whole = to_images(source[index_at(position, size=12, seed=4)].pixels)
        windows = whole.unfold(1, 24, 1).unfold(2, 24, 1)  # (3, y, x, 24, 24)
        plain = (windows == image[:, None, None]).all(dim=(0, 3, 4)).any()
        turned = (windows == image.flip(2)[:, None, None]).all(dim=(0, 3, 4)).any()
        assert plain or turned
        mirrored += int(turned and not plain)
    assert 4 < mirrored < 20


def test_crops_do_not_depend_on_workers_cache_or_where_one_starts(photos: Path) -> None:
    def images(first_step: int, num_workers: int, cache_bytes: int) -> torch.Tensor:
        crops = CropDataset(open_source(str(photos)), seed=1, resolution=16, shorter_side=30, cache_bytes=cache_bytes)
        order = MicroBatches(first_step=first_step, last_step=8, batch_size=4, rank=0, num_processes=1, accumulation=1)
        return torch.cat(
            [b.images for b in load_batches(crops, order, num_workers=num_workers, pin_memory=False, collate=collate)]
        )

    reference = images(0, 0, 0)
    assert reference.is_contiguous()
    assert torch.equal(images(0, 0, 10**9), reference)
    assert torch.equal(images(0, 2, 10**5), reference)
    assert torch.equal(images(5, 1, 0), reference[20:])


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (7, 3), (16, 16), (200, 17)])
@pytest.mark.parametrize("shorter_side", [None, 16, 40])
def test_images_of_any_size_give_crops_of_one_size(
    size: tuple[int, int], shorter_side: int | None, tmp_path: Path
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    crops = CropDataset(open_source(str(tmp_path)), seed=0, resolution=16, shorter_side=shorter_side)
    for position in range(3):
        image = crops[position].image
        assert image.shape == (3, 16, 16)
        assert image is not None
        assert np.abs(image).max() <= 1


def test_resizing_first_changes_the_scale_of_the_crop(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 256).astype(np.uint8)
    Image.fromarray(np.broadcast_to(ramp[None, :, None], (256, 256, 3)).copy()).save(tmp_path / "ramp.png")
    steps = {}
    for shorter_side in (None, 128, 64):
        crops = CropDataset(open_source(str(tmp_path)), seed=0, resolution=32, shorter_side=shorter_side)
        image = crops[0].image
        assert image is not None
        steps[shorter_side] = abs(float(image[0, 0, -1] - image[0, 0, 0]))
    assert steps[128] == pytest.approx(2 * steps[None], rel=0.05)
    assert steps[64] == pytest.approx(4 * steps[None], rel=0.05)


def test_reduction_draws_a_scale_for_each_crop_and_never_enlarges(tmp_path: Path) -> None:
    ramp = np.linspace(0, 255, 256).astype(np.uint8)
    Image.fromarray(np.broadcast_to(ramp[None, :, None], (96, 256, 3)).copy()).save(tmp_path / "ramp.png")
    source = open_source(str(tmp_path))

    def steps(low: float, high: float) -> np.ndarray:
        crops = CropDataset(source, seed=0, resolution=32, reduction=(low, high))
        images = [crops[position].image for position in range(40)]
        return np.array([abs(float(image[0, 0, -1] - image[0, 0, 0])) for image in images if image is not None])

    once = steps(1, 1)
    drawn = steps(0.5, 1) / once
    assert 0.98 < drawn.min() < 1.15 < 1.8 < drawn.max() < 2.05
    assert steps(0.1, 0.1) / once == pytest.approx(3, rel=0.06)  # the image is only three crops high


def test_bad_images_are_named_and_their_place_is_taken_by_a_good_one(tmp_path: Path) -> None:
    Image.new("RGB", (20, 20), "red").save(tmp_path / "good.png")
    for i in range(5):
        (tmp_path / f"bad {i}.png").write_bytes(b"damage")
    crops = CropDataset(open_source(str(tmp_path)), seed=0, resolution=16)
    order = MicroBatches(first_step=0, last_step=6, batch_size=2, rank=0, num_processes=1, accumulation=1)
    met: dict[str, str] = {}
    for workers in (0, 1):
        for batch in load_batches(crops, order, num_workers=workers, pin_memory=False, collate=collate):
            met |= batch.bad_images
            assert (batch.images[:, 0] == 1).all()
    assert set(met) == {f"bad {i}.png" for i in range(5)}
    assert all("cannot be decoded" in reason for reason in met.values())
    (tmp_path / "good.png").unlink()
    crops = CropDataset(open_source(str(tmp_path)), seed=0, resolution=16)
    for workers in (0, 1):
        with pytest.raises(
            DataError, match=r"^no usable image: all 5 that were tried are bad, such as bad \d.png: cannot"
        ):
            list(load_batches(crops, order, num_workers=workers, pin_memory=False, collate=collate))


@pytest.mark.parametrize(("cores", "processes", "workers"), [(2, "1", 1), (16, "1", 8), (16, "4", 3), (16, "16", 1)])
def test_workers_share_the_cores_of_their_machine(
    cores: int, processes: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert default_workers() == workers
