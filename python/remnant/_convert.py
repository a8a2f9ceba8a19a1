"""One line that makes an existing model keep less: `remnant.convert`."""

import dataclasses
import fnmatch
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn as torch_nn

from remnant import _budget, _units, hf, nn
from remnant._policy import Policy
from remnant._report import folded_names

# Leaves that hold nothing worth a word in a report.
_QUIET = (torch_nn.Embedding, torch_nn.Identity, torch_nn.Flatten, torch_nn.Unflatten)


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What `convert` did: converted[name] = (type, setting), left[name] = (type, why)."""

    converted: dict[str, tuple[str, str]]
    left: dict[str, tuple[str, str]]

    def __str__(self) -> str:
        """A line a layer; layers whose names differ in numbers alone, and of which the same is to be said, in one."""
        lines = [f"{len(self.converted)} layers converted, {len(self.left)} left as they were"]
        for layers, between in ((self.converted, ","), (self.left, " left:")):
            for name, (kind, text), count in folded_names(layers):
                times = f" ({count} layers)" if count > 1 else ""
                lines.append(f"  {name or '(the model)'}: {kind}{between} {text}{times}")
        return "\n".join(lines)


def _check_model(model: torch_nn.Module) -> None:
    if not isinstance(model, torch_nn.Module):
        raise TypeError(f"convert: model should be a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"convert: {name or 'the model'} is a scripted module, which cannot change: convert the "
                            "model before torch.jit.script")
        if isinstance(module, nn.Converted):
            raise ValueError(f"convert: {name or 'the model'} is converted already (memory={module.memory}): "
                             "call remnant.revert(model) first")


def _policies(model: torch_nn.Module, policy: Policy, overrides: Mapping[str, str | Policy]) -> dict[str, Policy]:
    """Every module's policy, the last pattern that fits its name deciding for it and what is inside."""
    names = [name for name, _ in model.named_modules()]
    chosen = dict.fromkeys(names, policy)
    for pattern, setting in overrides.items():
        wanted = Policy.parse(setting)
        found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            some = ", ".join(name for name in names[1:9])
            raise ValueError(f"convert: no layer's name fits the pattern {pattern!r}; the model's are {some}, ...")
        for name in names:
            if any(name == each or name.startswith(each + ".") for each in found):
                chosen[name] = wanted
    return chosen


class _Units:
    """What of a model's convolutions and norms runs as one under the policies that were chosen."""

    def __init__(self, model: torch_nn.Module, chosen: dict[str, Policy]) -> None:
        self.settings: dict[int, dict[str, Any]] = {}  # by id of the module
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

    def of(self, module: torch_nn.Module) -> dict[str, Any]:
        return self.settings.get(id(module), {})

    def reason_against(self, twin: type, module: torch_nn.Module) -> str | None:
        if not issubclass(twin, nn.NORMS) or self.of(module):
            return None
        return self.against.get(id(module), "tracing found no convolution that it alone follows")


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
            parametrized = any(base in nn.TWINS for base in kind.__mro__[1:])
            if parametrized and not any(True for _ in module.children()):
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
    memory: str | Policy = "exact",
    *,
    overrides: Mapping[str, str | Policy] | None = None,
    budget: str | int | None = None,
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
    shows each layer's setting.

        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.LayerNorm(8))
        >>> remnant.convert(model, memory="unbiased:bits=4") is model
        True
        >>> type(remnant.revert(model)[1]).__name__
        'GELU'

    Args:
        model: any torch.nn.Module that is not scripted and not converted.
        memory: "exact" (gradients equal PyTorch's up to rounding, dropout's masks differ), "unbiased:bits=4" (8, 4 or
            2: codes by stochastic rounding), "eager" (nothing changes), or a `Policy`.
        overrides: settings by pattern of names (shell-style, as in "encoder.*"); the last that fits decides.
        budget: bytes, or a text such as "2GB": the highest that a step's live memory may go beyond parameters,
            gradients and optimizer state. Each setting up to `memory` ("eager", exact without and with recomputation,
            then `memory` itself) is measured on `example`, five steps each, and the fastest that fits is taken.
        example: with a budget: inputs of the largest batch (a tensor, a sequence, or a mapping of keyword arguments),
            or a function without arguments that gives the loss. Gradients, buffers and random state stay as they are.

    Returns:
        `model` itself. `remnant.conversion(model)` says what was converted and what was left, with the reason.

    Raises:
        TypeError: not a module, or a scripted one.
        ValueError: an unknown setting (with the nearest name), a model that is converted already, or a pattern that
            fits no layer, or a budget that nothing fits (with the smallest peak). The model is unchanged.
    """
    policy = Policy.parse(memory)
    _check_model(model)
    if budget is not None:
        policy = _fit(model, policy, overrides or {}, _budget.parse_bytes(budget), example)
    _apply(model, policy, overrides or {})
    return model


def _fit(model: torch_nn.Module, most: Policy, overrides: Mapping[str, str | Policy], budget: int,
         example: Any) -> Policy:
    if example is None:
        raise ValueError("convert: a budget needs example=, the inputs of the largest batch or a function that gives "
                         "the loss")
    loss = _budget.loss_of(model, example)
    settings = {str(each): each for each in (Policy(eager=True), Policy(recompute=False), Policy(), most)}
    trials = []
    for name, each in settings.items():
        _apply(model, each, overrides)
        try:
            trials.append(_budget.measure(model, loss, name))
        finally:
            revert(model)
    return settings[_budget.choose(trials, budget).memory]


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
    for module in list(model.modules()):
        if isinstance(module, nn.Converted):
            nn.revert_one(module)
    hf.restore(model)
    return model


def conversion(model: torch_nn.Module) -> Conversion:
    """What of a model is converted, and what is left as it was and why."""
    converted: dict[str, tuple[str, str]] = {}
    chosen = dict.fromkeys((name for name, _ in model.named_modules()), Policy())
    for name, module in model.named_modules():
        if isinstance(module, nn.Converted):
            converted[name] = (module.torch_class.__name__, str(module.memory))
    converted.update(hf.converted(model))
    twins, left = _plan(model, chosen, _Units(model, chosen))
    modules = dict(model.named_modules())
    left.update({name: (type(modules[name]).__name__, "stays eager, as was asked for") for name in twins})
    return Conversion(converted, {name: each for name, each in left.items() if name not in converted})
