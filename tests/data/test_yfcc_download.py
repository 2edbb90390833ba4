"""Downloads arrive whole, are never fetched twice, and what fails is counted by cause and tried again."""

import io
import os
import signal
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yfcc_replica as replica
from fault_server import Fault, FaultServer, wait_until

from ssl_diversity.data import recipes
from ssl_diversity.data.pool import Pool
from ssl_diversity.data.prepare import prepare
from ssl_diversity.data.remote import Client
from ssl_diversity.data.sources.yfcc100m import YFCC100M
from ssl_diversity.data.verify import verify
from ssl_diversity.data.yfcc import download as module
from ssl_diversity.data.yfcc.download import photo_path
from ssl_diversity.errors import UserError

PHOTOS = 45


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 10)
    monkeypatch.setattr(module, "Client", partial(Client, backoff_s=0.01, max_wait_s=0.05))


@pytest.fixture
def metadata(tmp_path: Path) -> Path:
    return replica.write(tmp_path / "yfcc100m_dataset.bz2", [replica.line(i) for i in range(PHOTOS)])


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    for i in range(PHOTOS):
        replica.put(tmp_path / "bucket", i)
    return tmp_path / "bucket"


def source(metadata: Path, url: str, **options: Any) -> YFCC100M:
    return YFCC100M(YFCC100M.Options(metadata=(str(metadata),), images=url, **options), Path("unused"))


def fetch(metadata: Path, server: FaultServer, to: Path | None = None, **options: Any) -> dict[str, int]:
    """The counts of a download."""
    share = options.pop("share", (0, 1))
    asked = source(metadata, server.url, **options)
    asked.download(to, connections=4, timeout_s=30, share=share)
    return asked.counts


def pool_of(metadata: Path, images: str, **options: Any) -> Pool:
    values = {"metadata": str(metadata), "size": 12, "resize": "square", "codec": "png", "images": images}
    return prepare(recipes.resolve("yfcc100m", {**values, **options}))


def place(number: int) -> str:
    return photo_path(replica.hash_at(number))


def test_what_is_refused_or_cut_arrives_and_gives_the_same_pool(
    metadata: Path, bucket: Path, home: Path
) -> None:
    faults = {
        place(0): [Fault("429", retry_after="0"), Fault("429")],
        place(1): [Fault("500")],
        place(2): [Fault("cut", after=100)],
        place(3): [Fault("stall", after=50, seconds=2)],
        place(4): [Fault("503"), Fault("cut", after=300)],
    }
    with FaultServer(bucket, faults=faults) as server:
        pool = pool_of(metadata, server.url)
        assert [server.total(kind) for kind in ("429", "500", "503", "cut", "stall")] == [2, 1, 1, 2, 1]
    assert verify(pool) == []
    assert pool.size == PHOTOS
    assert pool.digest == pool_of(metadata, str(bucket)).digest


def test_failures_are_counted_by_cause_and_tried_again(metadata: Path, bucket: Path, tmp_path: Path) -> None:
    for i in (0, 1):
        replica.put(bucket, i).unlink()
    replica.put(bucket, 2, b"<html>gone</html>")
    with FaultServer(bucket, faults={place(3): [Fault("500")] * 20}) as server:
        counts = fetch(metadata, server, tmp_path / "to")
        missing = {"missing (HTTP 404)": 2, "missing (HTTP 500)": 1, "missing (not an image)": 1}
        assert counts == {"asked": PHOTOS, **missing}
        with pytest.raises(
            UserError, match=r"41 of 45 photos, 2 HTTP 404, 1 HTTP 500, 1 not an image"
        ) as caught:
            pool_of(metadata, str(tmp_path / "to"))
        assert "missing_ok=0.09" in str(caught.value)
        assert pool_of(metadata, str(tmp_path / "to"), missing_ok=0.09).size == PHOTOS - 4
    for i in range(4):
        replica.put(bucket, i)
    with FaultServer(bucket) as server:
        assert fetch(metadata, server, tmp_path / "to") == {"asked": PHOTOS}
        asked = {path for path, what in server.counts if what == "requests"}
        assert asked == {place(i) for i in range(4)}
        assert fetch(metadata, server, tmp_path / "to") == {"asked": PHOTOS}
        assert {path for path, what in server.counts if what == "requests"} == asked
    assert pool_of(metadata, str(tmp_path / "to")).digest == pool_of(metadata, str(bucket)).digest


def test_prepare_needs_no_network_once_enough_is_there(metadata: Path, bucket: Path) -> None:
    replica.put(bucket, 0).unlink()
    with FaultServer(bucket) as server:
        fetch(metadata, server)
    assert pool_of(metadata, server.url, missing_ok=0.1).size == PHOTOS - 1


def test_a_larger_selection_fetches_the_difference(metadata: Path, bucket: Path, tmp_path: Path) -> None:
    with FaultServer(bucket) as server:
        fetch(metadata, server, tmp_path / "to", n=15)
        assert server.total("requests") - 1 == 15  # and one to see whether the server is there
        fetch(metadata, server, tmp_path / "to", n=32)
        assert server.total("requests") - 2 == 32
        small = list(source(metadata, str(tmp_path / "to"), n=12).parts("all", 100))
        assert sum(map(len, small)) == 12
        with pytest.raises(UserError, match="not fetched yet"):
            list(source(metadata, str(tmp_path / "to")).parts("all", 100))


