"""The probe task: every probe of one network on one downstream set, from features embedded once."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ssl_diversity.errors import Interrupted, UserError
from ssl_diversity.evaluation.config import Probe, ProbeSpec, parse_probe
from ssl_diversity.runtime import Runtime

if TYPE_CHECKING:
    from ssl_diversity.data.pool import Pool
    from ssl_diversity.evaluation.labels import Labelled
    from ssl_diversity.evaluation.outcome import Outcome


def probe(spec: ProbeSpec, out: Path, runtime: Runtime) -> dict[str, Any]:
    """Embed train and test, run all probes, and return JSON-able results; nothing is written to `out`.

    "rows" has a dict per probe with `probe`, `accuracy`, `accuracy_low`, `accuracy_high` (95 %), `n_test`,
    `chance`, `chosen` (L2 strength), `validation_accuracy`, and `hits` of `trials` per test image
    (`outcome.accuracy_without` reads them); "draws" the accuracies of each few-shot probe's draws, in the same
    order for all networks; "effective_rank" is that of the test features.

    `chance` is 1 / number of classes, the accuracy of uniform guessing. Raises UserError for a downstream
    set that cannot be probed or a network that cannot be loaded.
    """
    import torch

    from ssl_diversity.data.pool import Pool
    from ssl_diversity.distance.diversity import effective_rank
    from ssl_diversity.evaluation.labels import Labelled
    from ssl_diversity.features import embed

    runtime.set_threads()
    train, test = Pool.open(spec.train_pool), Pool.open(spec.test_pool)
    check(spec, train, test)
    features, labels = [], []
    for pool in (train, test):
        embedded = embed(pool, spec.network, image_size=spec.image_size, runtime=runtime, calibration=train)
        features.append(torch.tensor(np.asarray(embedded), device=runtime.device))
        labels.append(torch.tensor(np.asarray(pool.label), dtype=torch.int64, device=runtime.device))
    data = Labelled(features[0], labels[0], features[1], labels[1], names=tuple(train.info.classes))
    probes = [parse_probe(name) for name in spec.probes]
    outcomes = {}
    for each in probes:
        if runtime.stop():
            raise Interrupted("stopped between probes; the features are kept")
        outcomes[each.name] = run(each, data, spec)
    common = {"n_test": test.size, "chance": 1 / data.classes}
    return {
        "rows": [{"probe": name, **outcome.row(), **common} for name, outcome in outcomes.items()],
        "draws": {name: list(outcome.draws) for name, outcome in outcomes.items() if outcome.draws},
        "effective_rank": effective_rank(features[1].cpu().numpy()),
    }


def run(which: Probe, data: "Labelled", spec: ProbeSpec) -> "Outcome":
    """One probe."""
    if which.kind == "linear":
        from ssl_diversity.evaluation.linear import linear

        return linear(data, spec.settings, spec.seed)
    if which.kind == "knn":
        from ssl_diversity.evaluation.knn import knn

        return knn(data, spec.settings)
    from ssl_diversity.evaluation.fewshot import fewshot

    return fewshot(data, which, spec.settings, spec.train_digest)


def check(spec: ProbeSpec, train: "Pool", test: "Pool") -> None:
    """Refuse, with one line, pools that are not the spec's or not a labelled train and test set."""
    for pool, digest in ((train, spec.train_digest), (test, spec.test_digest)):
        if pool.digest != digest:
            raise UserError(
                f"pool {pool.path}: has changed since this probe was planned; run the command again"
            )
        if not pool.info.classes or (np.asarray(pool.label) < 0).any():
            raise UserError(
                f"downstream set {pool.name}: not all images have labels; a probe needs classes (one folder each)"
            )
    if train.info.classes != test.info.classes:
        differing = sorted(set(train.info.classes) ^ set(test.info.classes))
        raise UserError(
            f"downstream set {train.name}: train and test differ in classes: {', '.join(differing[:5])}"
        )
    counts = np.bincount(np.asarray(train.label), minlength=len(train.info.classes))
    if not counts.all():
        empty = train.info.classes[int(counts.argmin())]
        raise UserError(
            f"downstream set {train.name}: class {empty!r} has no training images; add some or remove it"
        )
