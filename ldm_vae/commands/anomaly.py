"""`ldm-vae anomaly fit | score`: which images are not like the good ones."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ldm_vae.commands.embed import print_bad, ready
from ldm_vae.data.reader import USUAL
from ldm_vae.errors import ConfigError, nothing_usable
from ldm_vae.files import atomic, check_writable, write_bad_images, write_csv
from ldm_vae.hub import is_hub_id
from ldm_vae.runs.config import Reading

Method = Literal["l1", "ssim", "lpips", "mahalanobis", "standardised", "blemishes"]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Measure good images, and set the thresholds on others that the autoencoder was not trained on."""

    vae: str
    """Run directory, model folder or hub id of an autoencoder that was trained on good images."""
    data: str
    """Good images."""
    held_out: str | None = None
    """Good images that the autoencoder was not trained on. Unless given, every tenth of --data, and the others are
    measured: train on DATA#train."""
    output: Path | None = None
    """Folder of the detector; `anomaly` in --vae unless given."""
    methods: tuple[Method, ...] = ()
    """l1, ssim and mahalanobis unless given, and blemishes for networks that find these; lpips needs the weights of its
    backbone."""
    false_alarm_rate: float = 0.05
    blur: float = 4.0
    """Smoothing of the maps, in pixels."""
    surroundings: float = 0.0
    """Divide the maps by what is usual within so many pixels, three times the blur say; 0: do not."""
    share: float = 0.001
    """The largest part of a map, whose mean is the score."""
    lpips_backbone: Literal["vgg", "alex", "squeeze"] = "vgg"
    overwrite: bool = False
    device: str = "cpu"
    reading: Reading = USUAL

    @property
    def held_out_images(self) -> str:
        return f"{self.data}#held-out" if self.held_out is None else self.held_out


@dataclass(frozen=True, kw_only=True)
class Score:
    """Score images: a CSV of all, and a heat map of each."""

    vae: str
    data: str
    output: Path
    """Folder for scores.csv and heat_maps/."""
    detector: Path | None = None
    """What `anomaly fit` wrote; `anomaly` in --vae unless given."""
    method: Method | None = None
    """Of the heat maps; the detector's last unless given."""
    heat_maps: bool = True
    device: str = "cpu"
    reading: Reading = USUAL


@dataclass(frozen=True)
class Anomaly:
    """Find images that are unlike good ones."""

    action: tyro.conf.OmitArgPrefixes[
        tyro.conf.OmitSubcommandPrefixes[
            Annotated[Fit, tyro.conf.subcommand("fit")] | Annotated[Score, tyro.conf.subcommand("score")]
        ]
    ]


def find_anomalies(command: Anomaly) -> None:
    action: Any = command.action
    return fit(action) if isinstance(action, Fit) else score(action)


def check_unseen(command: Fit) -> None:
    """Raises ConfigError where the autoencoder was trained on the images that are to be held out."""
    held_out = command.held_out_images
    for run in (Path(command.vae), Path(command.vae).parent):  # a run, or the model in it
        try:
            seen = json.loads((run / "config.json").read_text())["config"]["data"]
            (trained_on, part), (used, other) = (split_of(path) for path in (seen, held_out))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # not a run of ours: the user knows
        if trained_on == used and {part, other} != {"train", "held-out"}:
            raise ConfigError(
                f"{command.vae} was trained on {seen}, of which {held_out} has a part: train on {trained_on}#train, or "
                "give --held-out other good images"
            )


def split_of(path: str) -> tuple[str, str]:
    """A source, with whatever names it in one way, and the part of it."""
    base, _, part = path.partition("#")
    return str(Path(base).resolve()) if Path(base).exists() else base, part


