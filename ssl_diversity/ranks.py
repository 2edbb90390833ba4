"""The processes of a job that train one cell together: who is who, how they meet, what they tell each other."""

import contextlib
import json
import os
import re
import socket
import struct
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from ssl_diversity.errors import Interrupted, UserError
from ssl_diversity.files import read_json, write_json

T = TypeVar("T")
MEETING_S = 900.0  # for the slowest rank to import torch from a busy file system
_IDLE = timedelta(days=60)  # a rank may wait for work for as long as its job lasts
_COLLECTIVE = timedelta(minutes=10)  # after which NCCL, which does not notice who has gone, ends the process
_GONE = re.compile(
    r"gloo|connection (closed|reset|refused|was)|broken pipe|nccl|socket|recvValue", re.IGNORECASE
)


class PeerLost(Exception):
    """Another rank has failed or gone away: this process can only leave, and the job start again."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of its job; ranks of one node are neighbours, as srun numbers them by default."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    node: int = 0
    nodes: int = 1

    @classmethod
    def current(cls) -> "Ranks":
        """What srun or submitit's local executor told this process; without either, one rank.

        The script of a SLURM job, outside of any srun, is one rank whatever the job's number of tasks.
        """

        def number(name: str) -> int:
            return int(os.environ[name])

        if os.environ.get("SUBMITIT_EXECUTOR") == "local" and "SUBMITIT_LOCAL_GLOBALID" in os.environ:
            rank, world = number("SUBMITIT_LOCAL_GLOBALID"), number("SUBMITIT_LOCAL_NTASKS")
            return cls(rank, world, number("SUBMITIT_LOCAL_LOCALID"), world)
        if "SLURM_STEP_NUM_TASKS" not in os.environ:
            return cls()
        node = number("SLURM_NODEID")
        return cls(
            number("SLURM_PROCID"),
            number("SLURM_STEP_NUM_TASKS"),
            number("SLURM_LOCALID"),
            _tasks_per_node(os.environ["SLURM_STEP_TASKS_PER_NODE"])[node],
            node,
            number("SLURM_STEP_NUM_NODES"),
        )

    def place(self, device: str) -> str:
        """ "cuda" as the GPU of this rank among those that it sees (one alone where srun binds them); else `device`."""
        if device != "cuda" or self.world == 1:
            return device
        import torch

        return f"cuda:{self.local_rank % max(1, torch.cuda.device_count())}"


def _tasks_per_node(text: str) -> list[int]:
    """SLURM's "2(x3),1" is [2, 2, 2, 1]."""
    counts = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    return counts


class Group:
    """Ranks that have met (`joined`); by default one alone, for which every method here is trivial.

    What they tell each other goes over the CPU, so no device has to wait. PeerLost where another rank has gone, and
    at every further word once the group is `broken` (why: a rank has gone, or had an error that the others don't know of).
    """

    def __init__(self, ranks: Ranks = Ranks(), control: Any = None, store: Any = None) -> None:
        self.ranks = ranks
        self.broken = ""
        self._control, self._store = control, store

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone writes files and reports."""
        return self.ranks.rank == 0

    def tell(self, value: Any) -> None:
        """Rank 0's word (picklable), for which all others `hear()`."""
        if self.ranks.world > 1:
            self._broadcast(value)

    def hear(self) -> Any:
        """What rank 0 tells; waits for it for as long as it takes."""
        return self._broadcast(None)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any rank; all ranks ask together."""
        if self.ranks.world == 1:
            return flag
        import torch
        import torch.distributed as dist

        word = torch.tensor(int(flag))
        with self.watched():
            dist.all_reduce(word, dist.ReduceOp.MAX, group=self._control)
        return bool(word)

    def gather(self, value: T) -> list[T]:
        """Every rank's value (picklable), by rank; all ranks ask together."""
        if self.ranks.world == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.ranks.world
        with self.watched():
            dist.all_gather_object(values, value, group=self._control)
        return values

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Around work in which ranks do not talk: where it fails on one, it fails on all, and the group stays whole."""
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
            if self.ranks.world == 1:
                raise
        kind = type(failure) if isinstance(failure, UserError | Interrupted) else RuntimeError
        word = None if failure is None else (kind, _in_words(failure))
        words = self.gather(word)
        if failure is not None:
            raise failure
        for rank, other in enumerate(words):
            if other is not None:
                raise other[0](f"rank {rank}: {other[1]}")

    @contextlib.contextmanager
    def entangled(self, agreed: Callable[[], bool]) -> Iterator[None]:
        """Around work full of collectives: after an error that is not `agreed` among ranks, the group is broken."""
        try:
            with self.watched():
                yield
        except BaseException:
            if self.ranks.world > 1 and not agreed():
                self.broken = self.broken or "this rank failed where the others could not know"
            raise

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Around what talks to other ranks: an error that comes of one that is gone is raised as PeerLost."""
        if self.broken:
            raise PeerLost(self.broken)
        try:
            yield
        except RuntimeError as error:
            if self.ranks.world == 1 or not _GONE.search(str(error)):
                raise
            gone = f"another rank has gone: {str(error).split(' This is typically')[0]}"
            self.broken = self._why() or gone
            raise PeerLost(self.broken) from error

    def close(self, error: BaseException | None = None) -> None:
        """Leave; the others learn of `error`, if there is one."""
        if self._control is None:
            return
        import torch.distributed as dist

        if error is not None and not isinstance(error, PeerLost):
            with contextlib.suppress(Exception):
                self._store.set("failure", f"rank {self.ranks.rank} failed: {_in_words(error)}")
        self.broken, self._control = self.broken or "this rank has left", None
        with contextlib.suppress(Exception):
            dist.destroy_process_group()

    def _broadcast(self, value: Any) -> Any:
        import torch.distributed as dist

        box = [value]
        with self.watched():
            dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]

    def _why(self) -> str | None:
        """What a rank that failed has left behind."""
        with contextlib.suppress(Exception):
            self._store.set_timeout(timedelta(seconds=10))
            if self._store.check(["failure"]):
                return str(self._store.get("failure").decode())
        return None


