"""Find defects and unusual images with a network trained on good images, beside methods without a network.

python benchmarks/anomaly.py magnetic-tile --data ../shared/data/magnetic-tile --output DIR
python benchmarks/anomaly.py fashion-mnist --data ../shared/data/fashion-mnist --output DIR

Training sees good images alone; every tenth of them is held out for the thresholds. magnetic-tile has folders
train/good, test/KIND and ground_truth/KIND. Of Fashion-MNIST each class is the good one in turn. The baselines, on
pixels: the reconstruction error of principal components (PCA), for each number of components and each way to score its
error map; and the mean distance to the 5 nearest good images. The same command resumes.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

from ldm_vae.analysis.anomaly import (
    AnomalyDetector,
    Facts,
    Method,
    fit_detector,
    mean_of_largest,
    relative,
    shrunk,
    smooth,
)
from ldm_vae.data.blemishes import blemished
from ldm_vae.data.conversion import to_images
from ldm_vae.data.fashion_mnist import FASHION, read_fashion_mnist, write_class_zip
from ldm_vae.data.images import Pixels, resize
from ldm_vae.data.order import Stream, generator_at
from ldm_vae.data.reader import read_pixels
from ldm_vae.data.sources import Source, open_source
from ldm_vae.errors import DataError, one_line_errors
from ldm_vae.files import check_writable
from ldm_vae.models.loading import load_network
from ldm_vae.progress import progress
from ldm_vae.report import markdown_table, provenance, write_report
from ldm_vae.runs.config import MixedPrecision, Range, check_ranges, parse_config
from ldm_vae.runs.run import training_seconds
from ldm_vae.timing import seconds_of_script

COMPONENTS = (4, 8, 16, 32, 64, 128)
VARIANCES = (0.95, 0.99)
"""Shares of the variance that PCA's components usually keep."""
TILE_SIDE = 256
PCA_SCORINGS = {"smooth": (8.0, 0.0, 0.05), "relative to the surroundings": (8.0, 24.0, 0.05)}
"""Blur and surroundings in pixels of a tile of 256 x 256, and share, as in `fit_detector`."""
NEIGHBOURS = 5
BLEMISHED_COPIES = 4
"""Of each held-out tile."""
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Config:
    data: Path = tyro.MISSING
    output: Path = tyro.MISSING
    dataset: tyro.conf.Suppress[str] = "magnetic-tile"
    preset: str = "find"
    """Of train_autoencoder.py."""
    resolution: int = 64
    """Side of the training crops."""
    global_latent: int | None = None
    steps: int = 12_000
    batch_size: int = 16
    mirror: bool = True
    mixed_precision: MixedPrecision = "auto"
    """Of the training."""
    blur: Annotated[float, Range(at_least=0)] = 2.0
    """Of the detector's maps, in pixels."""
    share: Annotated[float, Range(above=0, at_most=1)] = 0.02
    """Part of a map, its largest values, whose mean is the score."""
    sides: Annotated[tuple[int, ...], Range(at_least=1)] = (64, 128)
    """Images are resized to these for the methods on pixels."""
    false_alarm_rate: Annotated[float, Range(above=0, below=1)] = 0.1
    num_test: Annotated[int | None, Range(at_least=1)] = None
    """At most this many of Fashion-MNIST's test images, drawn with the seed."""
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
            share=1.0,
            sides=(32,),
            mirror=False,
            false_alarm_rate=0.05,
        ),
    ),
}


@dataclass(frozen=True)
class Scored:
    """A method's score for each test image (N,), and its maps (H, W)."""

    method: str
    scores: np.ndarray
    maps: Sequence[np.ndarray]


def train_detector(
    config: Config, data: Path, run: Path, methods: tuple[Method, ...] = ()
) -> tuple[AnomalyDetector, Source, Source]:
    """A detector trained on good images, the images that it was trained on, and those held out for its thresholds."""
    flags: list[object] = [config.preset, "--data", f"{data}#train", "--output", run, "--channels", 1]
    flags += ["--steps", config.steps, "--resolution", config.resolution, "--batch-size", config.batch_size]
    flags += ["--seed", config.seed, "--mixed-precision", config.mixed_precision, "--tracker", "none"]
    flags += ["--log-every", 200, "--sample-every", 2000]
    flags += [] if config.global_latent is None else ["--global-latent", config.global_latent]
    flags += [] if config.mirror else ["--no-mirror"]
    seconds_of_script("training/train_autoencoder.py", *flags)
    train, held_out = (open_source(f"{data}#{part}", channels=1) for part in ("train", "held-out"))
    facts = Facts(methods=methods, false_alarm_rate=config.false_alarm_rate, blur=config.blur, share=config.share)
    detector, _ = fit_detector(load_network(str(run)), train, held_out, facts)
    return detector, train, held_out