def test_machines_share_the_work(metadata: Path, bucket: Path, tmp_path: Path) -> None:
    with FaultServer(bucket) as server:
        assert fetch(metadata, server, tmp_path / "to", share=(0, 2))["missing (not fetched yet)"] == 20
        assert fetch(metadata, server, tmp_path / "to", share=(1, 2)) == {"asked": PHOTOS}
        assert server.total("requests") - 2 == PHOTOS


def test_a_killed_download_goes_on(metadata: Path, bucket: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from ssl_diversity.data.yfcc import download as module\n"
        "from ssl_diversity.data.sources.yfcc100m import YFCC100M\n"
        "module.BLOCK, module._BLOCKS_AT_ONCE = 10, 1\n"
        "options = YFCC100M.Options(metadata=(sys.argv[1],), images=sys.argv[2])\n"
        "YFCC100M(options, Path('unused')).download(Path(sys.argv[3]), connections=2)\n"
    )
    slow = {Fault("slow", after=5000): 1.0}
    with FaultServer(bucket, rates=slow) as server:
        words = [sys.executable, "-c", program, str(metadata), server.url, str(tmp_path / "to")]
        process = subprocess.Popen(words)
        records = tmp_path / "to/blocks"
        wait_until(lambda: len(list(records.glob("*.json"))) >= 2, seconds=600)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        finished = {path: path.read_bytes() for path in records.glob("[0-9]*.*")}
        before = server.total("requests")
    assert before < PHOTOS
    with FaultServer(bucket) as server:
        assert fetch(metadata, server, tmp_path / "to") == {"asked": PHOTOS}
        blocks = sum(path.suffix == ".json" for path in finished)
        assert server.total("requests") - 1 == PHOTOS - 10 * blocks
    assert all(
        path.read_bytes() == data for path, data in finished.items() if path.with_suffix(".json") in finished
    )
    assert pool_of(metadata, str(tmp_path / "to")).digest == pool_of(metadata, str(bucket)).digest


def names_of(to: Path) -> list[str]:
    """Of all photos in the tars."""
    names = []
    for path in sorted((to / "blocks").glob("*.tar")):
        with tarfile.open(path) as tar:
            names += tar.getnames()
    return names


def test_killed_between_a_tar_and_its_record_it_has_no_photo_twice(
    metadata: Path, bucket: Path, tmp_path: Path
) -> None:
    to = tmp_path / "to"
    with FaultServer(bucket) as server:
        fetch(metadata, server, to)
        (to / "blocks/000001.json").unlink()
        assert fetch(metadata, server, to) == {"asked": PHOTOS}
    assert len(names_of(to)) == len(set(names_of(to))) == PHOTOS
    with tarfile.open(to / "blocks/000002.tar") as tar:  # as written by an earlier version
        members = [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    with tarfile.open(to / "blocks/000002.tar", "w") as tar:
        for member, data in [*members, *members]:
            tar.addfile(member, io.BytesIO(data))
    assert pool_of(metadata, str(to), deduplicate=False).size == PHOTOS


def test_two_downloads_into_one_folder_share_the_work(metadata: Path, bucket: Path, tmp_path: Path) -> None:
    to = tmp_path / "to"
    with FaultServer(bucket, rates={Fault("slow", after=3000): 1.0}) as server, ThreadPoolExecutor(2) as both:
        found = list(both.map(lambda n: fetch(metadata, server, to, n=n), (40, PHOTOS)))
        assert [counts["asked"] for counts in found] == [40, PHOTOS]
        assert fetch(metadata, server, to) == {"asked": PHOTOS}
        assert server.total("requests") <= PHOTOS + 2  # and one each to see whether the server is there
    assert len(names_of(to)) == len(set(names_of(to))) == PHOTOS


def test_a_server_that_has_none_or_is_none_is_one_error(
    metadata: Path, bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_HOPELESS", 5)
    with (
        FaultServer(bucket) as server,
        pytest.raises(UserError, match="not one of the first 5 photos") as caught,
    ):
        source(metadata, f"{server.url}/wrong").download(tmp_path / "to", connections=4)
    assert "404" in str(caught.value)
    with pytest.raises(UserError, match="images=FOLDER"):
        source(metadata, server.url).download(tmp_path / "to")


def test_a_folder_keeps_to_one_selection(metadata: Path, bucket: Path, tmp_path: Path) -> None:
    with FaultServer(bucket) as server:
        fetch(metadata, server, tmp_path / "to")
        with pytest.raises(UserError, match="another selection"):
            fetch(metadata, server, tmp_path / "to", draw=1)


def test_a_damaged_block_is_named(metadata: Path, bucket: Path, tmp_path: Path) -> None:
    with FaultServer(bucket) as server:
        fetch(metadata, server, tmp_path / "to")
    tar = tmp_path / "to/blocks/000002.tar"
    tar.write_bytes(tar.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"000002.tar: truncated"):
        pool_of(metadata, str(tmp_path / "to"))
