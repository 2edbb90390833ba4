"""One SLURM cluster for all the drills of a session."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A cluster of three nodes with quick preemption. Leave it as you found it: `start_again`, no jobs.

    Skips where there can be none, unless SSL_DIVERSITY_REQUIRE_SLURM=1.
    """
    if os.environ.get("SSL_DIVERSITY_REQUIRE_SLURM") != "1":
        if os.geteuid() != 0:
            pytest.skip("a SLURM cluster of one's own needs root")
        if not shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin"):
            pytest.skip("SLURM is not installed; `make slurm-up` installs it (Debian, Ubuntu)")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # sockets want short paths
    with Cluster(folder, SLURM_GRACE=3).running() as made:
        yield made
