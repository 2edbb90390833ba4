"""The Lightning Trainer for cells and generators: exact budget, signals, checkpoints, exact resume.

There are no epochs here. A run is `order.steps` batches; batch k is a function of k alone, so a run
resumed at step k asks the order for batch k and goes on as if it had never stopped: bit for bit on CPU.
(Lightning resumes inside an epoch by replaying its sampler, from the wrong epoch with workers; we give
it one endless epoch and start our own iterator at the checkpoint's step.)
"""

import contextlib
import logging
import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments import LightningEnvironment
from torch import Tensor

from ssl_diversity.data.batches import Batches, Reader
from ssl_diversity.data.order import Order
from ssl_diversity.errors import Interrupted, UserError
from ssl_diversity.files import replacing
from ssl_diversity.runtime import Runtime

HISTORY_POINTS = 64  # losses kept per run, evenly spaced in samples seen


@dataclass(frozen=True)
class FitResult:
    """What a finished run cost. `history` holds [samples seen, loss] pairs; seconds are training alone."""

    samples_seen: int
    seconds: float
    peak_memory_bytes: int
    history: list[list[float]]


def fit(
    module: pl.LightningModule,
    *,
    order: Order,
    reader: Reader,
    out: Path,
    runtime: Runtime,
    precision: str,
    checkpoint_samples: int,
) -> FitResult:
    """Train `module` on exactly `order.steps` batches, going on from `out/last.ckpt` where there is one.

    `module.training_step` takes {"images": uint8 (B, 3, H, W), "positions": int64 (B,)} and leaves the detached
    loss in `module.last_loss`; what it needs to go on is all in its `state_dict()` and its optimiser's state.

    Saves `out/last.ckpt` every `checkpoint_samples` samples and when `runtime.stop()` turns true, then
    raises Interrupted. The caller removes the checkpoint once it has published the result.

    Raises UserError where the loss stops being finite.
    """
    runtime.set_threads()
    checkpoint = out / "last.ckpt"
    start = _checkpoint_step(checkpoint)
    guard = _Guard(order.steps, order.batch_size, checkpoint, checkpoint_samples, runtime)
    _reset_peak_memory(runtime.device)
    trainer = _trainer(order.steps, out, runtime.device, precision, guard)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")
        trainer.fit(
            module,
            train_dataloaders=_Tensors(Batches(order, reader, start)),
            ckpt_path=str(checkpoint) if start else None,
            weights_only=True if start else None,
        )
    if trainer.global_step != order.steps:
        raise RuntimeError(f"trained {trainer.global_step} steps where the budget says {order.steps}")
    return FitResult(
        order.steps * order.batch_size, guard.seconds, _peak_memory(runtime.device), guard.history
    )


@dataclass(frozen=True)
class _Tensors:
    """Batches as Lightning takes them."""

    batches: Batches

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        with contextlib.closing(iter(self.batches)) as running:
            for batch in running:
                yield {name: torch.from_numpy(array) for name, array in batch.items()}


class _Guard(pl.Callback):
    """After every step: is it time to save, to stop, to tell how far we are? Costs no host sync."""

    def __init__(
        self, steps: int, batch_size: int, checkpoint: Path, checkpoint_samples: int, runtime: Runtime
    ) -> None:
        self.steps, self.batch_size, self.checkpoint, self.runtime = steps, batch_size, checkpoint, runtime
        self.every = max(1, checkpoint_samples // batch_size)
        self.history_every = max(1, math.ceil(steps / HISTORY_POINTS))
        self.history: list[list[float]] = []
        self.seconds = 0.0
        self._resumed_at = self._told_at = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "seconds": self._elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history, self.seconds = list(state_dict["history"]), float(state_dict["seconds"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._resumed_at = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step % self.history_every == 0 or step == self.steps:
            self._record(step, float(cast(Tensor, pl_module.last_loss)))
        stopping = self.runtime.stop()
        if stopping or (step % self.every == 0 and step < self.steps):
            self._save(trainer)
        if stopping:
            raise Interrupted(
                f"stopped after {step * self.batch_size} samples; {self.checkpoint} holds the state"
            )
        now = time.monotonic()
        if now - self._told_at > 0.5 or step == self.steps:
            self._told_at = now
            self.runtime.progress(step * self.batch_size, self.steps * self.batch_size)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds = self._elapsed()

    def _elapsed(self) -> float:
        return self.seconds + time.monotonic() - self._resumed_at

    def _record(self, step: int, loss: float) -> None:
        if not math.isfinite(loss):
            raise UserError(
                f"the loss became {loss} after {step * self.batch_size} samples; "
                "lower its learning rate (`lr`) or use precision 32-true"
            )
        self.history.append([step * self.batch_size, loss])

    def _save(self, trainer: pl.Trainer) -> None:
        with replacing(self.checkpoint) as temporary:
            trainer.save_checkpoint(temporary)


def _trainer(steps: int, out: Path, device: str, precision: str, guard: _Guard) -> pl.Trainer:
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return pl.Trainer(
        accelerator="gpu" if device.startswith("cuda") else device,
        devices=[int(device.split(":")[1])] if ":" in device else 1,
        precision=precision,  # type: ignore[arg-type]
        max_epochs=1,
        max_steps=steps,
        callbacks=[guard],
        plugins=[LightningEnvironment()],  # ours are the signals and the requeue, also under SLURM
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=out,
    )


def _checkpoint_step(checkpoint: Path) -> int:
    """The step that a checkpoint was saved at; one that cannot be read is removed, and the run starts anew."""
    if not checkpoint.exists():
        return 0
    try:
        return int(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"])
    except Exception as error:
        warnings.warn(f"{checkpoint} is not readable ({error}); starting anew", stacklevel=2)
        checkpoint.unlink()
        return 0


def _reset_peak_memory(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM


def _peak_memory(device: str) -> int:
    """Peak bytes allocated on the GPU, or this process's peak resident set on CPU (0 where unknown)."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0
