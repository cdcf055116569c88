"""LatentDiffusionPipeline: noise, or an image and noise, -> denoiser -> latents -> autoencoder -> images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import huggingface_hub
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

import ldm_vae.models.autoencoder  # noqa: F401  # of a saved pipeline, diffusers loads classes of imported modules only
from ldm_vae.data.conversion import check_output_type, images_from, images_to, mask_from
from ldm_vae.errors import ModelError
from ldm_vae.latents.scaling import mean_and_std, scale_latents, unscale_latents
from ldm_vae.models.interface import channels_of, fingerprint, latent_channels_of, stride_of
from ldm_vae.models.loading import find_saved, load_saved
from ldm_vae.models.reconstruction import encode_mean, turn_on_tiling
from ldm_vae.models.unet import num_classes_of
from ldm_vae.sampling import Sampling, Seed, adds_noise, generators_for, prediction_of, sample_latents, slerp

AT_ONCE = 8
"""Images that go through the autoencoder together, however many are asked for."""

ClassLabel = int | str
Callback = Callable[["LatentDiffusionPipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor]]


class LatentDiffusionPipeline(DiffusionPipeline):
    """Images from noise, from an image, into the hole of an image, and between two seeds or two images.

    An image depends on its own generator alone, not on the batch that it is in.

    Args:
        vae: any diffusers autoencoder; its config says how latents are scaled (`latents/scaling.py`).
        unet: a UNet2DModel over scaled latents; with `num_class_embeds` = K + 1 it is conditional, class K being none.
        scheduler: one of `objectives.diffusion.SCHEDULERS`, for what the denoiser predicts.
        class_names: of the K classes, in the order of their labels.

    Raises:
        ValueError: parts that do not fit together.
    """

    model_cpu_offload_seq = "unet->vae"
    _callback_tensor_inputs = ("latents",)

    def __init__(self, vae: Any, unet: Any, scheduler: Any, class_names: list[str] | None = None) -> None:
        super().__init__()
        if unet.config.in_channels != latent_channels_of(vae):
            raise ValueError(
                f"the denoiser takes {unet.config.in_channels} channels, the autoencoder's latents have "
                f"{latent_channels_of(vae)}: use the autoencoder that it was trained on"
            )
        if class_names and len(class_names) != num_classes_of(unet):
            raise ValueError(f"{len(class_names)} class names for a denoiser of {num_classes_of(unet)} classes")
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler)
        self.register_to_config(class_names=list(class_names) if class_names else None)

    @classmethod
    def download(cls, pretrained_model_name: str, **keywords: Any) -> str:
        """The folder of a hub id; diffusers' own refuses a repository with a class that is not in diffusers."""
        known = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
        chosen = {k: v for k, v in keywords.items() if k in known and v is not None}
        files = ["*.json", "*.safetensors"]
        return str(huggingface_hub.snapshot_download(pretrained_model_name, allow_patterns=files, **chosen))

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
        """Makes images: `.images`, a list of PIL images unless `output_type` asks for something else.

        How many is the length of whatever is given as several (labels, generators, images), or `num_images`.

        Args:
            class_labels: 0..K-1, or names of classes; one for all images or one each. None: no class.
            height, width: in pixels, multiples of the autoencoder's stride; what the denoiser was trained on unless
                given. An `image` has a size of its own.
            num_inference_steps: of the scheduler; with FlowMatchHeun each is two forward passes.
            guidance_scale, guidance_interval: see `sampling.Sampling`.
            generator: a generator or seed for each image. A single one, for several images, gives the seeds of theirs.
            latents: initial noise (N, c, H/f, W/f) instead.
            image: to start from, as `data.conversion.images_from` takes it, of any size.
            strength: how much of the way is noised and made anew, 0..1; at 0 the result is the reconstruction.
            mask_image: of the image's size; what is white is made anew, the rest is the reconstruction's.
            output_type: "pil"; "np" (N, H, W, C) or "pt" (N, C, H, W), in [0, 1]; "latent", the scaled latents.
            callback_on_step_end: called as f(pipeline, step, timestep, {"latents": ...}); may give back a dictionary
                with other latents.

        Raises:
            ValueError: what cannot be, with what could.
        """
        check_output_type(output_type)
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(f"callbacks can be given {', '.join(self._callback_tensor_inputs)}, not {sorted(unknown)}")
        sampling = Sampling(
            num_inference_steps=num_inference_steps,
            strength=strength,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
        )
        if mask_image is not None and image is None:
            raise ValueError("a mask_image was given without the image that it is for")
        if image is not None and (height or width):
            raise ValueError("height and width are the image's own: resize the image instead")
        images = None if image is None else self.images_for(image)
        mask = None if mask_image is None else self.mask_for(images, mask_image)
        labels = self.labels_for(class_labels)
        count = common_count(
            num_images, class_labels=labels, generator=generator, latents=latents, image=images, mask_image=mask
        )
        known = None if images is None else spread(self.encode(images), count)
        size = self.latent_size(height, width, latents) if known is None else tuple(known.shape[-2:])
        generators = generators_for(generator, count)
        noise = self.noise_for(generators, count, size) if latents is None else self.check_noise(latents, count, size)

        def on_step_end(step: int, timestep: Tensor, latents: Tensor) -> Tensor:
            assert callback_on_step_end is not None
            inputs = {"latents": latents} if callback_on_step_end_tensor_inputs else {}
            return (callback_on_step_end(self, step, timestep, inputs) or {}).get("latents", latents)

        scaled_latents = sample_latents(
            self.unet,
            self.scheduler,
            noise,
            spread(labels, count),
            sampling,
            generators=generators,
            known=known,
            mask=None if mask is None else self.mask_of_latents(mask),
            progress_bar=self.progress_bar,
            on_step_end=None if callback_on_step_end is None else on_step_end,
        )
        if output_type == "latent":
            return self.output(scaled_latents, return_dict)
        decoded = self.decode(scaled_latents, like=images)
        if mask is not None:
            decoded = torch.where(mask, decoded, self.decode(known, like=images))
        return self.output(images_to(decoded, output_type), return_dict)

    def interpolate(self, seed_a: Seed, seed_b: Seed, num_images: int = 8, **options: Any) -> Any:
        """Images whose noise goes from seed a's to seed b's along the great circle (Shoemake 1985, section 3.3).

        The first and last are the images of the two seeds. `options` are those of a call.
        """
        check_interpolation(num_images, self.scheduler)
        size = self.latent_size(options.pop("height", None), options.pop("width", None), None)
        a, b = (self.noise_for(seed, 1, size) for seed in (seed_a, seed_b))
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
        sampling = Sampling(
            num_inference_steps=num_inference_steps,
            strength=strength,
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
        )
        pair = self.images_for([image_a, image_b])
        if len(pair) != 2:
            raise ValueError(f"{len(pair)} images were given to interpolate between: give two")
        labels = self.labels_for(class_labels)
        common_count(num_images, class_labels=labels)
        a, b = self.encode(pair).chunk(2)
        mixed = torch.cat([torch.lerp(a, b, i / (num_images - 1)) for i in range(num_images)])
        noise = spread(self.noise_for(generator, 1, mixed.shape[-2:]), num_images)
        scaled_latents = sample_latents(
            self.unet,
            self.scheduler,
            noise,
            spread(labels, num_images),
            sampling,
            known=mixed,
            progress_bar=self.progress_bar,
        )
        if output_type == "latent":
            return self.output(scaled_latents, return_dict)
        return self.output(images_to(self.decode(scaled_latents, like=pair), output_type), return_dict)

    def encode(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) in [-1, 1] of any size -> scaled latents of the posterior's mean, float32."""
        parts = images.to(self.vae.dtype).split(AT_ONCE)
        return torch.cat([scale_latents(self.vae, encode_mean(self.vae, p).float()) for p in parts])

    def decode(self, scaled_latents: Any, like: Tensor | None = None) -> Tensor:
        """Scaled latents (N, c, h, w) -> images (N, C, h*f, w*f), float32, about [-1, 1]; cut to the size of `like`."""
        parts = unscale_latents(self.vae, scaled_latents).to(self.vae.dtype).split(AT_ONCE)
        images = torch.cat([self.vae.decode(p).sample.float() for p in parts])
        return images if like is None else images[..., : like.shape[-2], : like.shape[-1]]

    def output(self, images: Any, return_dict: bool) -> Any:
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    # What was given ---------------------------------------------------------------------------------------------------

    def images_for(self, image: Any) -> Tensor:
        return images_from(image, channels=channels_of(self.vae)).to(self._execution_device)

    def labels_for(self, class_labels: Any) -> Tensor | None:
        """What was given as labels -> (N,) of 0..K-1, N = 1 for a single one; None for no class.

        Raises:
            ValueError: labels for an unconditional model, or a class that is not there.
        """
        if class_labels is None:
            return None
        if not self.num_classes:
            raise ValueError(f"class {class_labels} was asked for, but the model has no classes: leave it out")
        given = class_labels.tolist() if hasattr(class_labels, "tolist") else class_labels
        several = given if isinstance(given, (list, tuple, range)) else [given]
        return torch.tensor([self.label_of(one) for one in several], device=self._execution_device)

    def label_of(self, name: ClassLabel) -> int:
        """The label of a class by its name, or by its number. Raises ValueError."""
        names, last = self.config.class_names or [], self.num_classes - 1
        if name in names:
            return int(names.index(name))
        if isinstance(name, str) and not name.isdecimal():
            shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
            raise ValueError(f"there is no class {name}: try {shown or f'0 to {last}'}")
        if not 0 <= int(name) <= last:
            raise ValueError(f"there is no class {name}: the model's are 0 to {last}")
        return int(name)

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

    def noise_for(self, generator: Any, count: int, size: Sequence[int]) -> Tensor:
        """Standard normal (count, c, *size), each image's from its own generator, drawn on that generator's device."""
        shape = (count, latent_channels_of(self.vae), *size)
        own = generators_for(generator, count)
        noise: Tensor = randn_tensor(shape, generator=own, device=self._execution_device, dtype=torch.float32)
        return noise

    def check_noise(self, latents: Tensor, count: int, size: Sequence[int]) -> Tensor:
        shape = (latent_channels_of(self.vae), *size)
        if latents.ndim != 4 or tuple(latents.shape[1:]) != shape:
            needed = ", ".join(["N", *map(str, shape)])
            raise ValueError(f"latents of shape {tuple(latents.shape)} were given: ({needed}) is needed")
        return latents.to(self._execution_device, torch.float32).expand(count, *shape)

    def mask_for(self, images: Any, mask_image: Any) -> Tensor:
        """The mask of the pixels of images (M, C, H, W): bool (N, 1, H, W)."""
        mask = mask_from(mask_image).to(images.device)
        if mask.shape[-2:] != images.shape[-2:]:
            sizes = [f"{m.shape[-2]}x{m.shape[-1]}" for m in (mask, images)]
            raise ValueError(f"a mask of {sizes[0]} was given for an image of {sizes[1]}: make them one size")
        return mask

    def mask_of_latents(self, mask: Tensor) -> Tensor:
        """Latents of which any pixel is masked: bool (N, 1, H, W) -> (N, 1, ceil(H/f), ceil(W/f))."""
        return nn.functional.max_pool2d(mask.float(), stride_of(self.vae), ceil_mode=True) > 0


