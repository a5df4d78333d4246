"""Several processes that train one model, as `torchrun` starts them: one for each GPU, or several on a CPU.

Two channels join the ranks. Tensors go over the process group (NCCL between GPUs, gloo between CPUs). What the ranks
have to say to each other (configurations, failures, waiting for rank 0 to prepare the data) goes over the store that
they met at: a rank waiting there hears at once when another one fails, whatever place of the program that one was at.

BatchNorm's running statistics are each rank's own, and rank 0's are saved. Training never reads them (it normalises by
the batch), so broadcasting them at every step, as DistributedDataParallel does by default, would change no weight.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import pickle
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from vi_simsiam.engine.run import resolve_device
from vi_simsiam.errors import ImageWarning, InputError, TrainingError, UserError

TIMEOUT = 600.0
"""Seconds that a rank waits for the others before it gives up."""
_NO_LIMIT = 7 * 86400.0
_LONGEST_PAUSE = 0.2
_LEAVING_SECONDS = 10.0
# torch 2.14 gives the option a new name and warns of the old one.
_NEW_OPTION = (
    "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
)
_OWN_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if _NEW_OPTION else "broadcast_buffers": False
}
_LOST_CONTACT = ("gloo", "nccl", "timed out", "connection closed", "connection reset")


class PeerError(UserError):
    """Another rank failed and says why. The message is empty, since this rank has only to end; `reason` is for a debugger."""

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason


class World:
    """The ranks that work together, seen from one of them. Outside of `joined` it is a world of one.

    Attributes:
        rank, size: this process's number, and how many there are.
        local_rank, local_size: the same among the processes of this machine.
        device: where this rank computes.
        timeout: seconds after which a rank that waits for the others gives up.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        *,
        rank: int = 0,
        size: int = 1,
        local_rank: int = 0,
        local_size: int = 1,
        timeout: float = TIMEOUT,
        store: Store | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.rank, self.size, self.local_rank, self.local_size = rank, size, local_rank, local_size
        self.timeout = timeout
        self._store = store
        self._rounds = 0
        self._reports = False

    @property
    def is_main(self) -> bool:
        """Whether this rank writes and prints."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no process group: not started by torchrun."""
        return self._store is None

    def console(self, console: Console | None = None) -> Console:
        """`console` (None: standard output) on rank 0, one that prints nothing on the others."""
        return (console or Console()) if self.is_main else Console(quiet=True)

    def share(self, count: int) -> range:
        """This rank's part of range(count): without overlap, and in rank order nothing but range(count)."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def local_batch(self, batch_size: int) -> int:
        """This rank's part of a batch.

        Raises:
            InputError: `batch_size` is no multiple of the number of ranks, or leaves less than two samples to each.
        """
        if batch_size % self.size or batch_size < 2 * self.size:
            raise InputError(
                f"batch_size: {batch_size} cannot be divided among {self.size} ranks; "
                f"it must be a multiple of {self.size}, at least {2 * self.size}"
            )
        return batch_size // self.size

    # Host side, over the store.

    def exchange(self, value: object, *, timeout: float | None = None) -> list[Any]:
        """Give every rank's `value` (anything that pickles) to every rank, in rank order.

        Args:
            value: this rank's.
            timeout: seconds; None for the world's.

        Raises:
            PeerError: another rank failed.
            TrainingError: a rank did not come in time.
        """
        if self._store is None:
            return [value]
        self._rounds += 1
        keys = [f"round-{self._rounds}/{rank}" for rank in range(self.size)]
        limit = self.timeout if timeout is None else timeout
        deadline, pause = time.monotonic() + limit, 0.001
        try:
            self._store.set(keys[self.rank], pickle.dumps(value))  # type: ignore[arg-type]  # bytes are taken, too
            while not self._store.check(keys):
                if self._store.check(["failed"]):
                    raise PeerError(self._store.get("failed").decode())
                if time.monotonic() > deadline:
                    missing = [
                        rank for rank, key in enumerate(keys) if not self._store.check([key])
                    ]
                    raise TrainingError(
                        f"ranks: no answer from {missing} within {limit:g} s; they stalled or ended"
                    )
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            return [pickle.loads(self._store.get(key)) for key in keys]
        except dist.DistError as error:  # rank 0 holds the store where no launcher does: it is gone
            raise PeerError("rank 0 ended") from error

    def broadcast_object(self, value: object) -> Any:
        """Rank 0's `value`, on every rank. Raises what `exchange` raises."""
        return self.exchange(value if self.is_main else None)[0]

    def agree(self, name: str, value: object, *, ignore: Collection[str] = ()) -> None:
        """See that all ranks have the same `value`; it may be nested dictionaries, as `TrainConfig.to_dict` returns.

        Args:
            name: what it is, for the message.
            value: this rank's.
            ignore: names of fields that may differ, "augment.size" for nested ones.

        Raises:
            InputError: they differ; on every rank, with the first rank and field in which they do.
        """
        first, *others = (dict(_leaves(each, name)) for each in self.exchange(value))
        for rank, other in enumerate(others, start=1):
            for field in (*first, *(field for field in other if field not in first)):
                mine, theirs = first.get(field, "nothing"), other.get(field, "nothing")
                if field not in ignore and mine != theirs:
                    raise InputError(
                        f"ranks: {field} is {mine!r} on rank 0 and {theirs!r} on rank {rank}; it must be the same"
                    )

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """All ranks finish this block, or all leave it with an error.

        Of those that fail the first one raises its own error; every other rank raises PeerError, so that one rank
        reports. A rank that waits for the failed one, here or in another method of this section, is released at once.
        """
        with self._one_reports():
            yield
            self.exchange(None, timeout=_NO_LIMIT)

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 goes through this block before the others, which wait as long as it takes (a download, a cache)."""
        with self._one_reports():
            if not self.is_main:
                self.exchange(None, timeout=_NO_LIMIT)
            yield
            if self.is_main:
                self.exchange(None, timeout=_NO_LIMIT)

    def _leave_last(self) -> None:
        """On rank 0 wait until nobody needs the store any more: without torchrun it is part of this process."""
        assert self._store is not None
        deadline = time.monotonic() + _LEAVING_SECONDS
        with contextlib.suppress(dist.DistError):
            self._store.set(f"left/{self.rank}", "yes")
            keys = [f"left/{rank}" for rank in range(self.size)]
            while self.is_main and not self._store.check(keys) and time.monotonic() < deadline:
                time.sleep(0.01)

    @contextlib.contextmanager
    def _one_reports(self) -> Iterator[None]:
        """Tell the others when the block fails; raise its error where it is the first, else PeerError."""
        try:
            yield
        except PeerError:
            raise
        except Exception as error:
            if not self._tell(error):
                raise PeerError("another rank failed before") from error
            raise
        except BaseException as error:  # an interruption is every rank's own affair, but nobody is to wait for this one
            self._tell(error)
            raise

    def _tell(self, error: BaseException) -> bool:
        """Let the others know; returns whether this rank is the one that reports."""
        if self._store is None or self._reports:
            return True
        with contextlib.suppress(
            dist.DistError
        ):  # the store's own rank is gone: nobody else is left to report
            if self._store.add("failures", 1) > 1:
                return False
            self._store.set("failed", f"rank {self.rank}: {_line(error)}")
        self._reports = True
        return True

    # Device side, over the process group.

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Rows of all ranks, in rank order.

        Args:
            rows: (n, ...) of any dtype and device; n may differ between ranks and be 0, the rest must not.

        Returns:
            (sum of n, ...) on every rank, on the device of `rows`.

        Raises:
            InputError: other dimensions or dtypes differ.
        """
        if self.alone:
            return rows
        shapes = self.exchange((tuple(rows.shape), str(rows.dtype)))
        for rank, (shape, dtype) in enumerate(shapes):
            if (shape[1:], dtype) != (shapes[0][0][1:], shapes[0][1]):
                raise InputError(
                    f"rows: {shapes[0][1]} {shapes[0][0]} on rank 0 and {dtype} {shape} on rank {rank}; "
                    "only the first dimension may differ"
                )
        counts = [shape[0] for shape, _ in shapes]
        width = math.prod(rows.shape[1:]) * rows.element_size()
        # As bytes, padded to the longest: no backend has all dtypes, nor parts of different lengths.
        mine = rows.detach().contiguous().view(-1).view(torch.uint8).to(self.device)
        padded = mine.new_zeros(max(counts) * width)
        padded[: mine.numel()] = mine
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        joined = torch.cat(
            [part[: count * width] for part, count in zip(parts, counts, strict=True)]
        )
        return joined.to(rows.device).view(rows.dtype).view(sum(counts), *rows.shape[1:])

    def all_mean(self, values: Tensor) -> Tensor:
        """Mean over the ranks of `values` (any shape, floating point, on `device`); without host synchronisation.

        One non-finite value on one rank makes the mean non-finite on all of them.
        """
        if self.alone:
            return values
        total = values.detach().clone()
        dist.all_reduce(total)
        return total / self.size

    def any_rank(self, flag: Tensor) -> Tensor:
        """Whether `flag` (any shape and dtype, on `device`) is set on any rank; as `flag`, without synchronisation."""
        if self.alone:
            return flag
        raised = (flag != 0).to(torch.float32)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return raised.to(flag.dtype)


