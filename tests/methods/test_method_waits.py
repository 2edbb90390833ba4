"""A step reads nothing back from a GPU: no value, no count. Meta tensors, which take the same path, have neither."""

import contextlib
from typing import Any

import pytest
import torch
from method_helpers import BATCH, step, tiny
from torch import Tensor

from ssl_diversity.methods.losses import off_diagonal
from ssl_diversity.methods.recipe import METHODS


@pytest.fixture(autouse=True)
def on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch offers on GPUs and not there: autocast, and AdamW in one kernel."""
    autocast, adamw = torch.autocast, torch.optim.AdamW

    def cast(device: str, *args: Any, **kwargs: Any) -> Any:
        return contextlib.nullcontext() if device == "meta" else autocast(device, *args, **kwargs)

    monkeypatch.setattr(torch, "autocast", cast)
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda *args, fused, **kwargs: adamw(*args, foreach=fused, **kwargs)
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_step_reads_nothing_back(method: str) -> None:
    module = tiny(method).to("meta")
    optimizer = module.configure_optimizers()
    batch = {
        "images": torch.empty(BATCH, 3, 16, 16, dtype=torch.uint8, device="meta"),
        "positions": torch.empty(BATCH, dtype=torch.int64, device="meta"),
    }
    for _ in range(2):
        step(module, optimizer, batch)
    assert module.samples_seen == 2 * BATCH
    assert module.last_loss.device.type == "meta"
    assert module.last_loss.shape == ()


def test_a_wait_would_be_seen() -> None:
    square = torch.empty(3, 3, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        square[~torch.eye(3, dtype=torch.bool, device="meta")]
    with pytest.raises(RuntimeError):
        float(square.sum())
    assert off_diagonal(square).shape == (3, 2)


def test_off_diagonal() -> None:
    square: Tensor = torch.arange(9).view(3, 3)
    assert off_diagonal(square).tolist() == [[1, 2], [3, 5], [6, 7]]
    assert off_diagonal(square.T.contiguous()).tolist() == [[3, 6], [1, 7], [2, 5]]
