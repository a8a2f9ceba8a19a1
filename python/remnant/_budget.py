"""Chooses what a model keeps so that a step's peak fits a number of bytes."""

import contextlib
import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from remnant import _report

_UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_STEPS = 3


@dataclasses.dataclass(frozen=True)
class Trial:
    """One setting of a whole model, measured: bytes beyond parameters and gradients, and a step's time."""

    memory: str
    peak_bytes: int
    step_ms: float


def parse_bytes(text: str | float) -> int:
    """Bytes of a whole number, or of a text such as "2GB", "60MB" (powers of 1000) or "512MiB".

    Raises:
        ValueError: another text or number, or less than one byte.
        TypeError: neither a text nor a number.
    """
    if isinstance(text, bool) or not isinstance(text, (int, float, str)):
        raise TypeError(f"budget should be a number of bytes or a text such as '2GB', got {type(text).__name__}")
    if not isinstance(text, str):
        if isinstance(text, float) and not text.is_integer():
            raise ValueError(f"budget should be a whole number of bytes, got {text!r}")
        size = int(text)
    else:
        found = re.fullmatch(r"([0-9.]+)\s*([A-Za-z]+)", text.strip())
        if not found or found[2] not in _UNITS or found[1].count(".") > 1 or found[1] == ".":
            raise ValueError(f"budget should be a number of bytes or a text such as '2GB' or '512MiB', got {text!r}")
        size = round(float(found[1]) * _UNITS[found[2]])
    if size < 1:
        raise ValueError(f"budget should be at least one byte, got {text!r}")
    return size


def loss_of(model: nn.Module, example: Any) -> Callable[[], Tensor]:
    """A function that runs `model` on an example and gives a scalar.

    Args:
        example: a function without arguments that gives the loss itself; or the model's inputs, as a tensor, a
            sequence, or a mapping of keyword arguments. Of what the model returns, `.loss` is taken where there is
            one, else the sum of its tensors that need a gradient.
    """
    if callable(example) and not isinstance(example, (Tensor, nn.Module)):
        return lambda: _report.loss_of(None, lambda _: example(), "convert")

    def run() -> Tensor:
        if isinstance(example, Mapping):
            result = model(**example)
        elif isinstance(example, Sequence):
            result = model(*example)
        else:
            result = model(example)
        return _report.loss_of(result, None, "convert")

    return run


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Gradients, buffers and random state afterwards as before; inside, gradients are zeros that exist."""
    cpu = torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    leaves = [p for p in model.parameters() if p.requires_grad]
    try:
        with _report.buffers_as_before(model), _report.gradients_aside(leaves), torch.enable_grad():
            yield
    finally:
        torch.set_rng_state(cpu)
        if devices:
            torch.cuda.set_rng_state_all(devices)


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """Highest sum of live allocations during a step, minus what is live before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    return _report.host_peak(step)


def measure(model: nn.Module, loss: Callable[[], Tensor], memory: str) -> Trial:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def step() -> None:
        loss().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with _untouched(model):
        step()  # warms up
        times = []
        for _ in range(_STEPS):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        return Trial(memory, peak_bytes(step, device), 1e3 * min(times))


def choose(trials: Sequence[Trial], budget: int) -> Trial:
    """The fastest that fits.

    Raises:
        ValueError: none fits, with the smallest peak that was found.
    """
    fitting = [trial for trial in trials if trial.peak_bytes <= budget]
    if not fitting:
        least = min(trials, key=lambda trial: trial.peak_bytes)
        raise ValueError(
            f"convert: no setting of this model fits a budget of {budget / 1e6:.1f} MB; the smallest peak found for "
            f"this example is {least.peak_bytes / 1e6:.1f} MB, under {least.memory!r}: raise the budget, allow "
            "memory='unbiased:bits=4', or make the batch smaller")
    return min(fitting, key=lambda trial: trial.step_ms)
