"""kill -9 while images are made: the pool is that of an undisturbed run."""

import random
import time

import pytest
from generation_worker import working

from ssl_diversity.data.pool import Pool
from ssl_diversity.generation.assembly import generate
from ssl_diversity.generation.chunks import Maker
from ssl_diversity.runtime import Runtime

ENCODING = {"size": 8, "filter": "bicubic", "codec": "png", "quality": 95}


@pytest.mark.slow
def test_killed(recipe, saved, tmp_path, subprocess_environment, monkeypatch):
    """kill -9 five times at random moments, in chunks, among the last blocks and while the pool is written."""
    changes = {"pipeline": str(saved()), "n": 200, "sampling": {"steps": 20, "block": 8, "chunk": 64}}
    spec = recipe(**changes, near_duplicates=True).generate_spec(**ENCODING)
    delays = random.Random(0)
    tasks = [*spec.samples(), spec]
    for kill in range(5):
        stream = Maker(spec, Runtime()).stream
        process = working(subprocess_environment, *tasks)
        count, deadline = len(stream._of) + 4, time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            stream.look()
            if len(stream._of) > min(count, 24):
                break
            time.sleep(0.01)
        time.sleep(delays.uniform(0, 0.1) if kill < 4 else 0.3)
        process.kill()
        process.wait()
    for path in Maker(spec, Runtime()).stream.folder.rglob(".*"):
        path.unlink()
    process = working(subprocess_environment, *tasks)
    assert process.wait() == 0
    killed = Pool.open(spec.directory)
    monkeypatch.setenv("SSL_DIVERSITY_HOME", str(tmp_path / "undisturbed"))
    generate(spec, tmp_path, Runtime())
    undisturbed = Pool.open(spec.directory)
    assert (killed.digest, killed.info.counts) == (undisturbed.digest, undisturbed.info.counts)
    assert [s.blake2b for s in killed.info.shards] == [s.blake2b for s in undisturbed.info.shards]


def test_two_pools_of_the_same_images_at_once(recipe, saved, subprocess_environment):
    """Two processes that work off everything, in the same order: they share images, put them together and take them."""
    changes = {"pipeline": str(saved()), "n": 200, "sampling": {"steps": 2, "block": 10, "chunk": 50}}
    specs = [
        recipe(**changes, name=name, filters=[name]).generate_spec(**ENCODING)
        for name in ("blank", "saturated")
    ]
    processes = [working(subprocess_environment, *spec.samples(), spec) for spec in specs]
    assert [process.wait() for process in processes] == [0, 0]
    one, other = (Pool.open(spec.directory) for spec in specs)
    assert one.size == 200
    assert (one.content == other.content).all()
