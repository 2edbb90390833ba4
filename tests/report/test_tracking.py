"""Weights & Biases, with the real client, offline."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssl_diversity.report import tracking, write
from ssl_diversity.report.records import Collected

Records = Callable[..., list[dict]]
Make = Callable[..., Collected]


def history(key: str) -> list[tuple[int, float]]:
    return [(64, 3.0), (128, 2.0), (4096, 1.0)]


def runs(home: Path) -> list[Path]:
    return sorted((home / "wandb").glob("offline-run-*"))


def inspect(run: Path, *options: str) -> str:
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", *options, str(run)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


def test_a_cell_is_a_run_with_history_coordinates_and_summary(
    records: Records, collected: Make, home: Path, tmp_path: Path
) -> None:
    made = [r for r in records(seeds=1) if r["method"] == "simclr" and r["source"] == "digits"]
    both = collected(made)
    write(both, tmp_path)
    tracking.track(both, tmp_path, history)
    keys = {r["cell"] for r in made}
    assert {path.name.split("-")[-1] for path in runs(home)} == keys | {"toy"}

    key = min(keys)
    run = next(path for path in runs(home) if path.name.endswith(key))
    summary = json.loads(inspect(run, "--summary", "--json"))
    rows = {r["probe"]: r for r in made if r["cell"] == key}
    assert summary["run_id"] == key
    assert summary["state"] == "finished"
    assert summary["summary"]["digits/fewshot-5/accuracy"] == rows["fewshot-5"]["accuracy"]
    assert summary["summary"]["digits/frechet"] == 0.2
    assert summary["summary"]["effective_rank"] == 30.0
    assert summary["summary"]["loss"] == 1.0
    log = [json.loads(line) for line in inspect(run, "--json").splitlines()]
    assert sum(line["type"] == "history" for line in log) == 3
    text = json.dumps(log)
    assert '"toy"' in text  # the tag
    assert "unique_samples" in text

    report = json.loads(
        inspect(next(p for p in runs(home) if p.name.endswith("report-toy")), "--summary", "--json")
    )
    assert report["summary"]["results"]["nrows"] == len(made)
    assert "figures/accuracy-digits-4096-fewshot-5" in report["summary"]


def test_what_is_logged_is_not_logged_again_and_what_is_new_is(
    records: Records, collected: Make, home: Path, tmp_path: Path
) -> None:
    made = [
        r
        for r in records(seeds=1)
        if r["method"] == "simclr" and r["source"] == "digits" and r["unique_samples"] == 64
    ]
    write(collected(made), tmp_path)
    asked: list[str] = []

    def counted(key: str) -> list[tuple[int, float]]:
        asked.append(key)
        return history(key)

    tracking.track(collected(made), tmp_path, counted)
    first = len(runs(home))
    assert first == 2
    tracking.track(collected(made), tmp_path, counted)
    assert len(runs(home)) == first
    added = made + [r | {"downstream": "flowers"} for r in made]
    write(collected(added), tmp_path)
    tracking.track(collected(added), tmp_path, counted)
    assert len(runs(home)) == 2 * first
    tracking.track(collected(made, sweep="another"), tmp_path, counted)
    assert len(runs(home)) == 3 * first
    tracking.track(
        collected(added), tmp_path, counted
    )  # the other sweep's view of the cell is no news to this one
    assert len(runs(home)) == 3 * first
    assert len(asked) == 1  # the loss history goes once


def test_cells_that_were_not_trained_are_no_runs(
    records: Records, collected: Make, home: Path, tmp_path: Path
) -> None:
    made = [r for r in records(seeds=1) if r["status"] == "failed" or not r.get("source")]
    write(collected(made), tmp_path)
    tracking.track(collected(made), tmp_path, history)
    assert [path.name.split("-", 3)[-1] for path in runs(home)] == ["report-toy"]


def test_disabled_means_nothing_at_all(
    records: Records, collected: Make, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracking.track(collected(records()), tmp_path, history)
    assert not (home / "wandb").exists()


def test_a_failure_is_one_line_of_warning(
    records: Records,
    collected: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import wandb

    def refuse(**_: Any) -> None:
        raise wandb.errors.CommError("the server\nis away")

    monkeypatch.setattr(wandb, "init", refuse)
    tracking.track(collected(records()), tmp_path, history)
    assert capsys.readouterr().err == "warning: not logged to Weights & Biases: the server is away\n"


def test_an_account_means_online_and_the_users_word_goes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert tracking.mode() == "offline"
    monkeypatch.delenv("WANDB_MODE")
    assert tracking.mode() == "offline"
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert tracking.mode() == "online"
    (tmp_path / ".netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert tracking.mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert tracking.mode() == "offline"
