"""Make torchvision's wheel load beside a CPU build of torch; run once by `make setup`.

Symptom: `import torchvision` fails with "operator torchvision::nms does not exist", and with it lightning,
lightly, timm and torchmetrics. Cause: the published wheel is a CUDA build; its libraries ask for CUDA
symbols that a CPU torch does not have. Cure: two tiny stub libraries that define those symbols (each
aborts if it is ever called, which a CPU run never does), loaded by a `.pth` line when Python starts.
Nothing is done beside a CUDA build of torch, or where torchvision asks for no CUDA symbols.

    python -m ssl_diversity.torchvision_cpu

Needs a C compiler and `nm`.
"""

import re
import subprocess
import sys
import sysconfig
import tempfile
from importlib.util import find_spec
from pathlib import Path

STUBS = "_torchvision_cpu_stubs"  # a package beside torchvision in site-packages

_LOADER = """\
import ctypes
import pathlib

_here = pathlib.Path(__file__).parent
if not (_here.parent / "torch" / "lib" / "libc10_cuda.so").exists():
    libraries = [ctypes.CDLL(str(_here / name)) for name in ({names})]
"""

_PRELUDE = """\
#include <stdio.h>
#include <stdlib.h>
static long stub(const char *name) { fprintf(stderr, "CUDA symbol called on a CPU build: %s\\n", name); abort(); }
"""


def undefined_symbols(library: Path) -> set[str]:
    """The dynamic symbols that `library` needs from elsewhere, with their versions (`name@library`)."""
    output = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True
    ).stdout
    return {line.split()[-1] for line in output.splitlines() if " U " in line}


def stub_source(symbols: set[str]) -> str:
    """C code that defines `symbols` (plain or C++-mangled names)."""
    lines = [_PRELUDE]
    for name in sorted(symbols):
        if name.endswith("CUDACachingAllocator9allocatorE"):
            lines.append(f"void *{name}[8] = {{0}};")
        elif re.match(r"__cuda(Un)?[Rr]egister|__cudaInitModule", name) or name.endswith("device_countEv"):
            lines.append(f"long {name}(void) {{ return 0; }}")  # called by the libraries' own constructors
        else:
            lines.append(f'long {name}(void) {{ return stub("{name}"); }}')
    return "\n".join(lines) + "\n"


def install() -> str:
    """Build and install the stubs where they are needed; returns one line that says what was done."""
    torch, torchvision = find_spec("torch"), find_spec("torchvision")
    if torch is None or torch.origin is None or torchvision is None or torchvision.origin is None:
        return "torch and torchvision are not both installed: nothing to do"
    if (Path(torch.origin).parent / "lib" / "libc10_cuda.so").exists():
        return "torch is a CUDA build: nothing to do"
    libraries = [
        path for name in ("_C.so", "image.so") if (path := Path(torchvision.origin).parent / name).exists()
    ]
    wanted = set().union(*(undefined_symbols(path) for path in libraries))
    runtime = {symbol.split("@")[0] for symbol in wanted if "@libcudart" in symbol}
    cuda = {symbol for symbol in wanted if re.match(r"_ZNK?(3c104cuda|2at4cuda)", symbol)}
    if not runtime and not cuda:
        return "torchvision asks for no CUDA symbols: nothing to do"
    cudart = next((s.split("@")[-1] for s in wanted if "@libcudart" in s), "libcudart.so")
    site = Path(sysconfig.get_path("purelib"))
    folder = site / STUBS
    folder.mkdir(exist_ok=True)
    _compile(folder / cudart, runtime, version=cudart)
    _compile(folder / "libc10_cuda.so", cuda)
    _compile(folder / "libtorch_cuda.so", set())
    names = ", ".join(repr(name) for name in (cudart, "libc10_cuda.so", "libtorch_cuda.so"))
    (folder / "__init__.py").write_text(_LOADER.format(names=names))
    (site / f"{STUBS}.pth").write_text(f"import {STUBS}\n")
    return f"{len(runtime) + len(cuda)} CUDA symbols stubbed in {folder}"


def _compile(library: Path, symbols: set[str], version: str | None = None) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        source = Path(temporary) / "stub.c"
        source.write_text(stub_source(symbols))
        command = ["cc", "-w", "-fno-builtin", "-shared", "-fPIC", "-O1", f"-Wl,-soname,{library.name}"]
        if version:
            script = Path(temporary) / "versions.map"
            script.write_text(f"{version} {{ global: *; }};\n")
            command.append(f"-Wl,--version-script={script}")
        subprocess.run([*command, str(source), "-o", str(library)], check=True)


if __name__ == "__main__":
    try:
        print("torchvision:", install())
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        sys.exit(
            f"error: torchvision needs a C compiler and nm beside a CPU build of torch ({error}); install gcc and binutils"
        )
