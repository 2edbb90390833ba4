"""A profile adds up, runs what training runs, and leaves nothing behind."""

import json
from pathlib import Path

import pytest

from ssl_diversity import files, loop, profiling
from ssl_diversity.cli import main
from ssl_diversity.data.prepare import prepare
from ssl_diversity.errors import UserError
from ssl_diversity.profiling import MEASURED, PARTS, StepProfile, profile
from ssl_diversity.report import step_figure
from ssl_diversity.runtime import Runtime
from ssl_diversity.sweep import config
from ssl_diversity.sweep.plan import expand
from ssl_diversity.train import CellSpec


def spec(method: str, **values: object) -> CellSpec:
    choices = ["sources=[digits]", f"methods=[{method}]", "unique_samples=128", "budget=1024"]
    sweep = config.load("quickstart", choices).model_copy(update={"downstream": {}})
    for task in expand(sweep).tasks:
        if task.kind == "prepare":
            prepare(task.spec)  # type: ignore[arg-type]
    (cell,) = expand(sweep).cells
    assert cell.task is not None
    return CellSpec.model_validate(cell.task.spec.model_dump() | values)


@pytest.mark.parametrize("method", ["simclr", "dino", "mae"])
def test_the_parts_of_a_step_add_up_to_it(home: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "ROUNDS", 1)
    told: list[tuple[int, int]] = []
    found = profile(spec(method), Runtime(progress=lambda *now: told.append(now)), steps=4)
    assert tuple(found.parts) == PARTS
    assert sum(found.parts.values()) == pytest.approx(found.step_s)
    assert all(found.parts[part] > 0 for part in MEASURED)
    assert found.parts["checkpoints"] == 0  # fewer samples than a checkpoint takes
    busy = sum(found.parts[part] for part in MEASURED)
    assert found.parts["views"] + found.parts["forward"] + found.parts["backward"] > 0.3 * busy
    assert found.samples_per_second == pytest.approx(64 / found.step_s)
    assert found.flops_per_second == pytest.approx(found.flops_per_sample * found.samples_per_second)
    assert 0 < found.share_of_peak < 1
    assert found.steps == 4
    assert told == [(0, 1)]


def test_a_cell_that_saves_pays_its_share_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "ROUNDS", 1)
    saved, save = [], loop._Guard._save
    monkeypatch.setattr(loop._Guard, "_save", lambda self, trainer: saved.append(1) or save(self, trainer))  # type: ignore[func-returns-value]
    found = profile(spec("simclr", checkpoint_samples=64), Runtime(), steps=4)
    assert found.parts["checkpoints"] >= 0  # by times of change, which may be as coarse as 10 ms
    assert len(saved) == 1  # to time it, after the steps that are timed


def test_the_module_is_left_as_it_was(home: Path) -> None:
    cell = profiling._Cell(spec("byol"), Runtime())
    before = dict(vars(cell.module))
    twice = cell.parts(2), cell.parts(2)
    assert set(vars(cell.module)) == set(before)
    assert cell.module.samples_seen == 5 * 64
    assert twice[0].keys() == twice[1].keys() == set(MEASURED)
    whole_s, save_s = cell.whole(2)
    assert whole_s > 0
    assert save_s >= 0
    assert cell.module.samples_seen == 5 * 64


def test_the_reader_is_asked_for_the_cells_own_batches(home: Path) -> None:
    cell = profiling._Cell(spec("simclr"), Runtime())
    asked, read = [], cell.reader.read
    cell.reader.read = lambda indices: asked.append(indices.tolist()) or read(indices)  # type: ignore[method-assign, func-returns-value]
    cell.parts(2)
    ahead = len(asked)
    cell.whole(2)
    for begin in (0, ahead):
        assert asked[begin : begin + 5] == [cell.order.batch(step).tolist() for step in range(5)]


def test_too_few_steps_are_refused(home: Path) -> None:
    with pytest.raises(UserError, match="give it at least 256"):
        profile(spec("simclr", budget=192), Runtime())


def made(method: str, **values: object) -> StepProfile:
    parts = {part: 0.001 * (place + 1) for place, part in enumerate(PARTS)}
    base = {"method": method, "backbone": "resnet18", "recipe": "small", "image_size": 32, "batch_size": 256}
    more = {"precision": "bf16-mixed", "device": "cpu", "threads": 2, "steps": 9, "reading_s": 0.002}
    peaks = {"bf16-mixed": 2e12, "32-true": 1e12}
    whole = {"step_s": sum(parts.values()), "parts": parts, "flops_per_sample": 10**9, "peak_flops": peaks}
    return StepProfile(**(base | more | whole | values))  # type: ignore[arg-type]


def test_the_picture_has_a_bar_for_each_method_as_long_as_its_step(tmp_path: Path) -> None:
    slow = {part: 0.01 for part in PARTS} | {"rest": -0.001}
    profiles = [made("simclr"), made("byol", parts=slow, step_s=0.089)]
    axes = step_figure.draw(profiles).axes[0]
    bars = [container.patches for container in axes.containers]
    for place, one in enumerate(profiles):
        drawn = sum(patches[place].get_width() for patches in bars)
        assert drawn == pytest.approx(1e3 * sum(max(0.0, s) for s in one.parts.values()))
    step_figure.save(profiles, tmp_path / "a.png")
    step_figure.save(profiles, tmp_path / "a.svg")
    assert "byol" in (tmp_path / "a.svg").read_text()


def test_the_command_prepares_what_it_needs_and_tells_it_as_json(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    few = ["quickstart", "method=simclr", "budget=512", "unique_samples=128", "--steps", "2"]
    assert main(["profile", *few, "--json", "--picture", str(tmp_path / "step.png")]) == 0
    (record,) = json.loads(capfd.readouterr().out)
    assert record["method"] == "simclr"
    assert set(record["parts"]) == set(PARTS)
    assert (tmp_path / "step.png").stat().st_size > 1000
    assert not (home / "store" / "pretrain").exists()
    assert (
        main(["profile", "method=mae", "batch_size=32", "budget=512", "unique_samples=64", "--steps", "2"])
        == 0
    )
    shown = capfd.readouterr().out
    assert "one step of 32 images" in shown
    assert all(part in shown for part in (*PARTS, "share of peak", "FLOPs per sample"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--device", "tpu"], "--device tpu"),
        (["--device", "cuda"], "device=cuda: torch finds no GPU here"),
        (["--picture", "a.bmp"], "--picture a.bmp: end its name in one of"),
        (["--picture", "nowhere/a.png"], "--picture nowhere/a.png: there is no folder nowhere"),
        (["method=simclrr"], "did you mean 'simclr'"),
        (["method=mae", "backbone=resnet18"], "ViT"),
    ],
)
def test_mistakes_are_a_line(
    home: Path,
    arguments: list[str],
    told: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.backends.cuda.is_built", lambda: True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["profile", *arguments]) == 2
    assert told in capsys.readouterr().err
    assert not files.pools_dir().exists()  # told before any work
