"""An epoch of 50,000 images from a server that fails in every way, read by several processes, killed and resumed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).resolve().parents[1] / "benchmarks" / "bench_streaming.py"
DATA = os.environ.get("SSL_DIVERSITY_TEST_DATA", "")  # else random images


def drill(*arguments: str) -> dict[str, Any]:
    """What the benchmark says of one run; it fails itself where an image is missing, wrong or twice."""
    words = [sys.executable, str(BENCH), "--data", DATA, *arguments]
    done = subprocess.run(words, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)  # shown with -s: counts of faults and retries
    result: dict[str, Any] = json.loads(done.stdout)
    assert result["images"] == 50_000
    assert result["shards"] >= 40
    assert (result["wrong"], result["missing"]) == (0, 0)
    return result


@pytest.mark.slow
def test_an_epoch_arrives_complete_and_exact_through_all_faults() -> None:
    result = drill()
    assert result["images_by_times_seen"] == {"1": 50_000}
    assert all(
        result["server"][kind] > 0 for kind in ("429", "500", "cut", "slow", "stall", "length", "flip")
    )
    retries = {
        cause: result["clients"].get(f"retry:{cause}", 0) for cause in ("429", "500", "cut", "timeout")
    }
    assert all(retries.values()), retries
    assert result["server"]["bytes"] < 1.1 * result["pool_bytes"]  # four processes, one cache


@pytest.mark.slow
@pytest.mark.parametrize("order", ["windowed", "global"])
def test_killed_in_the_middle_it_goes_on_with_other_workers(order: str) -> None:
    result = drill("--kill", "--order", order)
    assert result["images_by_times_seen"] == {"1": 50_000}
    assert 0 < result["killed_at_step"] < result["steps"]
    assert result["processes"] == [4, 6]
    assert result["server"]["bytes"] < 1.2 * result["pool_bytes"]  # what was fetched is not fetched again
