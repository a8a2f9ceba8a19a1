"""One line that makes an existing model keep less: `remnant.convert`."""

import contextlib
import dataclasses
import fnmatch
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn as torch_nn

from remnant import _budget, _units, hf, nn
from remnant._policy import Policy, setting_of
from remnant._report import _size, folded_names

# Where a model says which step was measured under a budget.
_MEASURED = "_remnant_measured"
# Where a norm says why it was left.
_WHY = "_remnant_left"
# Leaves that hold nothing worth a word in a report.
_QUIET = (torch_nn.Embedding, torch_nn.Identity, torch_nn.Flatten, torch_nn.Unflatten)


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What `convert` did: converted[name] = (type, setting), left[name] = (type, why).

    Under a budget also the step that was measured with these settings: its peak beyond parameters and gradients, and
    its time.
    """

    converted: dict[str, tuple[str, str]]
    left: dict[str, tuple[str, str]]
    peak_bytes: int | None = None
    step_ms: float | None = None

    def __str__(self) -> str:
        """A line a layer; layers whose names differ in numbers alone, and of which the same is to be said, in one."""
        lines = [f"{len(self.converted)} layers converted, {len(self.left)} left as they were"]
        if self.peak_bytes is not None:
            lines[0] += f"; a step measured {_size(self.peak_bytes)} in {self.step_ms:.1f} ms"
        for layers, between in ((self.converted, ","), (self.left, " left:")):
            for name, (kind, text), count in folded_names(layers):
                times = f" ({count} layers)" if count > 1 else ""
                lines.append(f"  {name or '(the model)'}: {kind}{between} {text}{times}")
        return "\n".join(lines)


def _check_module(model: torch_nn.Module, caller: str) -> None:
    if not isinstance(model, torch_nn.Module):
        raise TypeError(f"{caller}: model should be a torch.nn.Module, got {type(model).__name__}")


def _check_model(model: torch_nn.Module) -> None:
    _check_module(model, "convert")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"convert: {name or 'the model'} is a scripted module, which cannot change: convert the "
                            "model itself, and revert it before torch.jit.script (torch.jit.trace works)")
        if isinstance(module, nn.Converted):
            raise ValueError(f"convert: {name or 'the model'} is converted already (memory={module.memory}): "
                             "call remnant.revert(model) first")


def _policies(model: torch_nn.Module, policy: Policy, overrides: Mapping[str, str | Policy]) -> dict[str, Policy]:
    """Every module's policy, the last pattern that fits its name deciding for it and what is inside.

    A module has as many names as parents; the first is its own.
    """
    first: dict[int, str] = {}
    names = {name: first.setdefault(id(module), name)
             for name, module in model.named_modules(remove_duplicate=False)}
    chosen = dict.fromkeys(first.values(), policy)
    for pattern, setting in overrides.items():
        wanted = Policy.parse(setting)
        found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            some = ", ".join(list(names)[1:9])
            raise ValueError(f"convert: no layer's name fits the pattern {pattern!r}; the model's are {some}, ...")
        for name, own in names.items():
            if any(name == each or name.startswith(each + ".") for each in found):
                chosen[own] = wanted
    return chosen


class _Units:
    """What of a model's convolutions and norms runs as one under the policies that were chosen.

    A norm that is left holds the reason: without `chosen` that is read, since tracing again might find another.
    """

    def __init__(self, model: torch_nn.Module, chosen: dict[str, Policy] | None = None) -> None:
        self.settings: dict[int, dict[str, Any]] = {}  # by id of the module
        self.otherwise: str | None = None
        if chosen is None:
            self.against = {id(each): each.__dict__[_WHY] for each in model.modules() if _WHY in each.__dict__}
            return
        self.otherwise = "tracing found no convolution that it alone follows"
        runs, self.against = _units.find_runs(model)
        names = {id(module): name for name, module in model.named_modules()}
        for run in runs:
            policy = chosen[names[id(run.conv)]]
            if run.norm is None:
                if policy.bits:  # exact: the activation and what follows hold one tensor anyway
                    self.settings[id(run.conv)] = {"then": run.then, "around": run.around}
            elif chosen[names[id(run.norm)]] != policy:
                self.against[id(run.norm)] = "its convolution has another setting"
            elif not nn.reason_against(run.conv):
                self.settings[id(run.conv)] = {"then": "norm", "around": run.around}
                self.settings[id(run.norm)] = {"then": run.then, "shortcut": run.shortcut, "around": run.around}
        for name, module in model.named_modules():
            why = self.reason_against(nn.TWINS.get(type(module), object), module)
            module.__dict__.pop(_WHY, None)
            if why is not None and not chosen[name].eager:
                module.__dict__[_WHY] = why

    def of(self, module: torch_nn.Module) -> dict[str, Any]:
        return self.settings.get(id(module), {})

    def reason_against(self, twin: type, module: torch_nn.Module) -> str | None:
        if not issubclass(twin, nn.NORMS) or self.of(module):
            return None
        return self.against.get(id(module), self.otherwise)


def _plan(model: torch_nn.Module, chosen: dict[str, Policy],
          units: _Units) -> tuple[dict[str, type], dict[str, tuple[str, str]]]:
    """The twin of each layer that gets one, and of the others what and why."""
    twins: dict[str, type] = {}
    left: dict[str, tuple[str, str]] = {}
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue  # attention reads its projections' weights itself
        kind = type(module)
        if isinstance(module, torch_nn.MultiheadAttention):
            inside = (*inside, f"{name}." if name else "")
        if chosen[name].eager:
            continue
        twin = nn.TWINS.get(kind) or hf.twin_of(module)
        if twin is None:
            if any(base in nn.TWINS for base in kind.__mro__[1:]):
                left[name] = (kind.__name__, "is a subclass of a torch.nn layer, whose forward may differ")
            elif not any(True for _ in module.children()) and not isinstance(module, _QUIET):
                left[name] = (kind.__name__, "has no twin in remnant.nn")
            continue
        if why := nn.reason_against(module) or units.reason_against(twin, module):
            left[name] = (kind.__name__, why)
            continue
        twins[name] = twin
    return twins, left


def convert(
    model: torch_nn.Module,
    memory: str | os.PathLike[str] | Policy = "exact",
    *,
    overrides: Mapping[str, str | Policy] | None = None,
    budget: str | float | None = None,
    example: Any = None,
) -> torch_nn.Module:
    """Makes a model's layers keep less for the backward pass, in place.

        model = remnant.convert(model, "unbiased:bits=4", overrides={"*.norm*": "exact", "head": "eager"})

    Layers of torch.nn (Linear, LayerNorm, RMSNorm, Dropout, ReLU, LeakyReLU, GELU, SiLU, MaxPool2d, MultiheadAttention, the
    Transformer's encoder and decoder layers, and convolutions with the BatchNorm or GroupNorm behind them) become
    their twins of `remnant.nn`; of a Hugging Face model also its activations, Conv1D and RMSNorm, and its attention
    implementation becomes "remnant" (see `remnant.hf`). Convolution, norm, a residual sum and ReLU, LeakyReLU or SiLU
    run as one `conv_norm_act`: torch.fx traces the model, or the largest parts of it that can be traced (their Python
    runs once without values), for convolutions whose output nobody else reads. Parameters,
    buffers, hooks, names and state dicts stay as they are, so optimizers and checkpoints keep working; `print(model)`
    shows each layer's setting. Under "exact" a norm's output and attention's input must not be changed in place before
    backward, which PyTorch allows: there the error "modified by an inplace operation" is mended by
    overrides={"*.norm*": "eager"}, or of the attention layer's name.

        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.LayerNorm(8))
        >>> remnant.convert(model, memory="unbiased:bits=4") is model
        True
        >>> type(remnant.revert(model)[1]).__name__
        'GELU'

    Args:
        model: any torch.nn.Module that is not scripted and not converted.
        memory: "exact" (gradients equal PyTorch's up to rounding, dropout's masks differ), "unbiased:bits=4" (8, 4 or
            2: codes by stochastic rounding), "eager" (nothing changes), or a `Policy`; "budget=60MB" is "exact" with
            that budget, "budget=60MB,bits=4" allows codes too; a name that ends in .json is a file of overrides,
            {pattern: setting}, over "exact".
        overrides: settings by pattern of names (shell-style, as in "encoder.*"); the last that fits decides.
        budget: bytes, or a text such as "2GB": the highest that a step's live memory may go beyond parameters,
            gradients and optimizer state. Each setting up to `memory` ("eager", exact without and with recomputation,
            then `memory` itself) is measured on `example`, five steps each. The fastest that fits is taken, or a faster
            one with that in the first layers, as many as it takes, found by measuring mixtures.
        example: with a budget: inputs of the largest batch (a tensor, a sequence, or a mapping of keyword arguments),
            or a function without arguments that gives the loss. Gradients, buffers and random state stay as they are.

    Returns:
        `model` itself. `remnant.conversion(model)` says what was converted and what was left, with the reason.

    Raises:
        TypeError: not a module, or a scripted one; or an argument of another type.
        ValueError: an unknown setting (with the nearest name), a file that holds none, a model that is converted
            already, a pattern that fits no layer, or a budget that nothing fits (with the smallest peak) or of a step
            without gradients. The model is unchanged.
        RuntimeError: a budget while a profiler runs on the host.
    """
    policy, by_name, size = _parse(memory, overrides, budget)
    _check_model(model)
    trial = None
    if size is not None:
        policy, by_name, trial = _fit(model, policy, by_name, size, example)
    _apply(model, policy, by_name)
    model.__dict__.pop(_MEASURED, None)
    if trial is not None:
        model.__dict__[_MEASURED] = trial
    return model


def _parse(memory: str | os.PathLike[str] | Policy, overrides: Mapping[str, str | Policy] | None,
           budget: str | float | None) -> tuple[Policy, Mapping[str, str | Policy], int | None]:
    """Setting, what differs from it by name, and budget, of `convert`'s arguments."""
    by_name: Mapping[str, str | Policy] = {} if overrides is None else overrides
    if not isinstance(by_name, Mapping):
        raise TypeError(f"convert: overrides should be a mapping of name patterns to settings, got "
                        f"{type(by_name).__name__}")
    if isinstance(memory, os.PathLike) or (isinstance(memory, str) and memory.endswith(".json")):
        file = _read(memory)
        by_name = {**{pattern: file[pattern] for pattern in file if pattern not in by_name}, **by_name}
        memory = "exact"
    elif isinstance(memory, str) and memory.startswith("budget="):
        if budget is not None:
            raise ValueError(f"convert: memory={memory!r} is a budget, and so is budget={budget!r}: give one of them")
        budget, comma, codes = memory.removeprefix("budget=").partition(",")
        if comma and not re.fullmatch("bits=[842]", codes):
            raise ValueError("convert: what follows a budget is bits=8, 4 or 2, as in 'budget=60MB,bits=4', got "
                             f"{memory!r}")
        memory = f"unbiased:{codes}" if comma else "exact"
    return Policy.parse(memory), by_name, None if budget is None else _budget.parse_bytes(budget)


