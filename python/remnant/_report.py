"""remnant.memory_report: what a model keeps for its backward pass, layer by layer, and its peak."""

import contextlib
import dataclasses
import html
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from remnant._ops import linear_code_bytes
from remnant._policy import setting_of

_MODEL, _LOSS = "(model)", "(loss)"
_COLUMNS = ("layer", "op", "policy", "shape", "dtype", "count", "kept_bytes", "predicted_bytes", "eager_bytes")
_SOMETIMES = ("policy", "predicted_bytes", "eager_bytes")  # shown where one is known
_SUMS = ("count", "kept_bytes", "predicted_bytes", "eager_bytes")


def memory_report(
    model: nn.Module,
    *inputs: Any,
    loss: Callable[[Any], Tensor] | None = None,
    eager_model: nn.Module | None = None,
    eager: bool = False,
    **kwargs: Any,
) -> "MemoryReport":
    """Runs model(*inputs, **kwargs) and its backward pass, and says what is kept for backward and the peak.

    The model is called as it is, in training or evaluation mode, twice: once to see what is saved, once with
    its backward pass for the peak. Gradients, buffers, random state and hooks are as before afterwards.

        print(remnant.memory_report(model, tokens, loss=lambda output: output.mean()))

        >>> layer = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
        >>> remnant.memory_report(layer, torch.randn(4, 8)).kept_bytes
        128

    Args:
        model: any module.
        inputs: its arguments, with what they contain left out of the counts.
        loss: makes of the model's output the number that backward starts from. When None: the output's own
            `.loss` where it has one, else the sum of the floating-point tensors in the output.
        eager_model: measured beside it, with the same inputs; `report.eager` is its report.
        eager: of a converted model, whether it is measured as it was before `remnant.convert` too. That needs the
            memory of PyTorch's own step meanwhile.
        kwargs: the model's keyword arguments.

    Returns:
        A MemoryReport: print(report), report.rows, report.kept_bytes, report.peak_bytes, report.to_html(),
        report.plot(), report.log(writer, step), report.compare(other).

    Kept bytes are those of the storages that the graph holds for backward at the end of the forward, without
    parameters, buffers and inputs, each storage once, in the row of the op that saved it first. Peak bytes
    are the highest sum of live allocations beyond what was live before, with room for gradients made
    beforehand. What a node holds outside of its saved tensors is not seen, nor are rows inside of compiled
    modules told apart by layer.

    Raises:
        TypeError: model is not a module, or loss gives no tensor.
        ValueError: a model in which nothing needs a gradient, or a loss of more than one element.
        RuntimeError: a DistributedDataParallel wrapper, which counts its backwards: pass its module; or a profiler
            that runs already, on the host.
    """
    from remnant._convert import reverted  # which imports this file

    _check(model)
    if eager_model is not None:
        _check(eager_model)
    report = _measure(model, inputs, kwargs, loss)
    if eager_model is not None:
        report.eager = _measure(eager_model, inputs, kwargs, loss)
    elif eager:
        with reverted(model):
            report.eager = _measure(model, inputs, kwargs, loss)
    if report.eager is not None:
        _put_beside(report.rows, report.eager.layers())
    return report


def _put_beside(rows: list[dict[str, Any]], eager: dict[str, int]) -> None:
    """Each layer's bytes in its first row, 0 in its others; a layer that keeps nothing here gets a row for them."""
    left = dict(eager)
    for row in rows:
        row["eager_bytes"] = left.pop(row["layer"], 0)
    for layer, size in left.items():
        empty = {"layer": layer, "op": "-", "policy": None, "shape": (), "dtype": "-", "count": 0, "kept_bytes": 0}
        rows.append({**empty, "predicted_bytes": None, "eager_bytes": size})


