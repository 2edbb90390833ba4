"""From a sweep to plain records: its plan, and the results in the store."""

import json
import math
import shlex
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from omegaconf import OmegaConf

from ssl_diversity.data.leaks import Leaks, find_leaks
from ssl_diversity.data.pool import Pool, Rows, overlap
from ssl_diversity.data.subset import digest_of
from ssl_diversity.errors import UserError
from ssl_diversity.evaluation.outcome import accuracy_without
from ssl_diversity.files import read_json, task_dir
from ssl_diversity.generation.sampling import SOURCE as GENERATED
from ssl_diversity.report.records import Collected, FailedTask
from ssl_diversity.report.words import date, scientific
from ssl_diversity.sweep import store
from ssl_diversity.sweep.config import SETS, SweepConfig, load
from ssl_diversity.sweep.plan import Baseline, Cell, Plan, expand
from ssl_diversity.sweep.status import duration
from ssl_diversity.sweep.task import Task

MEASURED = ("effective_rank", "collapsed", "compiled", "flops", "train_seconds", "peak_memory_bytes")
NEAR = (
    "extractor",
    "frechet",
    "frechet_floor",
    "frechet_noise",
    "visual_dna",
    "visual_dna_floor",
    "floor_n",
    "shared_images",
    "vendi",
)
SUBSET = {
    "subset_n": "n",
    "frechet_subset": "frechet",
    "frechet_subset_floor": "frechet_floor",
    "visual_dna_subset": "visual_dna",
}
Results = Mapping[tuple[str, str], dict[str, Any]]  # of the tasks that are done, by id
Parts = tuple[tuple[Pool, Rows], ...]  # of a cell


def collect(sweep: SweepConfig) -> Collected:
    """Everything that the report of `sweep` shows; cells without results yet are records without measures."""
    plan = expand(sweep)
    results = {task.id: result for task in plan.tasks if (result := store.result(task)) is not None}
    marked = store.Index("failed")
    records = [
        record
        for cell in plan.cells
        if cell.task is not None
        for record in _cell_records(plan, cell, results, marked)
    ]
    records += [
        record
        for baseline in plan.baselines
        for record in _baseline_records(sweep, baseline, results, marked)
    ]
    failed, tasks = _failed(plan, results, marked)
    return Collected(
        sweep=sweep.name,
        records=[_finite(record) for record in records],
        probes=sweep.probes,
        tasks=tasks,
        failed=failed,
        waiting=plan.waiting,
        run=_run(sweep, list(results.values())),
        spec_text=OmegaConf.to_yaml(OmegaConf.create(sweep.model_dump(mode="json"))),
    )


def history(key: str) -> list[tuple[int, float]]:
    """(samples seen, loss) along a finished cell's training."""
    return [
        (int(seen), float(loss))
        for seen, loss in read_json(task_dir("pretrain", key) / "result.json")["history"]
    ]


def _cell_records(plan: Plan, cell: Cell, results: Results, marked: store.Index) -> list[dict[str, Any]]:
    task, recipe, parts = cell.task, cell.recipe, cell.parts
    assert task is not None
    assert recipe is not None
    pools = [pool for pool, _ in parts]
    real = [pool.info.real_images for pool in pools]
    replicates = plan.sweep.seeds if plan.sweep.replicates == "per-seed" else (0,)
    trained = results.get(task.id, {})
    common = {
        "sweep": plan.sweep.name,
        "cell": task.key,
        "method": cell.method,
        "backbone": cell.backbone,
        "recipe": recipe.name,
        "source": cell.source.name,
        "source_kind": pools[0].info.source if len(pools) == 1 else "mix",
        "pool_digest": digest_of([pool.digest for pool in pools]),
        "source_real_images": None if None in real else sum(filter(None, real)),
        "source_cost_flops": _source_flops(parts),
        "unique_samples": cell.unique_samples,
        "budget": cell.budget,
        "budget_asked": cell.budget_asked,
        "batch_size": cell.batch_size,
        "seed": cell.seed,
        "replicate": cell.replicate,
        "overlap": _overlap(parts, replicates),
        "precision": plan.sweep.precision,
    } | {name: trained.get(name) for name in MEASURED}
    tests = {d.name: d.test for d in plan.downstream}
    out = []
    for name, probe in cell.probes.items():
        test = tests[name]
        assert test is not None
        near, subset = (
            results.get(of[name].id, {}) if name in of else {}
            for of in (cell.distances, cell.subset_distances)
        )
        leaks = _leaks(test, parts)
        measures = {
            "status": _status(task, probe, results, marked),
            "downstream": name,
            "leaked": int(leaks.exact.sum()),
            "leaked_near": None if leaks.near is None else int(leaks.near.sum()),
            "distance_n": near.get("n"),
        }
        measures |= {column: near.get(column) for column in NEAR}
        measures |= {column: subset.get(field) for column, field in SUBSET.items()}
        out += _probe_records(probe, results, common | measures, leaks)
    return out


def _source_flops(parts: Parts) -> float | None:
    """FLOPs of making the images of a cell: 0 for real ones, None where a generated pool does not say.

    Training the generator, where it was trained here, and sampling N images with those that filters dropped.
    """
    total = 0.0
    for pool, rows in parts:
        if pool.info.source != GENERATED:
            continue
        cost = pool.info.provenance.get("cost") or {}
        if cost.get("flops_per_image") is None or (
            "training_flops" in cost and cost["training_flops"] is None
        ):
            return None
        made = pool.info.counts["read"] / pool.size  # of which one is kept
        total += cost.get("training_flops", 0.0) + cost["flops_per_image"] * made * rows.count
    return total


