"""What an autoencoder that saw only good images makes of others: a map of scores, a score an image, and a threshold.

A method gives a map (H, W) that is large where an image differs from good ones: by how badly it is reconstructed
(Bergmann et al. 2019, "MVTec AD", section 4), by how far its latents are from those of good images (Mahalanobis
distance, as in Defard et al. 2021, "PaDiM", equation 2, with one Gaussian for all places), or by what a network says
that was taught to find blemishes made on good images. The map is smoothed, and an image's score is the mean of its
largest part. Each image is scored alone: no figure depends on a batch or an order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from ldm_vae.data.conversion import to_images
from ldm_vae.data.images import Sample, centre_square
from ldm_vae.data.sources import BadImages, Source, usable
from ldm_vae.errors import BadImageError, ConfigError, DataError, ModelError, ModelMismatchError, nothing_usable
from ldm_vae.files import write_json
from ldm_vae.metrics import SMALLEST_FOR_SSIM
from ldm_vae.models.interface import channels_of, fingerprint, latent_channels_of, side_for, stride_of
from ldm_vae.models.reconstruction import encode_mean
from ldm_vae.objectives.perceptual import SMALLEST_IMAGE, Backbone, LPIPSLoss

Method = Literal["l1", "ssim", "lpips", "mahalanobis", "standardised", "blemishes"]
FOLDER = "anomaly"
FACTS, STATISTICS = "anomaly.json", "statistics.safetensors"
SHRINKAGE = 0.01
"""Of the latents' covariance towards a multiple of the identity: no eigenvalue is below this share of their mean. And
of the errors' variance towards its mean."""
Map = np.ndarray[Any, Any]


def is_blemish_detector(vae: Any) -> bool:
    """Whether a network gives no images but, of one channel, the log-odds that a blemish is there."""
    return bool(vae.config.get("finds_blemishes"))


def as_images(vae: Any, output: Tensor) -> Tensor:
    """What a decoder gave, as images in [-1, 1]: of log-odds the probability, 1 where it is sure of a blemish."""
    return torch.tanh(output / 2) if is_blemish_detector(vae) else output.clamp(-1, 1)


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What scores depend on beside the autoencoder; `fit_detector` sets `vae`, `thresholds` and `held_out`."""

    vae: str = ""
    """Fingerprint of the autoencoder."""
    methods: tuple[Method, ...] = ()
    """l1, ssim and mahalanobis unless given; blemishes for a network that finds these, which has no other."""
    blur: float = 4.0
    """Standard deviation in pixels of the smoothing of a map."""
    surroundings: float = 0.0
    """Standard deviation in pixels of what a map is divided by, its mean around each place; 0 for not."""
    share: float = 0.001
    """The part of a map, the largest of it, whose mean is the image's score."""
    false_alarm_rate: float = 0.05
    """Asked for; on new good images it holds on average over what was held out."""
    thresholds: dict[str, float] = field(default_factory=dict)
    """By method: a higher score is an anomaly."""
    held_out: int = 0
    """Good images that the thresholds come from."""
    lpips_backbone: Backbone = "vgg"
    lpips_pretrained: bool = True


