"""Latents on disk: the posterior of every image of a data set, in shards that are written once and checked.

```
CACHE/plan.json             what is cached: fingerprints of the VAE and of the data, resolution, flip, shard size
CACHE/shard-00000.safetensors, shard-00000.json     one range of the data's indices; the .json means that it is whole
CACHE/index.json            all shards, their digests, and the statistics; it means that the cache is whole
CACHE/vae/                  the VAE, with latents_mean and latents_std in its config
```

A shard holds `moments` (N, E, 2c, h, w) in float16, E = 2 when the mirrored image is there, too; `indices` (N,) in the
source; `labels` (N,), -1 for none. Bad images have no row. Bytes an image: E * 2c * h * w * 2 + 16.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from ldm_vae.data.sources import BadImages
from ldm_vae.errors import DataError, nothing_usable
from ldm_vae.files import atomic, digest_of_json, sha256, write_json
from ldm_vae.latents.statistics import Statistics


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a cache holds. Two caches with equal plans are equal."""

    vae: str
    """Fingerprint of the VAE."""
    data: str
    """Fingerprint of the data."""
    num_images: int
    """Images of the source that were read, bad ones included."""
    resolution: int
    flip: bool
    latent_shape: tuple[int, int, int]
    """(c, h, w)."""
    classes: tuple[str, ...]
    shard_size: int

    @property
    def num_shards(self) -> int:
        return -(-self.num_images // self.shard_size)

    def indices(self, shard: int) -> range:
        """Of the source, in one shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_images))


def begin(folder: Path, plan: Plan) -> Plan:
    """Writes the plan, or checks it against the saved one, whose shard size and order of classes are kept.

    Raises:
        DataError: the folder holds latents of something else, or cannot be read.
    """
    file = folder / "plan.json"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, asdict(plan))
        return plan
    saved = read_plan(folder)
    plan = replace(plan, classes=in_order_of(saved.classes, plan.classes))
    differing = [n for n in asdict(plan) if getattr(saved, n) != getattr(plan, n) and n != "shard_size"]
    if differing:
        raise DataError(
            f"{folder} holds latents of something else ({', '.join(differing)} differ): remove it to make them anew, "
            "or choose another --output"
        )
    return saved


def in_order_of(begun: Iterable[str], classes: tuple[str, ...]) -> tuple[str, ...]:
    """The classes in the order of those that something was begun with; as they are, if those were others."""
    begun = tuple(begun)
    return begun if sorted(begun) == sorted(classes) else classes


def labels_among(classes: tuple[str, ...], own: tuple[str, ...]) -> list[int]:
    """The label among `classes` of each label among `own`, the same in another order."""
    label_of = {name: label for label, name in enumerate(classes)}
    return [label_of[name] for name in own]


def class_table(classes: tuple[str, ...], shown: int = 10) -> str:
    """The first of the classes with their labels, for people."""
    if not classes:
        return "no classes"
    first = ", ".join(f"{label} {name}" for label, name in enumerate(classes[:shown]))
    return f"{len(classes)} classes ({first}{', ...' if len(classes) > shown else ''})"


def shard_file(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


def unfinished(folder: Path, plan: Plan) -> list[int]:
    """The shards that are not complete."""
    return [s for s in range(plan.num_shards) if not is_finished(folder, s)]


def is_finished(folder: Path, shard: int) -> bool:
    file = shard_file(folder, shard)
    try:
        record = json.loads(file.with_suffix(".json").read_text())
        return record["bytes"] == 0 or file.stat().st_size == record["bytes"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_shard(
    folder: Path,
    shard: int,
    *,
    moments: np.ndarray,
    indices: list[int],
    labels: list[int],
    bad_images: Mapping[str, str],
) -> None:
    """Writes one shard atomically. moments: (N, E, 2c, h, w), `as_stored`; with N = 0 there is only a record."""
    file = shard_file(folder, shard)
    record: dict[str, Any] = {"bytes": 0, "sha256": None, "count": len(indices)}
    if len(indices):
        tensors = {
            "moments": np.ascontiguousarray(moments, np.float16),
            "indices": np.array(indices),
            "labels": np.array(labels),
        }
        with atomic(file) as out:
            out.write(save(tensors))
        statistics = Statistics.of(moments.reshape(-1, *moments.shape[2:]))
        record |= {"bytes": file.stat().st_size, "sha256": sha256(file), "statistics": statistics.as_json()}
    write_json(file.with_suffix(".json"), {**record, "bad_images": dict(bad_images)})


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The totals over all shards."""

    statistics: Statistics
    bad_images: dict[str, str]
    shards: list[dict[str, Any]]


def summarise(folder: Path, plan: Plan) -> Summary:
    """Of a cache with all its shards. Raises DataError when none of the images is usable."""
    bad_images: dict[str, str] = {}
    statistics = Statistics()
    shards = []
    for shard in range(plan.num_shards):
        file = shard_file(folder, shard).with_suffix(".json")
        try:
            record = json.loads(file.read_text())
            bad_images |= record["bad_images"]
            if record["count"]:
                statistics += Statistics.from_json(record["statistics"])
            shards.append({k: record[k] for k in ("count", "bytes", "sha256")})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{file} is damaged ({error}): remove it, and run the command again") from None
    if not statistics.count:
        raise nothing_usable(bad_images)
    return Summary(statistics=statistics, bad_images=bad_images, shards=shards)


def write_index(folder: Path, summary: Summary) -> None:
    """Written last: it marks the cache as complete."""
    index = {"statistics": summary.statistics.as_json(), "shards": summary.shards, "plan": sha256(folder / "plan.json")}
    write_json(folder / "index.json", index | {"sha256": digest_of_json(index)})


def read_plan(folder: Path) -> Plan:
    try:
        record = json.loads((folder / "plan.json").read_text())
        return replace(Plan(**record), latent_shape=tuple(record["latent_shape"]), classes=tuple(record["classes"]))
    except FileNotFoundError:
        raise DataError(f"{folder} is not a cache of latents: make one with training/cache_latents.py") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder / 'plan.json'} is damaged ({error}): remove {folder} and make it anew") from None


