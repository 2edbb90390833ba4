"""`make bench`: its rows, and how they get into docs/benchmarks.md."""

from pathlib import Path

import pytest
import ratios
import run_all
from ratios import Row

TITLES = ["One", "Two", "Three"]
DOCS = """# Benchmarks
| kept | as it is |

<!-- make bench: cpu -->

Not run yet.

<!-- end: cpu -->

#### One
between

<!-- make bench: cuda -->

Not run yet.

<!-- end: cuda -->
  the end, without a newline"""


@pytest.mark.parametrize(
    ("row", "target", "met"),
    [
        (Row("r", 2.3, at_least=2.3), ">= 2.3", True),
        (Row("r", 2.29, at_least=2.3), ">= 2.3", False),
        (Row("r", 10, "%", below=10), "< 10 %", False),
        (Row("r", 1.01, low=0.99, high=1.029, below=1.03), "< 1.03", True),
        (Row("r", 1.01, low=0.99, high=1.031, below=1.03), "< 1.03", False),
        (Row("r", 0.0, "points", -1.1, 0.9, at_least=-1, below=1), "-1 to 1 points", False),
        (Row("r", 0.0, "points", -0.9, 0.9, at_least=-1, below=1), "-1 to 1 points", True),
        (Row("r", float("nan"), at_least=0.8, below=1.2), "0.8 to 1.2", False),
        (Row("r", 0.0), "", None),
    ],
)
def test_a_target_is_met_by_the_whole_interval(row: Row, target: str, met: bool | None) -> None:
    assert (row.target, row.met) == (target, met)


def test_rows_as_a_table() -> None:
    rows = [
        Row("a", 2.4449, at_least=2.3),
        Row("b", 0.119, "points", -1.2, 1.44, at_least=-1, below=1),
        Row("c", 93.05, "%"),
    ]
    assert ratios.table(rows).splitlines()[2:] == [
        "| a | 2.445 |  | >= 2.3 | yes |",
        "| b | +0.12 points | -1.20 to +1.44 points | -1 to 1 points | **no** |",
        "| c | 93.05 % |  |  |  |",
    ]


def test_rows_come_back_from_their_file(tmp_path: Path) -> None:
    rows = [Row("a", 1.5, low=1, high=2, below=3), Row("b", 93.1, "%")]
    ratios.write(tmp_path / "rows.json", rows)
    assert ratios.read(tmp_path / "rows.json") == rows


def test_only_the_group_is_replaced() -> None:
    text = ratios.replaced(DOCS, "cpu", "Two", "second", TITLES)
    text = ratios.replaced(text, "cuda", "Three", "third on the GPU", TITLES)
    text = ratios.replaced(text, "cpu", "One", "first", TITLES)
    text = ratios.replaced(text, "cpu", "Two", "second again", TITLES)
    empty = "\nNot run yet.\n\n"
    assert text == DOCS.replace(
        empty, "\n#### One\n\nfirst\n\n#### Two\n\nsecond again\n\n", 1
    ).replace(empty, "\n#### Three\n\nthird on the GPU\n\n")  # fmt: skip


def test_a_group_of_a_benchmark_that_is_gone_stays() -> None:
    text = ratios.replaced(ratios.replaced(DOCS, "cpu", "Gone", "old", TITLES), "cpu", "One", "new", TITLES)
    assert "#### One\n\nnew\n\n#### Gone\n\nold\n\n<!-- end: cpu -->" in text


@pytest.mark.parametrize("line", ["<!-- make bench: cpu -->\n", "<!-- end: cpu -->\n"])
def test_a_section_without_a_marker_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="make bench: cpu"):
        ratios.replaced(DOCS.replace(line, ""), "cpu", "One", "first", TITLES)


def test_the_documentation_has_a_section_for_each_device() -> None:
    for device in ("cpu", "cuda"):
        ratios.section(run_all.DOCS.read_text(), device)


