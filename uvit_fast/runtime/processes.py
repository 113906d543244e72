"""The processes of one job, as torchrun and deepspeed start them: they divide its work, wait for each other, fail
together, and end with their launcher.
"""

import contextlib
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import psutil

from uvit_fast.runtime.errors import RankError, UserError

if TYPE_CHECKING:  # a process on its own works without torch
    import torch
    import torch.distributed as dist

T = TypeVar("T")

LAUNCHERS = {"torchrun", "torch.distributed.run", "torch.distributed.launch"}
LAUNCHERS |= {"deepspeed", "deepspeed.launcher.runner", "deepspeed.launcher.launch", "accelerate"}
PATIENCE = timedelta(days=1)  # with a rank that works alone, or finishes long after the others
FAILED, ENDED = "uvit_fast/failed", "uvit_fast/ended"  # the first that failed; how many have ended because of it


class World:
    """This process among the `size` of a job: its `rank`, and its `local_rank` on its host; alone without a launcher.

    `with World() as world:` brings the processes together and ends them together: the first that fails raises its
    error, the others exit with code 2 in silence. They learn of it at their next `check` or exchange. A single process
    needs no torch. The processes of a training run meet in `start` and part in `leave`: their launcher ends them if one
    fails.

    Args:
        alone: ignore a launcher.
        device: of a training run.
    """

    def __init__(self, alone: bool = False, device: "torch.device | None" = None):
        told = {} if alone else os.environ
        self.rank, self.size = int(told.get("RANK", "0")), int(told.get("WORLD_SIZE", "1"))
        self.local_rank = int(told.get("LOCAL_RANK", "0"))
        self._device = device
        self._store: Any = None

    def __enter__(self) -> "World":
        follow_launcher()
        if self.size > 1:
            import torch.distributed as dist

            try:
                self._store, *_ = next(iter(dist.rendezvous("env://", self.rank, self.size)))
            except dist.DistNetworkError as error:
                if problem := port_taken(error):
                    print(f"uvit-fast: {problem}", file=sys.stderr)
                    raise SystemExit(2) from None
                raise
            dist.init_process_group("gloo", store=self._store, rank=self.rank, world_size=self.size, timeout=PATIENCE)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> None:
        if self.size == 1:
            return
        import torch.distributed as dist

        failed = kind is not None and issubclass(kind, Exception)
        first = failed and self._is_first()
        dist.destroy_process_group()  # a process that waits for this one in an exchange learns of it now
        if first:
            self._await_others()
        elif failed:
            time.sleep(1)  # a launcher ends all at the first exit, which is that of the process with the error
            raise SystemExit(2)

    def leave(self) -> None:
        """End a training run's process group, all ranks together: one that left first might take along what others
        still wait for.
        """
        import torch.distributed as dist

        if self.size > 1:
            dist.barrier(group=host_group())
        dist.destroy_process_group()

    @property
    def device(self) -> "torch.device":
        """The device of a training run."""
        assert self._device is not None, "`start` chooses it"
        return self._device

    def share(self, parts: list) -> list:
        """Return every `size`-th of `parts`, from this rank's on."""
        return parts[self.rank :: self.size]

    def check(self) -> None:
        """Between two parts of the work: end here if another process failed."""
        if self._store is not None and self._store.check([FAILED]):
            raise RuntimeError("another rank failed")  # not the first: nobody will see it

    def gather(self, value: Any) -> list | None:
        """Return every rank's value, in rank order, on rank 0; None on the others. Tensors must be on the CPU."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values, group=self._hosts())
        return values

    def tell(self, value: Any) -> Any:
        """Return rank 0's value on every rank. Tensors must be on the CPU."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        told = [value]
        dist.broadcast_object_list(told, src=0, group=self._hosts())
        return told[0]

    def on_first(self, work: Callable[[], T]) -> T:
        """Run `work()` on rank 0 alone, and return its result, or raise its UserError, on every rank.

        The others wait however long it takes: a collective on the devices would give up after ten minutes.
        """
        result, mistake = None, None
        if self.rank == 0:
            try:
                result = work()
            except (UserError, ImportError) as error:
                mistake = error
        result, mistake = self.tell((result, mistake))
        if mistake:
            raise mistake
        return result

    def in_turn(self, find: Callable[[], Any]) -> Any:
        """Call `find()` on rank 0, and afterwards on the others, which find what it has kept on disk."""
        found = find() if self.rank == 0 else None
        self.tell(None)
        return found if self.rank == 0 else find()

    def _hosts(self) -> "dist.ProcessGroup | None":
        """The group on the hosts that exchanges objects; None if that is the default group."""
        return None if self._store is not None else host_group()

    def _is_first(self) -> bool:
        """Return whether no other process failed before this one."""
        try:
            first = self._store.compare_set(FAILED, "", str(self.rank)) == str(self.rank).encode()
            if not first:
                self._store.add(ENDED, 1)
            return first
        except RuntimeError:  # the store went with rank 0, whose failure caused this one
            return False

    def _await_others(self) -> None:
        """Wait until the others know, or ten seconds: the store may end with rank 0, and torch would complain at
        length.
        """
        deadline = time.monotonic() + 10
        while self._store.add(ENDED, 0) < self.size - 1 and time.monotonic() < deadline:
            time.sleep(0.02)