class AnomalyDetector:
    """An autoencoder, and what good images look like to it.

    Args:
        vae: any diffusers autoencoder.
        lpips: needed for that method alone.
        mean, whitening: of good images' latents, (c,) and (c, c): |whitening @ (z - mean)| is the Mahalanobis distance.
        variance: of good images' errors at each pixel (H, W), needed for the method `standardised` alone.

    Raises:
        ModelMismatchError: these are another autoencoder's facts.
    """

    def __init__(
        self,
        vae: Any,
        facts: Facts,
        *,
        mean: np.ndarray,
        whitening: np.ndarray,
        variance: np.ndarray | None,
        lpips: LPIPSLoss | None,
    ) -> None:
        if facts.vae != fingerprint(vae):
            raise ModelMismatchError(
                f"the detector was fitted for the autoencoder {facts.vae[:16]}, this one is {fingerprint(vae)[:16]}: "
                "fit it anew with `ldm-vae anomaly fit`"
            )
        self.vae, self.facts = vae.eval(), facts
        self.device = next(vae.parameters()).device
        self.mean, self.whitening, self.variance, self.lpips = mean, whitening, variance, lpips

    @torch.inference_mode()
    def maps(self, images: Tensor) -> tuple[dict[str, Map], Tensor]:
        """One image (1, C, H, W) in [-1, 1] -> by method its smoothed map, float32 (H, W); and its reconstruction.

        A network that finds blemishes has in its place how probable one is, (1, 1, H, W) in [-1, 1].

        Raises:
            BadImageError: too small for a method.
            ValueError: more than one image.
        """
        if len(images) != 1:
            raise ValueError(f"{len(images)} images: a map is made of one at a time")
        images = images.to(self.device)
        height, width = images.shape[-2:]
        side = side_for(self.vae, None)
        if side is not None and (height, width) != (side, side):
            raise BadImageError(f"{width}x{height} pixels: this autoencoder's vector is of {side}x{side}")
        latents = encode_mean(self.vae, images)
        output = self.vae.decode(latents).sample[..., :height, :width].float()
        reconstruction = as_images(self.vae, output)
        maps: dict[str, Map] = {}
        for method in self.facts.methods:
            match method:
                case "l1":
                    raw = (images - reconstruction).abs().mean(dim=1)
                case "ssim":
                    raw = dissimilarity(images, reconstruction)
                case "lpips":
                    assert self.lpips is not None
                    least = SMALLEST_IMAGE[self.facts.lpips_backbone]
                    check_side(images, least, method)
                    raw = self.lpips.maps(reconstruction, images)
                case "mahalanobis":
                    raw = self.distances(latents, height, width)
                case "blemishes":
                    raw = nn.functional.softplus(output[:, 0])  # -log(1 - p): what is certain counts for more
                case "standardised":
                    assert self.variance is not None
                    raw = squared_error(images, reconstruction) / torch.from_numpy(self.variance).to(self.device)
            maps[method] = relative(smooth(raw[0].float().cpu().numpy(), self.facts.blur), self.facts.surroundings)
        return maps, reconstruction

    def distances(self, latents: Tensor, height: int, width: int) -> Tensor:
        """Latents (1, c, h, w) -> Mahalanobis distances (1, H, W)."""
        centred = latents[0].cpu().double() - torch.from_numpy(self.mean)[:, None, None]
        white = torch.einsum("ij,jhw->ihw", torch.from_numpy(self.whitening), centred)
        distances = white.square().sum(dim=0).sqrt()[None, None].float()  # (1, 1, h, w)
        size = [n * stride_of(self.vae) for n in latents.shape[2:]]
        enlarged = nn.functional.interpolate(distances, size=size, mode="bilinear", align_corners=False)
        return enlarged[:, 0, :height, :width]

    def scores(self, maps: dict[str, Map]) -> dict[str, float]:
        """By method: the mean of the largest `share` of a map, of one pixel at least."""
        return {method: mean_of_largest(values, self.facts.share) for method, values in maps.items()}

    def save(self, folder: Path) -> None:
        """Into an existing folder."""
        write_json(folder / FACTS, asdict(self.facts))
        tensors = {"mean": self.mean, "whitening": self.whitening}
        save_file(tensors if self.variance is None else tensors | {"variance": self.variance}, folder / STATISTICS)

    @classmethod
    def load(cls, folder: Path, vae: Any) -> Self:
        """Raises ModelError for a folder without a detector, or with a damaged one."""
        if not (folder / FACTS).is_file():
            raise ModelError(f"{folder} holds no detector: fit one with `ldm-vae anomaly fit`")
        try:
            record = json.loads((folder / FACTS).read_text())
            if record.keys() != asdict(Facts()).keys():
                raise ValueError(f"{FACTS} holds other facts")
            facts = replace(Facts(**record), methods=tuple(record["methods"]))
            tensors = load_file(folder / STATISTICS)
            mean, whitening = tensors["mean"], tensors["whitening"]
            variance = tensors["variance"] if "standardised" in facts.methods else None
        except Exception as error:  # damaged files raise many kinds
            raise ModelError(f"cannot load the detector {folder}: {type(error).__name__}: {error}") from None
        return cls(vae, facts, mean=mean, whitening=whitening, variance=variance, lpips=lpips_for(vae, facts))


