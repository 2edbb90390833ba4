"""A test split of a set that has none: a share of each class, chosen by a hash of the content."""

import hashlib
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

_RANK_BITS = 18  # 2^18 counters find where the splits end
Slice = tuple[NDArray[np.int64], NDArray[np.uint64]]  # labels and ranks of images


class TestSplit:
    """The images of each class with the lowest ranks."""

    __test__ = False  # for pytest

    def __init__(self, share: float, classes: int, ranked: Callable[[], Iterable[Slice]]) -> None:
        """`share` of each of the `classes` and of the unlabelled images; `ranked()` gives all distinct ones in slices.

        It is called twice: first each class counts its images by the first bits of their ranks, then it sorts
        only those in the range where its split ends.
        """
        bits = max(0, _RANK_BITS - classes.bit_length())
        counts = np.zeros((classes + 1, 1 << bits), np.int64)
        for label, rank in ranked():
            np.add.at(counts, (label + 1, _head(rank, bits)), 1)
        members = counts.sum(1)
        wanted = np.maximum(np.rint(share * members), np.minimum(1, members - 1)).clip(0).astype(np.int64)
        until = np.cumsum(counts, 1)
        last = (until < wanted[:, None]).sum(1)  # the range that holds the last image of the split
        left = wanted - np.where(last > 0, until[np.arange(classes + 1), last - 1], 0)  # of it, in that range
        labels, ranks = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
        for label, rank in ranked():
            chosen = np.flatnonzero(_head(rank, bits) == last[label + 1])
            labels.append(label[chosen])
            ranks.append(rank[chosen])
        label, rank = np.concatenate(labels), np.concatenate(ranks)
        order = np.lexsort((rank, label))
        first = np.searchsorted(label[order], np.arange(-1, classes))
        some = wanted > 0
        self.below = np.zeros(classes + 1, np.uint64)  # by class, from -1
        self.below[some] = rank[order[(first + left - 1)[some]]] + np.uint64(1)

    def has(self, label: NDArray[np.int32], content: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """bool (n,) for labels (n,) and content hashes (n, 16)."""
        return ranks_of(content) < self.below[label + 1]


def ranks_of(content: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """uint64 (n,) for content hashes (n, 16): not keyed by the pool's seed, so that all pools are split alike."""
    digests = [hashlib.blake2b(row.tobytes(), digest_size=16, key=b"split").digest()[:8] for row in content]
    return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64)


def _head(rank: NDArray[np.uint64], bits: int) -> NDArray[np.int64]:
    return (rank >> np.uint64(63 - bits) >> np.uint64(1)).astype(np.int64)
