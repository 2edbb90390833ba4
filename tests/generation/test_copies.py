"""Near copies in a stream: what is said of a row never depends on later ones, and little is missed."""

import numpy as np
import pytest
from PIL import Image

from ssl_diversity.data.near import Described, describe
from ssl_diversity.errors import Interrupted
from ssl_diversity.generation.copies import earlier_copies
from ssl_diversity.runtime import Runtime

NONE = np.zeros(0, np.int64)


def described(n: int, copies: dict[int, int], seed: int = 0) -> Described:
    """Smooth random images; row i of `copies` is a brighter one of row copies[i]."""
    rng = np.random.default_rng(seed)
    images: list[np.ndarray] = []
    for i in range(n):
        small = rng.integers(40, 210, (6, 6, 3), dtype=np.uint8)
        large = np.asarray(Image.fromarray(small).resize((32, 32), Image.Resampling.BICUBIC))
        images.append(images[copies[i]] + np.uint8(3) if i in copies else large)
    rows = [[np.frombuffer(part, np.uint8) for part in describe(image)] for image in images]
    return Described(np.stack([a for a, _ in rows]), np.stack([b for _, b in rows]))


@pytest.fixture(scope="module")
def images() -> tuple[Described, dict[int, int]]:
    rng = np.random.default_rng(1)
    copies = {i: int(rng.integers(0, i)) for i in range(20, 400, 7)}
    return described(400, copies), copies


def test_as_comparing_every_pair(images):
    made, copies = images
    found = earlier_copies(made, NONE, Runtime())
    early, late = np.triu_indices(400, 1)
    apart = made.apart(early, made, late)
    want = np.full(400, 400)
    np.minimum.at(want, late[apart <= 1], early[apart <= 1])
    np.testing.assert_array_equal(found, np.where(want == 400, -1, want))
    assert all(found[i] >= 0 for i in copies)


def test_later_rows_change_nothing(images):
    """Of any prefix, from anything that was known of a shorter one."""
    made, _ = images
    whole = earlier_copies(made, NONE, Runtime())
    known = NONE
    for n in (1, 31, 32, 33, 64, 100, 257, 399, 400):
        part = made.take(slice(0, n))
        np.testing.assert_array_equal(earlier_copies(part, NONE, Runtime()), whole[:n])
        known = earlier_copies(part, known, Runtime())
        np.testing.assert_array_equal(known, whole[:n])


def test_crowds_change_nothing_either():
    """Where far more than a band looks at are alike, what is found may be incomplete, and is stable all the same."""
    crowd = described(600, {i: 0 for i in range(1, 600, 2)}, seed=3)
    whole = earlier_copies(crowd, NONE, Runtime())
    assert (whole[1::2] >= 0).all()
    for n in (77, 300, 511):
        np.testing.assert_array_equal(earlier_copies(crowd.take(slice(0, n)), NONE, Runtime()), whole[:n])


def test_stops(images):
    with pytest.raises(Interrupted):
        earlier_copies(images[0], NONE, Runtime(stop=lambda: True))


def test_nothing():
    empty = Described(np.zeros((0, 32), np.uint8), np.zeros((0, 242), np.uint8))
    assert len(earlier_copies(empty, NONE, Runtime())) == 0
