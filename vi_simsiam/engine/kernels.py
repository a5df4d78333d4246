"""The choice between the project's kernels and torch's layers, made by measuring.

Which of them trains faster depends on the network, the views, the batch and the machine. So a long
run times a step with each before it begins, on random views and copies of the model. The choice is
kept in the run folder, so that a resumed run goes on with the same layers.
"""

from __future__ import annotations

import contextlib
import copy
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vi_simsiam.checks import POSITIVE, check_fields, limited
from vi_simsiam.config import TrainConfig
from vi_simsiam.engine.distributed import World
from vi_simsiam.engine.graph import capture
from vi_simsiam.engine.network import own_norm
from vi_simsiam.engine.run import KERNELS
from vi_simsiam.engine.step import TrainStep
from vi_simsiam.errors import InputError, cut
from vi_simsiam.files import parse_json, read_bytes, write_json
from vi_simsiam.models import SimSiam
from vi_simsiam.ops.backends import why_unavailable
from vi_simsiam.text import counted, one_line

_TIE = 1.02
"""Torch's layers are taken where the fused ones take more than this many times as long, so that
equal runs make equal choices."""

_FUSED, _PLAIN = "fused", "torch's layers"
MakeStep = Callable[[SimSiam, Tensor, bool], TrainStep]
"""The step of a model with given learning rates, with the kernels if True."""


class _Effort(NamedTuple):
    """The extent of measuring."""

    fewest_steps: int
    """For a shorter run measuring costs more than it gains."""
    warmup: int
    """Steps before those that are timed."""
    rounds: int
    """Timed steps of each kind."""
    seconds: float
    """No round begins after so many seconds of timed steps."""


_EFFORT = {
    "cpu": _Effort(100, 1, 2, 5.0),
    # A graph is recorded in the fourth call. Of 3 ms a step, 2,000 steps are 6 s.
    "cuda": _Effort(2000, 5, 20, 1.0),
}


@dataclass(frozen=True)
class KernelChoice:
    """The layers that a run trains with; the content of kernels.json."""

    device: str
    """The name of the device that the choice was made for."""
    kernels: bool
    """True for the project's kernels, False for torch's layers."""
    fused_ms: float | None = limited(None, POSITIVE)
    """Milliseconds of a step with the kernels; None if it was not measured."""
    torch_ms: float | None = limited(None, POSITIVE)
    """Milliseconds of a step with torch's layers; None if it was not measured."""
    reason: str | None = None
    """The reason why the kernels cannot be used, or why a measurement failed."""

    def __post_init__(self) -> None:
        check_fields(self)

    def __str__(self) -> str:
        """Such as "on (fused 182 ms, torch's layers 214 ms a step)"."""
        state = "on" if self.kernels else "off"
        measured = {_FUSED: self.fused_ms, _PLAIN: self.torch_ms}
        times = [f"{name} {_shown(ms)} ms" for name, ms in measured.items() if ms is not None]
        parts = [f"{', '.join(times)} a step"] if times else []
        text = "; ".join([*parts, self.reason] if self.reason else parts)
        return f"{state} ({text})" if times else f"{state}: {text}" if text else state

    @property
    def explained(self) -> bool:
        """True with figures or a reason."""
        return any(x is not None for x in (self.fused_ms, self.torch_ms, self.reason))

    @classmethod
    def load(cls, folder: Path) -> KernelChoice | None:
        """Read the choice of a run; None where none was made.

        Raises:
            InputError: the file is damaged.
        """
        path = folder / KERNELS
        if not os.path.lexists(path):
            return None
        content = read_bytes(path, "run")
        try:
            return cls(**parse_json(content, dict[str, Any]))
        except (ValueError, TypeError) as error:
            reason = cut(one_line(str(error)))
            raise InputError(
                f"run: {path} is damaged ({reason}); without this file the choice is made anew"
            ) from error

    def save(self, folder: Path) -> None:
        """Write the choice to a run's folder; one without figures replaces none that has them."""
        before = self.load(folder)
        if self.torch_ms is not None or before is None or before.torch_ms is None:
            write_json(folder / KERNELS, asdict(self))


