"""LatentDiffusionPipeline: noise, or an image and noise, -> denoiser -> latents -> autoencoder -> images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import huggingface_hub
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

import ldm_vae.models.autoencoder  # noqa: F401  # of a saved pipeline, diffusers loads classes of imported modules only
from ldm_vae.data.conversion import check_output_type, images_from, images_to, mask_from
from ldm_vae.errors import ModelError
from ldm_vae.latents.scaling import scale_latents, scale_of, unscale_latents
from ldm_vae.models.interface import channels_of, fingerprint, latent_channels_of, stride_of
from ldm_vae.models.loading import find_saved, load_saved
from ldm_vae.models.reconstruction import encode_mean, turn_on_tiling
from ldm_vae.models.unet import num_classes_of, patch_size_of
from ldm_vae.sampling import (
    Sampling,
    Seed,
    StepCallback,
    check_interpolation,
    common_count,
    generators_for,
    prediction_of,
    sample_latents,
    slerp,
)

AT_ONCE = 8
"""Images that go through the autoencoder together, however many are asked for."""

ClassLabel = int | str
Callback = Callable[["LatentDiffusionPipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Start:
    """What sampling starts from, N of each, or 1 for all."""

    noise: Tensor
    """(N, c, h, w)."""
    labels: Tensor | None
    """(N,)."""
    generators: list[torch.Generator]
    images: Tensor | None = None
    """(M, C, H, W) in [-1, 1], of whose size the results are."""
    known: Tensor | None = None
    """Scaled latents (N, c, h, w) of the images."""
    mask: Tensor | None = None
    """Bool (M, 1, H, W): True where pixels are generated, False where they are the reconstruction's."""