def fit(command: Fit) -> None:
    from ldm_vae.analysis.anomaly import FACTS, FOLDER, STATISTICS, Facts, fit_detector
    from ldm_vae.data.sources import check_finite, open_source
    from ldm_vae.files import staged_directory
    from ldm_vae.models.interface import channels_of
    from ldm_vae.models.loading import load_network

    if command.output is None and is_hub_id(command.vae):
        raise ConfigError(f"{command.vae} is on the hub: add --output, a folder for the detector")
    folder = command.output or Path(command.vae) / FOLDER
    if folder.exists():
        if not {p.name for p in folder.iterdir()} <= {FACTS, STATISTICS}:
            raise ConfigError(f"{folder} holds other things than a detector: choose another --output")
        if not command.overwrite:
            raise ConfigError(f"{folder} is there: add --overwrite to replace it, or choose another --output")
    check_unseen(command)
    vae = ready(load_network, command.vae, command.device)
    check_writable(folder.parent)
    good = command.data if command.held_out is not None else f"{command.data}#train"
    sources = []
    for path in (good, command.held_out_images):
        sources.append(open_source(path, channels=channels_of(vae), options=command.reading))
        check_finite(sources[-1], path, None)
    asked = Facts(
        methods=command.methods,
        false_alarm_rate=command.false_alarm_rate,
        blur=command.blur,
        surroundings=command.surroundings,
        share=command.share,
        lpips_backbone=command.lpips_backbone,
    )
    detector, bad_images = fit_detector(vae, sources[0], sources[1], asked)
    with staged_directory(folder) as staging:
        detector.save(staging)
    print_bad(bad_images)
    facts = detector.facts
    thresholds = ", ".join(f"{method} {threshold:.4g}" for method, threshold in facts.thresholds.items())
    rate = f"{facts.false_alarm_rate:.1%} alarms"
    print(f"thresholds from {facts.held_out} good images held out, for {rate}: {thresholds}")
    print(f"the detector is in {folder}")


def score(command: Score) -> None:
    from ldm_vae.analysis.anomaly import FOLDER, AnomalyDetector, image_for
    from ldm_vae.commands.folders import numbered, result_names, stays_inside
    from ldm_vae.data.sources import BadImages, check_finite, check_outside, open_source, usable
    from ldm_vae.grids import heat_map
    from ldm_vae.models.interface import channels_of
    from ldm_vae.models.loading import load_network, local_folder
    from ldm_vae.progress import progress

    vae = ready(load_network, command.vae, command.device)
    detector = AnomalyDetector.load(command.detector or local_folder(command.vae, [f"{FOLDER}/*"]) / FOLDER, vae)
    thresholds = detector.facts.thresholds
    method = command.method or detector.facts.methods[-1]
    if method not in thresholds:
        raise ConfigError(f"the detector has no {method}: it has {', '.join(thresholds)}")
    source = open_source(command.data, channels=channels_of(vae), options=command.reading)
    check_finite(source, command.data, None)
    check_outside(command.output, command.data, flag="--data")
    check_writable(command.output)
    names = numbered(source.name(i) for i in range(len(source)))
    files = result_names(names, ".png")

    def judge(index: int) -> tuple[Any, Any, Any]:
        images = image_for(vae, source[index])
        return images, *detector.maps(images)

    rows: list[dict[str, Any]] = []
    bad_images: BadImages = {}
    indices = progress(range(len(source)), unit="image")
    for index, (images, maps, reconstruction) in usable(source, bad_images, indices=indices, read=judge):
        row: dict[str, Any] = {"name": names[index]}
        for m, value in detector.scores(maps).items():
            row |= {m: f"{value:.6g}", f"{m}_anomalous": int(value > thresholds[m])}
        rows.append(row)
        if command.heat_maps and stays_inside(files[index]):
            target = command.output / "heat_maps" / files[index]
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic(target) as out:
                heat_map(images[0], reconstruction[0].cpu(), maps[method], thresholds[method]).save(out, "PNG")
    if not rows:
        raise nothing_usable(bad_images)
    write_csv(command.output / "scores.csv", rows)
    write_bad_images(command.output, bad_images)
    anomalies = sum(row[f"{method}_anomalous"] for row in rows)
    print(f"{anomalies} of {len(rows)} images are anomalies by {method}, {len(bad_images)} bad; see {command.output}")
