"""A training step as one CUDA graph: one launch by the host instead of some hundred.

    step = capture(train_step, state=(model, optimizer))
    for images, labels in batches:
        loss = step(images, labels)

The first call runs the step once to check the rules (see `graph_rules`), and undoes what that
changed. The first `warmup` calls run the step as it is, so that optimizers make their state and
libraries their workspaces. The next call records it, and this call and all later ones replay the
record. Every call is one step of the training; captured and eager runs compute the same.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from vi_simsiam.checks import choice, require
from vi_simsiam.data.device import DeviceFeed
from vi_simsiam.engine.graph_rules import (
    Inputs,
    InputsChanged,
    Rules,
    Snapshot,
    check_state,
    explain,
    held,
)
from vi_simsiam.engine.step import OverlappedStep, TrainStep
from vi_simsiam.errors import InputError
from vi_simsiam.models import Output

MODES = ("auto", "on", "off")
GRAPH_PRIORITY = -1
"""Priority of the recorded stream. Work of a step on other streams has 0, and yields to it."""


def capture(
    step: Callable[..., Any], *, state: Sequence[Any] = (), mode: str = "auto", warmup: int = 3
) -> Captured:
    """Turn a training step into the replay of a CUDA graph.

    The step does forward, `loss.backward()`, `optimizer.step()` and
    `optimizer.zero_grad(set_to_none=True)` in any usual order, with autocast, if any, inside. It
    must not do what a graph cannot hold: read a value (`.item()`, `if tensor:`), use shapes that
    depend on values, copy between host and GPU, make tensors from host data, or replace a buffer
    instead of writing into it. Optimizers need `lr` as a tensor on the GPU, which schedulers write
    into, and SGD `fused=True`, Adam and its relatives `capturable=True`. Python code in the step
    runs while it is recorded and not afterwards: `model.eval()`, counters and printing in it have
    no effect on replays.

    Args:
        step: called as step(*inputs). Inputs and outputs are tensors on the GPU in nested lists,
            tuples and dicts; other inputs must be equal in every call, and other outputs keep the
            recorded value.
        state: all that the step changes: modules, optimizers, tensors, and objects with state_dict
            and load_state_dict; it serves to undo the check. It must stay where it is: call `reset`
            after `optimizer.load_state_dict`, which replaces tensors.
        mode: "auto" runs the step as it is where it cannot be captured, with the reason as a
            warning (none without a GPU); "on" raises instead; "off" always runs it as it is.
        warmup: the number of first calls that run the step as it is; at least 1. A compiled model
            can need 3.

    Returns:
        A callable with the step's inputs and outputs. Outputs carry no autograd graph. The next
        call overwrites the outputs of a replay: `clone()` those to keep.

    Raises:
        InputError: here, for arguments that cannot be used, and for mode "on" without a GPU; from
            the first calls, in mode "on", for a step that breaks a rule, with the operation and its
            line; from any call, for inputs of another structure, shape or dtype than the first
            call's.
    """
    backend = CudaGraph if torch.cuda.is_available() else None
    return Captured(step, state=state, mode=mode, warmup=warmup, backend=backend)


class CudaGraph:
    """A CUDA graph with its own stream and memory, or those of the graph `beside` it.

    Graphs that share memory must be replayed one after another, and must not read what an earlier
    one left in it.
    """

    device_type = "cuda"

    def __init__(self, device: torch.device, beside: CudaGraph | None = None) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", index)
        self._graph = torch.cuda.CUDAGraph()
        self._recorded: Callable[[], Any] | None = None
        self._stream: torch.cuda.Stream
        if beside is None:
            self._stream = torch.cuda.Stream(self._device, priority=GRAPH_PRIORITY)
        else:
            self._stream = beside._stream
        self._pool: Any = torch.cuda.graph_pool_handle() if beside is None else beside._pool

    def warm(self, call: Callable[[], Any]) -> Any:
        """Run `call` as it is, on the recording stream: libraries keep a workspace per stream."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            try:
                with torch.cuda.stream(self._stream):
                    return call()
            finally:
                current.wait_stream(self._stream)

    def record(self, call: Callable[[], Any]) -> Any:
        """Record `call` without running it; returns its outputs, which every replay fills.

        Other threads may use CUDA meanwhile, as loaders that pin memory do.
        """
        self._recorded = call  # keeps alive what replays write to: weights, counters
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            generator = torch.cuda.default_generators[self._device.index]
            random_state = generator.clone_state()
            graph = torch.cuda.graph(
                self._graph,
                pool=self._pool,
                stream=self._stream,
                capture_error_mode="thread_local",
            )
            try:
                with graph:
                    return call()
            except BaseException:  # undo: current stream, pool in use, recording generator
                torch.cuda.set_stream(current)
                self._graph.reset()
                # Some versions of torch give the pool back themselves, and raise here.
                with contextlib.suppress(RuntimeError):
                    torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
                    torch._C._cuda_releasePool(self._device.index, self._pool)
                try:
                    torch.rand(1, device=self._device)
                except RuntimeError:
                    generator.graphsafe_set_state(random_state)
                raise

    def replay(self) -> None:
        """Run the recorded call on the current stream, without waiting."""
        self._graph.replay()


