"""torch.compile with its default backend, which checks shapes and strides that other backends do not look at."""

import copy
import functools

import pytest
import torch
from torch import nn

import remnant


class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(50, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(32, 50)

    def forward(self, x):
        hidden = self.layer(self.words(x), is_causal=True, src_mask=torch.full((x.size(1),) * 2, -torch.inf).triu(1))
        return remnant.linear_cross_entropy(hidden.flatten(0, 1), self.head.weight, self.head.bias, x.flatten())


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(16, 10)

    def forward(self, x):
        x = self.pool(self.norm1(self.conv1(x)).relu())
        return self.head((self.norm2(self.conv2(x)) + x).relu().mean((2, 3)))


def perceptron():
    return nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.RMSNorm(64), nn.Linear(64, 64), nn.GELU("tanh"),
                         nn.LeakyReLU(0.1), nn.Dropout(0.0), nn.Linear(64, 32, bias=False), nn.LayerNorm(32))


def encoder(dropout=0.0):
    return nn.TransformerEncoderLayer(32, 4, 64, dropout, batch_first=True)


MODELS = {
    "language": (Language, lambda: torch.randint(0, 50, (2, 30))),
    "convolutional": (Convolutional, lambda: torch.randn(4, 3, 16, 16)),
    "perceptron": (perceptron, lambda: torch.randn(4, 6, 32)),
    "long": (encoder, lambda: torch.randn(2, 200, 32)),  # attention keeps its output: 2 n > 3 E
}


@functools.cache
def reason_to_skip():
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(3))
    except Exception as error:  # no compiler, no headers
        return f"torch.compile cannot compile here: {str(error).splitlines()[0]}"
    return None


@pytest.fixture(autouse=True)
def compiler():
    if reason := reason_to_skip():
        pytest.skip(reason)
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):  # of code for the library as it was
        yield


def step(function, model, x):
    """Gradients of the parameters, and the bytes kept for them."""
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), x)}
    seen = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = function(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    return torch.autograd.grad((y * weights).sum(), list(model.parameters())), sum(seen.values())


def distance(have, want):
    pairs = list(zip(have, want, strict=True))
    return float(sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)) ** 0.5


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("memory", ["exact", "unbiased:bits=8"])
def test_converted_models_compile(name, memory):
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    model, x = make(), inputs()
    wanted, plain = step(model, model, x)
    remnant.convert(model, memory)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True)
    found, kept = step(compiled, compiled, x)
    assert distance(found, wanted) < (1e-4 if memory == "exact" else 0.02)
    assert kept < 0.8 * plain


@pytest.mark.parametrize("memory", ["exact", "unbiased:bits=4"])
def test_dropout_and_sizes_that_change(memory):
    torch.manual_seed(0)
    model = remnant.convert(encoder(0.1), memory)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for rows, length in ((2, 200), (3, 150), (2, 20)):
        x = torch.randn(rows, length, 32)
        found, kept = step(compiled, model, x)
        wanted, eager = step(model, model, x)
        if memory == "exact":
            assert distance(found, wanted) < 1e-5
            assert kept <= eager + 4 * x.numel() + 1024  # a norm's normalised rows beside its output
        else:
            assert kept <= eager + 2 * x.numel() + 1024  # codes of both norms'
