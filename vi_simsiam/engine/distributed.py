"""Several processes that train one model, started by `torchrun`, one for each GPU or on a CPU.

Two channels join the ranks. Tensors go over the process group (NCCL between GPUs, gloo between
CPUs). Everything on the host's side (configurations, failures, waiting for rank 0 to prepare the
data) goes over the rendezvous store: a rank that waits there is released as soon as another one
fails, wherever in the program that is. A collective of a failing rank would hang instead.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import time
import warnings
from collections.abc import Collection, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from vi_simsiam.config import flat
from vi_simsiam.engine.run import resolve_device
from vi_simsiam.errors import InputError, LineWarning, TrainingError, UserError

TIMEOUT = 600.0
"""Seconds that a rank waits for the others, in a collective too, before it gives up. With gloo that
is an error in the program; NCCL's watchdog ends the process."""
_LONGEST_PAUSE = 0.2
_LOST_CONTACT = ("gloo", "nccl", "timed out", "connection closed", "connection reset")


class PeerError(UserError):
    """Another rank failed and reports it; this rank only has to end, so the message is empty.

    Attributes:
        reason: the other rank's error, for a debugger.
    """

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason


class World:
    """The ranks that work together, seen from one of them. Outside of `joined` it has size 1.

    Attributes:
        rank, size: this process's number, and the number of processes.
        is_main: True for the rank that writes and prints.
        alone: True without a process group, when torchrun did not start this process.
        device: where this rank computes.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        *,
        rank: int = 0,
        size: int = 1,
        store: Store | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.rank, self.size = rank, size
        self.is_main, self.alone = rank == 0, store is None
        self._store, self._rounds, self._reports = store, 0, False

    def console(self, console: Console | None = None) -> Console:
        """`console` (None: standard output) on rank 0, a silent one on the others."""
        return (console or Console()) if self.is_main else Console(quiet=True)

    def share(self, count: int) -> range:
        """This rank's part of range(count); the parts in rank order make up the whole range."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def local_batch(self, batch_size: int) -> int:
        """This rank's part of a batch.

        Raises:
            InputError: `batch_size` is no multiple of the number of ranks, or leaves less than two
                samples to each.
        """
        if batch_size % self.size or batch_size < 2 * self.size:
            raise InputError(
                f"batch_size: {batch_size} cannot be divided among {self.size} ranks; "
                f"it must be a multiple of {self.size}, at least {2 * self.size}"
            )
        return batch_size // self.size

    # Host side, over the store.

    def exchange(self, value: object, *, limit: float | None = None) -> list[Any]:
        """Every rank's `value`, in rank order.

        Args:
            value: this rank's; anything that pickles.
            limit: seconds; None for TIMEOUT.

        Raises:
            PeerError: another rank failed.
            TrainingError: a rank did not answer in time.
        """
        if self._store is None:
            return [value]
        self._rounds += 1
        keys = [f"round-{self._rounds}/{rank}" for rank in range(self.size)]
        limit = TIMEOUT if limit is None else limit
        deadline, pause = time.monotonic() + limit, 0.001
        try:
            self._store.set(keys[self.rank], pickle.dumps(value))  # type: ignore[arg-type]  # takes bytes
            while not self._store.check(keys):
                if self._store.check(["failed"]):
                    raise PeerError(self._store.get("failed").decode())
                if time.monotonic() > deadline:
                    missing = [
                        rank for rank in range(self.size) if not self._store.check([keys[rank]])
                    ]
                    raise TrainingError(
                        f"ranks: no answer from {missing} within {limit:g} s; they stalled or ended"
                    )
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            return [pickle.loads(self._store.get(key)) for key in keys]
        except dist.DistError as error:  # without a launcher the store is a part of rank 0
            raise PeerError("rank 0 ended") from error

    def agree(self, name: str, value: object, *, ignore: Collection[str] = ()) -> None:
        """Check that all ranks have the same `value`.

        Args:
            name: for the message, where `value` is no dictionary.
            value: this rank's; can be nested dictionaries, as `TrainConfig.to_dict` returns.
            ignore: names of fields that may differ, "augment.size" for nested ones.

        Raises:
            InputError: they differ; on every rank, with the first rank and field that differ.
        """
        fields = flat(value if isinstance(value, dict) else {name: value})
        first, *others = self.exchange(fields)
        for rank, other in enumerate(others, start=1):
            for field in dict.fromkeys((*first, *other)):
                expected, found = first.get(field, "nothing"), other.get(field, "nothing")
                if field not in ignore and expected != found:
                    raise InputError(
                        f"ranks: {field} is {expected!r} on rank 0 and {found!r} on rank {rank}; "
                        "it must be the same"
                    )

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """All ranks finish this block, or all leave it with an error.

        The first rank to fail raises its own error, and every other rank PeerError, so that only
        one reports. A rank that waits for the failed one, here or in another method of this
        section, is released at once.
        """
        with self._one_reports():
            yield
            self.exchange(None, limit=math.inf)

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 runs this block before the others, which wait without limit (for a download)."""
        with self._one_reports():
            if not self.is_main:
                self.exchange(None, limit=math.inf)
            yield
            if self.is_main:
                self.exchange(None, limit=math.inf)

    @contextlib.contextmanager
    def _one_reports(self) -> Iterator[None]:
        """Publish an error of the block; raise it on the first rank that fails, else PeerError."""
        try:
            yield
        except PeerError:
            raise
        except BaseException as error:
            if self._store is None or self._reports:
                raise
            with contextlib.suppress(dist.DistError):  # without a store nobody else reports
                # Every rank ends on an interruption; publishing it releases those that wait.
                if self._store.add("failures", 1) == 1:
                    self._store.set("failed", f"rank {self.rank}: {_line(error)}")
                elif isinstance(error, Exception):
                    raise PeerError("another rank failed before") from error
            self._reports = True
            raise

    # Device side, over the process group.

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Rows of all ranks, in rank order.

        Args:
            rows: (n, ...) of any dtype and device; only n may differ between ranks, and can be 0.

        Returns:
            (sum of n, ...) on every rank, on the device of `rows`.
        """
        if self.alone:
            return rows
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, rows.detach().cpu().clone())
        return torch.cat(parts).to(rows.device)

    def all_mean(self, values: Tensor) -> Tensor:
        """Mean over the ranks of `values`, without host synchronisation.

        A non-finite value on one rank makes the mean non-finite on all of them.

        Args:
            values: floating point of any shape, on `device`.
        """
        if self.alone:
            return values
        total = values.detach().clone()
        dist.all_reduce(total)
        return total / self.size

    def any_rank(self, flag: bool) -> bool:
        """True if `flag` is set on any rank."""
        if self.size == 1:
            return flag
        raised = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return bool(raised)


