"""Convolution, norm and activation of an existing model as one `conv_norm_act`, without a change to its forward.

`find_runs` traces a model to learn what follows each convolution. While the model runs, a converted convolution and its
norm return a `Pending`, which `+` and an activation complete; whatever else touches it makes it a tensor first. So the
tracing decides what is joined, never whether the result is right. For that a `Call` holds all that PyTorch's layers
would have read when they were called, whenever it runs.
"""

import contextlib
import dataclasses
import math
import operator
import random
import sys
import types
import warnings
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable
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
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version


@dataclasses.dataclass(frozen=True)
class Modes:
    """What of the state around a call decides on what it computes."""

    kind: str  # of device
    gradients: bool
    autocast: bool
    dtype: torch.dtype | None  # autocast's

    @staticmethod
    def now(kind: str) -> "Modes":
        gradients = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
            return Modes(kind, gradients, False, None)
        return Modes(kind, gradients, True, torch.get_autocast_dtype(kind))

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if torch.is_inference_mode_enabled():
                stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.set_grad_enabled(self.gradients))
            if Modes.now(self.kind) != self:
                stack.enter_context(torch.autocast(self.kind, self.dtype, self.autocast))
            yield


def seeded(x: Tensor) -> torch.Generator | None:
    """What a call rounds by when it runs at last. Seeded when it is called: so the default generator is at the same
    point behind it whether it waits or not, as a reentrant checkpoint's two runs need."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter) or x.is_meta or (
            x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    return torch.Generator(x.device).manual_seed(int(torch.ops.remnant.draw_seed(x.new_empty(0, device="cpu"))[0]))


@dataclasses.dataclass
class Call:
    """One run of a convolution and perhaps its norm, with what they read when they were called."""

    conv: Any
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    memory: str
    modes: Modes
    versions: tuple[int, int]  # of input and weight
    shape: tuple[int, ...]  # of the output
    generator: torch.Generator | None = None
    norm: dict[str, Any] | None = None  # conv_norm_act's arguments
    updates: bool = False  # the norm's running statistics take this batch
    done: bool = False  # they have it
    recompute: bool = False  # the unit keeps its input alone
    around: tuple[nn.Module, ...] = ()

    @staticmethod
    def of(conv: Any, input: Tensor, memory: str) -> "Call":
        weight, bias = conv.weight, conv.bias
        sizes = zip(input.shape[2:], padding_of(conv) or [], conv.dilation, weight.shape[2:], conv.stride, strict=True)
        shape = (input.shape[0], weight.shape[0], *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, p, d, k, s in sizes))
        return Call(conv, input, weight, bias, memory, Modes.now(input.device.type),
                    (version_of(input), version_of(weight)), shape, None if memory == "exact" else seeded(input),
                    around=conv.around)

    def normed(self, norm: Any, recompute: bool) -> "Call":
        """With what a norm reads, and all that it writes but for its running statistics."""
        if isinstance(norm, nn.GroupNorm):
            updates, named = False, {"norm": f"group:groups={norm.num_groups}"}
        else:
            updates = norm.training and norm.track_running_stats and norm.running_mean is not None
            momentum = 0.0 if norm.momentum is None else norm.momentum
            if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)
                if norm.momentum is None:
                    momentum = 1.0 / float(norm.num_batches_tracked)
            training = norm.training or norm.running_mean is None
            statistics = updates or not training
            named = {"training": training, "momentum": momentum,
                     "running_mean": norm.running_mean if statistics else None,
                     "running_var": norm.running_var if statistics else None}
        named |= {"norm_weight": norm.weight, "norm_bias": norm.bias, "eps": norm.eps}
        return dataclasses.replace(self, norm=named, updates=updates, recompute=recompute, around=norm.around)

    @property
    def sound(self) -> bool:
        """Whether it will run, or else raise where PyTorch would: at once."""
        known = self.modes.autocast or self.input.dtype == self.weight.dtype
        return known and self.input.shape[1] == self.weight.shape[1] * self.conv.groups and min(self.shape[2:]) > 0

    @property
    def dtype(self) -> torch.dtype:
        cast = self.modes.autocast and self.input.dtype != torch.double  # which autocast leaves as it is
        return self.modes.dtype if cast else self.input.dtype

    def check(self) -> None:
        for x, version, name in zip((self.input, self.weight), self.versions, ("input", "weight"), strict=True):
            if version_of(x) != version and not torch.compiler.is_compiling():
                raise RuntimeError(f"convert: the {name} of {self.conv} was changed in place before the norm or "
                                   "activation behind it was read; change a copy, or give the layer the setting "
                                   "'eager' by overrides")

    def run(self, residual: Tensor | None, activation: str) -> Tensor:
        conv, named = self.conv, {"norm": "none"} if self.norm is None else self.norm
        if self.updates and self.done:
            named = {**named, "running_mean": None, "running_var": None}
        self.done = True
        self.check()
        return _ops.conv_norm_act(
            self.input, self.weight, self.bias, residual=residual, stride=conv.stride, padding=padding_of(conv),
            dilation=conv.dilation, groups=conv.groups, activation=activation, memory=self.memory,
            generator=self.generator, recompute=self.recompute, **named)

    def draw_for(self, activation: str) -> None:
        """Draws what an activation's layer that joined draws when it is alone, as it is where no gradient is wanted."""
        if activation == "silu" and any(
                isinstance(each, nn.SiLU) and hasattr(each, "memory") and each.memory.bits and not each.inplace
                for each in self.around):
            torch.ops.remnant.draw_seed(self.input)

    def __del__(self) -> None:
        # A norm whose output nobody reads counts its batch all the same.
        if self.updates and not self.done and not sys.is_finalizing():
            try:
                with self.modes.restored(), torch.no_grad():
                    self.run(None, "identity")
            except RuntimeError as error:
                warnings.warn(f"the running statistics behind {self.conv} miss a batch: {error}", stacklevel=2)