class CapturedTraining:
    """The trainer's steps on the batches of a feed, captured where they can be.

    Views of the fused kernel are made in the graph, while the step before trains. Others are made
    before each step, since torch's operations read the table on the host; the graph is that of the
    step alone.

    Args:
        step, feed: see `OverlappedStep`.
        at: the next step of the run.
        mode: see `capture`.
        alone: no other ranks take part; otherwise the step runs as it is.
    """

    def __init__(
        self, step: TrainStep, feed: DeviceFeed, at: int, mode: str, *, alone: bool
    ) -> None:
        self._counter, self._feed = step.counter, feed
        whole: TrainStep | OverlappedStep = step
        if feed.fused:
            whole = OverlappedStep(step, feed)
            whole.prepare(at)
        self._replay = capture(whole, state=whole.state, mode=mode if alone else "off")
        if not alone:
            self._replay.reason = "a step with the collectives of torchrun's ranks is not captured"

    @property
    def launched(self) -> dict[str, bool | str]:
        """See `Captured.launched`."""
        return self._replay.launched

    def __call__(self, step: int) -> tuple[Output, float]:
        """Train step `step`; returns its output, and the seconds that the GPU waited for data."""
        before, feed = self._feed.waited, self._feed
        if feed.fused:
            feed.load(step + 1)
            output = self._replay()
        else:
            feed.load(step)
            output = self._replay(feed.make(self._counter).views)
        return output, feed.waited - before


