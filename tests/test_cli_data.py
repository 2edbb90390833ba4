"""The verbs on data: every example in the help works, a dry run makes nothing, downloads are told in one line."""

import re
import shlex
from pathlib import Path

import pytest
import yfcc_replica as replica
from fault_server import FaultServer
from rich.console import Console

from ssl_diversity import cli_data, files
from ssl_diversity.cli import main
from ssl_diversity.config import parse_overrides
from ssl_diversity.data import recipes
from ssl_diversity.data.sources import SOURCES
from ssl_diversity.sweep import config

DOCS = (files.REPOSITORY / "docs/data.md").read_text()


def commands(text: str) -> list[list[str]]:
    """The words of each `ssl-diversity data prepare` in a text."""
    found = re.findall(r"ssl-diversity data prepare (?!SOURCE)[^`#\n]+", text)
    return [shlex.split(command) for command in found]


EXAMPLES = commands(cli_data.data_prepare.__doc__ or "")


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's home folder with what the examples of the help name."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for i in range(12):
        path = tmp_path / f"flowers/{'ab'[i % 2]}/{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(replica.jpeg(i))
    for name in ("tables", "torchvision", "imagenet", "shards", "yfcc-1m", "yfcc-shards"):
        (tmp_path / name).mkdir()
    (tmp_path / "yfcc-shards/00000.tar").touch()
    for name in ("flowers.tar", "shards/000000.tar"):
        (tmp_path / name).touch()
    replica.write(tmp_path / "yfcc100m_dataset.bz2", [replica.line(i) for i in range(20)])
    return tmp_path


@pytest.mark.parametrize("words", [*EXAMPLES, *commands(DOCS)], ids=" ".join)
def test_every_example_of_prepare_is_a_set(words: list[str], user: Path) -> None:
    overrides = [word for word in words[4:] if "=" in word]
    assert recipes.resolve(words[3], parse_overrides(overrides)).source in SOURCES


def test_the_sweep_in_the_docs_is_one_and_finds_the_pools_that_the_docs_prepare(user: Path) -> None:
    sweep, mixture = re.findall(r"```yaml\n(.*?)```", DOCS, re.DOTALL)
    (user / "mixed.yaml").write_text(sweep.replace("sources:\n", mixture))
    asked = config.load(str(user / "mixed.yaml"), ["order={windowed: {shards: 4, lanes: 64}}"])
    assert asked.windowed is not None
    assert {"imagenet", "web", "mixed"} == asked.sources.keys()
    prepared = [
        recipes.resolve(words[3], parse_overrides([w for w in words[4:] if "=" in w]))
        for words in commands(DOCS)
    ]
    for name in ("imagenet", "web"):
        options = dict(asked.sources[name])
        spec = recipes.resolve(options.pop("recipe"), options, defaults=asked.defaults)
        assert spec.digest in {other.digest for other in prepared}