@dataclasses.dataclass(frozen=True)
class Unit:
    """What a Pending stands for. then: what may join it, "norm" or one of Run's, or "sum" with a residual."""

    call: Call
    then: str
    residual: Tensor | None = None
    activation: str = "identity"

    def run(self) -> Tensor:
        call = self.call
        call.check()
        with call.modes.restored():
            if call.norm is None and call.memory == "exact" and self.activation == "identity":
                return call.conv._conv_forward(call.input, call.weight, call.bias)
            return call.run(self.residual, self.activation)

    def tensors(self) -> dict[str, Tensor]:
        call, norm = self.call, self.call.norm or {}
        named = {"input": call.input, "weight": call.weight, "bias": call.bias, "residual": self.residual,
                 "norm_weight": norm.get("norm_weight"), "norm_bias": norm.get("norm_bias")}
        return {name: x for name, x in named.items() if x is not None}

    def on(self, tensors: dict[str, Tensor]) -> "Unit":
        """The same of other tensors, which counts for no statistics."""
        tensors = dict(tensors)
        residual = tensors.pop("residual", None)
        own = {name: tensors.pop(name) for name in ("input", "weight", "bias") if name in tensors}
        norm = None if self.call.norm is None else {**self.call.norm, **tensors}
        return dataclasses.replace(self, residual=residual,
                                   call=dataclasses.replace(self.call, done=True, norm=norm, **own))


class _Joint(torch.autograd.Function):
    """Puts a Pending into the graph, for what takes it in past __torch_function__: another autograd.Function.

    Behind the tensors of its unit, or without one behind the tensor itself.
    """

    @staticmethod
    def forward(ctx: Any, pending: "Pending", unit: Unit | None, *tensors: Tensor) -> Tensor:
        ctx.mark_dirty(pending)
        ctx.set_materialize_grads(False)
        ctx.unit = unit
        return pending

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2:]
        if gradient is None or ctx.unit is None:
            return (None, None, *(gradient for _ in wanted))
        # By itself: a tensor of the unit may come from another one.
        tensors = ctx.unit.tensors()
        leaves = {name: x.detach().requires_grad_(want)
                  for (name, x), want in zip(tensors.items(), wanted, strict=True)}
        found = iter(torch.autograd.grad(ctx.unit.on(leaves).run(), [x for x in leaves.values() if x.requires_grad],
                                         gradient, allow_unused=True))
        return (None, None, *(next(found) if want else None for want in wanted))


