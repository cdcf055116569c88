"""What the tunings of a codec lower, in training and where an encoder makes an effort."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def weighted_squared_error(reconstruction: Tensor, images: Tensor, weights: Tensor) -> Tensor:
    """Mean over all values of images (B, C, H, W) in [-1, 1], each image's errors times its weight (B,)."""
    return (weights[:, None, None, None] * (reconstruction.float() - images.float()).square()).mean()


SCALE_WEIGHTS = (1.0, 1.0, 2.0, 4.0)
"""Of the errors of whole images, and of those 1/2, 1/4 and 1/8 as large: low frequencies are seen most."""
WINDOW = 9
"""Pixels each way."""
LEAST_DEVIATION, USUAL_DEVIATION = 0.04, 0.1
"""On [-1, 1]: where an image's deviation is below the least, errors count alike; at the usual one, as they are."""


def masked_error(reconstruction: Tensor, images: Tensor, weights: Tensor) -> Tensor:
    """The squared error as it is seen: at several scales, and the less of it, the livelier the image is there.

    Each value's error is divided by the standard deviation of the channels' mean around it (contrast masking, as in
    the denominator of SSIM: Wang et al. 2004). Smooth areas, where a pattern of a single level is seen, count most.

    Args:
        reconstruction, images: (B, C, H, W) in [-1, 1].
        weights: (B,) times each image's errors.
    """
    reconstruction, images = reconstruction.float(), images.float()
    luma = images.mean(dim=1, keepdim=True)
    variance = (around(luma.square()) - around(luma).square()).clamp(min=0)
    visibility = weights[:, None, None, None] * USUAL_DEVIATION / (variance + LEAST_DEVIATION**2).sqrt()
    errors = reconstruction - images
    total = torch.zeros((), device=images.device)
    for weight in SCALE_WEIGHTS:
        total = total + weight * (visibility * errors.square()).mean()
        visibility, errors = halved(visibility), halved(errors)
    return total


def around(x: Tensor) -> Tensor:
    """Means over WINDOW x WINDOW pixels of x (B, C, H, W), of those that there are: (B, C, H, W)."""
    for shape in ((WINDOW, 1), (1, WINDOW)):  # one after the other is several times as fast
        padding = tuple(n // 2 for n in shape)
        x = functional.avg_pool2d(x, shape, stride=1, padding=padding, count_include_pad=False)
    return x


def halved(x: Tensor) -> Tensor:
    """Means over 2 x 2 pixels, or of what is left of an odd number."""
    return functional.avg_pool2d(x, 2, ceil_mode=True)


DISTORTIONS = {"visual": masked_error, "psnr": weighted_squared_error}
"""Of images (B, C, H, W), decoded and original, with weights (B,)."""
