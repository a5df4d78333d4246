"""A training step as one CUDA graph: the whole step is launched by one call of the host instead of some hundred.

    step = capture(train_step, state=(model, optimizer))
    for images, labels in batches:
        loss = step(images, labels)

The first call runs the step once to check the rules (see `graph_rules`), and takes back what that changed. Then the
step is run as it is for the first `warmup` calls, so that optimizers make their state as they always do and libraries
make their workspaces. The call after these records it, and it and all later ones replay the record. Every call is one
step of the training; captured and eager runs compute the same.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import (
    TreeSpec,
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_map,
)

from vi_simsiam.engine.graph_rules import Rules, check_optimizer_state, check_state, explain
from vi_simsiam.engine.graph_state import PLAIN, Snapshot, has_state_dict
from vi_simsiam.errors import InputError

MODES = ("auto", "on", "off")
GRAPH_PRIORITY = -1
"""Priority of the stream that is recorded. Work of a step on other streams has 0, and waits where both could begin."""


def capture(
    step: Callable[..., Any], *, state: Sequence[Any] = (), mode: str = "auto", warmup: int = 3
) -> Captured:
    """Turn a training step into the replay of a CUDA graph.

    The step does forward, `loss.backward()`, `optimizer.step()` and `optimizer.zero_grad(set_to_none=True)` in any usual
    order, with autocast, if any, inside. What it must not do, because a graph cannot hold it: read a value (`.item()`,
    `if tensor:`), use shapes that depend on values, copy between host and GPU, make tensors from host data, or replace
    a buffer instead of writing into it. Optimizers need `lr` as a tensor on the GPU, which schedulers write into, and
    SGD `fused=True`, Adam and its kin `capturable=True`. Python code in the step runs while it is recorded and not
    afterwards: `model.eval()`, counters and printing in it have no effect on replays.

    Args:
        step: called as step(*inputs). Inputs and outputs are tensors on the GPU in nested lists, tuples and dicts;
            inputs that are no tensors must be equal in every call, outputs that are none keep the recorded value.
        state: all that the step changes: modules, optimizers, tensors, and objects with state_dict and load_state_dict.
            It is needed to take back what the check has changed. It must stay where it is: after
            `optimizer.load_state_dict`, which replaces tensors, call `reset`.
        mode: "auto" runs the step as it is where it cannot be captured, with a warning that says why (none where there
            is no GPU); "on" raises instead; "off" always runs it as it is.
        warmup: the number of first calls that run the step as it is; at least 1. A compiled model may need 3.

    Returns:
        A callable with the step's inputs and outputs. Outputs carry no autograd graph. Outputs of a replay are
        overwritten by the next call: `clone()` what is to be kept.

    Raises:
        InputError: here, for arguments that cannot be used, and for mode "on" without a GPU; from the first calls, in
            mode "on", for a step that breaks a rule, naming the operation and its line; from any call, for inputs of
            another structure, shape or dtype than the first call's.
    """
    backend = CudaGraph if torch.cuda.is_available() else None
    return Captured(step, state=state, mode=mode, warmup=warmup, backend=backend)


class Graph(Protocol):
    """What records a step and repeats it; made with the device that the step runs on."""

    device_type: str

    def __init__(self, device: torch.device) -> None: ...

    def warm(self, call: Callable[[], Any]) -> Any:
        """Run `call` as it is, in the place where it will be recorded."""

    def record(self, call: Callable[[], Any]) -> Any:
        """Record what `call` does without doing it; returns its outputs, which every replay fills."""

    def replay(self) -> None:
        """Do what was recorded."""


class CudaGraph:
    """A CUDA graph with a stream to record on and memory of its own, or those of a graph `beside` it; see `Graph`.

    Graphs that share memory must be replayed one after another, and read nothing that an earlier one has left in it.
    """

    device_type = "cuda"

    def __init__(self, device: torch.device, beside: CudaGraph | None = None) -> None:
        self._device = torch.device(
            "cuda", torch.cuda.current_device() if device.index is None else device.index
        )
        self._stream: torch.cuda.Stream = (
            torch.cuda.Stream(self._device, priority=GRAPH_PRIORITY)
            if beside is None
            else beside._stream
        )
        self._pool: Any = torch.cuda.graph_pool_handle() if beside is None else beside._pool
        self._graph = torch.cuda.CUDAGraph()
        self._recorded: Callable[[], Any] | None = None

    def warm(self, call: Callable[[], Any]) -> Any:
        """See `Graph`. Runs on the recording stream: libraries keep a workspace for each stream."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            try:
                with torch.cuda.stream(self._stream):
                    return call()
            finally:
                current.wait_stream(self._stream)

    def record(self, call: Callable[[], Any]) -> Any:
        """See `Graph`. Other threads may use CUDA meanwhile, as loaders that pin memory do."""
        self._recorded = call  # replays write to what it holds: weights, counters
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            generator = torch.cuda.default_generators[self._device.index]
            random_state = generator.clone_state()
            try:
                with torch.cuda.graph(
                    self._graph,
                    pool=self._pool,
                    stream=self._stream,
                    capture_error_mode="thread_local",
                ):
                    return call()
            except BaseException:
                self._clean_up(current, generator, random_state)
                raise

    def replay(self) -> None:
        """See `Graph`. On the current stream, without waiting."""
        self._graph.replay()

    def _clean_up(
        self, current: torch.cuda.Stream, generator: torch.Generator, random_state: torch.Generator
    ) -> None:
        """A capture that cannot be ended leaves its stream current, its pool in use and the generator recording."""
        torch.cuda.set_stream(current)
        self._graph.reset()
        # Versions of torch whose failed captures and `reset` give the pool back themselves say that it is not in use.
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
            torch._C._cuda_releasePool(self._device.index, self._pool)
        try:
            torch.rand(1, device=self._device)
        except RuntimeError:
            generator.graphsafe_set_state(random_state)


