"""FLOPs per sample for a plan: counting needs torch, planning must not load it."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

from ssl_diversity.methods.flops import flops_per_sample, known_flops
from ssl_diversity.methods.recipe import Recipe, load_recipe
from ssl_diversity.sweep.config import SweepConfig

Question = tuple[str, str, int, Recipe]  # method, backbone, image size, recipe


def count_missing(sweep: SweepConfig, tell: Callable[[str], None]) -> bool:
    """Count what a plan of the sweep would ask for, in a process of its own, once per home; whether any was missing."""
    questions: list[Question] = [
        (method, sweep.backbone_of(method), sweep.image_size, recipe)
        for method in sweep.methods
        for recipe in _recipes(sweep, method)
    ]
    missing = [question for question in questions if known_flops(*question) is None]
    if missing:
        tell(f"counting the FLOPs of {len(missing)} networks (once)")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            process.submit(_count, missing).result()
    return bool(missing)


def _recipes(sweep: SweepConfig, method: str) -> list[Recipe]:
    """Every recipe that the method may get: with `auto`, the budget decides, in FLOPs only after counting."""
    overrides = sweep.hyperparameters.get(method, {})
    found: list[Recipe] = []
    for samples in (1, 10**6):
        recipe = load_recipe(
            method, sweep.recipe, budget_samples=samples, image_size=sweep.image_size, overrides=overrides
        )
        if recipe not in found:
            found.append(recipe)
    return found


def _count(questions: list[Question]) -> None:
    for question in questions:
        flops_per_sample(*question)
