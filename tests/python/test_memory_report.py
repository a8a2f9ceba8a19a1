"""remnant.memory_report: the bytes it counts, what it leaves as it was, and its forms."""

import sys
from types import SimpleNamespace

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import remnant

N, E = 48, 64


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def mlp(layers=3):
    return nn.Sequential(*(nn.Sequential(nn.Linear(E, E), nn.GELU()) for _ in range(layers)))


class Attention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.project, self.out, self.options = nn.Linear(E, 3 * E), nn.Linear(E, E), options

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (4, E // 4)).transpose(1, 2) for t in self.project(x).chunk(3, -1))
        return self.out(remnant.attention(q, k, v, **self.options).transpose(1, 2).flatten(2))


def state(model):
    return (
        [p.grad for p in model.parameters()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        {name: x.clone() for name, x in model.named_buffers()},
        [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in model.modules()],
        torch.get_rng_state(),
    )


def same_state(before, after):
    assert all(a is b for a, b in zip(before[0], after[0], strict=True))
    assert all(a is b or torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True))
    assert before[2].keys() == after[2].keys()
    assert all(torch.equal(before[2][name], after[2][name]) for name in before[2])
    assert before[3] == after[3] and torch.equal(before[4], after[4])


def test_rows_of_an_mlp():
    report = remnant.memory_report(mlp(), torch.randn(N, E))
    size = N * E * 4
    want = [
        (layer, op, None, (N, E), "float32", 1, size, None, None)
        for layer, op in (("0.1", "Gelu"), ("1.0", "Addmm"), ("1.1", "Gelu"), ("2.0", "Addmm"), ("2.1", "Gelu"))
    ]  # the first layer keeps the input, which is not counted
    assert [tuple(row.values()) for row in report.rows] == want
    assert list(report.rows[0]) == ["layer", "op", "policy", "shape", "dtype", "count", "kept_bytes", "predicted_bytes",
                                    "eager_bytes"]
    assert report.kept_bytes == 5 * size and report.peak_bytes >= report.kept_bytes


@pytest.mark.parametrize("name", ["encoder", "convolutions", "lstm", "attention", "quantized", "dropout"])
def test_totals_are_the_bytes_that_hooks_and_the_profiler_see(name, one_thread):
    model, x = {
        "encoder": lambda: (nn.TransformerEncoderLayer(E, 4, 128, dropout=0.0), torch.randn(2, N, E)),
        "convolutions": lambda: (
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
            torch.randn(2, 3, 20, 20),
        ),
        "lstm": lambda: (nn.LSTM(E, E), torch.randn(N, 2, E)),
        "attention": lambda: (Attention(), torch.randn(2, N, E)),
        "quantized": lambda: (Attention(policy="quantized:bits=4"), torch.randn(2, N, E)),
        "dropout": lambda: (nn.Sequential(nn.Linear(E, E), nn.Dropout(0.5), nn.Linear(E, E)), torch.randn(N, E)),
    }[name]()
    report = remnant.memory_report(model, x, loss=lambda y: (y[0] if isinstance(y, tuple) else y).sum())
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t.detach()

    def forward():
        y = model(x)
        return (y[0] if isinstance(y, tuple) else y).sum()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = forward()
    for t in (*model.parameters(), *model.buffers(), x):
        storages.pop(t.untyped_storage().data_ptr(), None)
    assert report.kept_bytes == sum(storages.values()) > 0
    del loss
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    assert report.peak_bytes == reference.allocations(lambda: forward().backward()).peak


def test_a_storage_counts_once_and_goes_to_its_first_reader():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(E, E), nn.Linear(E, E)

        def forward(self, x):
            h = x.sin()
            return self.first(h) + self.second(h[:, : E // 2].repeat(1, 2)) + self.second(h)

    report = remnant.memory_report(Shared(), torch.randn(N, E))
    assert report.layers() == {"first": N * E * 4, "second": N * E * 4}


def test_what_the_loss_does_not_need_is_not_kept():
    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(E, E), nn.Linear(E, E)

        def forward(self, x):
            self.b(x.clone()).exp()
            return self.a(x.clone())

    assert remnant.memory_report(Aside(), torch.randn(N, E)).layers() == {"a": N * E * 4}


def test_parameters_buffers_inputs_and_their_views_are_left_out():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(E, E))
            self.register_buffer("scale", torch.rand(N, E))

        def forward(self, x, *, more):
            return F.linear(x.view(N, E), self.weight[:8]) + F.linear(more["x"], self.weight.t()[:8]) \
                + (self.weight[:1] * self.scale[:, :E])[:, :8]

    x = torch.randn(2, N // 2, E, requires_grad=True)
    report = remnant.memory_report(Model(), x, more={"x": torch.randn(N, E)})
    assert report.rows == [] and report.kept_bytes == 0 and report.peak_bytes > 0
    assert x.grad is None
    assert "kept 0 B" in str(report)


def test_everything_is_as_before():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Flatten(), nn.Linear(128, 4)
    )
    model[5].bias.requires_grad_(False)
    x = torch.randn(2, 3, 6, 6)
    before = state(model)
    remnant.memory_report(model, x)
    same_state(before, state(model))
    model(x).sum().backward()
    model[1].eval()
    versions = [b._version for b in model.buffers()]
    before = state(model)
    remnant.memory_report(model, x)
    same_state(before, state(model))
    assert versions == [b._version for b in model.buffers()]
    with torch.no_grad():  # asked for by hand: the report needs a graph all the same
        assert remnant.memory_report(model, x).kept_bytes > 0


@pytest.mark.parametrize("where", ["forward", "loss", "backward"])
def test_an_error_leaves_everything_as_before(where):
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ZeroDivisionError("in backward")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.BatchNorm1d(E), nn.Linear(E, E)

        def forward(self, x):
            y = self.linear(self.norm(x))
            if where == "forward":
                raise ZeroDivisionError("in forward")
            return Fails.apply(y) if where == "backward" else y

    def loss(y):
        if where == "loss":
            raise ZeroDivisionError("in loss")
        return y.sum()

    model, x = Model(), torch.randn(N, E)
    before = state(model)
    with pytest.raises(ZeroDivisionError, match=f"in {where}"):
        remnant.memory_report(model, x, loss=loss)
    same_state(before, state(model))
    assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    model.forward = lambda x: model.linear(x)
    assert remnant.memory_report(model, torch.randn(N, E)).peak_bytes > 0  # no profiler runs on


def test_gradient_hooks_of_an_optimizer_do_not_run():
    model, calls = mlp(), []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: calls.append(p))
    remnant.memory_report(model, torch.randn(N, E))
    assert not calls and all(p.grad is None for p in model.parameters())


def test_losses():
    x = torch.randn(N, E)
    target = torch.randint(E, (N,))
    size = N * E * 4
    report = remnant.memory_report(mlp(1), x, loss=lambda y: F.cross_entropy(y, target))
    assert report.layers() == {"0.1": size, "(loss)": size + N * 8 + 4}

    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(E, E)

        def forward(self, x):
            y = self.linear(x)
            return SimpleNamespace(loss=y.exp().mean(), logits=y)

    assert remnant.memory_report(WithLoss(), x).layers() == {"(model)": size}
    with pytest.raises(TypeError, match="memory_report: loss must give a tensor, got float"):
        remnant.memory_report(mlp(), x, loss=lambda y: 0.5)
    with pytest.raises(ValueError, match=r"one number, got shape \[48, 64\]"):
        remnant.memory_report(mlp(), x, loss=lambda y: y)
    with pytest.raises(ValueError, match="nothing in the model's output needs a gradient"):
        remnant.memory_report(mlp().requires_grad_(False), x)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got function"):
        remnant.memory_report(lambda x: x, x)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got int"):
        remnant.memory_report(mlp(), x, eager_model=3)


def test_the_ops_of_this_library_have_names():
    report = remnant.memory_report(Attention(), torch.randn(2, N, E))
    ops = {row["op"] for row in report.rows}
    assert "remnant::Attention" in ops
    lse = [row for row in report.rows if row["shape"] == (2, 4, N)]
    assert [row["kept_bytes"] for row in lse] == [2 * 4 * N * 4]
    assert remnant.attention_residual_bytes("recompute", 8, N, N, 4) == 2 * 4 * N * 4


def test_compress_shows():
    model, x = mlp(), torch.randn(N, E)
    plain = remnant.memory_report(model, x)
    with remnant.compress(4):
        coded = remnant.memory_report(model, x)
    code = remnant.linear_code_bytes(N * E, 4)
    assert plain.kept_bytes - coded.kept_bytes == 2 * (N * E * 4 - code)
    assert {row["dtype"] for row in coded.rows if row["layer"] == "1.0"} == {"uint8", "bfloat16"}


def test_a_checkpointed_layer_keeps_its_input():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.rest = nn.Linear(E, E), mlp()

        def forward(self, x):
            return checkpoint(self.rest, self.first(x), use_reentrant=False)

    report = remnant.memory_report(Model(), torch.randn(N, E))
    assert report.kept_bytes == N * E * 4


# --- forms ------------------------------------------------------------------------------------------


def test_equal_layers_are_folded_in_print():
    report = remnant.memory_report(mlp(4), torch.randn(N, E))
    lines = str(report).splitlines()
    assert lines[0] == f"Sequential: kept 86.02 kB, peak {report.peak_bytes / 1e3:.2f} kB"
    assert lines[1].split() == ["layer", "op", "shape", "dtype", "count", "kept"]
    assert [line.split() for line in lines[2:]] == [
        ["*.1", "Gelu", "48x64", "float32", "4", "49.15", "kB"],
        ["*.0", "Addmm", "48x64", "float32", "3", "36.86", "kB"],
    ]
    assert sum(row["kept_bytes"] for row in report.folded()) == report.kept_bytes
    assert len(report.rows) == 7
    mixed = nn.Sequential(nn.Linear(E, E), nn.Sigmoid(), nn.Linear(E, 2 * E), nn.Sigmoid())
    report = remnant.memory_report(mixed, torch.randn(N, E))
    assert [row["layer"] for row in report.folded()] == ["1", "3"]  # sizes differ: not equal layers


def test_eager_beside_it():
    x = torch.randn(2, N, E)
    report = remnant.memory_report(Attention(policy="recompute"), x, eager_model=Attention(policy="exact"))
    assert report.eager.kept_bytes - report.kept_bytes == 2 * 4 * N * (N - 1) * 4  # p, not a log-sum-exp
    assert f"eager: kept {report.eager.kept_bytes / 1e3:.2f} kB" in str(report)
    assert remnant.memory_report(Attention(), x).eager is None


def converted(memory="unbiased:bits=4"):
    model = nn.Sequential(*(nn.Sequential(nn.Linear(E, E), nn.LayerNorm(E), nn.ReLU()) for _ in range(3)), nn.Softmax(-1))
    return remnant.convert(model, memory, overrides={"1.1": "exact"})


def test_a_converted_model_beside_eager():
    model, x = converted(), torch.randn(N, E, requires_grad=True)
    report = remnant.memory_report(model, x, eager=True)
    plain = remnant.memory_report(remnant.revert(converted()), x)
    assert plain.eager is None and report.eager.rows == plain.rows and report.eager.peak_bytes > report.peak_bytes
    beside = {}
    for row in report.rows:
        beside[row["layer"]] = beside.get(row["layer"], 0) + row["eager_bytes"]
    assert {name: size for name, size in beside.items() if size} == plain.layers()
    policies = {row["layer"]: row["policy"] for row in report.rows}
    assert policies["0.1"] == "unbiased:bits=4" and policies["1.1"] == "exact" and policies["3"] is None
    # Linear layers' bytes are known beforehand.
    code = remnant.linear_code_bytes(N * E, 4)
    for name in ("0.0", "1.0", "2.0"):
        assert sum(row["predicted_bytes"] for row in report.rows if row["layer"] == name) == code == report.layers()[name]
    assert {row["predicted_bytes"] for row in report.rows if not row["layer"].endswith(".0")} == {None}
    folded = report.folded()
    for column in ("count", "kept_bytes", "eager_bytes"):
        assert sum(row[column] for row in folded) == sum(row[column] for row in report.rows)
    lines = str(report).splitlines()
    assert lines[1].split() == ["layer", "op", "policy", "shape", "dtype", "count", "kept", "predicted", "eager"]
    assert f"eager: kept {plain.kept_bytes / 1e3:.2f} kB" in lines[0]
    assert "<th>predicted</th><th>eager</th>" in report.to_html()
    alone = remnant.memory_report(model, x)
    assert alone.eager is None and {row["eager_bytes"] for row in alone.rows} == {None}
    assert "eager" not in str(alone)


def test_a_layer_that_keeps_nothing_any_more_has_eager_s_bytes_too():
    model = remnant.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()))
    report = remnant.memory_report(model, torch.randn(2, 3, 8, 8), eager=True)
    assert report.layers()["1"] == 0
    assert sum(row["eager_bytes"] for row in report.rows) == report.eager.kept_bytes
    assert [line.split() for line in str(report).splitlines() if line.startswith("1 ")][0][1] == "-"


