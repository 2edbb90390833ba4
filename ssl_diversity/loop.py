"""The Lightning Trainer for cells and generators: exact budget, signals, checkpoints, exact resume.

There are no epochs here. A run is `order.steps` batches; batch k is a function of k alone, so a run
resumed at step k asks the order for batch k and goes on as if it had never stopped: bit for bit on CPU.
(Lightning resumes inside an epoch by replaying its sampler, from the wrong epoch with workers; we give
it one endless epoch and start our own iterator at the checkpoint's step.)
"""

import contextlib
import ctypes
import errno
import logging
import math
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments import ClusterEnvironment, LightningEnvironment
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor

from ssl_diversity.collectives import normalize_globally
from ssl_diversity.data.batches import Batch, Batches, Reader
from ssl_diversity.data.order import Order, slots
from ssl_diversity.errors import Interrupted, UserError
from ssl_diversity.files import replacing
from ssl_diversity.ranks import Group, Ranks
from ssl_diversity.runtime import Runtime

HISTORY_POINTS = 64  # losses kept per run, evenly spaced in samples seen
FILE_SEEN_S = 120.0  # in which a file of one node must be seen by the others


@dataclass(frozen=True)
class FitResult:
    """What a finished run cost. `history` holds [samples seen, loss] pairs; seconds are training alone.

    Peak memory is the most that any rank took.
    """

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

    All ranks of `runtime.group` call it together: each trains on its slots of every batch, all stop at the same step
    once one of them is asked to, rank 0 saves and tells how far they are. Any number of them may go on from any
    other's checkpoint, equal but for the order of sums.

    Raises UserError where the loss stops being finite, and where the ranks cannot share a batch evenly; PeerLost
    where one has gone.
    """
    group = runtime.group
    slots(order, group.ranks.rank, group.ranks.world)
    runtime.set_threads()
    checkpoint = out / "last.ckpt"
    guard = _Guard(order.steps, order.batch_size, checkpoint, checkpoint_samples, runtime)
    _reset_peak_memory(runtime.device)
    trainer = _trainer(out, precision, guard, runtime)
    if group.ranks.world > 1:
        normalize_globally(module, runtime.device)
    with warnings.catch_warnings(), group.entangled(lambda: guard.agreed), memory_kept(), _ctrl_c_kept():
        warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric")
        start = _start(checkpoint, group)
        trainer.fit(
            module,
            train_dataloaders=batches(order, reader, runtime, start),
            ckpt_path=str(checkpoint) if start else None,
            weights_only=True if start else None,
        )
        if trainer.global_step != order.steps:
            raise RuntimeError(f"trained {trainer.global_step} steps where the budget says {order.steps}")
        peak = max(group.gather(_peak_memory(runtime.device)))
    return FitResult(order.steps * order.batch_size, guard.seconds, peak, guard.history)


def batches(order: Order, reader: Reader, runtime: Runtime, start: int = 0) -> Batches:
    """This rank's batches from step `start` on, as `module.training_step` takes them.

    For a GPU they lie in pinned memory, from where it is given them without anybody's waiting for it.
    """
    ranks = runtime.group.ranks
    ready = _pinned if runtime.device.startswith("cuda") else _tensors
    return Batches(order, reader, start, ranks.rank, ranks.world, ready=ready)


def _tensors(batch: Batch) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def _pinned(batch: Batch) -> dict[str, Tensor]:
    return {name: tensor.pin_memory() for name, tensor in _tensors(batch).items()}


@contextlib.contextmanager
def _ctrl_c_kept() -> Iterator[None]:
    """Within, Ctrl-C raises KeyboardInterrupt; Lightning makes it exit status 1, and has a second one do nothing."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        signal.signal(signal.SIGINT, handler)
        raise KeyboardInterrupt from error


