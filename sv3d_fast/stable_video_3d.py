"""StableVideo3DPipeline: SV3D with the interface of diffusers' StableVideoDiffusionPipeline."""

import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from . import sampler
from .camera import Orbit
from .conditioning import Conditioning, condition
from .engine import NonFiniteError, Step, check_levels, decoding, denoising
from .events import finish
from .image import read_picture
from .model.config import SamplerConfig
from .model.vae import SV3DVAE
from .networks_pipeline import NetworksPipeline
from .poses import read_orbit, require_static

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
DECODE_CHUNK = 3  # frames decoded at once: 1.2 GiB beyond the weights at 576² in float16

Frames = list[list[Image.Image]] | np.ndarray | torch.Tensor
Callback = Callable[[NetworksPipeline, int, torch.Tensor, dict[str, torch.Tensor]], dict[str, torch.Tensor]]
Steps = Generator[Step, torch.Tensor | None, Any]
Generators = torch.Generator | list[torch.Generator] | None


@dataclass
class StableVideo3DPipelineOutput(BaseOutput):
    """What a call returns.

    frames: in the order of the poses; by `output_type`, "pil": B lists of T pictures; "np": (B, T, H, W, 3) float32 in
    [0, 1]; "pt": (B, T, 3, H, W) float32 in [0, 1]; "latent": (B, T, z, H/f, W/f) float32, as the sampler leaves them.
    """

    frames: Frames