@pytest.mark.parametrize("fails", [False, True])
def test_a_converted_model_stays_as_it_is(fails):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = converted()

        def forward(self, x):
            if fails and type(self.layers[0][0]) is nn.Linear:
                raise ZeroDivisionError("in eager's forward")
            return self.layers(x)

    def everything(model):
        return [(module, type(module), dict(module.__dict__)) for module in model.modules()]

    model, x = Model(), torch.randn(N, E)
    before, said = everything(model), remnant.conversion(model)
    if fails:
        with pytest.raises(ZeroDivisionError):
            remnant.memory_report(model, x, eager=True)
    else:
        assert remnant.memory_report(model, x, eager=True).eager.kept_bytes > 0
    after = everything(model)
    assert [each[:2] for each in after] == [each[:2] for each in before]
    for (_, _, old), (_, _, new) in zip(before, after, strict=True):
        assert old.keys() == new.keys() and all(new[name] is old[name] for name in old)
    assert remnant.conversion(model) == said


def test_a_hugging_face_model_beside_eager():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                                     vocab_size=50, max_position_embeddings=16)
    model, ids = transformers.BertModel(config), torch.randint(5, 50, (2, 8))
    before = model.config._attn_implementation
    plain = remnant.memory_report(model, ids)
    remnant.convert(model, "unbiased:bits=4", overrides={"encoder.layer.1.attention": "exact"})
    said = remnant.conversion(model)
    report = remnant.memory_report(model, ids, eager=True)
    assert report.eager.kept_bytes == plain.kept_bytes and report.kept_bytes < plain.kept_bytes
    assert remnant.conversion(model) == said and model.config._attn_implementation == "remnant"
    policies = {row["layer"]: row["policy"] for row in report.rows}
    assert policies["encoder.layer.0.attention.self"] == "unbiased:bits=4"
    assert policies["encoder.layer.1.attention.self"] == "exact"
    assert remnant.revert(model).config._attn_implementation == before


