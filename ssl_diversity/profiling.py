"""What one training step of a cell costs, part by part, measured on the functions that training runs.

The whole step is timed in `loop.fit`, as cells run it. Its parts are timed in a bare loop over the same batches that
calls what `training_step` calls, and `optimizer_step`, each part waited for. `rest` is the difference.
"""

import contextlib
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ssl_diversity import budget
from ssl_diversity.errors import Interrupted, UserError
from ssl_diversity.runtime import Runtime
from ssl_diversity.train import CellSpec, open_cell

MEASURED = ("idle", "copy", "views", "forward", "loss", "backward", "optimiser", "EMA")
PARTS = (*MEASURED, "checkpoints", "rest")
WARM_UP_STEPS = 3
ROUNDS = 3
ROUND_S = 2.0  # about, of a round whose number of steps is not given
STEPS = range(5, 201)  # of such a round
MATMUL_SIDE = {"cuda": 8192, "cpu": 2048}


@dataclass(frozen=True)
class StepProfile:
    """Seconds of one step, `parts` adding up to `step_s`; medians over rounds.

    `idle` is the wait for a batch that was not read yet, `copy` its way to the device, `loss` everything from the
    network's outputs to the loss, `optimiser` schedules, zeroing and clipping of gradients and the update, `checkpoints`
    a step's share of those that the cell saves, `rest` what the loop adds (on a GPU less what it overlaps: it may be
    below 0). `reading_s` is what a batch costs in the background. `peak_flops` is what a large matrix product reaches
    here, in FLOP/s, by precision.
    """

    method: str
    backbone: str
    recipe: str
    image_size: int
    batch_size: int
    precision: str
    device: str
    threads: int
    steps: int
    step_s: float
    parts: dict[str, float]
    reading_s: float
    flops_per_sample: int
    peak_flops: dict[str, float]

    @property
    def samples_per_second(self) -> float:
        return self.batch_size / self.step_s

    @property
    def flops_per_second(self) -> float:
        return self.flops_per_sample * self.samples_per_second

    @property
    def share_of_peak(self) -> float:
        return self.flops_per_second / self.peak_flops[self.precision]

    def as_record(self) -> dict[str, Any]:
        names = ("samples_per_second", "flops_per_second", "share_of_peak")
        return asdict(self) | {name: getattr(self, name) for name in names}


def profile(spec: CellSpec, runtime: Runtime, steps: int | None = None) -> StepProfile:
    """Measure the first steps of a cell: `steps` of them in each of three rounds, after a warm-up.

    Trains nothing that is kept. UserError where the cell has too few steps.
    """
    import torch

    from ssl_diversity.methods.flops import flops_per_sample

    runtime.set_threads()
    device = torch.device(runtime.device)
    cell = _Cell(spec, runtime)
    order = cell.order
    check_steps(spec, order.steps, WARM_UP_STEPS + 1)
    if steps is None:
        one_s = sum(cell.parts(1).values())
        steps = min(max(round(ROUND_S / one_s), STEPS.start), STEPS.stop - 1)
    steps = min(steps, order.steps - WARM_UP_STEPS)
    rounds, peaks = [], []
    for number in range(ROUNDS):
        runtime.progress(number, ROUNDS)
        whole_s, save_s = cell.whole(steps)
        parts = cell.parts(steps)
        saves = (budget.used(spec.budget, spec.batch_size) - 1) // spec.checkpoint_samples
        parts["checkpoints"] = saves * save_s / order.steps
        parts["rest"] = whole_s - sum(parts[name] for name in MEASURED)
        rounds.append(parts | {"reading": cell.reading(steps)})
        peaks.append({name: _matmul_flops_per_second(device, dtype) for name, dtype in _dtypes().items()})
    median = {name: statistics.median(parts[name] for parts in rounds) for name in rounds[0]}
    parts = {name: median[name] for name in PARTS}
    return StepProfile(
        method=spec.method,
        backbone=spec.backbone,
        recipe=spec.recipe.name,
        image_size=spec.image_size,
        batch_size=spec.batch_size,
        precision=spec.precision,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        threads=runtime.threads,
        steps=steps,
        step_s=sum(parts.values()),
        parts=parts,
        reading_s=median["reading"],
        flops_per_sample=flops_per_sample(spec.method, spec.backbone, spec.image_size, spec.recipe),
        peak_flops={name: max(peak[name] for peak in peaks) for name in peaks[0]},
    )