def _read(path: str | os.PathLike[str]) -> dict[str, str]:
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        if not isinstance(found, dict) or not all(isinstance(each, str) for each in found.values()):
            raise ValueError("what it holds is another thing")
        for setting in found.values():
            Policy.parse(setting)
    except (OSError, ValueError) as error:
        raise ValueError(f"convert: {os.fspath(path)} should be a JSON file of settings by layer-name pattern, such as "
                         f'{{"encoder.*": "unbiased:bits=4"}}: {error}') from error
    return found


def _blocks(names: Iterable[str], at_least: int = 8) -> list[str]:
    """The parts of a model that get one setting each, in order: layers by the numbers in their names."""
    blocks: list[str] = []
    for depth in (1, 2, 3):
        found = (re.match(rf"(?:.*?(?:^|\.)\d+(?=\.|$)){{1,{depth}}}", name) for name in names)
        blocks = list(dict.fromkeys(each[0] if each else name for each, name in zip(found, names, strict=True) if name))
        if len(blocks) >= at_least:
            break
    return blocks


def _fit(model: torch_nn.Module, most: Policy, overrides: Mapping[str, str | Policy], budget: int,
         example: Any) -> tuple[Policy, Mapping[str, str | Policy], _budget.Trial]:
    """The setting, what differs from it by name, and the measured step, of the fastest that fits.

    One setting for all layers, or one that is faster and does not fit, but for as many of the first layers as it takes.
    The first, since a step's peak is near its backward's start: what the last layers make again would come on top.
    """
    if example is None:
        raise ValueError("convert: a budget needs example=, the inputs of the largest batch or a function that gives "
                         "the loss")
    loss = _budget.loss_of(model, example)

    def measured(policy: Policy, by_name: Mapping[str, str | Policy]) -> _budget.Trial:
        _apply(model, policy, by_name)
        try:
            return _budget.measure(model, loss, str(policy))
        finally:
            revert(model)

    settings = {str(each): each for each in (Policy(eager=True), Policy(recompute=False), Policy(), most)}
    trials = [measured(each, overrides) for each in settings.values()]
    fastest = lean = _budget.choose(trials, budget)
    best: tuple[Policy, Mapping[str, str | Policy]] = (settings[lean.memory], overrides)
    modules, chosen = dict(model.named_modules()), _policies(model, Policy(), overrides)
    blocks = _blocks(_plan(model, chosen, _Units(model, chosen))[0])
    blocks = [name for name in blocks if name in modules and name not in overrides]
    for roomy in trials:
        if roomy.peak_bytes <= budget or roomy.step_ms >= lean.step_ms:
            continue
        few, enough, found, step_ms = 0, len(blocks), None, lean.step_ms  # lean blocks: too few, and that fit
        while enough - few > 1:
            count = (few + enough) // 2
            mixed = {**dict.fromkeys(blocks[:count], settings[lean.memory]), **overrides}
            trial = measured(settings[roomy.memory], mixed)
            if trial.peak_bytes > budget:
                few = count
                continue
            enough, found, step_ms = count, (trial, mixed), min(step_ms, trial.step_ms)
        # Fewer lean blocks take no longer, whatever the clock says.
        if found is not None and step_ms < fastest.step_ms:
            fastest, best = found[0], (settings[roomy.memory], found[1])
    return *best, fastest