def detector_scores(detector: AnomalyDetector, images: Sequence[Pixels], description: str) -> list[Scored]:
    maps = [detector.maps(to_images(p)[None])[0] for p in progress(images, unit="image", description=description)]
    scores = [detector.scores(m) for m in maps]
    return [
        Scored(f"ours, {name}", np.array([s[name] for s in scores]), [m[name] for m in maps])
        for name in detector.facts.methods
    ]


def alarm_rates(detector: AnomalyDetector, scored: Scored, anomalous: np.ndarray) -> Row:
    """Shares of the good and of the anomalous images above the detector's threshold; nothing for other methods."""
    threshold = detector.facts.thresholds.get(scored.method.removeprefix("ours, "))
    if threshold is None:
        return {}
    alarms = scored.scores > threshold
    return {"false_alarms": float(alarms[~anomalous].mean()), "detected": float(alarms[anomalous].mean())}


def flattened(images: Sequence[Pixels], side: int) -> np.ndarray:
    """Grey images resized to side x side: (N, side * side) in [0, 1]."""
    return np.stack([resize(p, (side, side))[:, :, 0].astype(np.float32).ravel() / 255 for p in images])


def pca_scores(good: Sequence[Pixels], test: Sequence[Pixels], config: Config) -> Iterator[Scored]:
    """The error of PCA's reconstruction, for each size, number of components and scoring."""
    for side in config.sides:
        x, y = flattened(good, side), flattened(test, side)
        counts = [c for c in COMPONENTS if c < min(x.shape)]
        for count in [*counts, *(VARIANCES if config.dataset == "magnetic-tile" else ())]:
            pca = PCA(count, random_state=config.seed).fit(x)
            errors = np.square(y - pca.inverse_transform(pca.transform(y)))
            maps = errors.reshape(-1, side, side)
            name = f"PCA of {count}{' of the variance' if count < 1 else ''} at {side}x{side}"
            yield Scored(f"{name}, mean", errors.mean(axis=1), maps)
            if config.dataset == "fashion-mnist":
                variance = shrunk(np.square(x - pca.inverse_transform(pca.transform(x))).mean(axis=0))
                standardised = errors / variance
                yield Scored(f"{name}, standardised", standardised.mean(axis=1), standardised.reshape(maps.shape))
            for scoring, (blur, surroundings, share) in pca_scorings(config, side).items():
                smoothed = [relative(smooth(m, blur), surroundings) for m in np.sqrt(maps)]
                yield Scored(f"{name}, {scoring}", np.array([mean_of_largest(m, share) for m in smoothed]), smoothed)


def pca_scorings(config: Config, side: int) -> dict[str, tuple[float, float, float]]:
    """Blur and surroundings in pixels of an image resized to `side`, and share."""
    if config.dataset == "fashion-mnist":
        return {"smooth": (config.blur, 0.0, config.share)}
    scorings = PCA_SCORINGS | {"as ours": (config.blur, 0.0, config.share)}
    scale = side / TILE_SIDE
    return {name: (scale * blur, scale * around, share) for name, (blur, around, share) in scorings.items()}


def neighbour_distances(good: Sequence[Pixels], test: Sequence[Pixels], side: int) -> np.ndarray:
    """Mean distance to the nearest good images, on pixels: (N,)."""
    nearest = NearestNeighbors(n_neighbors=NEIGHBOURS).fit(flattened(good, side))
    return nearest.kneighbors(flattened(test, side))[0].mean(axis=1)


def auroc(scores: Any, anomalous: Any) -> float:
    """Area under the receiver operating characteristic."""
    return float(roc_auc_score(anomalous, scores))


def ordered_pairs(scores: np.ndarray, anomalous: np.ndarray) -> np.ndarray:
    """1 where an anomalous image (row) scores above a good one (column), 1/2 at a tie; the mean is the area."""
    bad, good = scores[anomalous][:, None], scores[~anomalous][None]
    return (bad > good) + 0.5 * (bad == good)


def middle_95_percent(values: Any) -> Row:
    low, high = np.percentile(values, [2.5, 97.5])
    return {"low": float(low), "high": float(high)}