@lru_cache(256)
def open_shard(file: Path, digest: str) -> tuple[Any, list[int], list[int]]:
    """Its moments, which are read when sliced, its indices and its labels; opened anew when its digest changes."""
    handle = safe_open(file, "np")
    return handle.get_slice("moments"), handle.get_tensor("indices").tolist(), handle.get_tensor("labels").tolist()


class LatentCache:
    """The latents of a data set: `len(cache)` images, `cache.load(index, mirrored)`.

    Raises:
        DataError: it is missing or unfinished, or a shard is missing or damaged.
    """

    encoded = True

    @property
    def classes(self) -> tuple[str, ...]:
        return self.plan.classes

    def __init__(self, folder: Path, *, shards_to_verify: Callable[[int], bool] = lambda shard: True) -> None:
        self.folder, self.plan = folder, read_plan(folder)
        try:
            index = json.loads((folder / "index.json").read_text())
            if index.pop("sha256") != digest_of_json(index):
                raise ValueError("its digest differs")
            if index["plan"] != sha256(folder / "plan.json"):
                raise ValueError("it belongs to another plan.json")
            self.shards, self.statistics = index["shards"], Statistics.from_json(index["statistics"])
        except FileNotFoundError:
            raise DataError(f"{folder} is not finished: run the command that makes it again, it goes on") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{folder / 'index.json'} is damaged ({error}): remove it, and run its command") from None
        for shard, record in enumerate(self.shards):
            if record["count"] and shards_to_verify(shard) and not is_intact(shard_file(folder, shard), record):
                raise DataError(
                    f"{shard_file(folder, shard)} is missing or damaged: remove it, its .json and index.json, and run "
                    "the command that makes the cache again"
                )

    def __len__(self) -> int:
        return self.plan.num_images

    def open(self, shard: int) -> tuple[Any, list[int], list[int]]:
        return open_shard(shard_file(self.folder, shard), self.shards[shard]["sha256"])

    def load(self, index: int, mirrored: bool = False) -> tuple[np.ndarray, int | None, BadImages]:
        """Moments (2c, h, w), float32, and label (None without one) of image `index`, or of the next usable one."""
        shard, offset = divmod(index, self.plan.shard_size)
        if self.shards[shard]["count"] < len(self.plan.indices(shard)):
            shard, offset = self.next_usable(index)
        moments, _, labels = self.open(shard)
        label = None if labels[offset] < 0 else labels[offset]
        return moments[offset][int(mirrored and self.plan.flip)].astype(np.float32), label, {}

    def next_usable(self, index: int) -> tuple[int, int]:
        """Shard and row of the first usable image from `index` on, wrapping around at the end."""
        count = self.plan.num_shards
        for turn in range(count + 1):
            shard = (index // self.plan.shard_size + turn) % count
            indices = self.open(shard)[1] if self.shards[shard]["count"] else []
            for row, here in enumerate(indices):
                if here >= index or turn > 0:
                    return shard, row
        raise AssertionError("a finished cache has an image")


def is_intact(file: Path, record: Mapping[str, Any]) -> bool:
    """Whether a shard is there, and has its digest."""
    try:
        return file.stat().st_size == record["bytes"] and sha256(file) == record["sha256"]
    except OSError:
        return False
