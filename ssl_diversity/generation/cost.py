"""What making images costs: seconds, energy where the machine tells it, floating-point operations."""

import contextlib
import ctypes
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Self

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ssl_diversity.errors import UserError

_POWERCAP = Path("/sys/class/powercap")


class Meter:
    """`with Meter(device) as meter:` then `meter.seconds`, and `meter.energy_joules` or None where nothing tells it.

    The energy is an estimate: of a GPU its own counter (NVML), else those of all processors of the machine
    (RAPL), whatever else they do meanwhile.
    """

    def __init__(self, device: str) -> None:
        self._joules = _gpu_energy(device) if device.startswith("cuda") else _cpu_energy()

    def __enter__(self) -> Self:
        self._start = time.perf_counter(), self._joules and self._joules()
        return self

    def __exit__(self, *_: object) -> None:
        end = self._joules and self._joules()
        self.seconds = time.perf_counter() - self._start[0]
        before = self._start[1]
        # a counter that went round says nothing
        self.energy_joules = None if end is None or before is None or end < before else end - before


@cache
def _gpu_energy(device: str) -> Callable[[], float] | None:
    """The counter of a CUDA device's energy, joules; None where the driver has none."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    uuid = f"GPU-{torch.cuda.get_device_properties(torch.device(device)).uuid}"
    handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)):
        return None

    def read() -> float:
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
        return millijoules.value / 1e3

    return read if not nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)) else None


@cache
def _cpu_energy() -> Callable[[], float] | None:
    """The counters of the processors' energy, joules in all; None where they are absent or for the root user alone."""
    zones = [path / "energy_uj" for path in _POWERCAP.glob("intel-rapl:?")]

    def read() -> float:
        return sum(int(path.read_text()) for path in zones) / 1e6

    try:
        read()
    except (OSError, ValueError):
        return None
    return read if zones else None


def flops_per_image(make: Callable[[int], Any], steps: int, device: str) -> float | None:
    """FLOPs of one image in `steps` steps: counted at 1 and at 2 steps by `make(steps)`, and linear in between.

    None where the scheduler cannot do so few.
    """
    counts = []
    for few in (1, 2):
        # Attention by matrix products where the counter does not know the kernels; on a GPU they could need too much.
        plain = sdpa_kernel(SDPBackend.MATH) if device == "cpu" else contextlib.nullcontext()
        with plain, FlopCounterMode(display=False) as counter:
            try:
                make(few)
            except UserError:
                raise
            except Exception:  # schedulers fail in many ways
                return None
        counts.append(counter.get_total_flops())
    return float(counts[0] + (steps - 1) * (counts[1] - counts[0]))