def check_steps(spec: CellSpec, steps: int, least: int) -> None:
    """Raise UserError where a cell has fewer steps than measuring takes."""
    if steps < least:
        raise UserError(
            f"budget={spec.budget}: {steps} steps of {spec.batch_size} images are too few to measure; "
            f"give it at least {least * spec.batch_size}"
        )


class _Cell:
    """A cell whose first steps are measured, time and again from its beginning."""

    def __init__(self, spec: CellSpec, runtime: Runtime) -> None:
        import torch

        self.spec, self.runtime, self.device = spec, runtime, torch.device(runtime.device)
        _, self.order, self.module, self.reader = open_cell(spec, runtime)

    def whole(self, steps: int) -> tuple[float, float]:
        """(seconds of a step, of saving a checkpoint) in `loop.fit`, which asks after every step whether to stop."""
        from ssl_diversity import loop

        ends: list[float] = []

        def stop() -> bool:
            if len(ends) + 1 in (WARM_UP_STEPS, WARM_UP_STEPS + steps):
                wait(self.device)
            ends.append(time.time())
            return len(ends) == WARM_UP_STEPS + steps

        self.module.set_extra_state({"samples_seen": 0})
        with tempfile.TemporaryDirectory() as folder:
            with contextlib.suppress(Interrupted):
                loop.fit(
                    self.module,
                    order=self.order,
                    reader=self.reader,
                    out=Path(folder),
                    runtime=replace(self.runtime, stop=stop, progress=lambda done, total: None),
                    precision=self.spec.precision,
                    checkpoint_samples=10**15,  # the one save is that of stopping
                )
            saved = (Path(folder) / "last.ckpt").stat().st_mtime
        return (ends[-1] - ends[WARM_UP_STEPS - 1]) / steps, max(0.0, saved - ends[-1])

    def parts(self, steps: int) -> dict[str, float]:
        """Seconds of each of MEASURED in one step."""
        import torch

        from ssl_diversity.views.augment import make_views

        module, device, marks = self.module, self.device, _Marks(self.device)
        bf16 = self.spec.precision == "bf16-mixed"
        module.set_extra_state({"samples_seen": 0})
        module.to(device).train()
        optimizer: Any = module.configure_optimizers()
        hook = optimizer.register_step_post_hook(lambda *_: marks("optimiser"))
        with self._batches() as batches:
            for step, read in zip(range(WARM_UP_STEPS + steps), batches, strict=False):
                if step == WARM_UP_STEPS:
                    marks.seconds.clear()
                marks("idle")
                batch = {name: tensor.to(device, non_blocking=True) for name, tensor in read.items()}
                marks("copy")

                def closure(batch: dict[str, torch.Tensor] = batch) -> None:
                    marks("optimiser")
                    images, positions = batch["images"], batch["positions"]
                    with torch.autocast(device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
                        views = make_views(images, module.recipe.views, module.seed, positions)
                        marks("views")
                        outputs = module.outputs_of(views, positions)
                        marks("forward")
                        loss = module.loss_from(outputs)
                    marks("loss")
                    optimizer.zero_grad()
                    marks("optimiser")
                    loss.backward()
                    del loss, outputs  # their graph goes with them
                    marks("backward")

                module.optimizer_step(0, step, optimizer, closure)
                marks("EMA")
        hook.remove()
        return {name: marks.seconds[name] / steps for name in MEASURED}

    def reading(self, steps: int) -> float:
        """Seconds that a batch takes to be read where nothing else is done."""
        with self._batches() as batches:
            next(batches)
            start = time.perf_counter()
            count = sum(1 for _ in zip(range(steps), batches, strict=False))
        return (time.perf_counter() - start) / count

    def _batches(self) -> "contextlib.closing[Any]":
        from ssl_diversity.loop import batches

        return contextlib.closing(iter(batches(self.order, self.reader, self.runtime)))


class _Marks:
    """Whose time it was: `marks(part)` gives it what has passed since the mark before, work of the device included."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._last = time.perf_counter()

    def __call__(self, part: str) -> None:
        wait(self.device)
        now = time.perf_counter()
        self.seconds[part] += now - self._last
        self._last = now


def _dtypes() -> dict[str, Any]:
    import torch

    return {"bf16-mixed": torch.bfloat16, "32-true": torch.float32}


def _matmul_flops_per_second(device: Any, dtype: Any) -> float:
    """Of the best of a few large matrix products."""
    import torch

    side = MATMUL_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(4):
        wait(device)
        start = time.perf_counter()
        torch.mm(a, b)
        wait(device)
        seconds.append(time.perf_counter() - start)
    return 2.0 * side**3 / min(seconds)


def wait(device: Any) -> None:
    """Wait until `device` has done all that it was given."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