@pytest.fixture
def docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """docs/benchmarks.md of benchmarks `one` and `two`, the scripts of which lie beside it."""
    monkeypatch.setattr(run_all, "FOLDER", tmp_path)
    monkeypatch.setattr(run_all, "DOCS", tmp_path / "benchmarks.md")
    benchmarks = {
        "one": run_all.Benchmark("One", cuda="--steps 9", quick="--steps 1"),
        "two": run_all.Benchmark("Two"),
    }
    monkeypatch.setattr(run_all, "BENCHMARKS", benchmarks)
    monkeypatch.setattr(run_all, "machine", lambda device: f"a {device}")
    run_all.DOCS.write_text(DOCS)
    return run_all.DOCS


def script(docs: Path, name: str, body: str) -> None:
    (docs.parent / f"bench_{name}.py").write_text(f"import sys\npath = sys.argv[-1]\n{body}\n")


def measures(docs: Path, name: str, value: float) -> None:
    rows = f'[{{"what": "{name}", "value": {value}}}]'
    script(docs, name, f"open(path, 'w').write('''{rows}''')\nprint(sys.argv[1:-2])")


def test_each_group_has_its_rows_machine_versions_and_command(
    docs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    measures(docs, "one", 1.25)
    measures(docs, "two", 2)
    assert run_all.main(["--device", "cuda"]) == 0
    text = docs.read_text()
    assert text.index("<!-- make bench: cuda") < text.index("| one | 1.250 |") < text.index("| two | 2.000 |")
    assert "`python tests/benchmarks/bench_one.py --device cuda --steps 9`" in text
    assert "a cuda; Python 3." in text
    assert "pytorch-lightning 2." in text
    out = capfd.readouterr().out
    assert "['--device', 'cuda', '--steps', '9']" in out
    assert out.index("['--device', 'cuda']") < out.index("| one | 1.250 |")


@pytest.mark.parametrize("body", ["open(path, 'w').write('[]')\nsys.exit(3)", "pass"])
def test_what_fails_keeps_its_old_rows_and_the_next_is_run(
    docs: Path, body: str, capfd: pytest.CaptureFixture[str]
) -> None:
    measures(docs, "one", 1.25)
    assert run_all.main(["--only", "one"]) == 0
    script(docs, "one", body)
    measures(docs, "two", 2)
    assert run_all.main([]) == 1
    text = docs.read_text()
    assert "| one | 1.250 |" in text
    assert "| two | 2.000 |" in text
    assert capfd.readouterr().err.splitlines()[-1] == "failed: one"


def test_rows_are_in_the_documentation_before_the_next_benchmark_starts(docs: Path) -> None:
    measures(docs, "one", 1.25)
    script(
        docs, "two", f"assert '| one | 1.250 |' in open({str(docs)!r}).read()\nopen(path, 'w').write('[]')"
    )
    assert run_all.main([]) == 0


def test_a_smoke_run_leaves_the_documentation_alone(docs: Path) -> None:
    measures(docs, "one", 1)
    assert run_all.main(["--quick", "--only", "one"]) == 0
    assert docs.read_text() == DOCS
    other = docs.with_name("copy.md")
    other.write_text(DOCS)
    assert run_all.main(["--quick", "--only", "one", "--docs", str(other)]) == 0
    assert "--steps 1`" in other.read_text()


def test_documentation_without_the_section_is_refused_before_anything_runs(docs: Path) -> None:
    docs.write_text("# Benchmarks\n")
    script(docs, "one", f"open({str(docs.parent / 'ran')!r}, 'w')")
    with pytest.raises(SystemExit):
        run_all.main([])
    assert not (docs.parent / "ran").exists()


def test_commands_name_files_of_this_machine_by_name_alone() -> None:
    command = ["bench_accuracy.py", "--device", "cpu", "--images", "/home/me/cifar10.tar"]
    assert (
        run_all.shown(command)
        == "python tests/benchmarks/bench_accuracy.py --device cpu --images cifar10.tar"
    )


def test_only_the_accuracy_is_given_images(docs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_all.BENCHMARKS["accuracy"] = run_all.BENCHMARKS["two"]
    for name in ("one", "accuracy"):
        measures(docs, name, 1)
    assert run_all.main(["--quick", "--only", "one", "accuracy", "--images", "a.tar"]) == 0
    out = capfd.readouterr().out
    assert "['--device', 'cpu', '--steps', '1']" in out
    assert "['--device', 'cpu', '--images', 'a.tar']" in out