def test_there_is_an_example_for_each_source(user: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = {recipes.load(words[3])["source"] for words in EXAMPLES}
    assert kinds == SOURCES.keys() - {"photo_patches"}
    assert main(["data", "prepare", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("resize=short", "quality=90", "codec=original", "near_duplicates=true", "exclude="):
        assert words in shown


@pytest.mark.parametrize(
    "words", [words for words in EXAMPLES if words[3] in ("digits", "~/flowers")], ids=" ".join
)
def test_examples_run(words: list[str], user: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words[1:], "--processes", "1"]) == 0
    assert re.search(r"[\d,]+ images", capsys.readouterr().out)


def test_a_dry_run_says_what_would_be_made_and_makes_nothing(
    user: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "prepare", "~/flowers", "size=16", "--dry-run"]) == 0
    shown = {
        line.split("  ", 1)[0]: line.split("  ", 1)[1].strip()
        for line in capsys.readouterr().out.splitlines()
    }
    assert shown["images"].startswith("12 ")
    assert shown["classes"] == "2"
    assert shown["splits"] == "none"
    folder = Path(shown["folder"])
    assert not list(home.rglob("*.tar"))
    assert main(["data", "prepare", "~/flowers", "size=16", "--processes", "1"]) == 0
    assert (folder / "pool.json").exists()
    disk = sum(path.stat().st_size for path in folder.rglob("*.[tn]*") if path.is_file()) / 2**20
    assert float(re.search(r"about ([\d.]+) MiB", shown["disk"])[1]) == pytest.approx(disk, rel=0.3)  # type: ignore[index]
    capsys.readouterr()
    assert main(["data", "prepare", "~/flowers", "size=16", "--dry-run"]) == 0
    assert "is there" in capsys.readouterr().out


def test_a_dry_run_stands_what_prepare_drops(user: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (user / "flowers/a/0.jpg").write_bytes(b"")
    assert main(["data", "prepare", "~/flowers", "size=16", "--dry-run"]) == 0
    assert "MiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ["inspect", "digits", "--images", "0"],
        ["download", "yfcc100m", "--rate", "0"],
        ["download", "yfcc100m", "--timeout-s", "0"],
    ],
)
def test_numbers_have_bounds(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", *words]) == 2
    assert f"Invalid value for '{words[-2]}'" in capsys.readouterr().err


def test_a_dry_run_downloads_nothing(user: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "data",
        "prepare",
        "yfcc100m",
        "metadata=~/yfcc100m_dataset.bz2",
        "n=5",
        "images=http://127.0.0.1:9",
    ]
    assert main([*words, "--dry-run"]) == 0
    assert re.search(r"images +5\b", capsys.readouterr().out)
    assert not list(home.iterdir())


def test_the_bar_shows_rate_time_left_and_note_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        with cli_data.progress_bar("prepare x") as bar:
            bar.runtime.progress(1, 4)
            bar.runtime.progress(2, 4)
            bar.runtime.note("kept 2")

    work()
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(cli_data, "on_terminal", lambda: True)
    monkeypatch.setattr(
        cli_data, "Console", lambda **options: Console(**options, force_terminal=True, width=120)
    )
    work()
    shown = capsys.readouterr().err
    assert "prepare x" in shown
    assert "kept 2" in shown
    assert "/s" in shown


def test_addresses_for_another_downloader(user: Path) -> None:
    words = ["data", "download", "yfcc100m", "metadata=~/yfcc100m_dataset.bz2", "n=5"]
    assert main([*words, "--urls", str(user / "urls.txt")]) == 0
    urls = (user / "urls.txt").read_text().splitlines()
    assert len(set(urls)) == 5
    name = urls[0].rpartition("/")[2]
    assert urls[0].endswith(f".amazonaws.com/data/images/{name[:3]}/{name[3:6]}/{name}")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["digits"], "only yfcc100m"),
        (["yfcc100m", "metadata=~/yfcc100m_dataset.bz2", "--share", "4/4"], "--share 4/4"),
        (["yfcc100m", "metadata=~/yfcc100m_dataset.bz2", "n=21"], "n=21: the metadata lists 20 photos"),
        (["yfcc100m", "metadata=~/yfcc100m_dataset.bz2", "images=~/flowers"], "give an address"),
        (["yfcc100m", "metadata=~/nothing.bz2"], "no such file"),
    ],
)
def test_a_mistaken_download_is_one_line(
    words: list[str], says: str, user: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "download", *words]) == 2
    text = capsys.readouterr().err
    assert says in text
    assert text.startswith("error: ")
    assert text.count("\n") == 1


def test_an_incomplete_set_is_told(user: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, told in ((12, False), (13, True)):
        recipe = tmp_path / "mine.yaml"
        recipe.write_text(
            f"source: folder\noptions: {{path: ~/flowers}}\nsize: {number}\nexpected: {{all: {number}}}\n"
        )
        assert main(["data", "prepare", str(recipe), "split=all", "--processes", "1"]) == 0
        assert ("should have 13 images, 12 were read" in capsys.readouterr().out) == told


def test_a_pool_that_lies_elsewhere(
    user: Path,
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["data", "prepare", "~/flowers", "size=8", "--processes", "1"]) == 0
    folder = next((home / "pools").glob("flowers-*"))
    monkeypatch.setenv("SSL_DIVERSITY_HOME", str(tmp_path / "elsewhere"))
    with FaultServer(home / "pools") as server:
        url = f"{server.url}/{folder.name}"
        assert main(["data", "attach", url, "--name", "theirs"]) == 0
        assert main(["data", "list"]) == 0
        shown = capsys.readouterr().out
        assert re.search(r"flowers +12 +2 +square 8 +png +folder +remote +theirs-", shown)
        assert main(["data", "inspect", "theirs", "--sheet", str(tmp_path / "sheet.png")]) == 0
        assert url in capsys.readouterr().out
        assert main(["data", "attach", f"{server.url}/nothing"]) == 2
        text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert text.count("\n") == 1
