"""Large cells train compiled: the same training up to rounding, the same whether interrupted or not."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ssl_diversity import train
from ssl_diversity.cli_profile import _cells
from ssl_diversity.errors import Interrupted
from ssl_diversity.methods import compiling
from ssl_diversity.runtime import Runtime
from ssl_diversity.sweep import config
from ssl_diversity.sweep.plan import expand
from ssl_diversity.sweep.profile import load_profile
from ssl_diversity.train import CellSpec, pretrain

FEW = ["source=digits", "unique_samples=128", "budget=640"]


@pytest.fixture(autouse=True)
def compiler() -> Iterator[None]:
    """On a CPU torch needs one for C++, which the project does not."""
    if why := compiling._broken("cpu", 1):
        assert not os.environ.get("SSL_DIVERSITY_REQUIRE_CXX"), why
        pytest.skip(f"torch cannot compile here: {why}")
    yield
    torch.compiler.reset()


def cell(method: str, *texts: str) -> CellSpec:
    (found,) = _cells("quickstart", [f"method={method}", *FEW, *texts], load_profile("local"))
    assert found.task is not None
    return CellSpec.model_validate(found.task.spec.model_dump())


def trained(spec: CellSpec, out: Path, **runtime: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    out.mkdir(exist_ok=True)
    result = pretrain(spec, out, Runtime(**runtime))
    return result, torch.load(out / "weights.pt")["state_dict"]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "COMPILED_FROM", 640)


def test_compiled_it_is_the_same_training(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of DINO, which has a teacher and views of two sizes."""
    spec = cell("dino", "precision=32-true")
    eager, expected = trained(spec, tmp_path / "eager")
    assert eager["compiled"] is False
    monkeypatch.setattr(train, "COMPILED_FROM", 640)
    asked: list[Any] = []
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda m, **how: asked.append(m) or compile_module(m, **how)
    )
    result, weights = trained(spec, tmp_path / "compiled")
    assert result["compiled"] is True
    assert len(asked) == 2
    assert all(callable(m._compiled_call_impl) for m in asked)
    assert weights.keys() == expected.keys()
    assert result["history"] != eager["history"], "nothing was compiled"
    for (samples, loss), (_, eager_loss) in zip(result["history"], eager["history"], strict=True):
        assert loss == pytest.approx(eager_loss, rel=1e-4 if samples == 64 else 1e-2)  # rounding grows


def test_interrupted_it_goes_on_to_the_same_bits(home: Path, tmp_path: Path, always: None) -> None:
    spec = cell("byol")
    _, expected = trained(spec, tmp_path / "whole")
    left = [4]

    def stop() -> bool:
        left[0] -= 1
        return left[0] == 0

    with pytest.raises(Interrupted):
        trained(spec, tmp_path / "cut", stop=stop)
    torch.compiler.reset()  # as in another process
    result, weights = trained(spec, tmp_path / "cut")
    assert result["compiled"] is True
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_without_a_compiler_it_trains_all_the_same_and_says_so(home: Path, tmp_path: Path) -> None:
    spec = cell("simclr").model_dump_json()
    script = (
        "import sys; from pathlib import Path; from ssl_diversity import train; from ssl_diversity.runtime import Runtime;"
        "train.COMPILED_FROM = 640; spec = train.CellSpec.model_validate_json(sys.argv[1]);"
        "print(train.pretrain(spec, Path(sys.argv[2]), Runtime())['compiled'])"
    )
    without = {"CXX": "/no/such/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    ended = subprocess.run(
        [sys.executable, "-c", script, spec, str(tmp_path)],
        env=os.environ | without, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ended.stdout.split()[-1] == "False"
    (line,) = [line for line in ended.stderr.splitlines() if "torch.compile" in line]
    assert "does not work here" in line


def test_it_may_be_switched_off(
    home: Path,
    tmp_path: Path,
    always: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spec = cell("simclr")
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    assert trained(spec, tmp_path / "out")[0]["compiled"] is False
    assert "does not work here: TORCH_COMPILE_DISABLE=1" in capsys.readouterr().err


def test_a_network_that_cannot_be_compiled_after_all_trains_as_it_is(
    home: Path, tmp_path: Path, always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a disk that is full by then."""
    spec = cell("simclr")

    def compile_module(module: torch.nn.Module, **how: Any) -> None:
        module._compiled_call_impl = torch.compile(module._call_impl, backend=refuse, **how)

    def refuse(graph: Any, inputs: Any) -> Any:
        refused.append(graph)
        raise OSError("no space left on device")

    refused: list[Any] = []
    monkeypatch.setattr(torch.nn.Module, "compile", compile_module)
    result, _ = trained(spec, tmp_path / "out")
    assert refused
    assert result["samples_seen"] == 640


def test_the_key_says_so_and_follows_from_the_whole_budget_alone(home: Path) -> None:
    small, vit = cell("simclr"), cell("mae", "backbone=vit-micro")
    assert "compiled" not in small.identity()
    large = small.model_copy(update={"budget": train.COMPILED_FROM})
    assert large.identity()["compiled"] is True
    assert (
        large.model_copy(update={"budget": train.COMPILED_FROM - 1}).identity().keys()
        == small.identity().keys()
    )
    assert not vit.model_copy(update={"budget": 10**9}).compiled
    plans = expand(
        config.load(
            "quickstart",
            ["methods=[simclr,mae]", "sources=[digits]", "budget=[3999936,4e6]"],
        )
    )
    likes = {(c.method, c.budget): c.like.endswith("/compiled") for c in plans.cells}
    assert likes == {
        ("simclr", 3_999_936): False,
        ("simclr", 4_000_000): True,
        ("mae", 3_999_936): False,
        ("mae", 4_000_000): False,
    }
    large = expand(
        config.load(
            "quickstart",
            ["methods=[simclr]", "sources=[digits]", "budget=4e6", "batch_size=512", "unique_samples=[1024]"],
        )
    )
    for planned in (*plans.cells, *large.cells):
        assert planned.task is not None
        spec = planned.task.spec
        assert isinstance(spec, CellSpec)
        assert planned.task.key == type(planned.task)("pretrain", spec).key  # as the series has it
        assert planned.like.endswith("/compiled") == spec.compiled
    assert not large.cells[0].like.endswith("/compiled")  # 3,999,744 samples are whole batches
