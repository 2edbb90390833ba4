"""The house keeps its shape: a floor imports only floors below it, and planning imports no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ssl_diversity

PACKAGE = Path(ssl_diversity.__file__).parent
FLOORS = [  # from the top down (docs/architecture.md)
    ["__main__"],
    ["cli"],
    ["cli_launch", "cli_profile"],
    ["cli_data"],
    ["report"],
    ["sweep"],
    ["together"],
    ["profiling"],
    ["train"],
    ["generation"],
    ["evaluation"],
    ["features", "distance"],
    ["loop"],
    ["methods"],
    ["data"],
    ["views"],
    ["backbones"],
    ["networks"],
    ["collectives"],
    ["analysis"],
    ["randomness"],
    ["runtime"],
    ["ranks"],
    ["budget"],
    ["config"],
    ["files"],
    ["errors"],
    ["torchvision_cpu"],
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
TORCH_FREE = [
    "cli",
    "report",
    "sweep.plan",
    "sweep.status",
    "sweep.launch",
    "train",
    "profiling",
    "together",
    "data.prepare",
    "analysis.effect",
]


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
        if path != PACKAGE / "__init__.py"
    }


def imported(path: Path) -> set[str]:
    """The rooms of the package that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "ssl_diversity":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ssl_diversity."):
            names.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {
                alias.name.split(".")[1] for alias in node.names if alias.name.startswith("ssl_diversity.")
            }
    return names & FLOOR.keys()


@pytest.mark.parametrize("name", sorted(modules()))
def test_a_floor_imports_only_floors_below_it(name: str) -> None:
    room = name.split(".", maxsplit=1)[0]
    above = {other for other in imported(modules()[name]) if other != room and FLOOR[other] <= FLOOR[room]}
    if room in ("features", "distance"):
        above -= {"features", "distance"}
    assert not above, f"{name} imports {above} from its own floor or one above"


def test_every_room_has_a_floor() -> None:
    assert {name.split(".")[0] for name in modules()} == FLOOR.keys()


@pytest.mark.parametrize("name", TORCH_FREE)
def test_planning_and_reporting_import_no_torch(name: str) -> None:
    code = f"import sys, ssl_diversity.{name}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_files_stay_small() -> None:
    long = {name: n for name, path in modules().items() if (n := len(path.read_text().splitlines())) > 400}
    assert not long
