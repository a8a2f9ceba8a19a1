"""The C++ walk of the graph against Python's saved-tensor hooks, on the same models."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]


def load_library() -> None:
    torch.ops.load_library(os.environ.get("REMNANT_LIBRARY") or str(ROOT / "build/lib/libremnant.so"))


load_library()


def hooked_bytes(forward, left_out) -> int:
    """Bytes of the unique storages that the graph of forward() saves, without those of left_out."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    for tensor in left_out:
        storages.pop(tensor.untyped_storage()._cdata, None)
    assert output.requires_grad
    return sum(storage.nbytes() for storage in storages.values())


def check(model, forward, inputs) -> int:
    left_out = [*model.parameters(), *model.buffers(), *inputs]
    expected = hooked_bytes(forward, left_out)
    walked = torch.ops.remnant._kept_bytes([forward()], [*model.buffers(), *inputs])
    assert walked == expected
    return walked


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_transformer_layer_and_cross_entropy(norm_first, dropout):
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout, batch_first=True, norm_first=norm_first)
    head = torch.nn.Linear(32, 11)
    model = torch.nn.ModuleList([layer, head])
    x = torch.randn(3, 7, 32)
    target = torch.randint(11, (3 * 7,))
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[:, 5:] = True

    def forward():
        logits = head(layer(x, src_key_padding_mask=mask))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), target)

    assert check(model, forward, [x, target]) > 3 * 7 * 64 * 4


def test_convolution_with_batch_norm_and_pooling():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(inplace=True),
        torch.nn.MaxPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(8 * 4 * 4, 5),
    )
    x = torch.randn(2, 3, 8, 8)
    assert check(model, lambda: model(x).logsumexp(1).sum(), [x]) > 0


def test_recurrent_network():
    model = torch.nn.LSTM(6, 10, num_layers=2, batch_first=True)
    x = torch.randn(4, 5, 6)
    assert check(model, lambda: model(x)[0].square().mean(), [x]) > 0


LAYERS = {
    "linear": lambda d: torch.nn.Linear(d, d),
    "relu": lambda d: torch.nn.ReLU(),
    "relu_in_place": lambda d: torch.nn.ReLU(inplace=True),
    "gelu": lambda d: torch.nn.GELU(),
    "softmax": lambda d: torch.nn.Softmax(-1),
    "layer_norm": lambda d: torch.nn.LayerNorm(d),
    "dropout": lambda d: torch.nn.Dropout(0.3),
    "sigmoid": lambda d: torch.nn.Sigmoid(),
}


@settings(max_examples=40, deadline=None)
@given(
    names=st.lists(st.sampled_from(sorted(LAYERS)), max_size=6),
    rows=st.integers(1, 5),
    width=st.integers(1, 9),
    residual=st.booleans(),
)
def test_random_stacks(names, rows, width, residual):
    # A linear layer on both ends: nothing may be written in place into the leaf or over a saved output.
    before = ["linear", *names]
    names = [n for i, n in enumerate(names) if n != "relu_in_place" or before[i] == "linear"]
    model = torch.nn.Sequential(*[LAYERS[name](width) for name in ["linear", *names, "linear"]])
    x = torch.randn(rows, width)
    check(model, lambda: (model(x) + x * model[0].bias if residual else model(x)).sum(), [x])


def test_python_functions_and_hooks_are_an_error_and_not_a_smaller_number():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    w = torch.randn(4, requires_grad=True)
    with pytest.raises(RuntimeError, match="would not show what they keep"):
        torch.ops.remnant._kept_bytes([Double.apply(w.exp())], [])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        y = w.exp()
    with pytest.raises(RuntimeError, match="would not show what they keep"):
        torch.ops.remnant._kept_bytes([y], [])
    y.sum().backward()  # asking leaves the graph as it was
    assert torch.equal(w.grad, w.exp())


def test_measuring_leaves_the_graph_as_it_was():
    w = torch.randn(4, 4, requires_grad=True)
    loss = w.exp().softmax(-1).square().sum()
    for _ in range(2):
        assert torch.ops.remnant._kept_bytes([loss], []) == 2 * 16 * 4
    loss.backward()
    with pytest.raises(RuntimeError, match="already released"):
        torch.ops.remnant._kept_bytes([loss], [])
