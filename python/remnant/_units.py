"""Convolution, norm and activation of an existing model as one `conv_norm_act`, without a change to its forward.

`find_runs` traces a model to learn what follows each convolution. While the model runs, a converted convolution and its
norm return a `Pending`, which `+` and an activation complete; whatever else touches it makes it a tensor first. So the
tracing decides what is joined, never whether the result is right.
"""

import contextlib
import dataclasses
import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.utils._pytree import tree_map

from remnant import _ops
from remnant._report import buffers_as_before

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = {nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d}
_ACTIVATION_MODULES = (nn.ReLU, nn.LeakyReLU, nn.SiLU)
_RELU = (functional.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
_LEAKY = (functional.leaky_relu, functional.leaky_relu_)
_SILU = (functional.silu,)
_ACTIVATIONS = (*_RELU, *_LEAKY, *_SILU)
_ADDS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
_ADDS_IN_PLACE = (Tensor.add_, Tensor.__iadd__)
_FX_ADDS = (operator.add, operator.iadd, torch.add)
# What may give its input back, or a view of it.
_PASSING_METHODS = ("view", "reshape", "flatten", "transpose", "permute", "contiguous", "squeeze", "unsqueeze", "chunk",
                    "split", "to", "type_as", "float")
_PASSING_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


@dataclasses.dataclass(frozen=True)
class Run:
    """A convolution and what follows it.

    then: what the norm (without one: the convolution) waits for: "", "activation", "add" or "add activation".
    shortcut: a strided 1x1 convolution whose output goes into a sum, cheap enough to be run again in backward.
    around: modules whose forward begins or ends before the unit is whole.
    """

    conv: nn.Module
    norm: nn.Module | None
    then: str
    shortcut: bool = False
    around: tuple[nn.Module, ...] = ()


def padding_of(conv: nn.Module) -> list[int] | None:
    """The zeros before and behind each dimension, or None where the two differ."""
    if not isinstance(conv.padding, str):
        return list(conv.padding)
    if conv.padding == "valid":
        return [0] * len(conv.kernel_size)
    both = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    return None if any(n % 2 for n in both) else [n // 2 for n in both]


def activation_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """conv_norm_act's name of an activation's call, or None."""
    if func in _RELU:
        return "relu"
    if func in _SILU:
        return "silu"
    if func not in _LEAKY:
        return None
    slope = args[1] if len(args) > 1 else kwargs.get("negative_slope", 0.01)
    return f"leaky:slope={slope!r}" if 0 <= slope < math.inf else None


def version_of(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


@dataclasses.dataclass
class Call:
    """One run of a convolution and perhaps its norm."""

    conv: Any
    input: Tensor
    memory: str
    gradients: bool
    version: int  # of input
    norm: Any = None
    recompute: bool = False  # the unit keeps its input alone
    done: bool = False  # the norm's running statistics have this batch

    @property
    def shape(self) -> tuple[int, ...]:
        conv, padding = self.conv, padding_of(self.conv) or []
        sizes = zip(self.input.shape[2:], padding, conv.dilation, conv.kernel_size, conv.stride, strict=True)
        return (self.input.shape[0], conv.out_channels,
                *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in sizes))

    @property
    def dtype(self) -> torch.dtype:
        kind = self.input.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.input.dtype

    def check(self) -> None:
        if version_of(self.input) != self.version:
            raise RuntimeError(f"convert: the input of {self.conv} was changed in place before the norm or activation "
                               "behind it was read; change a copy, or give the layer the setting 'eager' by overrides")

    def run(self, residual: Tensor | None, activation: str) -> Tensor:
        self.check()
        conv, norm, named = self.conv, self.norm, {}
        if isinstance(norm, nn.GroupNorm):
            named = {"norm": f"group:groups={norm.num_groups}"}
        elif norm is None:
            named = {"norm": "none"}
        else:
            update = norm.training and norm.track_running_stats and not self.done
            momentum = 0.0 if norm.momentum is None else norm.momentum
            if update and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
                if norm.momentum is None:
                    momentum = 1.0 / float(norm.num_batches_tracked)
            training = norm.training or norm.running_mean is None
            statistics = update or not training
            named = {"training": training, "momentum": momentum,
                     "running_mean": norm.running_mean if statistics else None,
                     "running_var": norm.running_var if statistics else None}
        if norm is not None:
            named |= {"norm_weight": norm.weight, "norm_bias": norm.bias, "eps": norm.eps}
        self.done = True
        return _ops.conv_norm_act(
            self.input, conv.weight, conv.bias, residual=residual, stride=conv.stride, padding=padding_of(conv),
            dilation=conv.dilation, groups=conv.groups, activation=activation, memory=self.memory,
            recompute=self.recompute, **named)


class Pending(Tensor):
    """A convolution's output that is not computed yet, since norm, sum and activation may join it."""

    call: Call
    then: str
    residual: Tensor | None
    made: Tensor | None

    @staticmethod
    def of(call: Call, then: str, residual: Tensor | None = None) -> "Pending":
        # A tensor without data: what gets by __torch_function__ fails instead of reading rubbish.
        self = Tensor._make_subclass(Pending, torch.empty(0, device="meta"))
        self.call, self.then, self.residual, self.made = call, then, residual, None
        return self

    @property
    def open(self) -> bool:
        return self.made is None and self.call.gradients == torch.is_grad_enabled()

    def value(self) -> Tensor:
        """The tensor itself, for a reader that takes no part in the unit."""
        if self.made is None:
            call = self.call
            call.check()
            with torch.set_grad_enabled(call.gradients):
                if call.norm is None:
                    self.made = call.conv.alone(call.input)
                else:
                    self.made = call.run(self.residual, "identity")
        return self.made

    @classmethod
    def __torch_function__(cls, func: Callable, types: Iterable[type], args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _ACTIVATIONS:
            first = args[0] if args else kwargs.get("input")
            activation = activation_of(func, args, kwargs)
            if isinstance(first, Pending) and first.open and activation and first.then in ("activation", "sum"):
                result = first.call.run(first.residual, activation)
                if kwargs.get("inplace") or func.__name__.endswith("_"):
                    first.made = result  # the same tensor in the reader's eyes
                return result
        elif len(args) == 2 and not kwargs and (func in _ADDS or func in _ADDS_IN_PLACE):
            main, other = args
            if func in _ADDS and not (isinstance(main, Pending) and main.takes(other)):
                main, other = other, main
            if isinstance(main, Pending) and main.takes(other):
                return main.plus(other, func in _ADDS_IN_PLACE)
        args, kwargs = tree_map(lambda x: x.value() if isinstance(x, Pending) else x, (args, kwargs))
        return func(*args, **kwargs)

    def takes(self, other: Any) -> bool:
        """Whether a summand can join the unit."""
        if not self.open or not self.then.startswith("add") or not isinstance(other, Tensor):
            return False
        if isinstance(other, Pending):
            other = other.value()
        return tuple(other.shape) == self.call.shape and other.dtype == self.call.dtype

    def plus(self, other: Tensor, in_place: bool) -> Tensor:
        other = other.value() if isinstance(other, Pending) else other
        if self.then == "add":
            result = self.call.run(other, "identity")
            if in_place:
                self.made = result
            return result
        if not in_place:
            return Pending.of(self.call, "sum", other)
        self.residual, self.then = other, "sum"
        return self


def _kind(module: nn.Module | None) -> type:
    """A module's type, of a converted one the type that it had."""
    return module.__dict__.get("torch_class", type(module)) if module is not None else type(None)


class _Proxy(fx.Proxy):
    """torch.fx's takes x += y for x = x + y."""

    def _changed(self, function: Callable, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self._changed(operator.iadd, other)

    def __isub__(self, other: Any) -> fx.Proxy:
        return self._changed(operator.isub, other)

    def __imul__(self, other: Any) -> fx.Proxy:
        return self._changed(operator.imul, other)

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self._changed(operator.itruediv, other)


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not any(True for _ in m.children()) or super().is_leaf_module(m, module_qualified_name)


def _trace(module: nn.Module) -> fx.Graph | None:
    with contextlib.suppress(Exception):  # a forward that looks at values may fail in any way on none
        return _Tracer().trace(module)
    return None


def _graphs(module: nn.Module) -> Iterable[tuple[nn.Module, fx.Graph]]:
    """The graphs of the largest parts of a model that can be traced and have a convolution."""
    if not any(isinstance(each, CONVOLUTIONS) for each in module.modules()) or isinstance(module, CONVOLUTIONS):
        return
    graph = _trace(module)
    if graph is not None:
        yield module, graph
        return
    for child in module.children():
        yield from _graphs(child)


def _activates(node: fx.Node, root: nn.Module) -> bool:
    if node.op == "call_module":
        found = root.get_submodule(node.target)
        return _kind(found) in _ACTIVATION_MODULES and getattr(found, "negative_slope", 0) >= 0
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    return node.op == "call_function" and node.target in _ACTIVATIONS


def _adds(node: fx.Node) -> bool:
    known = node.target in _FX_ADDS if node.op == "call_function" else node.target in ("add", "add_")
    return known and node.op in ("call_function", "call_method") and len(node.args) == 2 and not node.kwargs


def _changed_in_place(node: fx.Node, root: nn.Module) -> bool:
    """Whether a reader writes into what a node gives, or into a view of it."""
    for user in node.users:
        first = bool(user.args) and user.args[0] is node
        passes = False
        if user.op == "call_module":
            reader = root.get_submodule(user.target)
            if getattr(reader, "inplace", False):
                return True
            passes = isinstance(reader, _PASSING_MODULES)
            if not passes and not type(reader).__module__.startswith(("torch.nn", "remnant.nn")):
                inner = _trace(reader)
                if inner is not None and any(each.op == "placeholder" and _changed_in_place(each, reader)
                                             for each in inner.nodes):
                    return True
        elif user.op == "call_method":
            if first and user.target.endswith("_") and not user.target.endswith("__"):
                return True
            passes = user.target in _PASSING_METHODS
        elif user.op == "call_function":
            name, home = getattr(user.target, "__name__", ""), getattr(user.target, "__module__", None) or ""
            if user.kwargs.get("inplace") or (first and home == "_operator" and name in (
                    "iadd", "isub", "imul", "itruediv", "setitem")) or (first and home != "_operator"
                                                                        and name.endswith("_")):
                return True
            passes = name in ("getitem", "flatten") or not home.startswith(("torch", "_operator"))
        if passes and _changed_in_place(user, root):
            return True
    return False


def _readers(node: fx.Node, root: nn.Module) -> list[fx.Node]:
    """Who reads a node, through nn.Identity."""
    return [reader for user in node.users
            for reader in (_readers(user, root) if _kind(_called(user, root)) is nn.Identity else [user])]


def _itself(node: Any, root: nn.Module) -> Any:
    """The node whose value nn.Identity passes on."""
    while isinstance(node, fx.Node) and _kind(_called(node, root)) is nn.Identity:
        node = node.args[0]
    return node


def _then(node: fx.Node, root: nn.Module) -> tuple[str, list[fx.Node]]:
    """What a norm should wait for, and the nodes up to the unit's end."""
    users = _readers(node, root)
    if len(users) != 1:
        return "", [node]
    if _activates(users[0], root):
        return "activation", [node, users[0]]
    in_place = users[0].target in (operator.iadd, "add_")
    first, second = (_itself(each, root) for each in users[0].args) if _adds(users[0]) else (None, None)
    if first is second or not isinstance(first, fx.Node) or not isinstance(second, fx.Node) or (
            in_place and first is not node):
        return "", [node]
    after = _readers(users[0], root)
    if len(after) == 1 and _activates(after[0], root):
        return "add activation", [node, users[0], after[0]]
    return "add", [node, users[0]]


def _around(nodes: list[fx.Node], root: nn.Module) -> tuple[nn.Module, ...]:
    """The modules that a value goes out of or comes into on the way from the first of some nodes to the last."""

    def inside(node: fx.Node) -> list[str]:
        return [path for path, _ in node.meta.get("nn_module_stack", {}).values()]

    everywhere = set.intersection(*(set(inside(node)) for node in nodes))
    found = dict.fromkeys(path for node in nodes for path in inside(node) if path not in everywhere)
    return tuple(root.get_submodule(path) for path in found)


def _called(node: Any, root: nn.Module) -> nn.Module | None:
    return root.get_submodule(node.target) if isinstance(node, fx.Node) and node.op == "call_module" else None


def _fits(norm: nn.Module | None, conv: nn.Module) -> bool:
    if _kind(norm) is nn.GroupNorm:
        return norm.num_channels == conv.out_channels
    return _kind(norm) is _BATCH_NORMS[_kind(conv)] and norm.num_features == conv.out_channels


def find_runs(model: nn.Module) -> tuple[list[Run], dict[int, str]]:
    """The runs of a model's convolutions, and why others of its norms take part in none, by id."""
    calls: dict[int, list[Run | None]] = {}
    against: dict[int, str] = {}
    with buffers_as_before(model):
        graphs = list(_graphs(model))
    for root, graph in graphs:
        mains: set[fx.Node] = set()  # sums that a unit has taken
        nodes = [node for node in graph.nodes if _kind(_called(node, root)) in CONVOLUTIONS]
        # A shortcut's strided 1x1 convolution leaves the sum to the other summand's.
        nodes.sort(key=lambda node: _is_strided_point(_called(node, root)))
        for node in nodes:
            conv = _called(node, root)
            users = _readers(node, root)
            norm = _called(users[0], root) if len(users) == 1 else None
            fits = _fits(norm, conv)
            then, nodes = _then(users[0] if fits else node, root)
            if not fits:
                run = Run(conv, None, then, around=_around(nodes, root)) if then == "activation" else None
                calls.setdefault(id(conv), []).append(run)
                continue
            total = _readers(users[0], root)[0] if then.startswith("add") else None
            if total in mains:
                then, nodes = "", users
            elif total is not None:
                mains.add(total)
            run = Run(conv, norm, then, not then and _is_strided_point(conv), _around([node, *nodes], root))
            if not then.endswith("activation") and _changed_in_place(nodes[-1], root):
                against[id(norm)] = "what follows changes its output in place"
                run = None
            elif isinstance(node.args[0] if node.args else None, fx.Node) and _changed_in_place(node.args[0], root):
                against[id(norm)] = "its convolution's input is changed in place"
                run = None
            calls.setdefault(id(conv), []).append(run)
    runs = [each[0] for each in calls.values() if each[0] is not None and all(run == each[0] for run in each)]
    return runs, against


def _is_strided_point(conv: nn.Module) -> bool:
    return all(k == 1 for k in conv.kernel_size) and any(s > 1 for s in conv.stride)