def _apply(model: torch_nn.Module, policy: Policy, overrides: Mapping[str, str | Policy]) -> None:
    chosen = _policies(model, policy, overrides)
    units = _Units(model, chosen)
    twins, _ = _plan(model, chosen, units)
    modules = dict(model.named_modules())
    attention = hf.prepare(model, chosen)  # may refuse, so before anything changes
    for name, twin in twins.items():
        nn.convert_one(modules[name], twin, chosen[name], units.of(modules[name]))
    attention()


def revert(model: torch_nn.Module) -> torch_nn.Module:
    """Gives every converted layer its own class back, in place; weights as they are now. Returns `model`."""
    _check_module(model, "revert")
    model.__dict__.pop(_MEASURED, None)
    # All that may be refused before anything changes.
    before = [(each, nn.class_before(each)) for each in model.modules() if isinstance(each, nn.Converted)]
    for module, kind in before:
        nn.revert_one(module, kind)
    hf.restore(model)
    return model


@contextlib.contextmanager
def reverted(model: torch_nn.Module) -> Iterator[None]:
    """Inside, the model as PyTorch runs it; then as before."""
    before = [(module, type(module), dict(module.__dict__)) for module in model.modules()]
    try:
        revert(model)
        before = [(module, kind, {name: each for name, each in held.items() if name not in module.__dict__})
                  for module, kind, held in before]
        yield
    finally:
        for module, kind, gone in before:
            module.__class__ = kind
            module.__dict__.update(gone)
            if hf._BEFORE in module.__dict__:
                module.set_attn_implementation(hf.NAME)  # type: ignore[operator]


def conversion(model: torch_nn.Module) -> Conversion:
    """What of a model is converted, and what is left as it was and why."""
    _check_module(model, "conversion")
    converted: dict[str, tuple[str, str]] = {}
    chosen = dict.fromkeys((name for name, _ in model.named_modules()), Policy())
    for name, module in model.named_modules():
        if isinstance(module, nn.Converted):
            converted[name] = (module.torch_class.__name__, str(module.memory))
    converted.update(hf.converted(model))
    twins, left = _plan(model, chosen, _Units(model))
    modules = dict(model.named_modules())
    left.update({name: (type(modules[name]).__name__, "stays eager, as was asked for") for name in twins})
    trial = model.__dict__.get(_MEASURED)
    return Conversion(converted, {name: each for name, each in left.items() if name not in converted},
                      *((trial.peak_bytes, trial.step_ms) if trial else ()))