def _in_words(error: BaseException) -> str:
    return str(error) if isinstance(error, UserError | Interrupted) else f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def joined(ranks: Ranks, device: str, meeting: Path, wait_s: float = MEETING_S) -> Iterator[Group]:
    """The ranks of a job as a `Group`, with torch.distributed initialised for tensors on `device`.

    `meeting` is a file on a file system that all ranks see, its name new at every start of the job: rank 0 writes there
    where it listens, and removes it when all have met. One rank alone needs none of this.

    Raises UserError where the ranks do not meet within `wait_s` seconds.
    """
    if ranks.world == 1:
        yield Group(ranks)
        return
    import torch
    import torch.distributed as dist

    deadline = time.monotonic() + wait_s
    store, address = _opened(meeting, deadline) if ranks.rank == 0 else _found(meeting, deadline)
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(device)
    try:
        with _gloo_over(address):
            dist.init_process_group(
                "nccl" if cuda else "gloo",
                store=store,
                rank=ranks.rank,
                world_size=ranks.world,
                timeout=_COLLECTIVE,
            )
            group = Group(ranks, dist.new_group(backend="gloo", timeout=_IDLE), store)
    except RuntimeError as error:
        raise UserError(
            f"{ranks.world} ranks did not meet at {meeting}: {error}; look at their logs"
        ) from error
    if ranks.rank == 0:
        meeting.unlink(missing_ok=True)
    try:
        yield group
    except BaseException as error:
        group.close(error)
        raise
    group.close()


def _opened(meeting: Path, deadline: float) -> tuple[Any, str]:
    """Rank 0's store and the address at which the others reached it."""
    import torch.distributed as dist

    wait_s = max(1.0, deadline - time.monotonic())
    store = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=wait_s)
    )
    nonce = uuid.uuid4().hex
    store.set("nonce", nonce)
    write_json(meeting, {"hosts": _addresses(), "port": store.port, "nonce": nonce})
    try:
        return store, store.get("address").decode()
    except RuntimeError:
        raise UserError(f"no other rank came to {meeting} in {wait_s:.0f} s: look at their logs") from None


def _found(meeting: Path, deadline: float) -> tuple[Any, str]:
    """The store that rank 0 announced, and this machine's address on the way there."""
    import torch.distributed as dist

    why = "rank 0 has not written it"
    while (remaining := deadline - time.monotonic()) > 0:
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            said = read_json(meeting)
            why = f"nobody answers at {', '.join(said['hosts'])}, port {said['port']}"
            for host in said["hosts"]:
                with contextlib.suppress(OSError, RuntimeError):
                    with socket.create_connection((host, said["port"]), timeout=5) as way:
                        own = str(way.getsockname()[0])
                    store = dist.TCPStore(
                        host, said["port"], is_master=False, timeout=timedelta(seconds=min(10, remaining))
                    )
                    if store.get("nonce").decode() == said["nonce"]:
                        store.set_timeout(timedelta(seconds=remaining))
                        store.set("address", host)
                        return store, own
        time.sleep(0.1)
    raise UserError(f"the ranks of this job did not meet at {meeting}: {why}; look at rank 0's log")


def _addresses() -> list[str]:
    """Where another process may reach this machine, the likeliest first; loopback last."""
    found = []
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: asks for the address of the default route
        found.append(str(probe.getsockname()[0]))
    with contextlib.suppress(OSError):
        found += [str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)]
    far = [address for address in found if not address.startswith("127.")]
    return [*dict.fromkeys([*far, "127.0.0.1"])]


@contextlib.contextmanager
def _gloo_over(address: str) -> Iterator[None]:
    """Gloo listens at this address, where the user did not say otherwise: by itself it takes the host name's, often
    loopback. Jobs submitted from here are not to inherit that."""
    name = "GLOO_SOCKET_IFNAME"
    interface = None if name in os.environ else _interface(address)
    if interface:
        os.environ[name] = interface
    try:
        yield
    finally:
        if interface:
            del os.environ[name]


def _interface(address: str) -> str | None:
    """The network interface with this IPv4 address."""
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()[:15]))  # SIOCGIFADDR
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None