def difference_interval(ours: np.ndarray, theirs: np.ndarray, anomalous: np.ndarray, seed: int) -> Row:
    """95 % interval of the difference of two areas, over 2,000 resamplings of the good and the anomalous images."""
    rng = np.random.default_rng(seed)
    gain = ordered_pairs(ours, anomalous) - ordered_pairs(theirs, anomalous)
    return middle_95_percent([gain[np.ix_(*(rng.choice(n, n) for n in gain.shape))].mean() for _ in range(2000)])


def mean_difference_interval(ours: list[np.ndarray], theirs: list[np.ndarray], labels: np.ndarray, seed: int) -> Row:
    """95 % interval of the difference of two mean areas, over 2,000 resamplings of the images of each class.

    Scores (N,) of the same images with class 0, 1, ... in turn as the good one; a resampling serves all of them.
    """
    rng = np.random.default_rng(seed)
    times = np.zeros((2000, len(labels)), np.float32)  # how often each image is drawn
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        times[:, own] = rng.multinomial(len(own), np.full(len(own), 1 / len(own)), size=len(times))
    total = np.zeros(len(times))
    for label, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        bad = labels != label
        gain = (ordered_pairs(a, bad) - ordered_pairs(b, bad)).astype(np.float32)
        total += ((times[:, bad] @ gain) * times[:, ~bad]).sum(axis=1) / gain.size
    return middle_95_percent(total / len(ours))


@dataclass(frozen=True)
class TestImage:
    """Pixels (H, W, 1), the kind of defect or "good", and where it is defective (H, W)."""

    kind: str
    pixels: Pixels
    mask: np.ndarray


def read_test_images(config: Config) -> list[TestImage]:
    """Raises DataError for a folder of another layout."""
    images = []
    for file in sorted((config.data / "test").rglob("*.jpg")):
        pixels, kind = read_pixels(file.read_bytes(), channels=1), file.parent.name
        mask = np.zeros(pixels.shape[:2], bool)
        if kind != "good":
            truth = config.data / "ground_truth" / kind / f"{file.stem}.png"
            mask = read_pixels(truth.read_bytes(), channels=1)[:, :, 0] > 127
        images.append(TestImage(kind, pixels, mask))
    if not images or not (config.data / "train" / "good").is_dir():
        raise DataError(f"{config.data} does not hold train/good, test/KIND and ground_truth/KIND")
    return images


def with_blemished_copies(held_out: Source) -> tuple[list[Pixels], list[bool]]:
    """Held-out good tiles, each followed by copies with one made blemish; and which of them have one."""
    images: list[Pixels] = []
    for index in range(len(held_out)):
        images.append(held_out[index].pixels)
        for copy in range(1, BLEMISHED_COPIES + 1):
            rng = generator_at(copy, index, Stream.CORRUPTION)
            rng.random()  # keeps the blemishes of the recorded figures
            values = blemished(held_out[index].pixels.astype(np.float32) / 255, rng)
            images.append((values.clip(0, 1) * 255).round().astype(np.uint8))
    return images, [False, *[True] * BLEMISHED_COPIES] * len(held_out)


def kind_areas(scores: np.ndarray, images: list[TestImage]) -> Row:
    """The area for each kind of defect, against the good images."""
    kinds = np.array([image.kind for image in images])
    areas = {}
    for kind in sorted({*kinds} - {"good"}):
        chosen = (kinds == "good") | (kinds == kind)
        areas[str(kind)] = auroc(scores[chosen], kinds[chosen] == kind)
    return areas


def pixel_area(maps: Sequence[np.ndarray], images: list[TestImage]) -> float:
    """The area over all pixels of all images, maps enlarged to the images' sizes."""
    largest = max(float(m.max()) for m in maps)
    full = [resize(m[:, :, None] / largest, i.mask.shape).ravel() for m, i in zip(maps, images, strict=True)]
    return auroc(np.concatenate(full), np.concatenate([i.mask.ravel() for i in images]))


def above_pca(ours: Scored, pca: list[Scored], by_blemishes: Row, anomalous: np.ndarray, seed: int) -> Row:
    """Interval of the difference to PCA, with its components and scoring chosen in four ways."""
    area = {s.method: auroc(s.scores, anomalous) for s in pca}
    means = [name for name in area if name.endswith(", mean")]
    chosen = {
        "best on these tiles": max(area, key=area.__getitem__),
        "best mean on these tiles": max(means, key=area.__getitem__),
        "as is usual": max((name for name in means if "variance" in name), key=area.__getitem__),
        "chosen by blemishes": max(by_blemishes, key=by_blemishes.__getitem__),
    }
    scores = {s.method: s.scores for s in pca}
    return {
        how: {"than": name, **difference_interval(ours.scores, scores[name], anomalous, seed)}
        for how, name in chosen.items()
    }