class Captured:
    """A step that is recorded and replayed; made by `capture`.

    Args:
        step: as in `capture`; `state`, `mode` and `warmup` too.
        backend: what records and replays; None where there is no GPU.

    Raises:
        InputError: as in `capture`.
    """

    def __init__(
        self,
        step: Callable[..., Any],
        *,
        state: Sequence[Any],
        mode: str,
        warmup: int,
        backend: type[Graph] | None,
    ) -> None:
        if not callable(step):
            raise InputError(
                f"step: {type(step).__name__} given, a function of the step's inputs is accepted"
            )
        if mode not in MODES:
            raise InputError(f"mode: {mode!r} given, {', '.join(MODES)} are accepted")
        if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 1:
            raise InputError(
                f"warmup: {warmup!r} given, a whole number of calls, at least 1, is accepted"
            )
        if mode == "on" and backend is None:
            raise InputError(
                "capture: 'on' needs a CUDA device and none was found; 'auto' runs without one"
            )
        if isinstance(state, nn.Module | torch.optim.Optimizer | Tensor) or not isinstance(
            state, Sequence
        ):
            raise InputError(f"state: {type(state).__name__} given, a list or tuple is accepted")
        for i, item in enumerate(state):
            if not isinstance(
                item, Tensor | nn.Module | torch.optim.Optimizer
            ) and not has_state_dict(item):
                raise InputError(
                    f"state[{i}]: {type(item).__name__} given; modules, optimizers, tensors and objects with state_dict "
                    "and load_state_dict are accepted"
                )
        self._step, self._state, self._mode, self._warmup, self._backend = (
            step,
            tuple(state),
            mode,
            warmup,
            backend,
        )
        self.reset()

    @property
    def captured(self) -> bool:
        """Whether the step has been recorded and calls replay it."""
        return self._recorded

    @property
    def reason(self) -> str | None:
        """Why the step is not captured and will not be; None while it is or still may be."""
        return self._reason

    @property
    def launched(self) -> dict[str, bool | str]:
        """For logs: `captured`, and `not_captured` with the reason if there is one."""
        return {"captured": self._recorded} | (
            {} if self._reason is None else {"not_captured": self._reason}
        )

    def reset(self) -> None:
        """Forget the record and its memory: the next call checks and warms up again, with inputs of any shape."""
        self._graph: Graph | None = None
        self._inputs: _Inputs | None = None
        self._outputs: Any = None
        self._calls, self._recorded = 0, False
        self._reason = (
            "capture is off"
            if self._mode == "off"
            else "no CUDA device"
            if self._backend is None
            else None
        )

    def __call__(self, *inputs: Any) -> Any:
        """One step of the training; see `capture`."""
        if self._reason is None and self._inputs is None:
            self._attempt(partial(self._check, inputs))
        elif self._reason is None and not self._recorded and self._calls >= self._warmup:
            self._attempt(partial(self._record, inputs))
        if self._graph is None or self._inputs is None:
            return _detached(self._step(*inputs))
        if not self._recorded:
            self._inputs.match(inputs)
            outputs = _detached(_warm(self._graph, partial(self._step, *inputs)))
            self._calls += 1
            return outputs
        self._inputs.fill(inputs)
        self._graph.replay()
        return self._outputs

    def _attempt(self, part: Callable[[], None]) -> None:
        """Do a part of the way to a record; under "auto" what goes wrong means that the step runs as it is."""
        try:
            part()
        except _InputsChanged:
            raise
        except Exception as error:
            self.reset()
            if self._mode == "on":
                raise
            self._reason = str(error) if isinstance(error, InputError) else explain(error)
            warnings.warn(
                f"capture: the step runs without a CUDA graph: {self._reason}", stacklevel=3
            )

    def _check(self, inputs: tuple[Any, ...]) -> None:
        """Run the step once under the rules, and take back what it did."""
        assert self._backend is not None
        device = self._device(inputs, self._backend.device_type)
        check_state(self._state, device)
        if torch.is_autocast_enabled(device.type) and torch.is_autocast_cache_enabled():
            raise InputError(
                "capture: autocast around the call keeps copies of weights that replays miss; put it into step"
            )
        static = _Inputs(inputs, device)
        graph = self._backend(device)
        snapshot = Snapshot(self._state, device)
        try:
            # Compiled models run as they are here: a compiler that meets the check may give up on their code for good.
            with (
                torch.compiler.set_stance("force_eager"),
                Rules(device, (*snapshot.tensors(), *static.tensors())),
            ):
                _warm(graph, partial(self._step, *static.tree()))
            check_optimizer_state(self._state, device)
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
                    f"state: the step replaces {replaced}, which a replay cannot; write into its tensor"
                )
        except Exception as error:
            snapshot.restore()
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"step: it cannot be captured as a CUDA graph: {explain(error)}"
            ) from error
        self._recorded = True

    def _device(self, inputs: tuple[Any, ...], device_type: str) -> torch.device:
        """Where the step runs: the device of the state, else of the inputs."""
        held = Snapshot.held(self._state)
        for tensor in (*held, *(leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))):
            if tensor.device.type == device_type:
                return tensor.device
        return torch.device(device_type)