class LatentDiffusionPipeline(DiffusionPipeline):
    """Images from noise, from an image, into the hole of an image, and between two seeds or two images.

    An image depends on its own generator alone, not on the batch that it is in.

    Args:
        vae: any diffusers autoencoder; its config says how latents are scaled (`latents/scaling.py`).
        unet: a UNet2DModel over scaled latents; with `num_class_embeds` = K + 1 it is conditional, class K being none.
        scheduler: one of `sampling.SCHEDULERS`, for what the denoiser predicts.
        class_names: of the K classes, in the order of their labels.

    Raises:
        ValueError: parts that do not fit together.
    """

    model_cpu_offload_seq = "unet->vae"
    _callback_tensor_inputs = ("latents",)

    def __init__(self, vae: Any, unet: Any, scheduler: Any, class_names: list[str] | None = None) -> None:
        super().__init__()
        patch_size_of(unet, latent_channels_of(vae))
        if class_names and len(class_names) != num_classes_of(unet):
            raise ValueError(f"{len(class_names)} class names for a denoiser of {num_classes_of(unet)} classes")
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler)
        self.register_to_config(class_names=list(class_names) if class_names else None)

    @classmethod
    def download(cls, pretrained_model_name: str, **keywords: Any) -> str:
        """The folder of a hub id; diffusers' own refuses a repository with a class that is not in diffusers."""
        options = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
        keywords = {k: v for k, v in keywords.items() if k in options and v is not None}
        files = ["*.json", "*.safetensors"]
        return str(huggingface_hub.snapshot_download(pretrained_model_name, allow_patterns=files, **keywords))

    @property
    def num_classes(self) -> int:
        """K of K classes; 0 for an unconditional model."""
        return num_classes_of(self.unet)

    def enable_vae_tiling(self) -> None:
        """Lets the autoencoder work on tiles: large images in little memory."""
        turn_on_tiling(self.vae)

    def disable_vae_tiling(self) -> None:
        self.vae.disable_tiling()

    @torch.no_grad()
    def __call__(
        self,
        class_labels: ClassLabel | Sequence[ClassLabel] | Tensor | None = None,
        num_images: int = 1,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        generator: Seed | Sequence[Seed] | None = None,
        latents: Tensor | None = None,
        image: Any = None,
        strength: float = 0.8,
        mask_image: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """Generates images: `.images`, a list of PIL images unless `output_type` asks for something else.

        There are as many as the options that are lists (labels, generators, images) have entries, or `num_images`.

        Args:
            class_labels: 0..K-1, or names of classes; one for all images or one each. None: no class.
            height, width: in pixels, multiples of the autoencoder's stride; by default the denoiser's training size.
            num_inference_steps, guidance_scale, guidance_interval, strength: see `sampling.Sampling`.
            generator: a generator or seed for each image; a single one draws the seeds of several.
            latents: initial noise (N, c, H/f, W/f) instead.
            image: to start from, of any size, as `data.conversion.images_from` takes it.
            mask_image: of the image's size; white is generated, the rest is the image's reconstruction.
            output_type: "pil"; "np" (N, H, W, C) or "pt" (N, C, H, W), in [0, 1]; "latent", the scaled latents.
            callback_on_step_end: f(pipeline, step, timestep, {"latents": ...}) -> a dictionary, perhaps of new latents.

        Raises:
            ValueError: an option that cannot work, with one that could.
        """
        check_output_type(output_type)
        sampling = Sampling(num_inference_steps, strength, guidance_scale, guidance_interval)
        size = (height, width)
        start = starting_point(self, class_labels, num_images, generator, latents, image, mask_image, size)
        on_step_end = step_callback(self, callback_on_step_end, callback_on_step_end_tensor_inputs)
        return self.finish(start, sampling, output_type, return_dict, on_step_end=on_step_end)

    def interpolate(self, seed_a: Seed, seed_b: Seed, num_images: int = 8, **options: Any) -> Any:
        """Images whose noise goes from seed a's to seed b's along the great circle (Shoemake 1985, section 3.3).

        The first and last are the images of the two seeds. `options` are those of a call.
        """
        check_interpolation(num_images, self.scheduler)
        size = self.latent_size(options.pop("height", None), options.pop("width", None), None)
        a, b = (self.noise_for(generators_for(seed, 1), size) for seed in (seed_a, seed_b))
        frames = torch.cat([slerp(a, b, i / (num_images - 1)) for i in range(num_images)])
        return self(num_images=num_images, latents=frames, **options)

    @torch.no_grad()
    def interpolate_images(
        self,
        image_a: Any,
        image_b: Any,
        num_images: int = 8,
        *,
        class_labels: Any = None,
        num_inference_steps: int = 50,
        strength: float = 0.5,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        generator: Seed | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """Images between two of one size: both noised alike, mixed linearly, denoised (Ho et al. 2020, section 4.3).

        The first and last are what image-to-image makes of the two; at strength 0 only their latents are mixed.
        """
        check_output_type(output_type)
        check_interpolation(num_images, self.scheduler)
        sampling = Sampling(num_inference_steps, strength, guidance_scale, guidance_interval)
        images = self.images_for([image_a, image_b])
        if len(images) != 2:
            raise ValueError(f"{len(images)} images were given to interpolate between: give two")
        labels = self.labels_for(class_labels)
        common_count(num_images, class_labels=labels)
        a, b = self.encode(images).chunk(2)
        known = torch.cat([torch.lerp(a, b, i / (num_images - 1)) for i in range(num_images)])
        generators = generators_for(generator, 1)
        noise = spread(self.noise_for(generators, known.shape[-2:]), num_images)
        start = Start(noise=noise, labels=spread(labels, num_images), generators=generators, images=images, known=known)
        return self.finish(start, sampling, output_type, return_dict)

    def finish(
        self,
        start: Start,
        sampling: Sampling,
        output_type: str,
        return_dict: bool,
        *,
        on_step_end: StepCallback | None = None,
    ) -> Any:
        """Samples latents and decodes them; what is not masked is the reconstruction's."""
        mask, stride = start.mask, stride_of(self.vae)
        images = sample_latents(
            self.unet,
            self.scheduler,
            start.noise,
            start.labels,
            sampling,
            generators=start.generators,
            known=start.known,
            mask=None if mask is None else nn.functional.max_pool2d(mask.float(), stride, ceil_mode=True) > 0,
            progress_bar=self.progress_bar,
            on_step_end=on_step_end,
        )
        if output_type != "latent":
            decoded = self.decode(images, like=start.images)
            if mask is not None:
                decoded = torch.where(mask, decoded, self.decode(start.known, like=start.images))
            images = images_to(decoded, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def encode(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) in [-1, 1] of any size -> scaled latents of the posterior's mean, float32."""
        parts = images.to(self.vae.dtype).split(AT_ONCE)
        return torch.cat([scale_latents(self.vae, encode_mean(self.vae, p).float()) for p in parts])

    def decode(self, scaled_latents: Any, like: Tensor | None = None) -> Tensor:
        """Scaled latents (N, c, h, w) -> images (N, C, h*f, w*f), float32, about [-1, 1]; cut to the size of `like`."""
        parts = unscale_latents(self.vae, scaled_latents).to(self.vae.dtype).split(AT_ONCE)
        images = torch.cat([self.vae.decode(p).sample.float() for p in parts])
        return images if like is None else images[..., : like.shape[-2], : like.shape[-1]]

    def images_for(self, image: Any) -> Tensor:
        return images_from(image, channels=channels_of(self.vae)).to(self._execution_device)

    def labels_for(self, class_labels: Any) -> Tensor | None:
        """Numbers or names of classes -> (N,) of 0..K-1, N = 1 for a single one; None for no class.

        Raises:
            ValueError: labels for an unconditional model, or a class that is not there.
        """
        if class_labels is None:
            return None
        if not self.num_classes:
            raise ValueError(f"class {class_labels} was asked for, but the model has no classes: leave it out")
        labels = class_labels.tolist() if hasattr(class_labels, "tolist") else class_labels
        labels = labels if isinstance(labels, (list, tuple, range)) else [labels]
        names = self.config.class_names or []
        numbers = [class_number(label, names, self.num_classes) for label in labels]
        return torch.tensor(numbers, device=self._execution_device)

    def latent_size(self, height: int | None, width: int | None, latents: Tensor | None) -> tuple[int, int]:
        """Height and width in latents. Raises ValueError for pixels that are no multiple of the stride."""
        stride = stride_of(self.vae)
        for name, value in (("height", height), ("width", width)):
            if value is not None and (value < stride or value % stride):
                raise ValueError(
                    f"{name} {value} is not a multiple of {stride}: try {max(value // stride, 1) * stride}"
                )
        default = self.unet.config.sample_size if latents is None else tuple(latents.shape[-2:])
        if default is None and not (height and width):
            raise ValueError("the model does not say the size that it was trained on: give height and width")
        h, w = default if isinstance(default, (tuple, list)) else (default, default)
        return height // stride if height else h, width // stride if width else w

    def noise_for(self, generators: list[torch.Generator], size: Sequence[int]) -> Tensor:
        """Standard normal (N, c, *size), each image's from its own generator, drawn on that generator's device."""
        shape = (len(generators), latent_channels_of(self.vae), *size)
        noise: Tensor = randn_tensor(shape, generator=generators, device=self._execution_device, dtype=torch.float32)
        return noise


def starting_point(
    pipeline: LatentDiffusionPipeline,
    class_labels: Any,
    num_images: int,
    generator: Any,
    latents: Tensor | None,
    image: Any,
    mask_image: Any,
    size: tuple[int | None, int | None],
) -> Start:
    """What a call starts from, its options checked against each other. Raises ValueError."""
    if mask_image is not None and image is None:
        raise ValueError("a mask_image was given without the image that it is for")
    if image is not None and any(size):
        raise ValueError("height and width are the image's own: resize the image instead")
    images = None if image is None else pipeline.images_for(image)
    mask = None if images is None or mask_image is None else mask_from(mask_image).to(images.device)
    if images is not None and mask is not None and mask.shape[-2:] != images.shape[-2:]:
        sizes = [f"{m.shape[-2]}x{m.shape[-1]}" for m in (mask, images)]
        raise ValueError(f"a mask of {sizes[0]} was given for an image of {sizes[1]}: make them one size")
    labels = pipeline.labels_for(class_labels)
    count = common_count(
        num_images, class_labels=labels, generator=generator, latents=latents, image=images, mask_image=mask
    )
    known = None if images is None else spread(pipeline.encode(images), count)
    shape = pipeline.latent_size(*size, latents) if known is None else tuple(known.shape[-2:])
    generators = generators_for(generator, count)
    if latents is None:
        noise = pipeline.noise_for(generators, shape)
    else:
        noise = check_noise(latents.to(pipeline._execution_device), (latent_channels_of(pipeline.vae), *shape), count)
    labels = spread(labels, count)
    return Start(noise=noise, labels=labels, generators=generators, images=images, known=known, mask=mask)


def class_number(label: ClassLabel, names: Sequence[str], num_classes: int) -> int:
    """The number of a class, by its name or its number. Raises ValueError."""
    if label in names:
        return list(names).index(str(label))
    if isinstance(label, str) and not label.isdecimal():
        known = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        raise ValueError(f"there is no class {label}: try {known or f'0 to {num_classes - 1}'}")
    if not 0 <= int(label) < num_classes:
        raise ValueError(f"there is no class {label}: the model's are 0 to {num_classes - 1}")
    return int(label)


def check_noise(latents: Tensor, shape: Sequence[int], count: int) -> Tensor:
    """Initial noise (1 or N, c, h, w) -> (N, c, h, w), float32. Raises ValueError for another (c, h, w)."""
    if latents.ndim != 4 or tuple(latents.shape[1:]) != tuple(shape):
        raise ValueError(
            f"latents of shape {tuple(latents.shape)} were given: (N, {', '.join(map(str, shape))}) is needed"
        )
    return latents.float().expand(count, *shape)


def step_callback(pipeline: Any, callback: Callback | None, inputs: Sequence[str]) -> StepCallback | None:
    """diffusers' kind of callback as `sample_latents` takes it. Raises ValueError for inputs other than latents."""
    unknown = set(inputs) - {"latents"}
    if unknown:
        raise ValueError(f"callbacks can be given latents, not {sorted(unknown)}")

    def on_step_end(step: int, timestep: Tensor, latents: Tensor) -> Tensor:
        assert callback is not None
        changed = callback(pipeline, step, timestep, {"latents": latents} if inputs else {})
        return (changed or {}).get("latents", latents)

    return None if callback is None else on_step_end


def spread(values: Any, count: int) -> Any:
    """(1, ...) or (count, ...) -> (count, ...); None stays None."""
    return None if values is None else values.expand(count, *values.shape[1:])


def fingerprint_of(pipeline: LatentDiffusionPipeline) -> str:
    """sha256 of all that decides an image but the options of a call and the solver: equal for equal pipelines."""
    vae, unet, prediction = pipeline.vae, pipeline.unet, prediction_of(pipeline.scheduler)
    parts = [fingerprint(vae), fingerprint(unet), scale_of(vae), prediction]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def load_pipeline(path: str) -> LatentDiffusionPipeline:
    """The pipeline that `path` names: a run directory (its `pipeline/`), a pipeline's folder, or a hub id.

    Raises:
        ModelError: nothing there, no pipeline of this kind, or files that cannot be read.
    """
    folder, class_name = find_saved(path, "pipeline")
    if class_name != LatentDiffusionPipeline.__name__:
        raise ModelError(f"{path} holds a {class_name}, which is not a LatentDiffusionPipeline")
    pipeline: LatentDiffusionPipeline = load_saved(LatentDiffusionPipeline, folder, path)
    return pipeline
