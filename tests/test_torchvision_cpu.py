"""torchvision works beside this torch, and the remedy leaves other installations alone."""

import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from ssl_diversity import torchvision_cpu


def test_native_operations_work() -> None:
    code = (
        "import torch, torchvision\n"
        "boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 2], [5, 5, 6, 6]])\n"
        "print(torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[0, 2]", done.stderr


def test_nothing_is_done_beside_a_cuda_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch" / "lib").mkdir(parents=True)
    (tmp_path / "torch" / "lib" / "libc10_cuda.so").touch()
    monkeypatch.setattr(
        torchvision_cpu,
        "find_spec",
        lambda name: ModuleSpec(name, None, origin=str(tmp_path / name / "__init__.py")),
    )
    monkeypatch.setattr(torchvision_cpu, "_compile", lambda *a, **k: pytest.fail("compiled"))
    assert "nothing to do" in torchvision_cpu.install()


def test_a_stub_that_is_called_says_so_and_aborts(tmp_path: Path) -> None:
    library = tmp_path / "libstub.so"
    torchvision_cpu._compile(library, {"cudaSomething"})
    code = f"import ctypes; ctypes.CDLL({str(library)!r}).cudaSomething()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode < 0
    assert "cudaSomething" in done.stderr