def lpips_for(vae: Any, facts: Facts) -> LPIPSLoss | None:
    """None where no method needs it. Raises ModelError for weights that are not there."""
    if "lpips" not in facts.methods:
        return None
    lpips = LPIPSLoss(facts.lpips_backbone, pretrained=facts.lpips_pretrained, image_channels=channels_of(vae))
    return lpips.to(next(vae.parameters()).device)


def squared_error(images: Tensor, reconstruction: Tensor) -> Tensor:
    """Mean over the channels, at each pixel: (1, H, W)."""
    return (images - reconstruction).square().mean(dim=1)


def dissimilarity(images: Tensor, reconstruction: Tensor) -> Tensor:
    """1 - SSIM at each pixel, mean over the channels: (1, H, W), in 0..2."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    check_side(images, SMALLEST_FOR_SSIM, "ssim")
    pair = (reconstruction + 1) / 2, (images + 1) / 2  # SSIM's luminance term wants values from 0 on
    _, full = structural_similarity_index_measure(*pair, data_range=1.0, return_full_image=True, sigma=1.5)
    return 1 - full.mean(dim=1)


def check_side(images: Tensor, least: int, method: str) -> None:
    if min(images.shape[-2:]) < least:
        raise BadImageError(f"{images.shape[-1]}x{images.shape[-2]} pixels: {method} needs {least} each way")


def smooth(values: Map, blur: float) -> Map:
    return np.asarray(gaussian_filter(values, blur, mode="reflect") if blur > 0 else values, np.float32)


def relative(values: Map, surroundings: float) -> Map:
    """A map in units of its mean around each pixel, within about so many pixels: what is usual there counts less.

    A tenth of the whole map's mean is added below, so that nothing is strange where hardly anything is wrong.
    """
    if surroundings == 0:
        return values
    around = gaussian_filter(values, surroundings, mode="reflect")
    return np.asarray(values / (around + 0.1 * values.mean() + 1e-12), np.float32)


def mean_of_largest(values: Map, share: float) -> float:
    count = max(round(share * values.size), 1)
    return float(np.partition(values, values.size - count, axis=None)[-count:].astype(np.float64).mean())


def threshold_at(scores: Sequence[float], false_alarm_rate: float) -> float:
    """What a new good image's score is above at most at that rate, on average over the good images held out.

    The k-th smallest of n scores, k = ceil((n + 1)(1 - rate)) (conformal prediction: Vovk et al. 2005, section 2.2). It
    assumes nothing of the scores but that new good images are drawn as these were.

    Raises:
        DataError: too few to promise so low a rate.
    """
    n = len(scores)
    k = math.ceil((n + 1) * (1 - false_alarm_rate) - 1e-9)
    if k > n:
        least = math.ceil(1 / false_alarm_rate) - 1
        raise DataError(
            f"{n} good images were held out: a false-alarm rate of {false_alarm_rate:g} needs at least {least}"
        )
    return float(np.sort(np.asarray(scores, float))[k - 1])


class LatentGaussian:
    """Mean and covariance of latents (c, h, w) over all their places, added up image by image in float64."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.total = np.zeros(channels)
        self.products = np.zeros((channels, channels))

    def add(self, latents: Tensor) -> None:
        rows = latents.flatten(1).T.cpu().double().numpy()  # (h * w, c)
        self.count += len(rows)
        self.total += rows.sum(axis=0)
        self.products += rows.T @ rows

    def whitening(self) -> tuple[np.ndarray, np.ndarray]:
        """mean (c,) and a matrix (c, c) that makes the covariance, shrunk by SHRINKAGE, the identity."""
        mean = self.total / self.count
        covariance = self.products / self.count - np.outer(mean, mean)
        c = len(mean)
        ridge = max(np.trace(covariance) / c, 1e-12)
        covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * ridge * np.eye(c)
        return mean, np.linalg.inv(np.linalg.cholesky(covariance))