class MemoryReport:
    """What a forward keeps for its backward pass; made by remnant.memory_report.

    Attributes:
        rows: one dict for each layer, op, shape and dtype: layer (the module's name), op (the autograd node),
            policy (of a converted layer, else None), shape, dtype, count (of storages), kept_bytes; and of the whole
            layer, in its first row, predicted_bytes (None where no closed form is known: all but linear layers that
            keep codes) and eager_bytes (None where eager was not measured). pandas.DataFrame(report.rows) takes them.
        kept_bytes: their sum.
        peak_bytes: the highest sum of live allocations in a forward and backward.
        model: the model's class.
        eager: another report beside it, or None.
    """

    def __init__(
        self, rows: list[dict[str, Any]], peak_bytes: int, model: str = "", eager: "MemoryReport | None" = None
    ) -> None:
        self.rows = rows
        self.peak_bytes = peak_bytes
        self.model = model
        self.eager = eager

    @property
    def kept_bytes(self) -> int:
        """Bytes kept for backward at the end of the forward."""
        return sum(row["kept_bytes"] for row in self.rows)

    def layers(self) -> dict[str, int]:
        """Kept bytes of each layer, in the order of the forward."""
        found: dict[str, int] = {}
        for row in self.rows:
            found[row["layer"]] = found.get(row["layer"], 0) + row["kept_bytes"]
        return found

    def folded(self) -> list[dict[str, Any]]:
        """The rows with equal layers as one: `layers.0.linear` and `layers.1.linear` are `layers.*.linear`.

        Layers are equal where their names differ in numbers alone and they keep the same.
        """
        contents: dict[str, tuple[tuple[Any, ...], ...]] = {}
        for row in self.rows:
            layer = row["layer"]
            contents[layer] = (*contents.get(layer, ()), tuple(row.get(column) for column in _COLUMNS[1:]))
        result = []
        for name, rows, layers in folded_names(contents):
            for row in rows:
                one = dict(zip(_COLUMNS, (name, *row), strict=True))
                one.update({column: one[column] * layers for column in _SUMS if one[column] is not None})
                result.append(one)
        return result

    def _table(self) -> list[list[str]]:
        rows = self.folded()
        known = {column for row in rows for column in _COLUMNS if row[column] is not None}
        shown = [column for column in _COLUMNS if column in known or column not in _SOMETIMES]
        lines = [[column.removesuffix("_bytes") for column in shown]]
        return lines + [[_cell(column, row[column]) for column in shown] for row in rows]

    def _totals(self) -> str:
        text = f"kept {_size(self.kept_bytes)}, peak {_size(self.peak_bytes)}"
        if self.eager is not None:
            text += f"; eager: kept {_size(self.eager.kept_bytes)}, peak {_size(self.eager.peak_bytes)}"
        return text

    def __str__(self) -> str:
        table = self._table()
        return f"{self.model}: {self._totals()}\n{_aligned(table, table[0].index('count'))}"

    def __repr__(self) -> str:
        return f"<MemoryReport of {self.model}: {self._totals()}>"

    def to_html(self, path: str | PathLike[str] | None = None) -> str:
        """The table as a piece of HTML, also written to path where one is given."""
        head, *body = ([html.escape(cell) for cell in line] for line in self._table())
        text = "\n".join(
            [
                '<table class="remnant-memory">',
                f"<caption>{html.escape(f'{self.model}: {self._totals()}')}</caption>",
                "<thead><tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr></thead>",
                "<tbody>",
                *("<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in body),
                "</tbody>",
                "</table>\n",
            ]
        )
        if path is not None:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
        return text

    def _repr_html_(self) -> str:
        return self.to_html()

    def plot(self, path: str | PathLike[str] | None = None) -> Any:
        """Bars of kept bytes a layer, eager's beside them, as a Matplotlib figure, also saved to path.

        Raises:
            ImportError: Matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("MemoryReport.plot needs Matplotlib, which is not installed: "
                              "pip install matplotlib, or use to_html()") from error
        reports = {"kept": self} if self.eager is None else {"kept": self, "eager": self.eager}
        names = list(dict.fromkeys(name for report in reports.values() for name in report.layers()))
        figure = Figure(figsize=(8, 1.2 + 0.25 * max(len(names), 1) * len(reports)), layout="constrained")
        axes = figure.add_subplot()
        height = 0.8 / len(reports)
        for k, (label, report) in enumerate(reports.items()):
            layers = report.layers()
            axes.barh(
                [y + k * height for y in range(len(names))], [layers.get(name, 0) / 1e6 for name in names], height,
                label=label,
            )  # fmt: skip
        axes.set_yticks([y + 0.4 - height / 2 for y in range(len(names))], names)
        axes.invert_yaxis()
        axes.set_xlabel("kept for backward, MB")
        axes.set_title(f"{self.model}: {self._totals()}", fontsize="medium")
        if len(reports) > 1:
            axes.legend()
        if path is not None:
            figure.savefig(path)
        return figure

    def log(self, writer: Any, step: int) -> None:
        """Writes the totals to a TensorBoard SummaryWriter, or anything with add_scalar(tag, value, step)."""
        for prefix, report in (("memory", self), ("memory/eager", self.eager)):
            if report is not None:
                writer.add_scalar(f"{prefix}/kept_bytes", report.kept_bytes, step)
                writer.add_scalar(f"{prefix}/peak_bytes", report.peak_bytes, step)

    def compare(self, other: "MemoryReport") -> "Comparison":
        """This report beside another, layer by layer."""
        if not isinstance(other, MemoryReport):
            raise TypeError(f"compare: other must be a MemoryReport, got {type(other).__name__}")
        return Comparison(self, other)


class Comparison:
    """Two reports side by side; made by MemoryReport.compare.

    Attributes:
        rows: one dict for each layer of either: layer, kept_bytes, other_bytes.
        kept_ratio: this report's kept bytes / the other's; None where the other keeps nothing.
        peak_ratio: the same of peak bytes.
    """

    def __init__(self, report: MemoryReport, other: MemoryReport) -> None:
        mine, others = report.layers(), other.layers()
        self.rows = [
            {"layer": name, "kept_bytes": mine.get(name, 0), "other_bytes": others.get(name, 0)}
            for name in dict.fromkeys([*mine, *others])
        ]
        self.kept_ratio = report.kept_bytes / other.kept_bytes if other.kept_bytes else None
        self.peak_ratio = report.peak_bytes / other.peak_bytes if other.peak_bytes else None
        self._totals = [
            [name, _size(a), _size(b), _ratio(a, b)]
            for name, a, b in (
                ("kept", report.kept_bytes, other.kept_bytes), ("peak", report.peak_bytes, other.peak_bytes)
            )
        ]  # fmt: skip

    def __str__(self) -> str:
        lines = [["layer", "kept", "other", "ratio"]]
        for row in self.rows:
            a, b = row["kept_bytes"], row["other_bytes"]
            lines.append([row["layer"], _size(a), _size(b), _ratio(a, b)])
        return _aligned([*lines, *self._totals], 1)


def folded_names(contents: Mapping[str, Any]) -> list[tuple[str, Any, int]]:
    """(name, content, how many) of layers, with those whose names differ in numbers alone and whose contents are equal
    as one: `layers.0.linear` and `layers.1.linear` are `layers.*.linear`."""
    groups: dict[tuple[str, Any], list[str]] = {}
    for layer, content in contents.items():
        groups.setdefault((_pattern(layer), content), []).append(layer)
    return [(_common(layers), content, len(layers)) for (_, content), layers in groups.items()]


def _pattern(layer: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in layer.split("."))


def _common(layers: list[str]) -> str:
    """The names as one, with * where they differ."""
    parts = zip(*(layer.split(".") for layer in layers), strict=True)
    return ".".join(each[0] if len(set(each)) == 1 else "*" for each in parts)


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def _cell(column: str, value: Any) -> str:
    if column == "shape":
        return "x".join(map(str, value)) or "1"
    if column in ("predicted_bytes", "eager_bytes"):  # of a whole layer, in its first row
        return _size(value) if value else ""
    return "-" if value is None else _size(value) if column == "kept_bytes" else str(value)


def _ratio(a: int, b: int) -> str:
    return f"{a / b:.3f}" if b else "-"


def _aligned(lines: list[list[str]], left: int) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"memory_report: model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise RuntimeError("memory_report: model is a DistributedDataParallel, whose forwards and backwards must "
                           "alternate on all processes: pass model.module")


def _measure(
    model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any], loss: Callable[[Any], Tensor] | None
) -> MemoryReport:
    def forward() -> Tensor:
        output = model(*inputs, **kwargs)
        return loss_of(output, loss, "memory_report")

    tensors = [x for x in tree_leaves((inputs, kwargs)) if isinstance(x, Tensor)]
    devices = {x.device for x in (*model.parameters(), *model.buffers(), *tensors) if x.device.type == "cuda"}
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[x.index or 0 for x in devices], device_type="cuda"))
        stack.enter_context(buffers_as_before(model))
        stack.enter_context(torch.enable_grad())
        state = torch.get_rng_state()
        rows = _kept_rows(model, tensors, forward)
        torch.set_rng_state(state)
        peak = _peak_bytes(model, tensors, forward, sorted(devices, key=str))
    return MemoryReport(rows, peak, type(model).__name__)


def loss_of(output: Any, loss: Callable[[Any], Tensor] | None, caller: str) -> Tensor:
    """The number that backward starts from."""
    if loss is not None:
        value = loss(output)
        if not isinstance(value, Tensor):
            raise TypeError(f"{caller}: loss must give a tensor, got {type(value).__name__}")
        if value.numel() != 1:
            raise ValueError(f"{caller}: loss must give one number, got shape {list(value.shape)}")
    elif isinstance(getattr(output, "loss", None), Tensor):
        value = output.loss
    else:
        parts = [x for x in _tensors(output) if x.requires_grad]
        value = torch.stack([x.abs().sum() if x.is_complex() else x.sum().float() for x in parts]).sum() \
            if parts else torch.zeros(())
    if not value.requires_grad:
        raise ValueError(f"{caller}: nothing in the model's output needs a gradient, so nothing is kept: "
                         "check requires_grad of its parameters")
    return value


def _tensors(output: Any) -> Iterator[Tensor]:
    for x in tree_leaves(output):
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, Mapping):  # of a kind that tree_leaves does not know
            yield from _tensors(dict(x))
        elif dataclasses.is_dataclass(x) and not isinstance(x, type):
            yield from _tensors([getattr(x, field.name) for field in dataclasses.fields(x)])


@contextlib.contextmanager
def buffers_as_before(model: nn.Module) -> Iterator[None]:
    """Puts back what the forward writes into buffers, such as running statistics."""
    modules = [(module, dict(module._buffers)) for module in model.modules()]
    values = {id(x): (x, x.detach().clone(), _version(x)) for _, buffers in modules for x in buffers.values()
              if x is not None and not is_lazy(x) and not x.is_meta and not isinstance(x, FakeTensor)}
    try:
        yield
    finally:
        for module, buffers in modules:
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for x, value, version in values.values():
                # What kernels write, such as running statistics, counts no version; sparse ones cannot be compared.
                if _version(x) != version or (x.layout == torch.strided and not torch.equal(x, value)):
                    x.copy_(value)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


@contextlib.contextmanager
def _layer_names(model: nn.Module) -> Iterator[tuple[list[str], dict[str, int]]]:
    """A stack of the names of the modules whose forward is running; and by name, what is to be kept where known."""
    running: list[str] = []
    predicted: dict[str, int] = {}
    handles = []

    def enter(name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        running.append(name)
        policy = setting_of(module)
        if isinstance(module, nn.Linear) and policy is not None and policy.bits and inputs:
            size = linear_code_bytes(inputs[0].numel(), policy.bits) if module.weight.requires_grad else 0
            predicted[name] = predicted.get(name, 0) + size

    def leave(*_: Any) -> None:
        running.pop()

    for hook in (enter, leave):
        hook.looks_at_nothing = True  # type: ignore[attr-defined]  # units may wait in spite of it
    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(partial(enter, name or _MODEL)))
            handles.append(module.register_forward_hook(leave, always_call=True))
        yield running, predicted
    finally:
        for handle in handles:
            handle.remove()


def _kept_rows(model: nn.Module, inputs: list[Tensor], forward: Callable[[], Tensor]) -> list[dict[str, Any]]:
    modules = {name or _MODEL: module for name, module in model.named_modules()}
    own = [*model.parameters(), *model.buffers(), *inputs]
    left_out = {_address(x) for x in own}
    seen: list[tuple[weakref.ref[Tensor], StorageWeakRef, dict[str, Any], int]] = []
    with _layer_names(model) as (running, predicted):

        def pack(x: Tensor) -> Tensor:
            held = x.detach()  # a node's own output would hold the node, for ever
            address = _address(x)
            leaf = x.is_leaf and x.requires_grad
            if address is not None and address not in left_out and not leaf and x.untyped_storage().nbytes() > 0:
                layer = running[-1] if running else _LOSS
                policy = setting_of(modules[layer]) if layer in modules else None
                row = {
                    "layer": layer,
                    "op": "",
                    "policy": None if policy is None else str(policy),
                    "shape": tuple(x.shape),
                    "dtype": str(x.dtype).removeprefix("torch."),
                    "count": 1,
                    "kept_bytes": x.untyped_storage().nbytes(),
                    "predicted_bytes": None,
                    "eager_bytes": None,
                }
                # The node that is saving was numbered last.
                number = torch.autograd._get_sequence_nr() - 1
                seen.append((weakref.ref(held), StorageWeakRef(x.untyped_storage()), row, number))
            return held

        with saved_tensors_hooks(pack, lambda x: x):
            value = forward()
    names = _node_names(value)
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    counted = set()
    for held, storage, row, number in seen:
        # A graph that the loss does not need has let go of what it saved.
        if held() is None or storage.cdata in counted:
            continue
        counted.add(storage.cdata)
        row["op"] = names.get(number, "?")
        key = tuple(row[column] for column in ("layer", "op", "shape", "dtype"))
        if key in rows:
            rows[key]["count"] += 1
            rows[key]["kept_bytes"] += row["kept_bytes"]
        else:
            rows[key] = row
            if row["layer"] in predicted:
                row["predicted_bytes"], predicted[row["layer"]] = predicted[row["layer"]], 0
    return list(rows.values())


def _address(x: Tensor) -> int | None:
    """What tells storages apart; None for a tensor without one of its own."""
    try:
        return x.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):
        return None


def _node_names(value: Tensor) -> dict[int, str]:
    """The names of the nodes of the graph by their numbers."""
    names: dict[int, str] = {}
    stack, visited = [value.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        names[node._sequence_nr()] = _op_name(node.name())
        stack.extend(following for following, _ in node.next_functions)
    return names


def _op_name(node: str) -> str:
    """AddmmBackward0 is Addmm; a C++ function of a library is named as its struct, without Function."""
    custom = re.fullmatch(r".*CppNode<(.*)>", node)
    if custom:
        scope = custom[1].split("::")
        name = re.sub(r"(Function|FunctionNode)$", "", scope[-1])
        return f"{scope[0]}::{name}" if len(scope) > 1 else name
    return re.sub(r"Backward\d*$", "", node.split("::")[-1])


def _peak_bytes(
    model: nn.Module, inputs: list[Tensor], forward: Callable[[], Tensor], devices: list[torch.device]
) -> int:
    leaves = [x for x in (*model.parameters(), *inputs) if x.is_leaf and x.requires_grad]

    def step() -> None:
        forward().backward()

    with gradients_aside(leaves):
        if devices:
            live = []
            for device in devices:
                torch.cuda.synchronize(device)
                torch.cuda.reset_peak_memory_stats(device)
                live.append(torch.cuda.memory_allocated(device))
            step()
            return sum(torch.cuda.max_memory_allocated(d) - a for d, a in zip(devices, live, strict=True))
        return host_peak(step)


@contextlib.contextmanager
def gradients_aside(leaves: Iterable[Tensor]) -> Iterator[None]:
    """Inside, gradients are zeros that exist, and no hook of a leaf runs: it may step an optimizer. Then as before."""
    leaves = list({id(x): x for x in leaves}.values())
    gradients = [x.grad for x in leaves]
    named = [getattr(x, name, None) for x in leaves for name in ("_backward_hooks", "_post_accumulate_grad_hooks")]
    hooks = [(each, dict(each)) for each in named if each]
    try:
        for each, _ in hooks:
            each.clear()
        for x in leaves:
            x.grad = torch.zeros_like(x)
        yield
    finally:
        for x, gradient in zip(leaves, gradients, strict=True):
            x.grad = gradient
        for each, before in hooks:
            each.update(before)


def host_peak(step: Callable[[], None]) -> int:
    if torch.autograd._profiler_enabled():
        raise RuntimeError("a profiler is running, which measuring a step's peak would end: measure outside of it")
    start_host_peak()
    try:
        step()
    finally:
        peak = end_host_peak()
    return peak


def start_host_peak() -> None:
    # The profiler of torch.profiler sees the same allocations, but writes lines of its own to stderr.
    config = torch.autograd.ProfilerConfig(
        torch.autograd.ProfilerState.CPU, False, True, False, False, False, torch._C._profiler._ExperimentalConfig()
    )
    torch.autograd._enable_profiler_legacy(config)


def end_host_peak() -> int:
    """The highest sum of what was allocated on the host since the start, less what was let go."""
    threads = torch.autograd._disable_profiler_legacy()
    records = [record for thread in threads for record in thread]
    if len(threads) > 1:
        first = records[0]
        records.sort(key=first.cpu_elapsed_us)
    live = peak = 0
    for record in records:
        if record.kind() == "memory_alloc":
            live += record.cpu_memory_usage()
            peak = max(peak, live)
    return peak
