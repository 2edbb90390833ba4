"""Task functions that cost nothing: what they return depends on the spec alone, and every run is logged."""

import json
import os
import time
from pathlib import Path
from typing import Any

from ssl_diversity.config import Config
from ssl_diversity.errors import Interrupted, UserError
from ssl_diversity.files import digest, home
from ssl_diversity.runtime import Runtime

FUNCTIONS = {kind: f"sweep_fakes:{kind}" for kind in ("pretrain", "probe", "distance")}


def _run(kind: str, spec: Config, out: Path, runtime: Runtime, steps: int) -> dict[str, Any]:
    key = digest(spec.identity())
    with (home() / "executions.log").open("a") as log:
        log.write(json.dumps({"kind": kind, "key": key, "pid": os.getpid()}) + "\n")
    if kind in os.environ.get("FAKE_FAIL", "").split(","):
        raise RuntimeError("made to fail")
    if kind in os.environ.get("FAKE_REFUSE", "").split(","):
        raise UserError("made to refuse")
    if kind in os.environ.get("FAKE_CRASH", "").split(","):
        os.kill(os.getpid(), 9)
    hoard = bytearray(int(float(os.environ.get("FAKE_MEMORY_GB", "0") if kind == "pretrain" else 0) * 2**30))
    hoard[:: 1 << 12] = b"1" * len(hoard[:: 1 << 12])
    for step in range(steps):
        runtime.progress(step, steps)
        if runtime.stop():
            raise Interrupted("asked to stop")
        time.sleep(float(os.environ.get("FAKE_STEP_S", "0")))
    return {"fake": key}


def pretrain(spec: Any, out: Path, runtime: Runtime) -> dict[str, Any]:
    result = _run("pretrain", spec, out, runtime, steps=20)
    (out / "weights.pt").write_text(result["fake"])
    return {**result, "samples_seen": spec.budget, "train_seconds": 1.0}


def probe(spec: Any, out: Path, runtime: Runtime) -> dict[str, Any]:
    return {**_run("probe", spec, out, runtime, steps=1), "rows": []}


def distance(spec: Any, out: Path, runtime: Runtime) -> dict[str, Any]:
    return _run("distance", spec, out, runtime, steps=1)


def report(sweep: Any) -> Path:
    _run("report", sweep, sweep.folder, Runtime(), steps=1)
    return Path(sweep.folder) / "report.html"


def executions() -> list[dict[str, Any]]:
    path = home() / "executions.log"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