def shrunk(variance: np.ndarray) -> np.ndarray:
    """By SHRINKAGE towards its mean, so that pixels that never vary count no more than 1 / SHRINKAGE times the mean."""
    return np.asarray((1 - SHRINKAGE) * variance + SHRINKAGE * max(variance.mean(), 1e-12), np.float32)


def image_for(vae: Any, sample: Sample) -> Tensor:
    """(1, C, H, W) in [-1, 1]; for one vector an image, the centred square of the side that `vae` was made for."""
    side = side_for(vae, None)
    return to_images(sample.pixels if side is None else centre_square(sample.pixels, side))[None]


def fit_detector(vae: Any, good: Source, held_out: Source, facts: Facts) -> tuple[AnomalyDetector, BadImages]:
    """A detector for this autoencoder, and the bad images met: name -> reason.

    Args:
        good: images without anomalies, whose latents are the measure; the autoencoder may have been trained on them.
        held_out: others, that it was not trained on: they set the thresholds.

    Raises:
        ConfigError: a method that this autoencoder does not have, or numbers that cannot be.
        DataError: nothing usable, or too few held out for the rate.
    """
    methods = facts.methods or (("blemishes",) if is_blemish_detector(vae) else ("l1", "ssim", "mahalanobis"))
    facts = replace(facts, vae=fingerprint(vae), methods=tuple(dict.fromkeys(methods)))
    check_facts(facts, vae)
    rate = facts.false_alarm_rate
    if len(held_out) < math.ceil(1 / rate) - 1:
        threshold_at([0.0] * len(held_out), rate)  # says so before hours are spent
    lpips = lpips_for(vae, facts)
    bad_images: BadImages = {}
    mean, whitening, variance = measure_good(vae, good, facts, bad_images)
    detector = AnomalyDetector(vae, facts, mean=mean, whitening=whitening, variance=variance, lpips=lpips)

    def scores_of(index: int) -> dict[str, float]:
        return detector.scores(detector.maps(image_for(vae, held_out[index]))[0])

    rows = [scores for _, scores in usable(held_out, bad_images, read=scores_of)]
    if not rows:
        raise nothing_usable(bad_images)
    thresholds: dict[str, float] = {m: threshold_at([r[m] for r in rows], rate) for m in facts.methods}
    detector.facts = replace(facts, thresholds=thresholds, held_out=len(rows))
    return detector, bad_images


def check_facts(facts: Facts, vae: Any) -> None:
    """Raises ConfigError for a method that this autoencoder does not have, or numbers that cannot be."""
    blemishes_alone = facts.methods == ("blemishes",)
    if blemishes_alone != is_blemish_detector(vae) or ("blemishes" in facts.methods and not blemishes_alone):
        raise ConfigError("blemishes is the one method of networks that find these, and of no other")
    if not 0 < facts.false_alarm_rate < 1 or not 0 <= facts.blur < math.inf or not 0 < facts.share <= 1:
        raise ConfigError("0 < false-alarm rate < 1, blur >= 0 and 0 < share <= 1 are needed")
    if not 0 <= facts.surroundings < math.inf:
        raise ConfigError(f"the surroundings are {facts.surroundings:g} pixels: they must be 0 or more")
    if "standardised" in facts.methods and side_for(vae, None) is None:
        raise ConfigError("standardised is for one vector an image (--global-latent), whose images are all of one size")


@torch.inference_mode()
def measure_good(
    vae: Any, good: Source, facts: Facts, bad_images: BadImages
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Of good images: mean and whitening of their latents, and for `standardised` the errors' variance at each pixel.

    Raises:
        DataError: nothing usable.
    """
    device = next(vae.parameters()).device
    gaussian = LatentGaussian(latent_channels_of(vae))
    errors, count = np.zeros(()), 0
    for _, sample in usable(good, bad_images):
        images = image_for(vae, sample).to(device)
        latents = encode_mean(vae, images)
        gaussian.add(latents[0])
        if "standardised" in facts.methods:
            reconstruction = vae.decode(latents).sample.clamp(-1, 1)
            errors = errors + squared_error(images, reconstruction)[0].cpu().double().numpy()
            count += 1
    if not gaussian.count:
        raise nothing_usable(bad_images)
    return *gaussian.whitening(), shrunk(errors / count) if count else None