def judge_tiles(config: Config) -> Row:
    images = read_test_images(config)
    anomalous = np.array([image.kind != "good" for image in images])
    run = config.output / config.preset
    detector, train, held_out = train_detector(config, config.data / "train" / "good", run)
    good, test = [train[i].pixels for i in range(len(train))], [image.pixels for image in images]
    copies, has_blemish = with_blemished_copies(held_out)
    by_blemishes = {s.method: auroc(s.scores, has_blemish) for s in pca_scores(good, copies, config)}
    ours, pca = detector_scores(detector, test, "test images"), list(pca_scores(good, test, config))
    rows = []
    for scored in [*ours, *pca]:
        row = {"method": scored.method, "image_auroc": auroc(scored.scores, anomalous)}
        row |= {"pixel_auroc": pixel_area(scored.maps, images), **kind_areas(scored.scores, images)}
        rows.append(row | alarm_rates(detector, scored, anomalous))
    near = neighbour_distances(good, test, config.sides[0])
    nearest = {"method": f"{NEIGHBOURS} nearest on pixels", "image_auroc": auroc(near, anomalous)}
    return {
        "training_seconds": training_seconds(run),
        "pca_by_blemishes": by_blemishes,
        "above_pca": above_pca(ours[0], pca, by_blemishes, anomalous, config.seed),
        "rows": [*rows, nearest | kind_areas(near, images)],
    }


def judge_fashion(config: Config) -> Row:
    """Each class in turn as the good one."""
    pixels, labels = read_fashion_mnist(config.data, "train")
    test, test_labels = read_fashion_mnist(config.data, "t10k")
    if config.num_test is not None:
        drawn = np.random.default_rng(config.seed).permutation(len(test))[: config.num_test]
        test, test_labels = test[drawn], test_labels[drawn]
    rows: list[Row] = []
    seconds = 0.0
    scores: dict[str, list[np.ndarray]] = {}  # of each method, for each class in turn
    for label, name in enumerate(FASHION):
        archive, run = config.output / f"{name}.zip", config.output / name
        write_class_zip(archive, ((p, name) for p in pixels[labels == label]))
        detector, train, _ = train_detector(config, archive, run, ("l1", "mahalanobis", "standardised"))
        seconds += training_seconds(run)
        good, anomalous = [train[i].pixels for i in range(len(train))], test_labels != label
        ours = detector_scores(detector, list(test), name)
        near = neighbour_distances(good, list(test), config.sides[0])
        nearest = Scored(f"{NEIGHBOURS} nearest on pixels", near, ())
        for scored in [*ours, *pca_scores(good, list(test), config), nearest]:
            scores.setdefault(scored.method, []).append(scored.scores)
            row = {"class": name, "method": scored.method, "image_auroc": auroc(scored.scores, anomalous)}
            rows.append(row | alarm_rates(detector, scored, anomalous))
    area = {m: statistics.fmean(r["image_auroc"] for r in rows if r["method"] == m) for m in scores}
    means: list[Row] = [{"class": "mean", "method": m, "image_auroc": a} for m, a in area.items()]
    above: dict[str, Row] = {}
    for scoring in ("mean", "standardised", "smooth"):
        pca = max((m for m in area if m.startswith("PCA") and m.endswith(f", {scoring}")), key=area.__getitem__)
        for method in [m for m in scores if m.startswith("ours")]:
            interval = mean_difference_interval(scores[method], scores[pca], test_labels, config.seed)
            above.setdefault(method, {})[pca] = {"by": area[method] - area[pca], **interval}
    return {"training_seconds": seconds, "above_pca": above, "rows": means + rows}


def main(config: Config) -> None:
    check_ranges(config)
    check_writable(config.output)
    results = judge_fashion(config) if config.dataset == "fashion-mnist" else judge_tiles(config)
    cells = [{k: v if isinstance(v, str) else f"{v:.3f}" for k, v in row.items()} for row in results["rows"]]
    write_report(config.output, provenance(config), results, markdown_table(cells))
    print(f"trained in {results['training_seconds'] / 60:.1f} minutes; figures are in {config.output}")


if __name__ == "__main__":
    with one_line_errors():
        main(parse_config(PRESETS, description="Find what differs from good images."))
