"""The main job at toy size, by the command line: plan, sweep, again, probe, report."""

import time
from pathlib import Path

import pytest
from helpers import LIMIT_S, comparable, equal_weights, labelled_folder, results, run, weights

SMALL = ["sources=[digits,photo_patches]", "methods=[simclr,mae]", "unique_samples=[64,128]", "budget=512"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("swept")
    run(home, "sweep", "quickstart", *SMALL)
    return home


COLUMNS = """sweep cell method backbone recipe source pool_digest source_real_images unique_samples budget batch_size
epochs diversity seed replicate overlap precision downstream probe accuracy accuracy_low accuracy_high n_test chance
leaked extractor distance_n frechet visual_dna vendi effective_rank flops train_seconds peak_memory_bytes""".split()


def test_results_have_every_coordinate_and_measure(swept: Path) -> None:
    table = results(swept)
    assert not set(COLUMNS) - set(table.columns)
    cells = table[table["source"].notna()]
    assert len(cells) == 2 * 2 * 2 * 3  # methods x sources x N x probes
    measured = [
        "accuracy",
        "frechet",
        "visual_dna",
        "vendi",
        "effective_rank",
        "flops",
        "train_seconds",
        "leaked",
    ]
    assert cells[measured].notna().all().all()
    assert cells["accuracy"].between(0, 1).all()
    assert set(table[table["source"].isna()]["method"]) == {"random", "pixels"}
    assert (cells["epochs"] * cells["unique_samples"] == cells["budget"]).all()


def test_the_same_sweep_again_computes_nothing_and_changes_nothing(swept: Path) -> None:
    before, stamps = results(swept), {p: p.stat().st_mtime_ns for p in swept.glob("store/*/*/*/result.json")}
    start = time.monotonic()
    run(swept, "sweep", "quickstart", *SMALL)
    print(f"a finished sweep again: {time.monotonic() - start:.1f} s")
    assert {p: p.stat().st_mtime_ns for p in swept.glob("store/*/*/*/result.json")} == stamps
    assert comparable(results(swept)).equals(comparable(before))


def test_the_report_is_one_self_contained_page(swept: Path) -> None:
    page = (swept / "runs" / "quickstart" / "report.html").read_text()
    assert "<svg" in page
    assert 'src="http' not in page
    assert 'href="http' not in page.replace('href="https://arxiv.org', "")


def test_a_new_downstream_set_costs_probes_alone_and_stays(swept: Path, tmp_path: Path) -> None:
    folder = labelled_folder(tmp_path / "stripes")
    trained = weights(swept).keys()
    run(swept, "probe", "--sweep", "quickstart", "--downstream", str(folder))
    added = results(swept)
    assert weights(swept).keys() == trained
    assert set(added["downstream"]) == {"digits", "stripes"}
    assert added[added["downstream"] == "stripes"]["source"].notna().sum() == 2 * 2 * 2 * 3
    run(swept, "sweep", "quickstart", *SMALL)
    assert comparable(results(swept)).equals(comparable(added))


def test_plan_and_status_say_what_is_there(swept: Path) -> None:
    planned = run(swept, "plan", "quickstart", *SMALL).stdout
    assert "simclr" in planned
    assert "done" in planned
    assert "done" in run(swept, "status", "quickstart").stdout


def test_two_sweeps_at_once_share_the_work(swept: Path, tmp_path: Path) -> None:
    import subprocess

    from helpers import command, environment

    home = tmp_path / "both"
    home.mkdir()
    both = [
        subprocess.Popen(
            command("sweep", "quickstart", *SMALL),
            cwd=home,
            env=environment(home),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    for process in both:
        output, _ = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 0, output
    assert equal_weights(home, swept)
