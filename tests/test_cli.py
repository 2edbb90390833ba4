"""The command line: thin, helpful, and honest in its exit status."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

from ssl_diversity import cli
from ssl_diversity.cli import main
from ssl_diversity.sweep import config, flops

VERBS = ["data", "generate", "plan", "sweep", "status", "pretrain", "probe", "distance", "report", "store"]


@pytest.fixture(autouse=True)
def _no_counting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flops, "count_missing", lambda *_: None)


@pytest.mark.parametrize("arguments", [[], *([verb] for verb in VERBS)])
def test_everything_has_help_with_an_example(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--help"]) == 0
    text = capsys.readouterr().out
    if not arguments:
        assert all(verb in text for verb in VERBS)
    elif arguments[0] not in ("data", "store"):
        assert f"ssl-diversity {arguments[0]}" in text
    assert "methods=" not in text or "methods=[simclr" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["plan", "quickstart", "methods=[simclrr]"], "did you mean 'simclr'"),
        (["plan", "quickstart", "bugdet=1"], "did you mean 'budget'"),
        (["plan", "quickstart", "budget=512", "unique_samples=1024"], "must not exceed C"),
        (["plan", "quickstart", "unique_samples=100"], "the nearest that works is 128"),
        (["plan", "quickstart", "backbone=resnet18"], "ViT"),
        (["plan", "nonsense"], "no such sweep"),
        (["sweep", "quickstart", "--profile", "moon"], "no such launch profile"),
        (["sweep", "quickstart", "sources=[/nowhere]"], "/nowhere"),
        (["probe", "--sweep", "quickstart", "--downstream", "digits"], "was never run"),
        (["pretrain", "method=simclr"], "name one"),
        (["data", "inspect", "nonsense"], "no pool 'nonsense'"),
        (["data", "prepare", "folder", "path=/nowhere", "name=x"], "/nowhere"),
        (["data", "prepare", "digitz"], "did you mean 'digits'"),
        (["data", "prepare", "generated-digits"], "ssl-diversity generate generated-digits"),
        (["generate", "digits"], "ssl-diversity data prepare digits"),
        (["store", "ls", "nonsense"], "unknown kind"),
        (["distance", "photo_patches", "digits", "--n", "1"], "at least 2"),
        (
            ["distance", "photo_patches", "digits", "--device", "gpu"],
            "--device gpu: expected auto, cpu or cuda",
        ),
        (["data", "page", "digits", "--device", "tpu"], "--device tpu: expected auto, cpu or cuda"),
        (["plan", "quickstart", "sources.digits=3"], "set digits=3"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    text = capsys.readouterr().err
    assert says in text
    assert text.startswith("error: ")
    assert text.count("\n") == 1


def test_an_unknown_verb_and_option_give_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["swep"]) == 2
    assert main(["sweep", "--profil", "x"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_store_of_newer_code_is_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "store").mkdir()
    (home / "store" / "format").write_text("99")
    assert main(["plan"]) == 2
    assert main(["sweep"]) == 2
    assert main(["store", "check"]) == 2
    for arguments in (["status"], ["store", "ls"], ["store", "du"]):
        assert main(arguments) == 2
    assert capsys.readouterr().err.count("newer than this code") == 6


def test_a_home_that_is_no_folder_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SSL_DIVERSITY_HOME", str(tmp_path / "file"))
    for arguments in (["sweep"], ["status"], ["data", "prepare", "digits", "--processes", "1"]):
        assert main(arguments) == 2
        text = capsys.readouterr().err
        assert text.startswith("error: ")
        assert str(tmp_path / "file") in text
        assert text.count("\n") == 1


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cli.cli_data, "mapping", full)
    assert main(["data", "prepare", "digits", "--processes", "1"]) == 2
    assert "disk full" in capsys.readouterr().err


def test_an_interrupt_is_status_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(config, "load", interrupted)
    assert main(["plan"]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_plan_shows_the_grid(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "quickstart", "budget=8192", "methods=[simclr,mae]", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "12 cells, 98,304 samples" in text
    assert "0 of 5 prepare" in text
    assert "waiting: source digits is not prepared yet" in text
    assert main(["plan", "methods=[byol]"]) == 0
    assert "6 cells" in capsys.readouterr().out


def test_the_cli_imports_no_torch_to_plan() -> None:
    code = (
        "import sys\n"
        "from ssl_diversity.cli import main\n"
        "from ssl_diversity.sweep import flops\n"
        "flops.count_missing = lambda *_: None\n"
        "assert main(['plan', '--dry-run']) == 0\n"
        "assert main(['status']) == 0\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ssl_diversity", "plan", "methods=[x]"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")


def test_data_verbs(tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "list"]) == 0
    assert "no pools yet" in capsys.readouterr().out
    assert main(["data", "prepare", "digits", "name=mine", "--processes", "1"]) == 0
    assert "images" in capsys.readouterr().out
    assert main(["data", "list"]) == 0
    assert "mine" in capsys.readouterr().out
    sheet = tmp_path / "sheet.png"
    assert main(["data", "inspect", "mine", "--sheet", str(sheet)]) == 0
    assert sheet.read_bytes().startswith(b"\x89PNG")
    assert main(["data", "verify", "mine"]) == 0
    shard = next((home / "pools").glob("mine-*/shards/*.tar"))
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(content)
    capsys.readouterr()
    assert main(["data", "verify", "mine"]) == 1
    assert shard.name in capsys.readouterr().out


def test_status_is_json_where_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "quickstart", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["done"] == 0


def test_store_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["ls"], ["du"], ["gc"], ["check"]):
        assert main(["store", *arguments]) == 0
    assert "the store is consistent" in capsys.readouterr().out
