"""remnant.memory_report: what a model keeps for its backward pass, layer by layer, and its peak."""

import contextlib
import html
import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

_MODEL, _LOSS = "(model)", "(loss)"
_COLUMNS = ("layer", "op", "shape", "dtype", "count", "kept_bytes")


def memory_report(
    model: nn.Module,
    *inputs: Any,
    loss: Callable[[Any], Tensor] | None = None,
    eager_model: nn.Module | None = None,
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
        RuntimeError: a DistributedDataParallel wrapper, which counts its backwards: pass its module.
    """
    _check(model)
    if eager_model is not None:
        _check(eager_model)
    report = _measure(model, inputs, kwargs, loss)
    if eager_model is not None:
        report.eager = _measure(eager_model, inputs, kwargs, loss)
    return report


class MemoryReport:
    """What a forward keeps for its backward pass; made by remnant.memory_report.

    Attributes:
        rows: one dict for each layer, op, shape and dtype: layer (the module's name), op (the autograd node),
            shape, dtype, count (of storages), kept_bytes; pandas.DataFrame(report.rows) takes them.
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
            contents[layer] = (*contents.get(layer, ()), tuple(row[column] for column in _COLUMNS[1:]))
        result = []
        for name, rows, layers in folded_names(contents):
            for row in rows:
                one = dict(zip(_COLUMNS, (name, *row), strict=True))
                one["count"] *= layers
                one["kept_bytes"] *= layers
                result.append(one)
        return result

    def _table(self) -> list[list[str]]:
        lines = [["layer", "op", "shape", "dtype", "count", "kept"]]
        for row in self.folded():
            shape = "x".join(map(str, row["shape"])) or "1"
            lines.append([row["layer"], row["op"], shape, row["dtype"], str(row["count"]), _size(row["kept_bytes"])])
        return lines

    def _totals(self) -> str:
        text = f"kept {_size(self.kept_bytes)}, peak {_size(self.peak_bytes)}"
        if self.eager is not None:
            text += f"; eager: kept {_size(self.eager.kept_bytes)}, peak {_size(self.eager.peak_bytes)}"
        return text

    def __str__(self) -> str:
        return f"{self.model}: {self._totals()}\n{_aligned(self._table(), 4)}"

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
        return _loss_of(output, loss)

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


def _loss_of(output: Any, loss: Callable[[Any], Tensor] | None) -> Tensor:
    if loss is not None:
        value = loss(output)
        if not isinstance(value, Tensor):
            raise TypeError(f"memory_report: loss must give a tensor, got {type(value).__name__}")
        if value.numel() != 1:
            raise ValueError(f"memory_report: loss must give one number, got shape {list(value.shape)}")
    elif isinstance(getattr(output, "loss", None), Tensor):
        value = output.loss
    else:
        parts = [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.requires_grad]
        value = torch.stack([x.abs().sum() if x.is_complex() else x.sum().float() for x in parts]).sum() \
            if parts else torch.zeros(())
    if not value.requires_grad:
        raise ValueError("memory_report: nothing in the model's output needs a gradient, so nothing is kept: "
                         "check requires_grad of its parameters")
    return value


@contextlib.contextmanager
def buffers_as_before(model: nn.Module) -> Iterator[None]:
    """Puts back what the forward writes into buffers, such as running statistics."""
    modules = [(module, dict(module._buffers)) for module in model.modules()]
    values = {id(x): (x, x.detach().clone()) for _, buffers in modules for x in buffers.values() if x is not None}
    try:
        yield
    finally:
        for module, buffers in modules:
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for x, value in values.values():
                if not torch.equal(x, value):
                    x.copy_(value)


@contextlib.contextmanager
def _layer_names(model: nn.Module) -> Iterator[list[str]]:
    """A stack of the names of the modules whose forward is running."""
    running: list[str] = []
    handles = []

    def leave(*_: Any) -> None:
        running.pop()

    leave.looks_at_nothing = True  # type: ignore[attr-defined]  # units may wait in spite of it
    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: running.append(name or _MODEL)))
            handles.append(module.register_forward_hook(leave, always_call=True))
        yield running
    finally:
        for handle in handles:
            handle.remove()


def _kept_rows(model: nn.Module, inputs: list[Tensor], forward: Callable[[], Tensor]) -> list[dict[str, Any]]:
    own = [*model.parameters(), *model.buffers(), *inputs]
    left_out = {_address(x) for x in own}
    seen: list[tuple[weakref.ref[Tensor], StorageWeakRef, dict[str, Any], int]] = []
    with _layer_names(model) as running:

        def pack(x: Tensor) -> Tensor:
            held = x.detach()  # a node's own output would hold the node, for ever
            address = _address(x)
            leaf = x.is_leaf and x.requires_grad
            if address is not None and address not in left_out and not leaf and x.untyped_storage().nbytes() > 0:
                row = {
                    "layer": running[-1] if running else _LOSS,
                    "op": "",
                    "shape": tuple(x.shape),
                    "dtype": str(x.dtype).removeprefix("torch."),
                    "count": 1,
                    "kept_bytes": x.untyped_storage().nbytes(),
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
        key = tuple(row[column] for column in _COLUMNS[:4])
        if key in rows:
            rows[key]["count"] += 1
            rows[key]["kept_bytes"] += row["kept_bytes"]
        else:
            rows[key] = row
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
    leaves = list({id(x): x for x in (*model.parameters(), *inputs) if x.is_leaf and x.requires_grad}.values())
    # Somebody who steps an optimizer when a gradient is ready must not see this backward.
    watched = any(getattr(x, "_post_accumulate_grad_hooks", None) for x in leaves)
    before = [x.grad for x in leaves]

    def step() -> None:
        value = forward()
        if watched:
            torch.autograd.grad(value, leaves, allow_unused=True)
        else:
            value.backward()

    try:
        if not watched:
            for x in leaves:
                x.grad = torch.zeros_like(x)
        if devices:
            live = []
            for device in devices:
                torch.cuda.synchronize(device)
                torch.cuda.reset_peak_memory_stats(device)
                live.append(torch.cuda.memory_allocated(device))
            step()
            return sum(torch.cuda.max_memory_allocated(d) - a for d, a in zip(devices, live, strict=True))
        return _host_peak(step)
    finally:
        for x, grad in zip(leaves, before, strict=True):
            x.grad = grad


def _host_peak(step: Callable[[], None]) -> int:
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
