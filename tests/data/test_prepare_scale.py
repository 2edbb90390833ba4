"""Preparing many images: within its bound of memory, and the same pool after a kill -9."""

from pathlib import Path

import bench_prepare as bench
import pytest

from ssl_diversity.data.pool import Pool
from ssl_diversity.data.verify import verify

IMAGES = 20_000
MEMORY_BYTES = 1 << 29


@pytest.mark.slow
def test_20000_images_within_half_a_gib_and_the_same_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "SHARD_ROWS", 1000)
    monkeypatch.setattr(bench, "SAMPLE_S", 0.02)
    images = tmp_path / "images"
    bench.make_images(images, IMAGES)
    options = {"processes": 2, "memory_bytes": MEMORY_BYTES, "shard_bytes": 1 << 22}
    whole = bench.run(images, "whole", tmp_path / "home", **options)
    assert whole is not None
    print(f"{IMAGES / whole.seconds:,.0f} images/s, peak {whole.peak_pss_bytes / 2**20:.0f} MiB")
    assert 50 << 20 < whole.peak_pss_bytes < MEMORY_BYTES
    pool = Pool.open(whole.folder)
    copies, broken = IMAGES // 100, IMAGES // 1000
    assert pool.info.counts["undecodable"] == broken
    assert pool.info.counts["duplicate"] == copies
    assert pool.size == IMAGES - copies - broken
    assert len(pool.info.shards) > 3
    assert bench.run(images, "killed", tmp_path / "home", kill_after=0.5, **options) is None
    finished = bench.finished_parts(tmp_path / "home", "killed")
    assert 10 <= finished < 20
    resumed = bench.run(images, "killed", tmp_path / "home", **options)
    assert resumed is not None
    assert resumed.note.endswith(f"{finished * bench.SHARD_ROWS:,} images decoded before")
    assert resumed.peak_pss_bytes < MEMORY_BYTES
    assert bench.checksums(resumed.folder) == bench.checksums(whole.folder)
    assert verify(resumed.folder) == []