def test_compare():
    x = torch.randn(N, E)
    small, large = remnant.memory_report(mlp(1), x), remnant.memory_report(mlp(2), x)
    comparison = small.compare(large)
    size = N * E * 4
    assert comparison.rows == [
        {"layer": "0.1", "kept_bytes": size, "other_bytes": size},
        {"layer": "1.0", "kept_bytes": 0, "other_bytes": size},
        {"layer": "1.1", "kept_bytes": 0, "other_bytes": size},
    ]
    assert comparison.kept_ratio == 1 / 3
    assert comparison.peak_ratio == small.peak_bytes / large.peak_bytes
    lines = str(comparison).splitlines()
    assert lines[0].split() == ["layer", "kept", "other", "ratio"] and lines[-2].split()[-1] == "0.333"
    assert remnant.MemoryReport([], 0).compare(remnant.MemoryReport([], 0)).kept_ratio is None
    with pytest.raises(TypeError, match="other must be a MemoryReport, got int"):
        small.compare(3)


def test_html(tmp_path):
    rows = [{"layer": "<a>", "op": "Mul", "shape": (2, 3), "dtype": "float32", "count": 1, "kept_bytes": 24}]
    report = remnant.MemoryReport(rows, 100, "Model & Co")
    text = report.to_html(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == text == report.to_html()
    assert "&lt;a&gt;" in text and "<a>" not in text and "Model &amp; Co" in text
    assert text.count("<tr>") == 2 and "<td>2x3</td>" in text and "<td>24 B</td>" in text


def test_tensorboard():
    written = []
    writer = SimpleNamespace(add_scalar=lambda *arguments: written.append(arguments))
    report = remnant.MemoryReport(
        [{"layer": "a", "op": "Mul", "shape": (), "dtype": "float32", "count": 1, "kept_bytes": 4}], 9
    )
    report.log(writer, 7)
    assert written == [("memory/kept_bytes", 4, 7), ("memory/peak_bytes", 9, 7)]
    report.eager = remnant.MemoryReport([], 3)
    report.log(writer, 8)
    assert written[-2:] == [("memory/eager/kept_bytes", 0, 8), ("memory/eager/peak_bytes", 3, 8)]


def test_plot(tmp_path):
    pytest.importorskip("matplotlib", reason="Matplotlib is not installed")
    x = torch.randn(N, E)
    report = remnant.memory_report(mlp(2), x, eager_model=mlp(3))
    figure = report.plot(tmp_path / "report.png")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(report.eager.layers())
    kept, eager = axes.containers
    assert [round(bar.get_width() * 1e6) for bar in kept] == [N * E * 4] * 3 + [0, 0]
    assert [round(bar.get_width() * 1e6) for bar in eager] == [N * E * 4] * 5
    assert (tmp_path / "report.png").stat().st_size > 0


def test_plot_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="MemoryReport.plot needs Matplotlib"):
        remnant.MemoryReport([], 0).plot()