class Captured:
    """A step that is recorded and replayed; made by `capture`, with the same arguments.

    Attributes:
        captured: True once the step is recorded and calls replay it.
        reason: why the step will not be captured; None while it is or still may be.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        *,
        state: Sequence[Any],
        mode: str,
        warmup: int,
        backend: type[CudaGraph] | None,
    ) -> None:
        choice("mode", mode, MODES)
        require("warmup", warmup, warmup >= 1, "a whole number of calls, at least 1")
        if mode == "on" and backend is None:
            raise InputError(
                "capture: 'on' needs a CUDA device and none was found; 'auto' runs without one"
            )
        listed = isinstance(state, Sequence)
        require("state", type(state).__name__, listed, "a list or tuple")
        accepted = "a module, optimizer, tensor or object with state_dict and load_state_dict"
        for i, item in enumerate(state):
            fits = isinstance(item, Tensor) or hasattr(item, "load_state_dict")
            require(f"state[{i}]", type(item).__name__, fits, accepted)
        self._step, self._state, self._mode = step, tuple(state), mode
        self._warmup, self._backend = warmup, backend
        self.reset()

    @property
    def launched(self) -> dict[str, bool | str]:
        """For logs: `captured`, and `not_captured` with the reason if there is one."""
        reason = {} if self.reason is None else {"not_captured": self.reason}
        return {"captured": self.captured, **reason}

    def reset(self) -> None:
        """Drop the record and its memory: the next call starts again, with inputs of any shape."""
        self._graph: CudaGraph | None = None
        self._inputs: Inputs | None = None
        self._outputs: Any = None
        self._calls, self.captured = 0, False
        self.reason: str | None = "no CUDA device" if self._backend is None else None
        if self._mode == "off":
            self.reason = "capture is off"

    def __call__(self, *inputs: Any) -> Any:
        """One step of the training; see `capture`."""
        if self.reason is None and self._inputs is None:
            self._attempt(partial(self._check, inputs))
        elif self.reason is None and not self.captured and self._calls >= self._warmup:
            self._attempt(partial(self._record, inputs))
        if self._graph is None or self._inputs is None:
            return _detached(self._step(*inputs))
        if not self.captured:
            self._inputs.match(inputs)
            outputs = _detached(_warm(self._graph, partial(self._step, *inputs)))
            self._calls += 1
            return outputs
        self._inputs.fill(inputs)
        self._graph.replay()
        return self._outputs

    def _attempt(self, stage: Callable[[], None]) -> None:
        """Check or record; with mode "auto" an error means that the step runs as it is."""
        try:
            stage()
        except InputsChanged:
            raise
        except Exception as error:
            self.reset()
            if self._mode == "on":
                raise
            self.reason = str(error) if isinstance(error, InputError) else explain(error)
            text = f"capture: the step runs without a CUDA graph: {self.reason}"
            warnings.warn(text, stacklevel=3)

    def _check(self, inputs: tuple[Any, ...]) -> None:
        """Run the step once under the rules, and undo its changes."""
        assert self._backend is not None
        leaves = (*held(self._state), *tree_leaves(inputs))
        devices = [leaf.device for leaf in leaves if isinstance(leaf, Tensor)]
        kind = self._backend.device_type
        device = next((place for place in devices if place.type == kind), torch.device(kind))
        check_state(self._state, device)
        if torch.is_autocast_enabled(device.type) and torch.is_autocast_cache_enabled():
            raise InputError(
                "capture: autocast around the call keeps copies of weights that replays miss; "
                "put it into step"
            )
        static = Inputs(inputs, device)
        graph = self._backend(device)
        snapshot = Snapshot(self._state, device)
        rules = Rules(device, (*snapshot.tensors(), *static.tensors()))
        try:
            # A compiler that meets the check could give up on a model's code for good.
            with torch.compiler.set_stance("force_eager"), rules:
                _warm(graph, partial(self._step, *static.tree()))
            check_state(self._state, device)
        finally:
            snapshot.restore()
        self._inputs, self._graph = static, graph

    def _record(self, inputs: tuple[Any, ...]) -> None:
        assert self._graph is not None
        assert self._inputs is not None
        self._inputs.fill(inputs)
        snapshot = Snapshot(self._state, self._inputs.device)
        try:
            self._outputs = _detached(self._graph.record(partial(self._step, *self._inputs.tree())))
            if replaced := snapshot.replaced():
                raise InputError(
                    f"state: the step replaces {replaced}, which a replay cannot; "
                    "write into its tensor"
                )
        except Exception as error:
            snapshot.restore()
            if isinstance(error, InputError):
                raise
            text = f"step: it cannot be captured as a CUDA graph: {explain(error)}"
            raise InputError(text) from error
        self.captured = True


def _warm(graph: CudaGraph, call: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        # Adam warns when it runs without a graph though it could be captured.
        message = "This instance was constructed with capturable=True"
        warnings.filterwarnings("ignore", message=message)
        return graph.warm(call)


def _detached(outputs: Any) -> Any:
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, outputs)