ALONE = World(alone=True)


@functools.cache
def host_group() -> "dist.ProcessGroup":
    """Return the group of a training run's ranks on their hosts. All must make the first call together."""
    import torch.distributed as dist

    return dist.new_group(backend="gloo", timeout=PATIENCE)


def start(device: str) -> World:
    """Choose the device, see `pick_device`, and join the process group of a training run; without a launcher, this
    process forms a group of its own.

    Raises:
        UserError: a GPU was requested and there is none. RankError: there are fewer GPUs than processes, or another job
            meets at the port.
    """
    import torch.distributed as dist

    from uvit_fast.runtime.device import pick_device

    for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        os.environ.setdefault(name, default)  # deepspeed reads them
    world = World(device=pick_device(device))
    if world.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is first imported
    if not dist.is_initialized():
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        if world.size == 1:  # on a free port
            store = dist.TCPStore("127.0.0.1", 0, world_size=1, is_master=True)
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
        else:
            try:
                dist.init_process_group(backend)
            except dist.DistNetworkError as error:
                if problem := port_taken(error):
                    raise RankError(problem) from None
                raise
    return world


def port_taken(error: Exception) -> str | None:
    """Return a line for the user if the ranks could not meet because another job uses the port, else None."""
    if "EADDRINUSE" not in str(error):
        return None
    port = os.environ.get("MASTER_PORT")
    return f"launcher: expected a free port, got {port}, where another job's ranks meet; --master_port takes another"


def follow_launcher() -> None:
    """From now on, send this process SIGTERM once its launcher is gone, which a killed launcher cannot do itself;
    without a launcher, nothing. Checks once per second.
    """
    chain = _launchers()
    if chain:
        threading.Thread(target=_follow, args=(chain,), name="launcher", daemon=True).start()


def _launchers() -> list[psutil.Process]:
    """Return this process, its parent and so on up to the outermost launcher: deepspeed's is two processes, and a
    script may stand between. Empty without a launcher: a shell, or a cluster's daemon, may end before what it started.
    """
    if "WORLD_SIZE" not in os.environ:
        return []
    line = [psutil.Process()]
    with contextlib.suppress(psutil.Error):
        line += line[0].parents()
    last = max((i for i, process in enumerate(line[1:], 1) if _launches(process)), default=None)
    return [] if last is None else line[: last + 1]


def _launches(process: psutil.Process) -> bool:
    """Return whether it is a launcher, by the program's name, or the script's or module's that its Python runs."""
    try:
        words = [os.path.basename(word) for word in process.cmdline()[:5]]
    except psutil.Error:
        return False
    return not LAUNCHERS.isdisjoint(words if words and words[0].startswith("python") else words[:1])


def _follow(chain: list[psutil.Process]) -> None:
    while _unbroken(chain):
        time.sleep(1)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with contextlib.suppress(OSError):  # its output may be gone, too
            what = f"the launcher (pid {chain[-1].pid}) is gone: its ranks end as after SIGTERM"
            print(what, file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)


def _unbroken(chain: list[psutil.Process]) -> bool:
    """Return whether each is still the parent of the one before: orphans get a new parent at once."""
    try:
        return all(child.ppid() == parent.pid for child, parent in zip(chain, chain[1:]))
    except psutil.Error:
        return False