def _baseline_records(
    sweep: SweepConfig, baseline: Baseline, results: Results, marked: store.Index
) -> list[dict[str, Any]]:
    common = {
        "sweep": sweep.name,
        "cell": baseline.task.spec.network,  # type: ignore[attr-defined]
        "status": _status(baseline.task, baseline.task, results, marked),
        "method": baseline.name,
        "backbone": baseline.backbone,
        "seed": baseline.seed,
        "downstream": baseline.downstream.name,
        "effective_rank": results.get(baseline.task.id, {}).get("effective_rank"),
    }
    return _probe_records(baseline.task, results, common)


def _probe_records(
    probe: Task, results: Results, common: dict[str, Any], leaks: Leaks | None = None
) -> list[dict[str, Any]]:
    """One record per probe asked for; without measures where the task is not done."""
    found = {row["probe"]: row for row in results.get(probe.id, {}).get("rows", [])}
    columns = ("accuracy", "accuracy_low", "accuracy_high", "n_test", "chance")
    asked: Sequence[str] = probe.spec.probes  # type: ignore[attr-defined]
    return [
        {**common, "probe": name, "accuracy_clean": _clean(found[name], leaks) if name in found else None}
        | {column: found.get(name, {}).get(column) for column in columns}
        for name in asked
    ]


def _clean(row: Mapping[str, Any], leaks: Leaks | None) -> float | None:
    """The accuracy of a probe's row without the test images that leaked."""
    if leaks is None or not leaks.known.any():
        return float(row["accuracy"])
    return accuracy_without(row, leaks.known)


def _status(trained: Task, probe: Task, results: Results, marked: store.Index) -> str:
    """done, failed (and not done since) or waiting."""
    if probe.id in results:
        return "done"
    missing = [task for task in (trained, probe) if task.id not in results]
    return "failed" if any(task.key in marked.keys(task.kind) for task in missing) else "waiting"


def _failed(
    plan: Plan, results: Results, marked: store.Index
) -> tuple[list[FailedTask], dict[str, dict[str, int]]]:
    failed, counts = [], Counter[tuple[str, str]]()
    done = store.Done()
    for task in plan.tasks:
        is_done = task in done or task.id in results
        attempts = store.failures(task) if not is_done and task.key in marked.keys(task.kind) else []
        state = "failed" if attempts else "done" if is_done else "waiting"
        counts[task.kind, state] += 1
        if attempts:
            message = textwrap.shorten(
                attempts[-1].summary.removeprefix("UserError: "), 240, placeholder=" ..."
            )
            failed.append(FailedTask(task.kind, task.key, task.label, message, len(attempts)))
    kinds = dict.fromkeys(task.kind for task in plan.tasks)
    states = ("done", "failed", "waiting")
    return failed, {kind: {s: counts[kind, s] for s in states if counts[kind, s]} for kind in kinds}


def _run(sweep: SweepConfig, results: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """How the results came about, from what each says of its own run."""
    runs = [result["run"] for result in results if "run" in result]
    out = {"command": command(sweep)}
    if not runs:
        return out
    started, ended = min(r["started"] for r in runs), max(r["started"] + r["seconds"] for r in runs)
    out["first task began"], out["last task ended"] = date(started), date(ended)
    out["work of all tasks"] = duration(sum(r["seconds"] for r in runs))
    out["training FLOPs"] = scientific(sum(r.get("flops") or 0 for r in results))
    out["largest memory of a cell"] = (
        f"{max(r.get('peak_memory_bytes') or 0 for r in results) / 2**20:,.0f} MiB"
    )
    for name in ("machine", "device", "threads", "python", "commit"):
        out[name] = ", ".join(sorted({str(r[name]) for r in runs if r.get(name)}))
    versions = {f"{name} {number}" for r in runs for name, number in r.get("versions", {}).items()}
    out["versions"] = ", ".join(sorted(versions))
    return {name: text for name, text in out.items() if text}


def command(sweep: SweepConfig) -> str:
    """A command that runs this sweep: its file and what differs from it."""
    try:
        base = load(sweep.name, remembered=False).model_dump(mode="json")
    except UserError:
        base = {}
    values = sweep.model_dump(mode="json")
    changed = [
        f"{key}={_flow(key, value, base[key])}"
        for key, value in values.items()
        if value != base.get(key, value)
    ]
    return shlex.join(["ssl-diversity", "sweep", sweep.name, *changed])


def _flow(key: str, value: Any, base: Any) -> str:
    """A value as an override says it; of the base's own sets, the names are enough."""
    if key in SETS and value.items() <= base.items():
        value = list(value)
    if key == "backbone" and list(value) == ["default"]:
        value = value["default"]
    if isinstance(value, list) and all(isinstance(item, str | int | float) for item in value):
        return f"[{','.join(map(str, value))}]"
    return value if isinstance(value, str) else json.dumps(value)


@cache
def _overlap(parts: Parts, replicates: tuple[int, ...]) -> float:
    """Of a mixture, the mean over its images."""
    shared = sum(rows.count * overlap(pool, rows.count, replicates, first=rows.ring) for pool, rows in parts)
    return shared / sum(rows.count for _, rows in parts)


@cache
def _leaks(test: Pool, parts: Parts) -> Leaks:
    return find_leaks(test, parts)


def _finite(record: Mapping[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
