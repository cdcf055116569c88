"""Workers: the same as without them, small, and gone when nobody needs them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ldm_vae.data.blemishes import with_blemishes
from ldm_vae.data.corruption import parse_corruption
from ldm_vae.data.loader import CropDataset, collate, collated
from ldm_vae.data.sources import open_source
from ldm_vae.data.workers import made_ahead
from ldm_vae.errors import LdmVaeError
from ldm_vae.latents.rows import DiffusionRows, Squares, collate_rows, squares_of


def children() -> set[int]:
    """The processes that this one has started and that have not ended."""
    return {int(p) for f in Path("/proc/self/task").glob("*/children") for p in f.read_text().split()}


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_what_is_made_comes_in_its_order(num_workers: int) -> None:
    before = children()
    assert list(made_ahead(abs, range(-50, 0), num_workers=num_workers)) == list(range(50, 0, -1))
    assert list(made_ahead(abs, [], num_workers=num_workers)) == []
    assert children() == before


def test_what_a_worker_raises_comes_in_its_place_and_says_where_it_was() -> None:
    before = children()
    made = made_ahead(int, ["4", "9", "four", "16"], num_workers=2)
    assert [next(made), next(made)] == [4, 9]
    with pytest.raises(ValueError, match="invalid literal") as raised:
        next(made)
    assert "In a worker:" in raised.value.__notes__[0]
    assert children() == before


def test_who_asks_for_no_more_leaves_no_process() -> None:
    before = children()
    made = made_ahead(time.sleep, [0.0, *[60.0] * 20], num_workers=2)
    next(made)
    assert len(children() - before) == 2
    began = time.monotonic()
    made.close()
    assert children() == before
    assert time.monotonic() - began < 10


def refused(item: int) -> None:
    """Raises what does not go through pickle."""
    error = ValueError("three is not possible")
    error.because = lambda: item  # type: ignore[attr-defined]
    raise error


def test_what_does_not_go_through_pickle_is_said_all_the_same() -> None:
    with pytest.raises(RuntimeError, match="ValueError: three is not possible") as raised:
        list(made_ahead(refused, [3], num_workers=1))
    assert "in refused" in raised.value.__notes__[0]


def lock(item: int) -> Any:
    """What cannot be sent."""
    return threading.Lock()


def test_a_worker_that_fails_says_why_and_does_not_speak_of_memory(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LdmVaeError, match="a worker process failed, with code 1"):
        list(made_ahead(lock, [1], num_workers=1))
    assert "cannot pickle '_thread.lock'" in capfd.readouterr().err


def test_a_worker_that_cannot_begin_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(LdmVaeError, match="a worker process failed, with code 1"):
        list(made_ahead(abs, range(100), num_workers=2))


class Arrays:
    """Items and answers of very many arrays: neither side may wait for the other to read."""

    def __call__(self, item: list[np.ndarray]) -> list[np.ndarray]:
        return [array + 1 for array in item]


def test_very_many_arrays_go_both_ways() -> None:
    item = [np.full(1, i) for i in range(20_000)]
    for answer in made_ahead(Arrays(), [item] * 6, num_workers=1):
        assert [int(a[0]) for a in answer[::5000]] == [1, 5001, 10001, 15001]


@pytest.mark.parametrize("size", [0, 10, 10**6])
def test_arrays_come_as_they_were_and_can_be_written_to(size: int) -> None:
    rng = np.random.default_rng(0)
    item = [rng.random((3, size)), rng.random((size, 3)).T, rng.random((2, size))[:, ::-1], rng.random(3) < 0.5]
    (answer,) = made_ahead(list, [item], num_workers=1)
    for sent, came in zip(item, answer, strict=True):
        assert np.array_equal(sent, came)
        assert came.flags.writeable


HOARDER = """
import resource, numpy as np
from ldm_vae.data.workers import made_ahead
from ldm_vae.errors import LdmVaeError
resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
small = list(made_ahead(np.zeros, [10] * 200, num_workers=1))
print(len(small))
large = list(made_ahead(np.zeros, [10**6] * 200, num_workers=1))
"""


def test_who_keeps_too_much_is_told_so_and_does_not_wait_for_ever() -> None:
    done = subprocess.run([sys.executable, "-c", HOARDER], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "200\n"
    assert "Too many open files" in done.stderr


TRAINER = """
import time
from pathlib import Path
from ldm_vae.data.workers import made_ahead
from ldm_vae.errors import LdmVaeError
made = made_ahead(time.sleep, [0.0] + [0.5] * 1000, num_workers=2)
next(made)  # the other one may still be starting
print(*(f.read_text() for f in Path("/proc/self/task").glob("*/children")), flush=True)
for _ in made:
    pass
"""


def test_workers_end_when_their_trainer_is_killed_and_not_by_a_signal_to_all() -> None:
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert trainer.stdout is not None
    workers = [int(p) for p in trainer.stdout.readline().split()]
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker, signal.SIGTERM)
        os.kill(worker, signal.SIGINT)
    time.sleep(1)
    assert all(Path(f"/proc/{w}").exists() for w in workers)
    trainer.kill()
    trainer.communicate()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{w}/cmdline").exists() and "serve" in cmdline(w) for w in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def cmdline(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of four images, without a VAE."""
    from ldm_vae.latents.cache import LatentCache, Plan, begin, summarise, write_index, write_shard

    folder = tmp_path_factory.mktemp("cache")
    plan = Plan(
        vae="", data="", num_images=4, resolution=16, flip=False, latent_shape=(4, 2, 2), classes=(), shard_size=4
    )
    begin(folder, plan)
    moments = np.random.default_rng(0).standard_normal((4, 1, 8, 2, 2))
    write_shard(folder, 0, moments=moments, indices=[0, 1, 2, 3], labels=[-1] * 4, bad_images={})
    write_index(folder, summarise(folder, plan))
    return LatentCache(folder)


def makers(cache: Any) -> dict[str, tuple[Callable[[Any], Any], Any]]:
    """All that is made by workers, and something to make."""
    source = open_source("procedural:dead-leaves", resolution=32)
    given: dict[str, Any] = {"seed": 0, "label_dropout": 1.0, "label_of": (), "flip": True, "prediction": "flow"}
    given["latent_shape"] = (4, 2, 2)
    crops = CropDataset(source, seed=0, resolution=16, pairing=parse_corruption("jpeg:10-40"))
    squares = Squares(source, 16)
    return {
        "crops": (partial(collated, crops, collate), [3, 4]),
        "blemishes": (
            partial(collated, CropDataset(source, seed=0, resolution=16, pairing=with_blemishes), collate),
            [3, 4],
        ),
        "cached": (partial(collated, DiffusionRows(cache, **given), collate_rows), [3, 4]),
        "squares": (partial(collated, DiffusionRows(squares, **given), collate_rows), [3, 4]),
        "to be cached": (partial(squares_of, squares), range(2, 4)),
    }


@pytest.mark.parametrize("kind", ["crops", "blemishes", "cached", "squares", "to be cached"])
def test_no_worker_has_torch_so_that_each_stays_below_300_mb(kind: str, cache: Any) -> None:
    make, item = makers(cache)[kind]
    before = children()
    made = made_ahead(make, [item, item], num_workers=1)
    next(made)
    (worker,) = children() - before
    try:
        assert "libtorch" not in Path(f"/proc/{worker}/maps").read_text()
        status = Path(f"/proc/{worker}/status").read_text()
        assert int(status.split("VmHWM:")[1].split()[0]) * 1024 < 300e6
    finally:
        made.close()