@contextlib.contextmanager
def joined(device: str = "auto", *, timeout: float = TIMEOUT) -> Iterator[World]:
    """The world of this process: that of `torchrun`, or a world of one where it was started alone.

    Leaving the block waits for the other ranks, as long as it takes: rank 0 may have something to do on its own at the
    end. An error leaves it at once; torchrun then ends the other ranks, and those that notice before raise PeerError.

    Args:
        device: "auto", "cpu" or "cuda" (the GPU of the local rank); "cuda:N" only alone.
        timeout: seconds after which a rank that waits for the others in a collective gives up. Over gloo that is an
            error in the program; NCCL's watchdog ends the process.

    Raises:
        InputError: torchrun's environment is incomplete, or there is no such device.
        PeerError: another rank failed, and has said why.
        TrainingError: contact with another rank was lost.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield World(resolve_device(device), timeout=timeout)
        return
    place = _read_environment()
    limit = timedelta(seconds=timeout)
    try:
        store, _, _ = next(rendezvous("env://", place["rank"], place["size"], timeout=limit))
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise TrainingError(
            f"ranks: rank {place['rank']} did not meet the others: {_line(error)}"
        ) from error
    world = World("cpu", timeout=timeout, store=PrefixStore("vi-simsiam", store), **place)
    with world.together():
        world.device = _local_device(device, world)
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(world.device)
    dist.init_process_group(
        backend,
        store=PrefixStore("group", store),
        rank=world.rank,
        world_size=world.size,
        timeout=limit,
        device_id=world.device if backend == "nccl" else None,
    )
    try:
        with warnings.catch_warnings(), world.together(), _contact():
            if not world.is_main:  # all ranks open the same images
                warnings.simplefilter("ignore", ImageWarning)
            yield world
    except BaseException:
        # NCCL waits for the other ranks when it is shut down properly, and they will not come.
        if backend == "gloo":
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()
    world._leave_last()


def wrap(model: Callable[..., Any], world: World) -> Callable[..., Any]:
    """`model` with gradients averaged over the ranks; `model` itself alone.

    The wrapper's forward must take all views of a step at once, since it prepares one reduction for one backward. The
    loss is computed from its output outside, as the mean over the rank's part of the batch: with parts of equal size
    the averaged gradient is that of the mean over the whole batch. Save and restore `model`, not the wrapper.

    All ranks start from rank 0's weights and buffers. Every parameter must take part in the loss.
    """
    if world.alone:
        return model
    assert isinstance(model, nn.Module)
    return DistributedDataParallel(
        model,
        device_ids=[world.device] if world.device.type == "cuda" else None,
        **_OWN_BUFFERS,  # see the head of this file
        gradient_as_bucket_view=True,  # saves one copy of all gradients
    )


def sync_batch_norm(model: nn.Module, world: World) -> nn.Module:
    """`model` with every BatchNorm's statistics taken over the batch of all ranks; parameters stay the same objects.

    Raises:
        InputError: on a CPU, where torch has none.
    """
    if world.device.type != "cuda":
        raise InputError("sync_batch_norm: SyncBatchNorm runs on GPUs only; leave it out on a CPU")
    if world.alone:
        return model
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return converted


def _read_environment() -> dict[str, int]:
    """rank, size, local_rank and local_size as torchrun says them."""
    names = {
        "rank": "RANK",
        "size": "WORLD_SIZE",
        "local_rank": "LOCAL_RANK",
        "local_size": "LOCAL_WORLD_SIZE",
    }
    missing = [
        name
        for name in (*list(names.values())[:3], "MASTER_ADDR", "MASTER_PORT")
        if name not in os.environ
    ]
    if missing:
        raise InputError(
            f"ranks: RANK and WORLD_SIZE are set, {', '.join(missing)} not; start the ranks with torchrun"
        )
    try:
        place = {key: int(os.environ.get(name, "1")) for key, name in names.items()}
    except ValueError:
        values = ", ".join(f"{name}={os.environ.get(name)}" for name in names.values())
        raise InputError(f"ranks: {values}; they must be integers") from None
    if not 0 <= place["rank"] < place["size"]:
        raise InputError(
            f"ranks: RANK {place['rank']} must be at least 0 and below WORLD_SIZE {place['size']}"
        )
    return place


def _local_device(name: str, world: World) -> torch.device:
    """The device of a rank: every rank of a machine takes a GPU of its own."""
    device = resolve_device(name)
    if device.type == "cpu":
        return device
    if device.index is not None and world.size > 1:
        raise InputError(
            f"device: {name!r} is one GPU for {world.size} ranks; say cuda, and each takes its own"
        )
    index = world.local_rank if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise InputError(
            f"device: local rank {index} has no GPU ({torch.cuda.device_count()} CUDA devices found); "
            "start as many ranks as there are GPUs, or say cpu"
        )
    return torch.device("cuda", index)


@contextlib.contextmanager
def _contact() -> Iterator[None]:
    """Turn what the backends raise when a rank is gone or stalls into one readable line."""
    try:
        yield
    except UserError:
        raise
    except RuntimeError as error:
        text = str(error).lower()
        if isinstance(error, dist.DistError) or any(word in text for word in _LOST_CONTACT):
            raise TrainingError(
                f"ranks: contact with another rank was lost: {_line(error)}"
            ) from error
        raise


def _leaves(value: object, name: str) -> Iterator[tuple[str, object]]:
    """(name, value) of everything in nested dictionaries; the names of the inner ones are joined by dots."""
    if not isinstance(value, Mapping):
        yield name, value
        return
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from ((f"{key}.{below}", leaf) for below, leaf in _leaves(inner, ""))
        else:
            yield str(key), inner


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
