"""Several ranks on this machine: processes that meet and run one function, each with its `Group`."""

import contextlib
import multiprocessing
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from method_helpers import tiny

from ssl_diversity import loop
from ssl_diversity.data.order import GlobalOrder
from ssl_diversity.errors import Interrupted, UserError
from ssl_diversity.ranks import Group, PeerLost, Ranks, joined
from ssl_diversity.runtime import Runtime
from ssl_diversity.train import CellSpec, pretrain
from ssl_diversity.views import augment

STEPS, BATCH = 20, 12


def on_ranks(world: int, folder: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(group, *args)` returned on each rank; where it raised, the traceback; None where it died."""
    folder.mkdir(parents=True)
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_rank, args=(rank, world, folder, function, args), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(1200)
        process.kill()
    answers = [folder / f"answer-{rank}" for rank in range(world)]
    return [pickle.loads(path.read_bytes()) if path.exists() else None for path in answers]


def _rank(rank: int, world: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        with joined(Ranks(rank, world, rank, world), "cpu", folder / "meeting", wait_s=120) as group:
            answer = function(group, *args)
    except BaseException:
        answer = traceback.format_exc()
    (folder / f"answer-{rank}").write_bytes(pickle.dumps(answer))


class Images:
    """A reader of 40 fixed images."""

    images = np.random.default_rng(0).integers(0, 256, (40, 3, 16, 16), dtype=np.uint8)

    def read(self, indices: np.ndarray) -> np.ndarray:
        return self.images[indices]


@contextlib.contextmanager
def in_double() -> Iterator[None]:
    """Where code asks for float32 it gets float64, so that what differs by more than 1e-10 is no rounding."""
    augment._mean_and_std.cache_clear()
    try:
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
            yield
    finally:
        augment._mean_and_std.cache_clear()


def train(
    group: Group, method: str, out: Path, precision: str = "64-true", **options: Any
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of all steps and the final state, from `tiny` with `options`; `stop` and `reader` may be given."""
    stop, reader = options.pop("stop", bool), options.pop("reader", Images())
    module = tiny(method, budget=STEPS * BATCH, batch_size=BATCH, **options)
    out.mkdir(parents=True, exist_ok=True)
    if precision == "64-true":
        module.double()  # before a checkpoint is loaded into it
    with in_double() if precision == "64-true" else contextlib.nullcontext():
        result = loop.fit(
            module,
            order=GlobalOrder(40, BATCH, 0, STEPS * BATCH),
            reader=reader,
            out=out,
            runtime=Runtime(stop=stop, group=group),
            precision=precision,
            checkpoint_samples=10 * BATCH,
        )
    state = {name: value for name, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    return [loss for _, loss in result.history], state


def train_all(group: Group, cases: dict[str, dict[str, Any]], out: Path) -> dict[str, Any]:
    return {name: train(group, out=out / name, **case) for name, case in cases.items()}


def stopped_after(group: Group, out: Path, step: int, on_rank: int = 0) -> str:
    """Train SimCLR until that rank gets a SIGTERM in its `step`th step; what came of it."""
    asked, stopping = 0, False

    def on_signal(*_: Any) -> None:
        nonlocal stopping
        stopping = True

    def stop() -> bool:
        nonlocal asked
        asked += 1
        if asked == step and group.ranks.rank == on_rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return stopping

    before = signal.signal(signal.SIGTERM, on_signal)
    try:
        train(group, "simclr", out, stop=stop)
    except Interrupted as error:
        return f"{asked}: {error}"
    finally:
        signal.signal(signal.SIGTERM, before)
    return "ended"


def talk(group: Group, out: Path) -> list[Any]:
    """A bit of everything that ranks can say to each other."""
    rank = group.ranks.rank
    said: list[Any] = []
    if group.first:
        group.tell({"task": 1})
        train(Group(), "mae", out)  # what rank 0 does by itself
        group.tell("next")
    else:
        said += [group.hear(), group.hear()]
    said += [group.any(rank == 1), group.any(False), group.gather(10 * rank)]
    for failing in (1, 0):
        try:
            with group.together():
                if rank == failing:
                    raise UserError("no such shard")
        except UserError as error:
            said.append(str(error))
    return said


def rehearse(group: Group, cases: dict[str, dict[str, Any]], out: Path) -> dict[str, Any]:
    return {
        "said": talk(group, out / "alone"),
        "trained": train_all(group, cases, out),
        "stopped": stopped_after(group, out / "stopped", 7, on_rank=1),
    }


def killed(group: Group, out: Path) -> str | None:
    """The last rank dies while it trains; what the others are told, soon enough for `on_ranks` to see it."""
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        if asked == 4 and group.ranks.rank == group.ranks.world - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    try:
        train(group, "simclr", out, stop=stop)
    except PeerLost:
        try:
            group.tell("more")
        except PeerLost as error:
            return str(error)
    return None


def go_on_and_be_killed(group: Group, cases: dict[str, dict[str, Any]], out: Path, going_on: Path) -> Any:
    return train_all(group, cases, out), train(group, "simclr", going_on), killed(group, out / "killed")


class Cut(Images):
    """A reader that fails on rank 1."""

    def __init__(self, group: Group) -> None:
        self.group, self.reads = group, 0

    def read(self, indices: np.ndarray) -> np.ndarray:
        self.reads += 1
        if self.group.ranks.rank == 1 and self.reads == 4:
            raise UserError("shard 7 is cut")
        return super().read(indices)


def pretrain_and_fail(group: Group, spec: CellSpec, out: Path) -> Any:
    """A cell, whole, and then a run whose images rank 1 cannot read."""
    out.mkdir(parents=True, exist_ok=True)
    told: list[int] = []
    result = pretrain(
        spec, out, Runtime(group=group, progress=lambda done, total: told.append(done), note=lambda _: None)
    )
    try:
        train(group, "simclr", out / "cut", reader=Cut(group))
    except PeerLost as error:
        return result, told, str(error)
    return result, told, "ended"