class Pending(Tensor):
    """A convolution's output that is not computed yet, since norm, sum and activation may join it.

    It has no data. What gets by __torch_function__ comes to _Joint in the graph, and to __torch_dispatch__ below it.
    """

    unit: Unit
    made: Tensor | None

    @staticmethod
    def of(unit: Unit) -> "Pending":
        call = unit.call
        self = Tensor._make_wrapper_subclass(Pending, call.shape, dtype=call.dtype, device=call.input.device)
        return self.become(unit)

    def become(self, unit: Unit, made: Tensor | None = None) -> "Pending":
        self.unit, self.made = unit, made
        return self._join(unit, *unit.tensors().values())

    def _join(self, unit: Unit | None, *tensors: Tensor) -> "Pending":
        with torch._C.DisableTorchFunctionSubclass():
            return _Joint.apply(self, unit, *tensors)

    @property
    def open(self) -> bool:
        """Whether something can join: what it computes does not depend on whether it waits."""
        modes = self.unit.call.modes
        return self.made is None and modes == Modes.now(modes.kind)

    def value(self) -> Tensor:
        """The tensor itself, for a reader that takes no part in the unit."""
        if self.made is None:
            self.made = self.unit.run()
        return self.made

    @classmethod
    def __torch_function__(cls, func: Callable, types: Iterable[type], args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _ACTIVATIONS:
            first = args[0] if args else kwargs.get("input")
            activation = activation_of(func, args, kwargs)
            if isinstance(first, Pending) and activation and first.unit.then in ("activation", "sum") and first.open:
                unit = dataclasses.replace(first.unit, then="", activation=activation)
                result = unit.call.run(unit.residual, activation)
                unit.call.draw_for(activation)
                if kwargs.get("inplace") or func.__name__.endswith("_"):
                    first.become(unit, result)  # the same tensor in the reader's eyes
                return result
        elif len(args) == 2 and not kwargs and (func in _ADDS or func in _ADDS_IN_PLACE):
            main, other = args
            if func in _ADDS and not (isinstance(main, Pending) and main.takes(other)):
                main, other = other, main
            if isinstance(main, Pending) and main.takes(other):
                return main.plus(other, func in _ADDS_IN_PLACE)
        read: list[tuple[Pending, int]] = []

        def value(x: Any) -> Any:
            if not isinstance(x, Pending):
                return x
            made = x.value()
            read.append((x, version_of(made)))
            return made

        args, kwargs = tree_map(value, (args, kwargs))
        result = func(*args, **kwargs)
        for pending, version in read:
            if version_of(pending.value()) != version:  # changed in place
                pending._join(None, pending.value())
        return result

    @classmethod
    def __torch_dispatch__(cls, func: Callable, types: Iterable[type], args: tuple[Any, ...] = (),
                           kwargs: dict[str, Any] | None = None) -> Any:
        def data(x: Any) -> Any:
            if not isinstance(x, Pending):
                return x
            # Nothing is recorded here, so that what runs is no value for readers above.
            return (x.unit.run() if x.made is None else x.made).detach().to(x.unit.call.dtype)

        args, kwargs = tree_map(data, (args, kwargs or {}))
        return func(*args, **kwargs)

    def takes(self, other: Any) -> bool:
        """Whether a summand can join the unit."""
        if not self.unit.then.startswith("add") or not isinstance(other, Tensor) or not self.open:
            return False
        if isinstance(other, Pending):
            other = other.value()
        return tuple(other.shape) == self.unit.call.shape and other.dtype == self.unit.call.dtype

    def plus(self, other: Tensor, in_place: bool) -> Tensor:
        other = other.value() if isinstance(other, Pending) else other
        unit = dataclasses.replace(self.unit, then="sum", residual=other)
        if self.unit.then == "add":
            result = unit.call.run(other, "identity")
            if in_place:
                self.become(unit, result)
            return result
        return self.become(unit) if in_place else Pending.of(unit)


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


def _reachable(model: nn.Module) -> list[Any]:
    """The dictionaries, lists, sets and deques that a model's Python may write into."""
    found: dict[int, Any] = {}
    seen: dict[int, Any] = {}
    left: list[Any] = [model]
    while left:
        x = left.pop()
        if id(x) in seen or isinstance(x, (Tensor, type, types.ModuleType, types.FunctionType, str, bytes, int, float)):
            continue
        home = type(x).__module__.partition(".")[0]
        seen[id(x)] = x  # which keeps its id its own
        if type(x) in (dict, OrderedDict, defaultdict):
            found[id(x)] = x
            left.extend(x.values())
        elif type(x) in (list, set, deque, tuple):
            if type(x) is not tuple:
                found[id(x)] = x
            left.extend(x)
        elif home not in sys.stdlib_module_names and isinstance(getattr(x, "__dict__", None), dict):
            left.append(x.__dict__)  # not of loggers and locks, which are everybody's
    return list(found.values())


@contextlib.contextmanager
def _state_as_before(model: nn.Module) -> Iterator[None]:
    """Puts back what a forward's Python writes into its model, proxies while it is traced, and random states."""
    held = [(each, each.copy()) for each in _reachable(model)]
    devices = sorted({x.device.index or 0 for x in model.parameters() if x.is_cuda})
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices, device_type="cuda"), buffers_as_before(model):
            yield
    finally:
        random.setstate(state)
        for each, before in held:
            if _contents(each) == _contents(before):
                continue
            each.clear()
            if isinstance(each, (dict, set)):
                each.update(before)
            else:
                each.extend(before)


def _contents(x: Any) -> list[Any]:
    return [(id(key), id(value)) for key, value in x.items()] if isinstance(x, dict) else [id(each) for each in x]


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
    if not any(isinstance(each, CONVOLUTIONS) for each in model.modules()):
        return [], {}
    with _state_as_before(model):
        return _runs(list(_graphs(model)))


def _runs(graphs: list[tuple[nn.Module, fx.Graph]]) -> tuple[list[Run], dict[int, str]]:
    calls: dict[int, list[Run | None]] = {}
    against: dict[int, str] = {}
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