def spread(values: Any, count: int) -> Any:
    """(1, ...) or (count, ...) -> (count, ...); None stays None."""
    return None if values is None else values.expand(count, *values.shape[1:])


def common_count(num_images: int, **options: Any) -> int:
    """How many images: the length of the options that have several values, which must agree. Raises ValueError."""
    if num_images < 1:
        raise ValueError(f"num_images is {num_images}: it must be at least 1")
    lengths = {name: len(o) for name, o in options.items() if isinstance(o, (list, tuple, range, Tensor))}
    count = max([num_images, *lengths.values()])
    for name, length in lengths.items():
        if length not in (1, count) or (name == "generator" and length != count):
            raise ValueError(f"{length} of {name} for {count} images: give one for each")
    if num_images not in (1, count):
        raise ValueError(f"num_images is {num_images}, but {count} were described: leave num_images out")
    return count


def check_interpolation(num_images: int, scheduler: Any) -> None:
    """Raises ValueError."""
    if num_images < 2:
        raise ValueError(f"num_images is {num_images}: an interpolation has at least its two ends")
    if adds_noise(scheduler):
        raise ValueError(
            f"this {type(scheduler).__name__} adds noise in each step, in which frames would differ at random: "
            "set algorithm_type to dpmsolver++"
        )


def fingerprint_of(pipeline: LatentDiffusionPipeline) -> str:
    """sha256 of all that decides an image but the options of a call and the solver: equal for equal pipelines."""
    scale = [v.flatten().tolist() for v in mean_and_std(pipeline.vae, torch.zeros(1, dtype=torch.float64))]
    parts = [fingerprint(pipeline.vae), fingerprint(pipeline.unet), scale, prediction_of(pipeline.scheduler)]
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
