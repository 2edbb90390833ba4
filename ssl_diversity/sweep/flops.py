"""FLOPs per sample as far as they have been counted: counting needs torch, planning must not load it."""

import contextlib
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

from ssl_diversity.files import digest, read_json, write_json
from ssl_diversity.methods.recipe import Recipe, load_recipe
from ssl_diversity.sweep.config import SweepConfig
from ssl_diversity.sweep.store import cache_dir

Question = tuple[str, str, int, Recipe]  # method, backbone, image size, recipe


def known(method: str, backbone: str, image_size: int, recipe: Recipe) -> int | None:
    """FLOPs per sample, or None if they have not been counted yet."""
    return _answers().get(_key((method, backbone, image_size, recipe)))


def count_missing(sweep: SweepConfig, tell: Callable[[str], None]) -> None:
    """Count what a plan of the sweep would ask for, in a process of its own; once per home."""
    questions: list[Question] = []
    for method in sweep.methods:
        for recipe in _recipes(sweep, method):
            question = (method, sweep.backbone_of(method), sweep.image_size, recipe)
            if known(*question) is None:
                questions.append(question)
    if not questions:
        return
    tell(f"counting the FLOPs of {len(questions)} networks (once)")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        counts = process.submit(_count, questions).result()
    new = {_key(question): count for question, count in zip(questions, counts, strict=True)}
    write_json(cache_dir() / "planned_flops.json", {**_answers(), **new})


def _recipes(sweep: SweepConfig, method: str) -> list[Recipe]:
    """Every recipe that the method may get: with `auto`, the budget decides, in FLOPs only after counting."""
    overrides = sweep.hyperparameters.get(method, {})
    found = []
    for samples in (1, 10**6):
        recipe = load_recipe(
            method, sweep.recipe, budget_samples=samples, image_size=sweep.image_size, overrides=overrides
        )
        if recipe not in found:
            found.append(recipe)
    return found


def _count(questions: list[Question]) -> list[int]:
    from ssl_diversity.methods.flops import flops_per_sample

    return [flops_per_sample(*question) for question in questions]


def _answers() -> dict[str, int]:
    with contextlib.suppress(OSError, ValueError):
        found: dict[str, int] = read_json(cache_dir() / "planned_flops.json")
        return found
    return {}


def _key(question: Question) -> str:
    method, backbone, image_size, recipe = question
    return digest([method, backbone, image_size, recipe.identity()])
