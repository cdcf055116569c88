"""Find defects and strange images by an autoencoder of good ones, beside what needs no network.

python benchmarks/anomaly.py magnetic-tile --data ../shared/data/magnetic-tile --output DIR
python benchmarks/anomaly.py fashion-mnist --data ../shared/data/fashion-mnist --output DIR

Trained on good images alone; every tenth of them is held out for the thresholds. magnetic-tile has folders train/good,
test/KIND and ground_truth/KIND; which of our scores is ours is chosen by blemishes made on the held-out good tiles, not
by the test images. Of Fashion-MNIST each class is the good one in turn. Beside ours: the error of a reconstruction by
principal components, scored like each of ours or by its mean, whichever and with however many components is best on
the test images (in its favour), and of tiles also as it would be chosen without them, as ours is; and the mean distance
to the 5 nearest good images, on pixels.

The same command goes on with what was trained.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from PIL import Image
from tqdm import tqdm

from ldm_vae.analysis.anomaly import AnomalyDetector, fit_detector, mean_of_largest, relative, shrunk, smooth
from ldm_vae.data.conversion import to_images
from ldm_vae.data.corruption import parse_corruption
from ldm_vae.data.idx import FASHION, read_fashion_mnist, write_class_zip
from ldm_vae.data.images import Pixels, read_pixels, resize
from ldm_vae.data.order import Stream, generator_at
from ldm_vae.data.sources import Source, open_source
from ldm_vae.errors import ConfigError, DataError, one_line_errors
from ldm_vae.files import atomic, check_writable, write_csv, write_json
from ldm_vae.grids import heat_map
from ldm_vae.models.loading import load_autoencoder
from ldm_vae.runs.config import as_json, parse_config
from ldm_vae.runs.run import git_revision, training_seconds, versions
from ldm_vae.timing import describe_machine, seconds_of_script

ROOT = Path(__file__).parent.parent
COMPONENTS = (4, 8, 16, 32, 64, 128)
VARIANCES = (0.95, 0.99)
"""Shares of the good tiles' variance that as many components as it takes are to keep, as is usual."""
NEIGHBOURS = 5
BLEMISHED = 4
"""Copies of each held-out tile that are blemished."""
Row = dict[str, Any]
Scores = dict[str, list[float]]
Maps = dict[str, list[np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of the anomaly benchmark."""

    data: Path = tyro.MISSING
    output: Path = tyro.MISSING
    dataset: tyro.conf.Suppress[str] = "magnetic-tile"
    preset: str = "restore"
    """Of train_vae.py."""
    scale: float = 0.5
    """Of the tiles that the network of this preset sees; all others see them whole."""
    resolution: int = 64
    """Side of the training crops."""
    global_latent: int | None = None
    steps: int = 12_000
    batch_size: int = 16
    mirror: bool = True
    mixed_precision: Literal["no", "bf16"] = "bf16"
    """Of the trainings; no is many times as fast on CPUs without AVX-512."""
    blur: float = 4.0
    """In pixels of what the network sees, as are the surroundings."""
    surroundings: float = 12.0
    share: float = 0.05
    networks: tuple[Literal["restore", "find"], ...] = ("restore", "find")
    """Those of ours that tiles are judged by."""
    find_steps: int = 12_000
    """Of the network that finds blemishes on tiles, and how its maps are scored."""
    find_blur: float = 2.0
    find_share: float = 0.02
    sides: tuple[int, ...] = (64, 128)
    """To which images are resized for the comparisons on pixels."""
    false_alarm_rate: float = 0.1
    num_test: int | None = None
    """Only so many of Fashion-MNIST's test images, drawn by the seed."""
    seed: int = 0


PRESETS = {
    "magnetic-tile": ("grey photos of tiles with five kinds of defects", Config()),
    "fashion-mnist": (
        "each class of clothes against the others",
        Config(
            dataset="fashion-mnist",
            preset="plain",
            resolution=32,
            global_latent=16,
            steps=800,
            batch_size=64,
            blur=1.0,
            surroundings=0.0,
            share=1.0,
            sides=(32,),
            mirror=False,
            false_alarm_rate=0.05,
        ),
    ),
}


def trained(config: Config, good: str, run: Path, *, preset: str, steps: int) -> float:
    """Seconds of training. What was trained before is not trained again, and refused where the settings were others."""
    words: list[object] = [preset, "--data", good, "--output", run, "--channels", 1, "--steps", steps]
    words += ["--resolution", config.resolution, "--batch-size", config.batch_size, "--seed", config.seed]
    words += ["--mixed-precision", config.mixed_precision, "--tracker", "none", "--log-every", 200]
    words += ["--sample-every", 2000]
    words += [] if config.global_latent is None else ["--global-latent", config.global_latent]
    words += [] if config.mirror else ["--no-mirror"]
    seconds_of_script(ROOT / "training" / "train_vae.py", *words)
    return training_seconds(run)


def options_of(config: Config) -> dict[str, Any]:
    """Of fit_detector."""
    return {k: getattr(config, k) for k in ("false_alarm_rate", "blur", "surroundings", "share")}


def options_of_finder(config: Config) -> dict[str, Any]:
    return {"false_alarm_rate": config.false_alarm_rate, "blur": config.find_blur, "share": config.find_share}


def auroc(scores: Any, anomalous: Any) -> float:
    """The area under the receiver operating characteristic."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(anomalous, scores))


def small(pixels: Pixels, side: int) -> np.ndarray:
    """In [0, 1], (side * side,)."""
    return resize(pixels, (side, side))[:, :, 0].astype(np.float32).ravel() / 255


# Without a network ---------------------------------------------------------------------------------------------------


def by_components(
    good: list[Pixels], test: list[Pixels], config: Config
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(name, score of each test image, map of each (N, side, side)) for each size, number of components and scoring."""
    from sklearn.decomposition import PCA

    for side in config.sides:
        x, y = (np.stack([small(p, side) for p in part]) for part in (good, test))
        counts = [c for c in COMPONENTS if c < min(x.shape)]
        for count in [*counts, *(VARIANCES if config.dataset == "magnetic-tile" else ())]:
            pca = PCA(count, random_state=config.seed).fit(x)
            errors = np.square(y - pca.inverse_transform(pca.transform(y)))
            maps = errors.reshape(-1, side, side)
            name = f"PCA of {count}{' of the variance' if count < 1 else ''} at {side}x{side}"
            yield f"{name}, mean", errors.mean(axis=1), maps
            if config.dataset == "fashion-mnist":
                variance = shrunk(np.square(x - pca.inverse_transform(pca.transform(x))).mean(axis=0))
                yield f"{name}, standardised", (errors / variance).mean(axis=1), maps / variance.reshape(side, side)
            for scoring, (blur, surroundings, share) in scorings(config, side).items():
                found = np.stack([relative(smooth(m, blur), surroundings) for m in np.sqrt(maps)])
                yield f"{name}, {scoring}", np.array([mean_of_largest(m, share) for m in found]), found


def scorings(config: Config, side: int) -> dict[str, tuple[float, float, float]]:
    """Of PCA's errors, as ours are: blur and surroundings, in pixels of an image reduced to this side, and share."""
    if config.dataset == "fashion-mnist":
        return {"smooth": (config.blur, config.surroundings, config.share)}
    size = side / 256 / config.scale
    return {
        "smooth": (size * config.blur, 0.0, config.share),
        "as restore": (size * config.blur, size * config.surroundings, config.share),
        "as find": (side / 256 * config.find_blur, 0.0, config.find_share),
    }


def by_neighbours(good: list[Pixels], test: list[Pixels], side: int) -> np.ndarray:
    from sklearn.neighbors import NearestNeighbors

    x, y = (np.stack([small(p, side) for p in part]) for part in (good, test))
    return NearestNeighbors(n_neighbors=NEIGHBOURS).fit(x).kneighbors(y)[0].mean(axis=1)


# Defects of tiles ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TestImage:
    """Pixels (H, W, 1), its kind, and where it is defective (H, W)."""

    name: str
    kind: str
    pixels: Pixels
    mask: np.ndarray


def tiles(config: Config) -> list[TestImage]:
    """Every image of the test folder. Raises DataError for another layout."""
    found = []
    for file in sorted((config.data / "test").rglob("*.jpg")):
        pixels = read_pixels(file.read_bytes(), channels=1)
        kind = file.parent.name
        mask = np.zeros(pixels.shape[:2], bool)
        if kind != "good":
            truth = config.data / "ground_truth" / kind / f"{file.stem}.png"
            mask = read_pixels(truth.read_bytes(), channels=1)[:, :, 0] > 127
        found.append(TestImage(name=f"{kind}/{file.name}", kind=kind, pixels=pixels, mask=mask))
    if not found or not (config.data / "train" / "good").is_dir():
        raise DataError(f"{config.data} does not hold train/good, test/KIND and ground_truth/KIND")
    return found


def reduced(pixels: Pixels, scale: float) -> Pixels:
    height, width = (max(round(n * scale), 1) for n in pixels.shape[:2])
    return pixels if scale == 1 else resize(pixels, (height, width))


def write_reduced(config: Config) -> Path:
    """The good tiles as the network is to see them, in a folder."""
    folder = config.output / f"good-{config.scale:g}"
    folder.mkdir(exist_ok=True)
    for file in sorted((config.data / "train" / "good").rglob("*.jpg")):
        pixels = reduced(read_pixels(file.read_bytes(), channels=1), config.scale)
        Image.fromarray(pixels[:, :, 0]).save(folder / f"{file.stem}.png")
    return folder


@dataclass(frozen=True, kw_only=True)
class Ours:
    """A detector, and the scale of the tiles that it sees."""

    detector: AnomalyDetector
    scale: float
    seconds: float
    """Of training."""

    def maps(self, pixels: Pixels) -> tuple[dict[str, np.ndarray], torch.Tensor, torch.Tensor]:
        """Of a whole tile: maps by method, what the network gave, and what it saw."""
        seen = to_images(reduced(pixels, self.scale))[None]
        return *self.detector.maps(seen), seen


def restorer(config: Config) -> Ours:
    """What takes blemishes away, of tiles made smaller."""
    good, run = write_reduced(config), config.output / f"restore-{config.scale:g}"
    seconds = trained(config, f"{good}#train", run, preset=config.preset, steps=config.steps)
    sources = [open_source(f"{good}#{part}", channels=1) for part in ("train", "held-out")]
    detector, _ = fit_detector(load_autoencoder(str(run)), *sources, **options_of(config))
    return Ours(detector=detector, scale=config.scale, seconds=seconds)


def finder(config: Config) -> Ours:
    """What says where blemishes are."""
    good, run = config.data / "train" / "good", config.output / "find"
    seconds = trained(config, f"{good}#train", run, preset="find", steps=config.find_steps)
    sources = [open_source(f"{good}#{part}", channels=1) for part in ("train", "held-out")]
    vae = load_autoencoder(str(run), or_finder=True)
    detector, _ = fit_detector(vae, *sources, **options_of_finder(config))
    return Ours(detector=detector, scale=1.0, seconds=seconds)


def with_and_without_blemishes(held_out: Source) -> tuple[list[Pixels], list[bool]]:
    """Held-out good tiles, each as it is and copies with one blemish made on them; and which have one."""
    found, blemished = [], []
    for index in range(len(held_out)):
        for copy in range(BLEMISHED + 1):
            rng = generator_at(copy, index, Stream.CORRUPTION)
            found.append(parse_corruption(f"blemishes:{min(copy, 1)}")(held_out[index].pixels, rng)[0])
            blemished.append(copy > 0)
    return found, blemished


def judged(ours: list[Ours], images: list[Pixels], description: str) -> tuple[Scores, Maps]:
    """Scores and maps of whole tiles by each of our methods."""
    scores: Scores = {m: [] for one in ours for m in one.detector.facts.methods}
    maps: Maps = {m: [] for m in scores}
    for pixels in tqdm(images, unit="image", desc=description):
        for one in ours:
            found = one.maps(pixels)[0]
            for method, value in one.detector.scores(found).items():
                scores[method].append(value)
                maps[method].append(found[method])
    return scores, maps


def difference_interval(ours: Any, theirs: Any, anomalous: np.ndarray, seed: int) -> tuple[float, float]:
    """Of the areas' difference, 95 %, over 2,000 resamplings of the good and of the anomalous images."""
    rng = np.random.default_rng(seed)
    gain = pairs_in_order(ours, anomalous) - pairs_in_order(theirs, anomalous)
    found = [gain[np.ix_(*(rng.choice(n, n) for n in gain.shape))].mean() for _ in range(2000)]
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def pairs_in_order(scores: Any, anomalous: np.ndarray) -> np.ndarray:
    """1 where an anomalous image (row) has more than a good one (column), 1/2 where as much; its mean is the area."""
    values = np.asarray(scores)
    bad, good = values[anomalous][:, None], values[~anomalous][None]
    return (bad > good) + 0.5 * (bad == good)


def mean_difference_interval(
    ours: list[np.ndarray], theirs: list[np.ndarray], labels: np.ndarray, seed: int
) -> tuple[float, float]:
    """Of the difference of mean areas, 95 %, over 2,000 resamplings of the images of each class.

    Scores (N,) of the same images with class 0, 1, ... in turn as the good one; one resampling serves all of them.
    """
    rng = np.random.default_rng(seed)
    times = np.zeros((2000, len(labels)), np.float32)  # how often each image is drawn
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        times[:, own] = rng.multinomial(len(own), np.full(len(own), 1 / len(own)), size=len(times))
    total = np.zeros(len(times))
    for label, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        bad = labels != label
        gain = (pairs_in_order(a, bad) - pairs_in_order(b, bad)).astype(np.float32)
        total += ((times[:, bad] @ gain) * times[:, ~bad]).sum(axis=1) / gain.size
    low, high = np.percentile(total / len(ours), [2.5, 97.5])
    return float(low), float(high)


def judge_tiles(config: Config) -> Row:
    if not config.networks:
        raise ConfigError("--networks names none: at least one of restore and find is needed")
    images = tiles(config)
    ours = [{"restore": restorer, "find": finder}[name](config) for name in config.networks]
    good_tiles = config.data / "train" / "good"
    made, blemished = with_and_without_blemishes(open_source(f"{good_tiles}#held-out", channels=1))
    whole = open_source(f"{good_tiles}#train", channels=1)  # what ours were trained on
    good, test = [whole[i].pixels for i in range(len(whole))], [i.pixels for i in images]
    by_blemishes = {m: auroc(v, blemished) for m, v in judged(ours, made, "blemishes made")[0].items()}
    pca_by_blemishes = {name: auroc(values, blemished) for name, values, _ in by_components(good, made, config)}
    anomalous = np.array([i.kind != "good" for i in images])
    scores, maps = judged(ours, test, "test images")
    thresholds = {m: t for one in ours for m, t in one.detector.facts.thresholds.items()}
    alarms = {f"ours, {m}": rates(np.array(scores[m]) > thresholds[m], anomalous) for m in scores}
    every = [(f"ours, {m}", scores[m], maps[m]) for m in scores]
    every += [(name, list(values), list(found)) for name, values, found in by_components(good, test, config)]
    truth = np.concatenate([i.mask.ravel() for i in images])
    rows = []
    for name, values, found_maps in every:
        largest = max(float(m.max()) for m in found_maps)
        full = [resize(m[:, :, None] / largest, i.mask.shape) for m, i in zip(found_maps, images, strict=True)]
        pixel = auroc(np.concatenate([m.ravel() for m in full]), truth)
        of_kinds = {k: auroc(*of_kind(values, images, k)) for k in kinds(images)}
        row = {"method": name, "image_auroc": auroc(values, anomalous), "pixel_auroc": pixel, **of_kinds}
        rows.append(row | alarms.get(name, {}))
    near = by_neighbours(good, test, config.sides[0])
    kinds_of = {k: auroc(*of_kind(near, images, k)) for k in kinds(images)}
    rows.append({"method": f"{NEIGHBOURS} nearest on pixels", "image_auroc": auroc(near, anomalous), **kinds_of})
    chosen = max(by_blemishes, key=lambda m: by_blemishes[m])
    values_of = {name: values for name, values, _ in every}
    best = max(pca_by_blemishes, key=lambda name: auroc(values_of[name], anomalous))
    fair = max(pca_by_blemishes, key=lambda name: pca_by_blemishes[name])
    means = [name for name in pca_by_blemishes if name.endswith(", mean")]
    mean = max(means, key=lambda name: auroc(values_of[name], anomalous))
    usual = max((m for m in means if "variance" in m), key=lambda name: auroc(values_of[name], anomalous))
    above = {}
    for how, name in (
        ("best on these tiles", best),
        ("best mean on these tiles", mean),
        ("as is usual", usual),
        ("chosen as ours", fair),
    ):
        low, high = difference_interval(scores[chosen], values_of[name], anomalous, config.seed)
        above[how] = {"than": name, "low": low, "high": high}
    for one in ours:
        draw_tiles(one, images, config)
    return {
        "training_seconds": sum(one.seconds for one in ours),
        "seconds_of_each": {" and ".join(one.detector.facts.methods): one.seconds for one in ours},
        "chosen_by_blemishes": by_blemishes,
        "pca_by_blemishes": pca_by_blemishes,
        "ours": chosen,
        "above_pca": above,
        "rows": rows,
    }


def kinds(images: list[TestImage]) -> list[str]:
    return sorted({i.kind for i in images} - {"good"})


def of_kind(scores: Any, images: list[TestImage], kind: str) -> tuple[list[float], list[bool]]:
    """Scores and truth of the good images and of one kind of defects."""
    pairs = [(s, i.kind == kind) for s, i in zip(scores, images, strict=True) if i.kind in ("good", kind)]
    return [s for s, _ in pairs], [t for _, t in pairs]


def rates(alarms: np.ndarray, anomalous: np.ndarray) -> Row:
    """At the calibrated threshold."""
    return {"false_alarms": float(alarms[~anomalous].mean()), "detected": float(alarms[anomalous].mean())}


def draw_tiles(ours: Ours, images: list[TestImage], config: Config) -> None:
    """A sheet for each method: two images of each kind with their heat maps."""
    facts = ours.detector.facts
    for method in facts.methods:
        strips = []
        for kind in ["good", *kinds(images)]:
            for image in [i for i in images if i.kind == kind][:2]:
                maps, given, seen = ours.maps(image.pixels)
                strip = heat_map(seen[0], given[0], maps[method], facts.thresholds[method])
                strip.thumbnail((480, 240))
                strips.append(strip)
        sheet = Image.new("RGB", (3 * 490, -(-len(strips) // 3) * 250), "white")
        for i, strip in enumerate(strips):
            sheet.paste(strip, (i % 3 * 490, i // 3 * 250))
        sheet.save(config.output / f"{method}.png")


# Clothes -------------------------------------------------------------------------------------------------------------


def judge_fashion(config: Config) -> Row:
    """Each class in turn as the good one."""
    pixels, labels = read_fashion_mnist(config.data, "train")
    test_pixels, test_labels = read_fashion_mnist(config.data, "t10k")
    if config.num_test is not None:
        some = np.random.default_rng(config.seed).permutation(len(test_pixels))[: config.num_test]
        test_pixels, test_labels = test_pixels[some], test_labels[some]
    rows, seconds = [], 0.0
    scores: dict[str, list[np.ndarray]] = {}  # of each method, for each class in turn
    for label, name in enumerate(FASHION):
        own = pixels[labels == label]
        target = config.output / f"{name}.zip"
        write_class_zip(target, ((p, name) for p in own))
        run = config.output / name
        seconds += trained(config, f"{target}#train", run, preset=config.preset, steps=config.steps)
        vae = load_autoencoder(str(run))
        sources = [open_source(f"{target}#{part}", channels=1) for part in ("train", "held-out")]
        options = options_of(config)
        detector, _ = fit_detector(vae, *sources, methods=("l1", "mahalanobis", "standardised"), **options)
        anomalous = test_labels != label
        found = [detector.scores(detector.maps(to_images(p)[None])[0]) for p in tqdm(test_pixels, desc=name)]
        for method in detector.facts.methods:
            values = np.array([f[method] for f in found])
            scores.setdefault(f"ours, {method}", []).append(values)
            alarms = rates(values > detector.facts.thresholds[method], anomalous)
            rows.append({"class": name, "method": f"ours, {method}", "image_auroc": auroc(values, anomalous), **alarms})
        good, test = [sources[0][i].pixels for i in range(len(sources[0]))], list(test_pixels)
        for pca, values, _ in by_components(good, test, config):
            scores.setdefault(pca, []).append(values)
            rows.append({"class": name, "method": pca, "image_auroc": auroc(values, anomalous)})
        near = auroc(by_neighbours(good, test, config.sides[0]), anomalous)
        rows.append({"class": name, "method": f"{NEIGHBOURS} nearest on pixels", "image_auroc": near})
    means = [
        {
            "class": "mean",
            "method": m,
            "image_auroc": statistics.fmean(r["image_auroc"] for r in rows if r["method"] == m),
        }
        for m in dict.fromkeys(r["method"] for r in rows)
    ]
    area = {m["method"]: m["image_auroc"] for m in means}
    above: dict[str, Row] = {}
    for kind in ("mean", "standardised", "smooth"):
        best = max((m for m in scores if m.startswith("PCA") and m.endswith(f", {kind}")), key=lambda m: area[m])
        for name in [m for m in scores if m.startswith("ours")]:
            low, high = mean_difference_interval(scores[name], scores[best], test_labels, config.seed)
            above.setdefault(name, {})[best] = {"by": area[name] - area[best], "low": low, "high": high}
    return {"training_seconds": seconds, "above_pca": above, "rows": means + rows}


def table(rows: list[Row]) -> str:
    keys = list(dict.fromkeys(k for r in rows for k in r))
    lines = ["| " + " | ".join(keys) + " |", "|" + " --- |" * len(keys)]
    for r in rows:
        cells = ["-" if k not in r else r[k] if isinstance(r[k], str) else f"{r[k]:.3f}" for k in keys]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(config: Config) -> None:
    check_writable(config.output)
    found = judge_fashion(config) if config.dataset == "fashion-mnist" else judge_tiles(config)
    record = {
        "config": as_json(config),
        "machine": describe_machine(torch.device("cpu")),
        "versions": versions(),
        "git": git_revision(),
        **found,
    }
    write_json(config.output / "results.json", record)
    every = [{k: r.get(k, "") for k in dict.fromkeys(k for x in found["rows"] for k in x)} for r in found["rows"]]
    write_csv(config.output / "table.csv", every)
    with atomic(config.output / "table.md") as out:
        out.write(table(found["rows"]).encode())
    print(table(found["rows"]))
    print(f"trained in {found['training_seconds'] / 60:.1f} minutes; pictures and figures are in {config.output}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_config(PRESETS, description="Find what is unlike good images."))