class _Guard(pl.Callback):
    """After every step: is it time to save, to stop, to tell how far we are? Costs no wait for the device.

    `agreed`: the error that it raises is raised by all ranks at the same step.
    """

    def __init__(
        self, steps: int, batch_size: int, checkpoint: Path, checkpoint_samples: int, runtime: Runtime
    ) -> None:
        self.steps, self.batch_size, self.checkpoint, self.runtime = steps, batch_size, checkpoint, runtime
        self.every = max(1, checkpoint_samples // batch_size)
        self.history_every = max(1, math.ceil(steps / HISTORY_POINTS))
        self.history: list[list[float]] = []
        self.seconds = 0.0
        self.agreed = False
        self._trained = False
        self._sigterm = signal.getsignal(signal.SIGTERM)
        self._resumed_at = self._told_at = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history, "seconds": self._elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history, self.seconds = list(state_dict["history"]), float(state_dict["seconds"])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._resumed_at = time.monotonic()
        if callable(self._sigterm) and threading.current_thread() is threading.main_thread():
            # the caller's, who asks to stop by it; Lightning's would exit without a checkpoint
            signal.signal(signal.SIGTERM, self._sigterm)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Also asked to stop while it waited for a batch, which other ranks may have."""
        alone = self.runtime.group.ranks.world == 1
        if isinstance(exception, Interrupted) and not self.agreed and alone and self._trained:
            try:
                self._save(trainer)
            except Exception as error:
                warnings.warn(f"{self.checkpoint}: not written ({error})", stacklevel=2)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        self._trained = True
        stopping = self.runtime.group.any(self.runtime.stop())
        if step % self.history_every == 0 or step == self.steps:
            losses = self.runtime.group.gather(float(cast(Tensor, pl_module.last_loss)))
            self._record(step, sum(losses) / len(losses))
        if stopping or (step % self.every == 0 and step < self.steps):
            self._save(trainer)
        if stopping:
            self.agreed = True
            raise Interrupted(
                f"stopped after {step * self.batch_size} samples; {self.checkpoint} holds the state"
            )
        now = time.monotonic()
        if self.runtime.group.first and (now - self._told_at > 0.5 or step == self.steps):
            self._told_at = now
            self.runtime.progress(step * self.batch_size, self.steps * self.batch_size)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seconds = self._elapsed()

    def _elapsed(self) -> float:
        return self.seconds + time.monotonic() - self._resumed_at

    def _record(self, step: int, loss: float) -> None:
        if not math.isfinite(loss):
            self.agreed = True
            raise UserError(
                f"the loss became {loss} after {step * self.batch_size} samples; "
                "lower its learning rate (`lr`) or use precision 32-true"
            )
        self.history.append([step * self.batch_size, loss])

    def _save(self, trainer: pl.Trainer) -> None:
        if not self.runtime.group.first:
            trainer.save_checkpoint(self.checkpoint)  # writes nothing: takes part
            return
        with replacing(self.checkpoint) as temporary:
            trainer.save_checkpoint(temporary)


class _Met(ClusterEnvironment):
    """Ranks that have met already. To Lightning each is a world of its own, all but the first without files to write.

    Of a larger world it would broadcast SIGTERM within the signal's handler, in the midst of other collectives, and
    make every step wait for the device. What ranks do together is torch's DDP, and `_Guard`.
    """

    creates_processes_externally = True
    main_address, main_port = "", 0  # not used by ranks that have met

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    @staticmethod
    def detect() -> bool:
        return False

    def world_size(self) -> int:
        return 1

    def set_world_size(self, size: int) -> None:
        pass

    def global_rank(self) -> int:
        return self.ranks.rank

    def set_global_rank(self, rank: int) -> None:
        pass

    def local_rank(self) -> int:
        return 0

    def node_rank(self) -> int:
        return 0


class _Ddp(DDPStrategy):
    def _configure_launcher(self) -> None:
        """Launches nothing, and so leaves the number of threads alone."""


def _trainer(out: Path, precision: str, guard: _Guard, runtime: Runtime) -> pl.Trainer:
    device, ranks = runtime.device, runtime.group.ranks
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return pl.Trainer(
        accelerator="gpu" if device.startswith("cuda") else device,
        devices=[int(device.split(":")[1])] if ":" in device else 1,
        precision=precision,  # type: ignore[arg-type]
        max_epochs=1,
        max_steps=guard.steps,
        callbacks=[guard],
        # Not SLURM's, even there: the signals and the requeue are ours.
        plugins=[_Met(ranks) if ranks.world > 1 else LightningEnvironment()],
        strategy=_Ddp(broadcast_buffers=False, gradient_as_bucket_view=True) if ranks.world > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=out,
    )


def _start(checkpoint: Path, group: Group) -> int:
    """The step to start at, by rank 0's word; another node waits until it sees the file of that step."""
    if group.first:
        step = _checkpoint_step(checkpoint)
        group.tell(step)
        return step
    step, deadline = int(group.hear()), time.monotonic() + FILE_SEEN_S
    while step:
        with contextlib.suppress(Exception):
            if _saved_step(checkpoint) == step:
                break
        if time.monotonic() > deadline:
            raise UserError(
                f"{checkpoint}: rank {group.ranks.rank} does not see what rank 0 saved at step {step}; "
                "let all nodes share SSL_DIVERSITY_HOME"
            )
        time.sleep(0.5)
    return step


def _saved_step(checkpoint: Path) -> int:
    return int(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"])


def _checkpoint_step(checkpoint: Path) -> int:
    """The step that a checkpoint was saved at; one that cannot be read is removed, and the run starts anew."""
    if not checkpoint.exists():
        return 0
    try:
        return _saved_step(checkpoint)
    except Exception as error:
        if isinstance(error, MemoryError) or getattr(error, "errno", errno.EINVAL) != errno.EINVAL:
            raise  # of the file server or the machine, not of the checkpoint
        warnings.warn(f"{checkpoint} is not readable ({error}); starting anew", stacklevel=2)
        checkpoint.unlink()
        return 0


@contextlib.contextmanager
def memory_kept() -> Iterator[None]:
    """Within, what tensors on the CPU leave free stays with this process, for the next step's; then the system has it.

    By default glibc maps each large tensor anew: a step of ResNet-18 (32 px, batch 256) has 2 GB of pages cleared by the
    kernel, a sixth of its time. The price is a higher peak (3.1 GB for 2.1). Without glibc nothing changes.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        yield
        return
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # malloc.h
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, -1)
    try:
        yield
    finally:
        libc.mallopt(mmap_max, 1 << 16)
        libc.mallopt(mmap_threshold, 32 << 20)  # where glibc's own adaptation ends
        libc.mallopt(trim_threshold, 64 << 20)
        libc.malloc_trim(0)


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
