"""Batches of a run, read ahead: what one worker of one rank delivers."""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict

import numpy as np
from numpy.typing import NDArray

from ssl_diversity.data.order import Order, slots

AHEAD_BATCHES = 2


class Batch(TypedDict):
    """`images` uint8 (B/world, 3, S, S), `positions` int64 (B/world,) in the order: the keys of all randomness."""

    images: NDArray[np.uint8]
    positions: NDArray[np.int64]


class Reader(Protocol):
    """As `data.reading.Reader`; one that fetches ahead has `begin` and `close` as well (`data.streaming.StreamingReader`)."""

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]: ...


def _as_it_is(batch: Batch) -> Batch:
    return batch


@dataclass(frozen=True)
class Batches:
    """The batches of `order` from step `start` on, as rank `rank` of `world` sees them: its own slots of each.

    Of several workers, each delivers the steps start + worker, start + worker + workers, ...: taken in turn they
    give the same sequence as one. At most `ahead` batches are read ahead, by `threads` threads, which end when
    the iterator is closed or used up; on them `ready` makes of each batch what is delivered. An error of the reader is
    raised where its batch would have come.
    """

    order: Order
    reader: Reader
    start: int = 0
    rank: int = 0
    world: int = 1
    worker: int = 0
    workers: int = 1
    threads: int = 1
    ahead: int = AHEAD_BATCHES
    ready: Callable[[Batch], Any] = _as_it_is

    def __iter__(self) -> Generator[Any, None, None]:
        mine = slots(self.order, self.rank, self.world)
        if begin := getattr(self.reader, "begin", None):
            begin(self.start, self.rank, self.world, self.workers)
        steps = iter(range(self.start + self.worker, self.order.steps, self.workers))
        waiting: deque[Future[Any]] = deque()
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="read-ahead")
        try:
            while True:
                for step in steps:
                    waiting.append(pool.submit(self._read, step, mine))
                    if len(waiting) > self.ahead:
                        break
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            if close := getattr(self.reader, "close", None):
                close()

    def _read(self, step: int, mine: slice) -> Any:
        first = step * self.order.batch_size
        images = self.reader.read(self.order.batch(step)[mine])
        return self.ready({"images": images, "positions": np.arange(first + mine.start, first + mine.stop)})