class StableVideo3DPipeline(NetworksPipeline):
    """One picture of an object to an orbit around it, by SV3D_u or SV3D_p.

    Arguments, results and errors are those of diffusers' StableVideoDiffusionPipeline, with SV3D's defaults and with
    cameras. What differs: latents and angles stay float32 in a 16-bit model; the networks and the sampler are this
    package's, so `scheduler` can be read and not replaced, and there is no feature_extractor; bad arguments are found
    before anything runs. `enable_attention_slicing`, `enable_xformers_memory_efficient_attention` and
    `enable_vae_slicing` are accepted and change nothing: attention never stores its matrix, and the decoder sees
    `decode_chunk_size` frames at a time. Threads may call one pipeline: they take turns, and what one gets depends on
    its own arguments alone, as long as each brings its own generator.
    """

    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]
    _guidance_scale: float | torch.Tensor = 1.0
    _num_timesteps = 0
    _interrupt = False

    @property
    def guidance_scale(self) -> float | torch.Tensor:
        """(B, T, 1, 1, 1) scales of the last call's frames; 1 before the first call."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether guidance makes a difference to some frame."""
        scale = self._guidance_scale
        return bool((scale.max() if isinstance(scale, torch.Tensor) else scale) > 1)

    @property
    def num_timesteps(self) -> int:
        """Steps of the last call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt = True` in a callback to stop after its step; the latents of that step are decoded."""
        return self._interrupt

    def __call__(
        self,
        image: Image.Image | Sequence[Image.Image] | torch.Tensor,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        min_guidance_scale: float | None = None,
        max_guidance_scale: float | None = None,
        fps: int | None = None,
        motion_bucket_id: int | None = None,
        noise_aug_strength: float | None = None,
        decode_chunk_size: int | None = None,
        num_videos_per_prompt: int | None = 1,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
        *,
        poses: Sequence[Mapping[str, float]] | None = None,
        polars_rad: Sequence[float] | torch.Tensor | None = None,
        azimuths_rad: Sequence[float] | torch.Tensor | None = None,
        orbit: Orbit | None = None,
        elevation: float | None = None,
    ) -> StableVideo3DPipelineOutput | Frames:
        """Makes the orbits of one or several pictures.

        image: the object on white or transparent, centred (`sv3d_fast.Subject` says how, `image.load_subject` does
            it); a PIL picture, a list of them, or a tensor (B, 3, H, W) in [0, 1]. Resized to height x width.
        height, width: pixels, multiples of what the networks divide by (64 for SV3D); None for the model's own.
        num_frames: None for one per pose, or the model's own (21).
        num_inference_steps: None for the model's own (50). sigmas: noise levels in place of the model's, decreasing,
            one more than there are steps; the last is 0.
        min_guidance_scale, max_guidance_scale: at the input view and half way round; None for the model's (1, 2.5).
        fps, motion_bucket_id: accepted with a warning; SV3D has no such inputs.
        noise_aug_strength: noise added to the picture that the autoencoder sees; None for the model's (1e-5).
        decode_chunk_size: frames decoded at once, 3 by default; changes memory, never the result.
        num_videos_per_prompt: orbits of each picture; they follow one another in the result.
        generator: of the noise, or a list with one for each orbit. First the pictures' noise is drawn, then the
            latents', in float32, on the generator's device.
        latents: (B, T, z, H/f, W/f) unit-variance noise, in the order of the poses, in place of what would be drawn.
        output_type: "pil", "np", "pt" or "latent". return_dict: False returns the frames themselves.
        callback_on_step_end: called as f(pipe, step, timestep, {"latents": ...}) after each step; returns a dict,
            whose "latents", if any, take the place of those given.
        poses: [{"elevation": e, "azimuth": a}, ...] in degrees, one for each frame; elevations are absolute, the input
            view has azimuth 0 and is the first or the last. polars_rad, azimuths_rad: the same in radians, polar
            angles from the up axis. orbit: an `Orbit`; its last frame is the input view. elevation: of one even turn,
            in degrees (10 by default). At most one of the four. SV3D_u takes no cameras: poses other than an even
            turn are an error.
        The frame of the input view is the picture itself, as in the official sampling, except in latents.
        Raises ValueError, naming the argument, for arguments that can't be used; engine.NonFiniteError where the
        latents overflow.
        """
        copies = 1 if num_videos_per_prompt is None else num_videos_per_prompt
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type: expected one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs: expected names of {self._callback_tensor_inputs}, "
                f"got {sorted(unknown)}"
            )
        for name, least in (("num_videos_per_prompt", copies), ("decode_chunk_size", decode_chunk_size)):
            if least is not None and least < 1:
                raise ValueError(f"{name}: expected at least 1, got {least}")
        for name, unused in (("fps", fps), ("motion_bucket_id", motion_bucket_id)):
            if unused is not None:
                warnings.warn(f"{name}: SV3D has no such input; it is ignored", stacklevel=2)
        orbit, shift = read_orbit(
            frames=num_frames, default_frames=self.model_config.frames, poses=poses, polars_rad=polars_rad,
            azimuths_rad=azimuths_rad, orbit=orbit, elevation=elevation,
        )  # fmt: skip
        if self.model_config.unet.variant == "u":
            require_static(orbit)
        config, levels = self._sampling(
            num_inference_steps, sigmas, min_guidance_scale, max_guidance_scale, noise_aug_strength
        )
        images = self._read_images(image, height, width)
        image_noise, noise = self._draw(images, len(orbit), copies, generator, latents, shift)

        with self._turns:
            scales = sampler.triangle_guidance(config, len(orbit)).roll(shift).to(noise.device)
            self._guidance_scale = scales.expand(len(noise), -1)[..., None, None, None]
            self._num_timesteps, self._interrupt = config.steps, False
            given = self._condition(images, [orbit] * len(images), image_noise, config.cond_aug, copies)
            running: Steps = denoising(self.unet, given, noise, config, levels)
            made = self._run(running, config.steps, callback_on_step_end, callback_on_step_end_tensor_inputs, shift)
            if output_type == "latent":
                frames: Frames = made.roll(shift, 1)
            else:
                frames = self._decode(made, images.repeat_interleave(copies, 0), decode_chunk_size, shift, output_type)
            self.maybe_free_model_hooks()
        return StableVideo3DPipelineOutput(frames) if return_dict else frames

    def _sampling(self, steps, sigmas, low, high, strength) -> tuple[SamplerConfig, list[float] | None]:
        """The sampler's settings, with the caller's in place of the model's, and the caller's own noise levels."""
        levels = None
        if sigmas is not None:
            levels = check_levels(sigmas)
            if steps not in (None, len(levels) - 1):
                raise ValueError(
                    f"num_inference_steps: expected {len(levels) - 1}, as sigmas has, or None, got {steps}"
                )
            steps = len(levels) - 1
        if steps is not None and steps < 1:
            raise ValueError(f"num_inference_steps: expected at least 1, got {steps}")
        asked = {"steps": steps, "min_guidance": low, "max_guidance": high, "cond_aug": strength}
        return replace(self.model_config.sampler, **{k: v for k, v in asked.items() if v is not None}), levels

    def _read_images(self, image: Any, height: int | None, width: int | None) -> torch.Tensor:
        """(B, 3, H, W) float32 in [-1, 1]."""
        config = self.model_config
        height, width = height or config.image_size, width or config.image_size
        unit = self.vae_scale_factor * 2 ** (len(config.unet.block_channels) - 1)
        if height < 1 or width < 1 or height % unit or width % unit:
            raise ValueError(f"height and width: expected multiples of {unit}, got {height} and {width}")
        pictures = list(image) if isinstance(image, (list, tuple)) else [image]
        if not pictures or not all(isinstance(one, (Image.Image, torch.Tensor)) for one in pictures):
            kinds = ", ".join(sorted({type(one).__name__ for one in pictures})) or "an empty list"
            raise ValueError(f"image: expected PIL pictures, a list of them or a tensor, got {kinds}")
        pictures = [_on_white(one) if isinstance(one, Image.Image) else one for one in pictures]
        for one in pictures:
            if isinstance(one, torch.Tensor):
                _check_pixels(one)
        return torch.cat([self.video_processor.preprocess(one, height, width).float().cpu() for one in pictures])

    def _draw(self, images, frames: int, copies: int, generator: Generators, latents, shift: int):
        """The pictures' noise and the latents', in diffusers' order, on the device that runs."""
        device, batch = self._execution_device, len(images) * copies
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(f"generator: expected one for each of {batch} orbits, got {len(generator)}")
        side = [pixels // self.vae_scale_factor for pixels in images.shape[-2:]]
        shape = (batch, frames, self.model_config.vae.latent_channels, *side)
        image_noise = randn_tensor(images.shape, generator, device, torch.float32)
        if latents is None:
            return image_noise, randn_tensor(shape, generator, device, torch.float32)
        if latents.shape != shape:
            raise ValueError(f"latents: expected {shape}, got {tuple(latents.shape)}")
        return image_noise, latents.to(device, torch.float32).roll(-shift, 1)

    def _condition(self, images, orbits: list[Orbit], noise, strength: float, copies: int) -> Conditioning:
        with self._loaded("vae", "image_encoder"), _in_full_precision(self.vae):
            given = condition(self.model, images, orbits, noise, strength)
        token, latents, vector = (
            part.to(self._execution_device).repeat_interleave(copies, 0)
            for part in (given.token, given.image_latents, given.vector)
        )
        return Conditioning(token, latents, vector)

    def _run(self, running: Steps, steps: int, callback: Callback | None, names, shift: int) -> torch.Tensor:
        """Runs the steps, until an interruption; the callback sees latents in the order of the poses."""
        latents: Any = None
        with self.progress_bar(total=steps) as bar, self._loaded("unet"):
            for index in range(steps):
                step = running.send(latents)
                latents = step.latents
                if callback is not None:
                    shown = latents.roll(shift, 1)
                    timestep = torch.tensor(sampler.c_noise(step.sigma), device=latents.device)
                    answer = callback(self, index, timestep, {"latents": shown} if names else {})
                    latents = _replaced(shown, answer).roll(-shift, 1)
                bar.update()
                if self._interrupt:
                    break
        running.close()
        return latents

    def _decode(self, latents, images, chunk: int | None, shift: int, output_type: str) -> Frames:
        batch, frames = latents.shape[:2]
        # float16 convolutions of a CPU are many times slower than float32's
        precision = _in_full_precision(self.vae) if latents.device.type == "cpu" else nullcontext()
        with self._loaded("vae"), precision:
            pictures = finish(decoding(self.vae, latents.flatten(0, 1), chunk=chunk or DECODE_CHUNK))
        if not torch.isfinite(pictures).all():
            raise NonFiniteError("the decoder overflowed; load with dtype={'vae': torch.float32, ...}")
        pictures = pictures.unflatten(0, (batch, frames))
        pictures[:, -1] = images.to(pictures)
        return self.video_processor.postprocess_video(pictures.roll(shift, 1).transpose(1, 2), output_type)


def _replaced(shown: torch.Tensor, answer: Any) -> torch.Tensor:
    """The latents that a callback's answer leaves in place."""
    if not isinstance(answer, dict):
        raise ValueError(f"callback_on_step_end: expected it to return a dict, got {answer!r}")
    latents = answer.get("latents", shown)
    if not isinstance(latents, torch.Tensor) or latents.shape != shown.shape:
        got = tuple(latents.shape) if isinstance(latents, torch.Tensor) else type(latents).__name__
        raise ValueError(f"callback_on_step_end: expected latents {tuple(shown.shape)}, got {got}")
    return latents.to(shown)


def _check_pixels(image: torch.Tensor) -> None:
    if image.ndim not in (3, 4) or image.shape[-3] != 3 or 0 in image.shape:
        raise ValueError(f"image: expected tensors (B, 3, H, W), got {tuple(image.shape)}")
    low, high = float(image.min()), float(image.max())
    if not (low >= 0 and high <= 1):  # NaN too
        raise ValueError(f"image: expected values in [0, 1], got {low:g} to {high:g}")


def _on_white(picture: Image.Image) -> Image.Image:
    picture = read_picture(picture)
    if picture.mode != "RGBA":
        return picture
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


@contextmanager
def _in_full_precision(vae: SV3DVAE) -> Iterator[None]:
    """A float16 autoencoder is float32 inside: the encoder always, as in diffusers and in the official sampling."""
    if next(vae.parameters()).dtype != torch.float16:
        yield
        return
    vae.to(torch.float32)
    try:
        yield
    finally:
        vae.to(torch.float16)
