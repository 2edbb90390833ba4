"""Diffusers pipelines: saved whole or not at all, loaded from a folder or the hub, sampled block by block."""

import inspect
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import ConsistencyModelPipeline, DDIMPipeline, DDPMPipeline, DiffusionPipeline
from diffusers.utils import logging
from huggingface_hub import snapshot_download
from numpy.typing import NDArray
from transformers.utils import logging as transformers_logging

from ssl_diversity.errors import UserError
from ssl_diversity.generation.conditions import Drawn, for_classes, for_text, model_classes
from ssl_diversity.generation.sampling import (
    HUB,
    SHORT,
    TASK,
    Conditions,
    Sampling,
    pipeline_class,
    task_folder,
)

UNCONDITIONAL = (
    DDPMPipeline,
    DDIMPipeline,
    ConsistencyModelPipeline,
)  # a U-Net of pixels: any loop over it will do
_LOOPS = {"ddim": DDIMPipeline, "ddpm": DDPMPipeline} | {
    "DDIMScheduler": DDIMPipeline,
    "DDPMScheduler": DDPMPipeline,
}
_IMAGE_INPUTS = ("image", "images", "video", "num_frames", "frames", "audio_length_in_s")


def save(pipeline: Any, folder: Path) -> None:
    """Write `pipeline` so that `folder` holds all of it or does not exist."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        pipeline.save_pretrained(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def pipeline_folder(pipeline: str) -> Path:
    """The folder that a spec's `pipeline` stands for; one of the hub is fetched into the usual cache, once.

    Raises UserError where it cannot be had.
    """
    if pipeline.startswith(TASK):
        return task_folder(pipeline)
    if not pipeline.startswith(HUB):
        return Path(pipeline).expanduser()
    name, _, commit = pipeline.removeprefix(HUB).partition("@")
    logging.set_verbosity_error()
    try:
        return Path(DiffusionPipeline.download(name, revision=commit))
    except Exception as error:
        with suppress(Exception):  # no network: what is there may be enough, and loading tells
            return Path(snapshot_download(name, revision=commit, local_files_only=True))
        raise UserError(
            f"pipeline={name}: cannot be had from the Hugging Face hub at {commit} ({_one_line(error)}); without "
            "network, fetch it where there is one and give the folder as pipeline="
        ) from None


class Sampler:
    """A saved pipeline, ready to make images; those of a block depend on what is drawn for that block alone.

    `conditions` are the spec's, with the numbers of a class-conditional model's classes filled in; `about` is what
    rows say of it. Raises UserError where the pipeline cannot be loaded, is of no kind that makes an image
    from text, from a class number or from nothing, or does not take what the spec asks for.
    """

    def __init__(self, folder: Path, sampling: Sampling, conditions: Conditions, device: str) -> None:
        self.sampling, self.where = sampling, f"pipeline={folder}"
        kind = pipeline_class(folder)
        if sampling.dtype == "float16" and device == "cpu":
            raise UserError(f"{self.where}: sampling.dtype=float16 needs a GPU; say bfloat16 or float32")
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        try:
            saved = DiffusionPipeline.from_pretrained(
                folder, local_files_only=True, dtype=getattr(torch, sampling.dtype)
            )
        except Exception as error:
            raise UserError(f"{self.where}: cannot be loaded ({_one_line(error)})") from None
        self._check_steps(getattr(saved, "scheduler", None))
        self.pipeline = self._scheduled(saved)
        self.conditions, self._arguments = self._asked(conditions, model_classes(folder))
        self.pipeline.set_progress_bar_config(disable=True)
        self._place(device)
        self.about = {
            "pipeline_class": kind,
            "scheduler": type(self.pipeline.scheduler).__name__,
            "diffusers": diffusers.__version__,
            "torch": torch.__version__.partition("+")[0],
        }

    def _check_steps(self, scheduler: Any) -> None:
        if scheduler is None:
            raise UserError(f"{self.where}: has no scheduler of that name; it cannot be sampled")
        trained = scheduler.config.get("num_train_timesteps", self.sampling.steps)
        if self.sampling.steps > trained:
            raise UserError(
                f"sampling.steps={self.sampling.steps}: {self.where} has {trained} time steps; lower it"
            )

    def _scheduled(self, saved: Any) -> Any:
        """The pipeline under the scheduler that was asked for.

        Those of a bare U-Net keep to one scheduler; a pipeline with the same loop for the asked one takes their place.
        """
        name = self.sampling.scheduler
        if isinstance(saved, UNCONDITIONAL) and saved.unet.config.out_channels not in (1, 3):
            raise UserError(
                f"{self.where}: makes {saved.unet.config.out_channels}-channel images; 1 or 3 are wanted"
            )
        if name is None:
            return saved
        try:
            scheduler = getattr(diffusers, SHORT.get(name, name)).from_config(saved.scheduler.config)
        except Exception as error:
            raise UserError(
                f"sampling.scheduler={name}: does not go with {self.where} ({_one_line(error)}); leave it out"
            ) from None
        if not isinstance(saved, UNCONDITIONAL):
            saved.scheduler = scheduler
            return saved
        if "generator" not in inspect.signature(scheduler.step).parameters:
            raise UserError(
                f"sampling.scheduler={name}: takes no generator, which the loop of {self.where} passes on; say ddim, "
                "ddpm, EulerDiscreteScheduler or DPMSolverMultistepScheduler"
            )
        if saved.unet.config.num_class_embeds is None and name in _LOOPS:
            return _LOOPS[name](saved.unet, scheduler)
        return ConsistencyModelPipeline(saved.unet, scheduler)

    def _asked(
        self, conditions: Conditions, classes: tuple[str, ...] | None
    ) -> tuple[Conditions, dict[str, Any]]:
        """Conditions as this kind of pipeline takes them, and the arguments that are the same for every block."""
        takes = inspect.signature(self.pipeline.__call__).parameters
        foreign = [name for name in takes if name in _IMAGE_INPUTS]
        needed = {"generator", "num_inference_steps", "output_type"} - takes.keys()
        self.input = (
            "prompt" if "prompt" in takes else "class_labels" if classes and "class_labels" in takes else None
        )
        if foreign or needed or not (self.input or "batch_size" in takes):
            why = f"takes {foreign[0]}" if foreign else f"takes no {sorted(needed or {'prompt'})[0]}"
            raise UserError(
                f"{self.where}: a {type(self.pipeline).__name__} {why}; pipelines that make images of text, of a "
                "class number or of nothing can be sampled"
            )
        if self.input == "prompt":
            conditions = for_text(conditions, self.where)
        elif self.input == "class_labels":
            conditions = for_classes(conditions, classes or (), self.where)
        elif conditions.classes:
            raise UserError(
                f"{self.where}: an unconditional model, which knows no classes; leave classes out"
            )
        self._counts = self.input != "prompt" and "batch_size" in takes
        s = self.sampling
        arguments: dict[str, Any] = {"num_inference_steps": s.steps, "output_type": "pt"}
        for option, value, names in (
            ("guidance", s.guidance, ("guidance_scale",)),
            ("negative_prompt", s.negative_prompt or None, ("negative_prompt",)),
            ("resolution", s.resolution, ("height", "width")),
        ):
            if value is not None and not takes.keys() >= set(names):
                raise UserError(f"sampling.{option}={value}: {self.where} takes none; leave it out")
            arguments |= {} if value is None else dict.fromkeys(names, value)
        return conditions, arguments

    def _place(self, device: str) -> None:
        if device != "cpu" and self.sampling.offload == "model":
            self.pipeline.enable_model_cpu_offload(device=device)
        elif device != "cpu" and self.sampling.offload == "sequential":
            self.pipeline.enable_sequential_cpu_offload(device=device)
        else:
            self.pipeline.to(device)
        self.device = device

    def block(self, drawn: Drawn, **changes: Any) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Images uint8 (B, H, W, 3), and which of them the pipeline's own safety filter objects to, bool (B,).

        Noise is drawn on the CPU, so it is the same on any device. `changes` are to the pipeline's arguments.
        """
        arguments = {**self._arguments, **changes}
        arguments["generator"] = [torch.Generator().manual_seed(seed) for seed in drawn.seeds]
        if self._counts:
            arguments["batch_size"] = len(drawn)
        if self.input is not None:
            arguments[self.input] = list(drawn.inputs)
        if "negative_prompt" in arguments:
            arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(drawn)
        scheduler = self.pipeline.scheduler
        fresh = scheduler.from_config(scheduler.config)  # a used one remembers the block before
        if isinstance(self.pipeline, ConsistencyModelPipeline):  # scales the noise before it sets the steps
            fresh.set_timesteps(arguments["num_inference_steps"])
        self.pipeline.scheduler = fresh
        try:
            with _repeatable(drawn.block_seed, self.device):
                made = self.pipeline(**arguments)
        except torch.OutOfMemoryError:
            raise UserError(
                f"{self.where}: the GPU has too little memory for {len(drawn)} images at once; say "
                "sampling.offload=model, or a smaller sampling.block (which makes another pool)"
            ) from None
        unsafe = getattr(made, "nsfw_content_detected", None)
        flags = np.zeros(len(drawn), bool) if unsafe is None else np.array(unsafe, bool)
        return _pixels(made.images, self.where), flags


def _pixels(images: Any, where: str) -> NDArray[np.uint8]:
    """uint8 (B, H, W, 3) of float images in [0, 1]: tensor (B, C, H, W) or array (B, H, W, C), C 1 or 3."""
    if isinstance(images, torch.Tensor):
        images = images.permute(0, 2, 3, 1).float().cpu().numpy()
    values = np.asarray(images)
    if values.ndim != 4 or values.shape[3] not in (1, 3) or values.dtype.kind != "f":
        raise UserError(f"{where}: gives {values.dtype} of shape {values.shape}, no grey or RGB images")
    pixels = np.round(np.nan_to_num(values).clip(0, 1) * 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:3], 3)))


@contextmanager
def _repeatable(seed: int, device: str) -> Iterator[None]:
    """The global generators seeded, and kernels that give the same again; afterwards as it was."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first matrix is multiplied
    devices = [torch.cuda.current_device()] if device.startswith("cuda") else []
    with (
        torch.random.fork_rng(devices),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True),
    ):
        torch.manual_seed(seed)
        yield


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
