"""`ldm-vae anomaly fit | score`: which images are not like the good ones."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ldm_vae.commands.embed import in_tiles, say_bad
from ldm_vae.errors import BadImageError, ConfigError, nothing_usable
from ldm_vae.files import atomic, check_writable, write_csv
from ldm_vae.hub import is_hub_id

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
    held_out = command.held_out if command.held_out is not None else f"{command.data}#held-out"
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
    from ldm_vae.analysis.anomaly import FACTS, FOLDER, STATISTICS, fit_detector
    from ldm_vae.data.sources import check_finite, open_source
    from ldm_vae.files import staged_directory
    from ldm_vae.models.interface import channels_of
    from ldm_vae.models.loading import check_device, load_network

    if command.output is None and is_hub_id(command.vae):
        raise ConfigError(f"{command.vae} is on the hub: add --output, a folder for the detector")
    folder = command.output or Path(command.vae) / FOLDER
    if folder.exists():
        if not {p.name for p in folder.iterdir()} <= {FACTS, STATISTICS}:
            raise ConfigError(f"{folder} holds other things than a detector: choose another --output")
        if not command.overwrite:
            raise ConfigError(f"{folder} is there: add --overwrite to replace it, or choose another --output")
    check_unseen(command)
    check_device(command.device)
    vae = in_tiles(load_network(command.vae).to(command.device))
    check_writable(folder.parent)
    given = command.data if command.held_out is not None else f"{command.data}#train"
    held_out = command.held_out if command.held_out is not None else f"{command.data}#held-out"
    sources = [open_source(path, channels=channels_of(vae)) for path in (given, held_out)]
    for source, path in zip(sources, (given, held_out), strict=True):
        check_finite(source, path, None)
    detector, bad = fit_detector(
        vae,
        *sources,
        methods=command.methods,
        false_alarm_rate=command.false_alarm_rate,
        blur=command.blur,
        surroundings=command.surroundings,
        share=command.share,
        lpips_backbone=command.lpips_backbone,
    )
    with staged_directory(folder) as staging:
        detector.save(staging)
    say_bad(bad)
    facts = detector.facts
    said = ", ".join(f"{m} {t:.4g}" for m, t in facts.thresholds.items())
    print(f"thresholds from {facts.held_out} good images held out, for {facts.false_alarm_rate:.1%} alarms: {said}")
    print(f"the detector is in {folder}")


def score(command: Score) -> None:
    from tqdm import tqdm

    from ldm_vae.analysis.anomaly import FOLDER, AnomalyDetector, images_of
    from ldm_vae.commands.folders import numbered, result_names, stays_inside
    from ldm_vae.data.sources import check_finite, check_outside, open_source
    from ldm_vae.grids import heat_map
    from ldm_vae.models.interface import channels_of
    from ldm_vae.models.loading import check_device, load_network, local_folder

    folder = command.detector or local_folder(command.vae, [f"{FOLDER}/*"]) / FOLDER
    check_device(command.device)
    vae = in_tiles(load_network(command.vae).to(command.device))
    detector = AnomalyDetector.load(folder, vae)
    facts = detector.facts
    method = command.method or facts.methods[-1]
    if method not in facts.methods:
        raise ConfigError(f"the detector has no {method}: it has {', '.join(facts.methods)}")
    source = open_source(command.data, channels=channels_of(vae))
    check_finite(source, command.data, None)
    check_outside(command.output, command.data, flag="--data")
    check_writable(command.output)
    names = numbered(source.name(i) for i in range(len(source)))
    files = result_names(names, ".png")
    rows, bad = [], {}
    for index, (_, images) in enumerate(tqdm(images_of(source, vae), total=len(source), unit="image")):
        name = names[index]
        try:
            if isinstance(images, str):
                raise BadImageError(images)
            maps, reconstruction = detector.maps(images)
        except BadImageError as error:
            bad[name] = str(error)
            continue
        scores = detector.scores(maps)
        row: dict[str, Any] = {"name": name}
        for m, value in scores.items():
            row |= {m: f"{value:.6g}", f"{m}_anomalous": int(value > facts.thresholds[m])}
        rows.append(row)
        if command.heat_maps and stays_inside(files[index]):
            target = command.output / "heat_maps" / files[index]
            target.parent.mkdir(parents=True, exist_ok=True)
            picture = heat_map(images[0], reconstruction[0].cpu(), maps[method], facts.thresholds[method])
            with atomic(target) as out:
                picture.save(out, "PNG")
    if not rows:
        raise nothing_usable(bad)
    write_csv(command.output / "scores.csv", rows)
    write_csv(command.output / "bad_images.csv", [{"name": n, "reason": r} for n, r in sorted(bad.items())])
    found = sum(r[f"{method}_anomalous"] for r in rows)
    print(f"{found} of {len(rows)} images are anomalies by {method}, {len(bad)} bad; see {command.output}")