class _InputsChanged(InputError):
    """Inputs that do not fit the first call's: the caller's mistake, in every mode."""


class _Inputs:
    """The inputs' structure and the memory that a graph reads them from.

    Raises:
        InputError: a tensor is on another device or requires a gradient, or a leaf is of a type that cannot be compared.
    """

    def __init__(self, inputs: tuple[Any, ...], device: torch.device) -> None:
        paths, self._structure = tree_flatten_with_path(inputs)
        self._names = [f"inputs{keystr(path)}" for path, _ in paths]
        self.device = device
        for name, (_, leaf) in zip(self._names, paths, strict=True):
            if isinstance(leaf, Tensor) and leaf.device.type != device.type:
                raise InputError(
                    f"{name}: a tensor on {leaf.device} given, on {device} is accepted"
                )
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                raise InputError(
                    f"{name}: a tensor that requires a gradient given; detach it, and ask for one in step"
                )
            if not isinstance(leaf, (Tensor, *PLAIN)):
                raise InputError(
                    f"{name}: {type(leaf).__name__} given; tensors and plain values in lists, tuples and dicts are accepted"
                )
        self._leaves = [
            leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for _, leaf in paths
        ]

    def tree(self) -> tuple[Any, ...]:
        """The inputs to call the step with."""
        return self._structure.unflatten(self._leaves)  # type: ignore[no-any-return]

    def tensors(self) -> list[Tensor]:
        """The static tensors."""
        return [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]

    def match(self, inputs: tuple[Any, ...]) -> list[Any]:
        """The leaves of `inputs`, which must fit the first call's."""
        leaves, structure = tree_flatten(inputs)
        if structure != self._structure:
            raise _InputsChanged(
                f"inputs: {_outline(structure)} given, {_outline(self._structure)} as in the first call"
            )
        for name, expected, given in zip(self._names, self._leaves, leaves, strict=True):
            if not _fits(given, expected):
                raise _InputsChanged(
                    f"{name}: {_kind(given)} given, {_kind(expected)} as in the first call is accepted; "
                    "a loader's smaller last batch is left out by drop_last=True"
                )
        return leaves

    def fill(self, inputs: tuple[Any, ...]) -> None:
        """Copy `inputs` to where the graph reads them."""
        leaves = self.match(inputs)
        pairs = [
            (s, g)
            for s, g in zip(self._leaves, leaves, strict=True)
            if isinstance(s, Tensor) and s is not g
        ]
        if pairs:
            with torch.no_grad():
                torch._foreach_copy_([static for static, _ in pairs], [given for _, given in pairs])


def _warm(graph: Graph, call: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        # Adam warns when it is used without a graph though it could be captured.
        warnings.filterwarnings(
            "ignore", message="This instance was constructed with capturable=True"
        )
        return graph.warm(call)


def _detached(outputs: Any) -> Any:
    return tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, outputs)


def _fits(given: Any, expected: Any) -> bool:
    """Whether an input is what it was in the first call, but for the values in a tensor."""
    if isinstance(given, Tensor) and isinstance(expected, Tensor):
        return (given.shape, given.dtype, given.device) == (
            expected.shape,
            expected.dtype,
            expected.device,
        )
    return type(given) is type(expected) and bool(given == expected)


def _kind(leaf: Any) -> str:
    """What must be the same in every call, in words."""
    if isinstance(leaf, Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')} of shape {tuple(leaf.shape)} on {leaf.device}"
    return repr(leaf)


def _outline(structure: TreeSpec) -> str:
    return str(structure.unflatten(["*"] * structure.num_leaves))