def choose_kernels(
    config: TrainConfig,
    world: World,
    model: SimSiam,
    make_step: MakeStep,
    *,
    dtype: torch.dtype,
    steps: int,
    resumed: Path | None = None,
) -> KernelChoice:
    """Decide on the project's kernels, for all ranks alike.

    With `kernels` auto a run of many steps takes the faster layers. The model, the generators of
    random numbers and the data stay as they are.

    Args:
        config: of the run.
        world: the ranks that train together; each times its part of a batch, and the slowest one
            counts.
        model: on the device to train on.
        make_step: makes the step of a copy of the model, without the other ranks.
        dtype: of the views.
        steps: how many are left to train.
        resumed: the folder of the run that goes on; None for a new run. Its choice is kept on a
            device of the same name, and where few steps are left.

    Raises:
        InputError: kernels is "on", and they cannot be used; a damaged choice in `resumed`.
    """
    device = device_name(world.device)
    saved: KernelChoice | None = None
    if config.kernels == "off":
        return KernelChoice(device, False)
    if config.kernels == "auto" and resumed is not None and world.is_main:
        saved = KernelChoice.load(resumed)
    found = world.exchange((why_unusable(config, world.device.type, model), device, saved))
    problem = next((reason for reason, *_ in found if reason is not None), None)
    _, device, saved = found[0]
    if config.kernels == "on" and problem is not None:
        raise InputError(f"kernels: 'on' cannot be used: {problem}; auto and off run here")
    if problem is not None:
        return KernelChoice(device, False, reason=problem)
    # "Off" without times was no choice: the kernels could not be used then.
    if saved is not None and saved.device == device and (saved.kernels or saved.torch_ms):
        return saved
    effort = _EFFORT[world.device.type]
    if config.kernels == "on" or steps < effort.fewest_steps:
        return saved if saved is not None and saved.torch_ms else KernelChoice(device, True)
    mine = _measure(config, world, model, make_step, dtype, effort)
    fused, plain = (_slowest(times) for times in zip(*world.exchange(mine), strict=True))
    failed = {name: x for name, x in ((_FUSED, fused), (_PLAIN, plain)) if isinstance(x, str)}
    fused_ms, torch_ms = (None if isinstance(x, str) else round(x, 4) for x in (fused, plain))
    return KernelChoice(
        device,
        torch_ms is None or (fused_ms is not None and fused_ms <= _TIE * torch_ms),
        fused_ms,
        torch_ms,
        "; ".join(f"{name} failed: {text}" for name, text in failed.items()) or None,
    )


def kernels_of(folder: Path, config: TrainConfig) -> str:
    """The choice of a run in words."""
    if config.kernels != "auto":
        return config.kernels
    try:
        return str(KernelChoice.load(folder) or "not recorded")
    except InputError:
        return "not readable"


def why_unusable(config: TrainConfig, device_type: str, model: SimSiam) -> str | None:
    """The reason why a run cannot use the kernels, or None if it can."""
    problem = why_unavailable("cpu" if device_type == "cpu" else "triton", device_type)
    if problem is not None:
        return problem
    if config.compile:
        return "compile replaces them"
    if config.sync_batch_norm:
        return "they do not take statistics over several GPUs, as with sync_batch_norm"
    if (name := own_norm(model)) is not None:
        part = name.partition(".")[0].replace("_", " ")
        return f"the {part} has BatchNorm layers of its own ({name})"
    return None


def device_name(device: torch.device) -> str:
    """A GPU's name, or the CPU's threads and vector instructions."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = counted(torch.get_num_threads(), "thread")
    return f"cpu ({threads}, {torch.backends.cpu.get_cpu_capability()})"


def _measure(
    config: TrainConfig,
    world: World,
    model: SimSiam,
    make_step: MakeStep,
    dtype: torch.dtype,
    effort: _Effort,
) -> list[float | str]:
    """Milliseconds of a step with the kernels and with torch's layers, or why it failed."""
    device, augment, channels = world.device, config.augment, config.decode.channels
    on_gpu = device.type == "cuda"
    mode = config.capture if on_gpu and world.alone else "off"
    sizes = [augment.size] * 2 + [augment.local_size] * augment.local_views
    batch = world.local_batch(config.batch_size)
    rates = torch.zeros(effort.warmup + effort.rounds)

    def ready(kernels: bool) -> Callable[[], object]:
        step = make_step(copy.deepcopy(model), rates, kernels)
        return partial(capture(step, state=step.state, mode=mode), views)

    def timed(*kinds: bool) -> list[float | str]:
        calls = [ready(kernels) for kernels in kinds]
        times: list[list[float]] = [[] for _ in calls]
        for number in range(effort.warmup + effort.rounds):
            if sum(map(sum, times)) > effort.seconds:
                break
            for call, taken in zip(calls, times, strict=True):
                seconds = _seconds(call, device)
                if number >= effort.warmup:
                    taken.append(seconds)
        return [1e3 * min(taken) for taken in times]  # others are held up by other programs

    def alone(kernels: bool) -> float | str:
        try:
            return timed(kernels)[0]
        except Exception as error:  # memory, Triton and the driver each raise their own
            return (str(error).splitlines() or [type(error).__name__])[0].partition(". ")[0]

    with torch.random.fork_rng([device] if on_gpu else []):
        views = [torch.randn(batch, channels, size, size, device=device) for size in sizes]
        views = [view.to(dtype).contiguous(memory_format=torch.channels_last) for view in views]
        # One of them fails, or the memory is too small for both at once.
        with contextlib.suppress(Exception):
            return timed(True, False)
        return [alone(True), alone(False)]


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """The duration of a call, up to the end of its work on the device."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def _slowest(times: Sequence[float | str]) -> float | str:
    """The longest of the ranks' times, or the first reason of a rank that failed."""
    reasons = [each for each in times if isinstance(each, str)]
    return reasons[0] if reasons else max(float(each) for each in times)


def _shown(ms: float) -> str:
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"
