"""The loop trains the exact budget, and a resumed run is the run that never stopped."""

import ctypes
import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from ssl_diversity import loop
from ssl_diversity.errors import Interrupted, UserError
from ssl_diversity.randomness import normal
from ssl_diversity.runtime import Runtime

BATCH = 4
STEPS = 13


class Order:
    unique_samples, batch_size, units, steps, total = 10, BATCH, BATCH, STEPS, STEPS * BATCH

    def batch(self, step: int) -> np.ndarray:
        return self.at(np.arange(step * BATCH, (step + 1) * BATCH))

    def at(self, positions: np.ndarray) -> np.ndarray:
        return positions % 10


class Reader:
    images = np.random.default_rng(0).integers(0, 256, (10, 3, 4, 4), dtype=np.uint8)

    def read(self, indices: np.ndarray) -> np.ndarray:
        return self.images[indices]


class Module(pl.LightningModule):
    """Momentum, batch norm, noise and a schedule: everything that a careless resume forgets."""

    def __init__(self, diverge: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
        self.diverge = diverge
        self.seen: list[Tensor] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append(batch["positions"])
        x = batch["images"].float() / 255 + normal(1, 0, batch["positions"], 48).view(-1, 3, 4, 4)
        loss = self.net(x).square().mean() * (float("nan") if self.diverge else 1)
        self.last_loss = loss.detach()
        return loss

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def run(
    out: Path, stop_after: int | None = None, precision: str = "32-true"
) -> tuple[Module, loop.FitResult]:
    out.mkdir(exist_ok=True)
    module = Module()
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return stop_after is not None and asked >= stop_after

    result = loop.fit(
        module,
        order=Order(),
        reader=Reader(),
        out=out,
        runtime=Runtime(stop=stop),
        precision=precision,
        checkpoint_samples=3 * BATCH,
    )
    return module, result


def same(a: Module, b: Module) -> bool:
    return all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_trains_exactly_the_budget(tmp_path: Path) -> None:
    module, result = run(tmp_path)
    assert torch.equal(torch.cat(module.seen), torch.arange(STEPS * BATCH))
    assert result.samples_seen == STEPS * BATCH
    assert result.history[-1][0] == STEPS * BATCH
    assert len(result.history) == STEPS
    assert result.peak_memory_bytes > 0


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_resumed_at_any_step_equals_undisturbed(tmp_path: Path, precision: str) -> None:
    undisturbed, expected = run(tmp_path / "a", precision=precision)
    for step in range(1, STEPS):
        out = tmp_path / f"stopped-{step}"
        with pytest.raises(Interrupted):
            run(out, stop_after=step, precision=precision)
        module, result = run(out, precision=precision)
        assert module.seen[0][0] == step * BATCH
        assert same(module, undisturbed)
        assert result.history == expected.history


def test_ctrl_c_is_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(self: Module, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(Module, "training_step", pressed)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert signal.getsignal(signal.SIGINT) is handler


def test_asked_to_stop_while_it_waits_for_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed, _ = run(tmp_path / "a")
    read = Reader.read
    for step in range(STEPS):
        batches = 0

        def interrupted(self: Reader, indices: np.ndarray, step: int = step) -> np.ndarray:
            nonlocal batches
            batches += 1
            if batches > step:
                raise Interrupted("no server answers, and the worker is told to end")
            return read(self, indices)

        monkeypatch.setattr(Reader, "read", interrupted)
        with pytest.raises(Interrupted):
            run(tmp_path / f"b{step}")
        monkeypatch.setattr(Reader, "read", read)
        module, _ = run(tmp_path / f"b{step}")
        assert module.seen[0][0] >= (step - 1) * BATCH  # Lightning asks for one more than it trains on
        assert same(module, undisturbed)


def test_a_sigterm_is_the_callers_at_any_moment(tmp_path: Path) -> None:
    """Lightning's own would end the process without a result where it comes after the last step."""
    told: list[int] = []
    handler = signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    mine = signal.getsignal(signal.SIGTERM)
    try:
        result = loop.fit(
            Module(),
            order=Order(),
            reader=Reader(),
            out=tmp_path,
            runtime=Runtime(progress=lambda done, total: os.kill(os.getpid(), signal.SIGTERM)),
            precision="32-true",
            checkpoint_samples=3 * BATCH,
        )
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert result.samples_seen == STEPS * BATCH
    assert set(told) == {signal.SIGTERM}


def test_interrupted_twice(tmp_path: Path) -> None:
    undisturbed, _ = run(tmp_path / "a")
    for stop_after in (4, 5):
        with pytest.raises(Interrupted):
            run(tmp_path / "b", stop_after=stop_after)
    module, _ = run(tmp_path / "b")
    assert len(module.seen) == STEPS - 9
    assert same(module, undisturbed)


def test_a_checkpoint_cut_in_half_is_not_loaded(tmp_path: Path) -> None:
    undisturbed, _ = run(tmp_path / "a")
    with pytest.raises(Interrupted):
        run(tmp_path / "b", stop_after=4)
    checkpoint = tmp_path / "b" / "last.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[: checkpoint.stat().st_size // 2])
    with pytest.warns(UserWarning, match="starting anew"):
        module, _ = run(tmp_path / "b")
    assert len(module.seen) == STEPS
    assert same(module, undisturbed)


def test_a_loss_that_is_not_finite_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the loss became nan after 4 samples.*lr"):
        loop.fit(
            Module(diverge=True),
            order=Order(),
            reader=Reader(),
            out=tmp_path,
            runtime=Runtime(),
            precision="32-true",
            checkpoint_samples=8,
        )


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not glibc")
def test_memory_of_one_step_serves_the_next_and_goes_back_after_the_last() -> None:
    size = 1 << 28

    def new_pages() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(size, dtype=torch.uint8)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    outside = resident()
    with loop.memory_kept():
        pages = [new_pages() for _ in range(8)]  # the first few lay out what the others find
        assert sum(pages[4:]) < size / resource.getpagesize() / 100
        assert resident() > outside + size / 2
    assert resident() < outside + size / 2
