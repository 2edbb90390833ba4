"""A made-up sweep: records such as collect.py makes, with known gaps."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ssl_diversity.report.records import Collected, FailedTask

SOURCES = {"digits": "digits", "generated-digits": "generated", "photo_patches": "photo_patches"}


def make_records(
    *,
    seeds: int = 2,
    ns: tuple[int, ...] = (64, 1024),
    methods: tuple[str, ...] = ("mae", "simclr"),
    draw_seed: int = 0,
) -> list[dict[str, Any]]:
    draw = np.random.default_rng(draw_seed)
    frechet = {"digits": 0.2, "generated-digits": 3.4, "photo_patches": 17.8}
    records: list[dict[str, Any]] = []

    def accuracy(mean: float) -> dict[str, Any]:
        value = float(np.clip(mean + draw.normal(0, 0.005), 0, 1))
        return {
            "accuracy": value,
            "accuracy_low": value - 0.03,
            "accuracy_high": value + 0.03,
            "accuracy_clean": value,
            "n_test": 360,
            "chance": 0.1,
        }

    for probe in ("fewshot-5", "linear"):
        place = {"sweep": "toy", "status": "done", "downstream": "digits", "probe": probe}
        records.append({**place, "cell": "pixels", "method": "pixels", **accuracy(0.85)})
        for s in range(seeds):
            at = {"cell": f"random:conv:{s}", "method": "random", "backbone": "conv", "seed": s}
            records.append({**place, **at, **accuracy(0.8)})
        for method in methods:
            for i, (source, kind) in enumerate(SOURCES.items()):
                for n in ns:
                    for s in range(seeds):
                        failed = (method, source, n, s) == ("mae", "photo_patches", ns[0], 0)
                        collapsed = (method, source, n) == ("simclr", "photo_patches", ns[0])
                        at = {
                            "cell": f"{method}{i}{n:06d}{s}".rjust(32, "0"), "method": method, "backbone": "conv",
                            "recipe": "quick", "source": source, "source_kind": kind, "pool_digest": "ab" * 16,
                            "source_real_images": 1437,
                            "source_cost_flops": 2.5e11 * (kind == "generated"), "unique_samples": n, "budget": 4096, "budget_asked": "4096",
                            "batch_size": 64, "seed": s, "replicate": s, "overlap": 0.1, "precision": "bf16-mixed",
                            "leaked": 0, "leaked_near": 0, "extractor": "random-resnet", "distance_n": 1024, "frechet": frechet[source],
                            "frechet_floor": 0.19, "visual_dna": frechet[source] / 100, "visual_dna_floor": 0.01,
                            "vendi": 5.0,
                        }  # fmt: skip
                        if failed:
                            records.append({**place, **at, "status": "failed"})
                            continue
                        at |= {
                            "effective_rank": 1.2 if collapsed else 30.0,
                            "collapsed": collapsed,
                            "flops": 10**12,
                        }
                        at |= {"train_seconds": 8.0, "peak_memory_bytes": 10**9}
                        mean = 0.4 if collapsed else 0.9 - 0.03 * i + 0.01 * np.log2(n / ns[0]) * (i < 2)
                        records.append({**place, **at, **accuracy(mean)})
    return records


def make_collected(records: list[dict[str, Any]], **more: Any) -> Collected:
    failed = FailedTask("pretrain", "f" * 32, "pretrain mae photo_patches", "RuntimeError: <boom> & more", 3)
    given: dict[str, Any] = {
        "sweep": "toy", "records": records, "probes": ("fewshot-5", "linear"), "failed": (failed,),
        "tasks": {"pretrain": {"done": 23, "failed": 1}}, "waiting": ("source textures is not prepared yet",),
        "run": {"command": "ssl-diversity sweep toy budget=4096", "machine": "laptop"}, "spec_text": "name: toy\n",
    }  # fmt: skip
    return Collected(**given | more)


@pytest.fixture
def records() -> Callable[..., list[dict[str, Any]]]:
    return make_records


@pytest.fixture
def collected() -> Callable[..., Collected]:
    """`collected(records, **fields)`."""
    return make_collected
