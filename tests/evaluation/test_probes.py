"""The probes on features: references, splits, draws, and that test labels choose nothing."""

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from ssl_diversity.errors import UserError
from ssl_diversity.evaluation.config import ProbeSettings, parse_probe
from ssl_diversity.evaluation.fewshot import cross_validate, draw, fewshot, labels_per_class
from ssl_diversity.evaluation.knn import knn, knn_votes
from ssl_diversity.evaluation.labels import Labelled, ranks, standardise
from ssl_diversity.evaluation.linear import choose, linear, validation_part
from ssl_diversity.evaluation.outcome import Outcome, accuracy_without, as_hits, t_interval, wilson

QUICK = ProbeSettings(draws=4, l2=(1e-3, 1e-1, 10.0))
FIVE = parse_probe("fewshot-5")


def downstream(classes: int = 3, n: int = 90, n_test: int = 60, d: int = 8, noise: float = 2.0) -> Labelled:
    """Gaussian classes, float16 as the cache holds them."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, d, generator=generator)
    labels = torch.arange(n + n_test) % classes
    x = (centres[labels] + noise * torch.randn(n + n_test, d, generator=generator)).half()
    names = tuple(f"c{i}" for i in range(classes))
    return Labelled(x[:n], labels[:n], x[n:], labels[n:], names)


def with_test_labels_changed(data: Labelled) -> Labelled:
    changed = (data.test_labels + 1) % data.classes
    return Labelled(data.train, data.train_labels, data.test, changed, data.names)


RUNS: list[Callable[[Labelled], Outcome]] = [
    lambda data: linear(data, QUICK, seed=0),
    lambda data: knn(data, QUICK),
    lambda data: fewshot(data, FIVE, QUICK, "digest"),
]


@pytest.mark.parametrize("probe", RUNS)
def test_a_probe_is_better_than_chance_and_its_interval_holds_its_accuracy(
    probe: Callable[[Labelled], Outcome],
) -> None:
    found = probe(downstream())
    assert found.accuracy > 0.5
    assert 0 <= found.low <= found.accuracy <= found.high <= 1


@pytest.mark.parametrize("probe", RUNS)
def test_a_probe_is_deterministic(probe: Callable[[Labelled], Outcome]) -> None:
    assert probe(downstream()) == probe(downstream())


@pytest.mark.parametrize("probe", RUNS)
def test_a_probe_says_which_test_images_it_is_right_about(probe: Callable[[Labelled], Outcome]) -> None:
    data = downstream()
    found = probe(data)
    hits = np.frombuffer(found.hits, "<u2")
    assert found.trials == max(1, len(found.draws))
    assert hits.shape == (len(data.test),)
    assert hits.max() <= found.trials
    assert hits.mean() / found.trials == pytest.approx(found.accuracy)
    half = Labelled(data.train, data.train_labels, data.test[::2], data.test_labels[::2], data.names)
    np.testing.assert_array_equal(np.frombuffer(probe(half).hits, "<u2"), hits[::2])
    row = json.loads(json.dumps(found.row()))
    left_out = np.arange(len(hits)) % 2 == 1
    assert accuracy_without(row, left_out) == pytest.approx(probe(half).accuracy)
    assert accuracy_without(row, np.zeros(len(hits), bool)) == pytest.approx(found.accuracy)
    assert accuracy_without(row, np.ones(len(hits), bool)) is None


def test_more_draws_than_a_byte_counts_are_counted() -> None:
    row = Outcome(1.0, 1.0, 1.0, hits=as_hits(np.full(3, 300)), trials=300).row()
    assert accuracy_without(row, np.zeros(3, bool)) == 1.0


@pytest.mark.parametrize("probe", RUNS)
def test_test_labels_choose_nothing(probe: Callable[[Labelled], Outcome]) -> None:
    honest, changed = probe(downstream()), probe(with_test_labels_changed(downstream()))
    assert honest.accuracy != changed.accuracy
    assert (honest.chosen, honest.validation_accuracy) == (changed.chosen, changed.validation_accuracy)


def test_test_features_do_not_change_the_linear_probes_weights() -> None:
    data = downstream()
    found = [
        choose(standardise(data.train, test)[0], data.train_labels, data.classes, QUICK, 0)
        for test in (data.test, data.test * 100)
    ]
    assert torch.equal(found[0].weights, found[1].weights)


@pytest.mark.parametrize("probe", RUNS)
def test_collapsed_features_give_chance(probe: Callable[[Labelled], Outcome]) -> None:
    data = downstream()
    flat = Labelled(data.train * 0 + 1, data.train_labels, data.test * 0 + 1, data.test_labels, data.names)
    assert probe(flat).accuracy == pytest.approx(1 / 3)


def test_linear_is_scikit_learn_at_the_chosen_strength() -> None:
    data = downstream()
    train, test = standardise(data.train, data.test)
    chosen = choose(train, data.train_labels, data.classes, QUICK, seed=0)
    model = LogisticRegression(C=1 / (chosen.l2 * len(train)), tol=1e-8, max_iter=10_000)
    model.fit(train.numpy(), data.train_labels.numpy())
    ours = (test @ chosen.weights + chosen.bias).softmax(1).numpy()
    np.testing.assert_allclose(ours, model.predict_proba(test.numpy()), atol=2e-3)
    expected = model.score(test.numpy(), data.test_labels.numpy())
    assert linear(data, QUICK, seed=0).accuracy == pytest.approx(expected, abs=0.5 / len(test))


def test_linear_chooses_what_scikit_learn_finds_best_on_the_validation_part() -> None:
    data = downstream()
    x, y = standardise(data.train, data.test)[0].numpy(), data.train_labels.numpy()
    held = validation_part(y, QUICK.validation_fraction, seed=0)
    losses = []
    for l2 in QUICK.l2:
        model = LogisticRegression(C=1 / (l2 * (~held).sum()), tol=1e-8, max_iter=10_000).fit(
            x[~held], y[~held]
        )
        losses.append(-np.log(model.predict_proba(x[held])[np.arange(held.sum()), y[held]]).mean())
    chosen = choose(torch.from_numpy(x), data.train_labels, data.classes, QUICK, seed=0)
    assert chosen.l2 == QUICK.l2[int(np.argmin(losses))]


def test_cross_validation_is_scikit_learns_fold_by_fold() -> None:
    data = downstream()
    x, y = standardise(data.train, data.test)[0].numpy(), data.train_labels.numpy()
    rows, folds = draw(y, np.array([5, 5, 5]), 5, 3, seed=1)
    best, accuracy = cross_validate(
        torch.from_numpy(x[rows]), torch.from_numpy(y[rows]), torch.from_numpy(folds), 3, QUICK.l2
    )
    for i in range(3):
        loss, right = np.zeros(len(QUICK.l2)), np.zeros(len(QUICK.l2))
        for fold, (j, l2) in ((f, s) for f in range(5) for s in enumerate(QUICK.l2)):
            seen, held = rows[i][folds[i] != fold], rows[i][folds[i] == fold]
            model = LogisticRegression(C=1 / (l2 * len(seen)), tol=1e-8, max_iter=10_000).fit(
                x[seen], y[seen]
            )
            loss[j] -= np.log(model.predict_proba(x[held])[np.arange(len(held)), y[held]]).sum()
            right[j] += (model.predict(x[held]) == y[held]).sum()
        assert int(best[i]) == int(loss.argmin())
        assert float(accuracy[i]) == pytest.approx(right[loss.argmin()] / 15)


def test_knn_is_the_direct_formula() -> None:
    data = downstream()
    found = knn_votes(data.train, data.train_labels, data.test, 3, k=20, temperature=0.07)
    train, test = data.train.numpy().astype(np.float64), data.test.numpy().astype(np.float64)
    for i, x in enumerate(test):
        cosine = np.array([x @ t / math.sqrt((x @ x) * (t @ t)) for t in train])
        votes = np.zeros(3)
        for j in np.argsort(-cosine)[:20]:
            votes[data.train_labels[j]] += math.exp(cosine[j] / 0.07)
        np.testing.assert_allclose(found[i].numpy(), votes, rtol=1e-4)


def test_knn_in_blocks_is_knn(monkeypatch: pytest.MonkeyPatch) -> None:
    data = downstream()
    whole = knn(data, QUICK)
    monkeypatch.setattr("ssl_diversity.evaluation.knn._BLOCK", 300)
    assert knn(data, QUICK) == whole


def test_fewshot_in_blocks_is_fewshot(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fewshot(downstream(), FIVE, QUICK, "digest")
    monkeypatch.setattr("ssl_diversity.evaluation.fewshot._BLOCK", 1)
    found = fewshot(downstream(), FIVE, QUICK, "digest")
    assert found.draws == pytest.approx(whole.draws, abs=0.02)
    assert found.chosen == whole.chosen


def test_features_constant_in_train_do_not_count() -> None:
    train = torch.tensor([[1.0, 0.3], [3.0, 0.3], [5.0, 0.3]]).half()
    a, b = standardise(train, torch.tensor([[3.0, 9.0]]).half())
    assert torch.equal(b, torch.zeros(1, 2, dtype=torch.float64))
    torch.testing.assert_close(a.std(0, correction=0), torch.tensor([1.0, 0.0], dtype=torch.float64))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(0, 2**40), st.integers(0, 20))
def test_ranks_number_each_class_from_zero(labels: list[int], seed: int, stream: int) -> None:
    y = np.array(labels, np.int64)
    place = ranks(y, seed, stream)
    for c in set(labels):
        assert sorted(place[y == c]) == list(range(labels.count(c)))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.floats(0.01, 0.99))
def test_validation_takes_a_part_of_each_class_and_never_all(labels: list[int], fraction: float) -> None:
    y = np.array(labels, np.int64)
    held = validation_part(y, fraction, seed=0)
    for c in set(labels):
        total, taken = labels.count(c), int(held[y == c].sum())
        assert taken < total
        assert taken >= min(1, total - 1)
        assert abs(taken - fraction * total) <= 1


def test_draws_depend_on_labels_and_seed_alone_and_differ() -> None:
    y = np.arange(100) % 4
    wanted = np.full(4, 5)
    rows, folds = draw(y, wanted, 5, 20, seed=7)
    again, _ = draw(y, wanted, 5, 20, seed=7)
    np.testing.assert_array_equal(rows, again)
    assert len({tuple(r) for r in rows.tolist()}) == 20
    assert not np.array_equal(rows, draw(y, wanted, 5, 20, seed=8)[0])
    for r, f in zip(rows, folds, strict=True):
        assert np.bincount(y[r]).tolist() == [5, 5, 5, 5]
        assert all(np.bincount(y[r[f == fold]], minlength=4).tolist() == [1, 1, 1, 1] for fold in range(5))


def test_draws_are_the_same_for_all_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[np.ndarray] = []

    def spy(*arguments: object) -> tuple[np.ndarray, np.ndarray]:
        seen.append(draw(*arguments)[0])  # type: ignore[arg-type]
        return draw(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("ssl_diversity.evaluation.fewshot.draw", spy)
    fewshot(downstream(d=8), FIVE, QUICK, "digest")
    fewshot(downstream(d=30, noise=0.1), FIVE, QUICK, "digest")
    fewshot(downstream(d=8), parse_probe("fewshot-4"), QUICK, "digest")
    fewshot(downstream(d=8), FIVE, QUICK, "another digest")
    np.testing.assert_array_equal(seen[0], seen[1])
    assert not set(seen[2][0]) <= set(seen[0][0])
    assert not np.array_equal(seen[0], seen[3])


def test_a_share_takes_that_part_of_each_class() -> None:
    counts = np.array([200, 300])
    assert labels_per_class(counts, parse_probe("fewshot-1pct"), ("a", "b")).tolist() == [2, 3]
    assert labels_per_class(counts, parse_probe("fewshot-2.5pct"), ("a", "b")).tolist() == [5, 8]


@pytest.mark.parametrize(
    "name",
    ["lineal", "fewshot", "fewshot-0", "fewshot-1", "fewshot--5", "fewshot-0pct", "fewshot-101pct", ""],
)
def test_a_wrong_probe_name_is_one_line(name: str) -> None:
    with pytest.raises(UserError, match=r"^[^\n]+$"):
        parse_probe(name)


def test_too_few_images_name_the_probe_and_the_class() -> None:
    data = downstream(n=12, n_test=9)  # four of each class
    with pytest.raises(UserError, match="'fewshot-5': class 'c0' has only 4"):
        fewshot(data, FIVE, QUICK, "digest")
    with pytest.raises(UserError, match="fewshot-1pct"):
        fewshot(data, parse_probe("fewshot-1pct"), QUICK, "digest")
    with pytest.raises(UserError, match="knn_k=20"):
        knn(data, QUICK)
    with pytest.raises(UserError, match="linear"):
        linear(downstream(n=3, n_test=3), QUICK, 0)


def test_wilson_interval_against_its_formula() -> None:
    z, p, n = 1.959963984540054, 0.9, 50
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert wilson(45, 50) == pytest.approx((middle - reach, middle + reach))
    assert wilson(50, 50)[1] == 1


def test_t_interval_against_its_formula() -> None:
    values = (0.7, 0.8, 0.75)
    reach = 4.302652729911275 * float(np.std(values, ddof=1)) / math.sqrt(3)
    assert t_interval(values) == pytest.approx((0.75 - reach, 0.75 + reach))
    assert t_interval((1.0, 1.0)) == (1, 1)