@contextlib.contextmanager
def joined(device: str = "auto") -> Iterator[World]:
    """The world of this process: torchrun's, or one of size 1 without torchrun.

    Leaving the block waits for the other ranks without limit: rank 0 may have more to do at the
    end. An error leaves it at once; torchrun then ends the other ranks, and those that notice
    before raise PeerError.

    Args:
        device: "auto", "cpu" or "cuda" (the GPU of the local rank); "cuda:N" only alone.

    Raises:
        InputError: torchrun's environment is incomplete, or there is no such device.
        PeerError: another rank failed, and reports it.
        TrainingError: contact with another rank was lost.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield World(resolve_device(device))
        return
    (rank, size, local_rank), limit = _numbers(), timedelta(seconds=TIMEOUT)
    try:
        store, _, _ = next(rendezvous("env://", rank, size, timeout=limit))
    except (dist.DistError, RuntimeError, ValueError) as error:
        text = f"ranks: rank {rank} did not meet the others: {_line(error)}"
        raise TrainingError(text) from error
    # The store may outlive ranks that torchrun starts again, with the addresses of the former ones.
    store = PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    world = World(rank=rank, size=size, store=PrefixStore("vi-simsiam", store))
    with world.together():
        world.device = _local_device(device, size, local_rank)
    on_gpu = world.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(world.device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=PrefixStore("group", store),
        rank=rank,
        world_size=size,
        timeout=limit,
        device_id=world.device if on_gpu else None,
    )
    try:
        with warnings.catch_warnings(), world.together(), _contact():
            if not world.is_main:  # all ranks open the same files
                warnings.simplefilter("ignore", LineWarning)
            yield world
    except BaseException:
        # NCCL's orderly shutdown waits for the other ranks, which will not come.
        if not on_gpu:
            dist.destroy_process_group()
        raise
    dist.barrier()  # rank 0 may hold the store, which the others have read by now
    dist.destroy_process_group()


def _numbers() -> tuple[int, int, int]:
    """Rank, number of ranks and rank on this machine, from torchrun's variables."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    with contextlib.suppress(KeyError, ValueError):
        rank, size, local_rank = (int(os.environ[name]) for name in names)
        if 0 <= rank < size:
            return rank, size, local_rank
    given = ", ".join(f"{name}={os.environ.get(name)}" for name in names)
    raise InputError(
        f"ranks: {given}; they must be numbers, RANK below WORLD_SIZE; start with torchrun"
    )


def _local_device(name: str, size: int, local_rank: int) -> torch.device:
    """The device of a rank: every rank of a machine has its own GPU."""
    device = resolve_device(name)
    if device.index is not None and device.type == "cuda" and size > 1:
        raise InputError(
            f"device: {name!r} is one GPU for {size} ranks; with cuda each takes its own"
        )
    if device.type == "cuda" and device.index is None:
        if local_rank >= (count := torch.cuda.device_count()):
            raise InputError(
                f"device: local rank {local_rank} has no GPU ({count} CUDA devices found); "
                "start as many ranks as there are GPUs, or use cpu"
            )
        return torch.device("cuda", local_rank)
    return device


@contextlib.contextmanager
def _contact() -> Iterator[None]:
    """Turn the backends' errors for a rank that ended or stalled into one readable line."""
    try:
        yield
    except UserError:
        raise
    except RuntimeError as error:
        text = str(error).lower()
        if isinstance(error, dist.DistError) or any(word in text for word in _LOST_CONTACT):
            text = f"ranks: contact with another rank was lost: {_line(error)}"
            raise TrainingError(text) from error
        raise


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
