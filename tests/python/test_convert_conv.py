"""remnant.convert on convolutional models: units found by tracing, and right whatever the model does with them."""

import copy
import pickle
import random

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import remnant


class Block(nn.Module):
    """A residual block in the ways that people write its end."""

    def __init__(self, inputs, outputs, stride, end):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample, self.end = None, end
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        identity = x if self.downsample is None else self.downsample(x)
        if self.end == "in place":
            out += identity
            return self.relu(out)
        if self.end == "method":
            return out.add_(identity).relu_()
        if self.end == "function":
            return functional.silu(torch.add(identity, out))
        return identity + out


class Net(nn.Module):
    def __init__(self, end="in place"):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layers = nn.Sequential(Block(16, 16, 1, end), Block(16, 32, 2, end), Block(32, 32, 1, end))
        self.fc = nn.Linear(32, 10)

    def forward(self, x):
        return self.fc(self.layers(functional.relu(self.bn(self.conv(x)))).mean((2, 3)))


def outcome(model, x):
    """(output, gradients of parameters and input, buffers) of a step."""
    model.zero_grad()
    x = x.detach().requires_grad_()
    y = model(x)
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return y.detach(), {**gradients, "input": x.grad}, {name: b.clone() for name, b in model.named_buffers()}


def assert_same(found, wanted, tolerance=1e-4):
    assert torch.allclose(found[0], wanted[0], atol=1e-4, rtol=1e-4)
    for name, g in wanted[1].items():
        assert (found[1][name] - g).norm() <= tolerance * (1 + g.norm()), name
    assert found[2].keys() == wanted[2].keys()
    for name, b in wanted[2].items():
        assert torch.allclose(found[2][name], b, atol=1e-5), name


def kept(model, x):
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers(), x)}
    seen = {}

    def pack(held):
        if held.untyped_storage().data_ptr() not in own:
            seen[held.untyped_storage().data_ptr()] = held.untyped_storage().nbytes()
        return held.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held):
        held = model(x)
    del held
    return sum(seen.values())


def units(model):
    """Names of the norms that join a unit."""
    return [name for name, module in model.named_modules()
            if isinstance(module, (*remnant.nn.NORMS,)) and module.memory is not None]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("end", ["in place", "method", "function", "sum"])
def test_residual_network(end, layout):
    torch.manual_seed(0)
    model = Net(end).to(memory_format=layout)
    x = torch.randn(6, 3, 16, 16).to(memory_format=layout)
    other = copy.deepcopy(model)
    eager = kept(model, x)
    wanted = outcome(model, x)
    assert remnant.convert(other) is other and not remnant.conversion(other).left
    assert len(units(other)) == 8 and other.state_dict().keys() == model.state_dict().keys()
    assert kept(other, x) < 0.52 * eager
    for b, name in zip(other.buffers(), wanted[2], strict=True):
        b.data.copy_(model.get_buffer(name))
    wanted = outcome(model, x)
    assert_same(outcome(other, x), wanted)  # a second step, from the statistics of the first
    remnant.revert(other)
    assert kept(other, x) == eager
    remnant.convert(other, "unbiased:bits=4")
    assert kept(other, x) < 0.13 * eager
    remnant.revert(other)
    other.load_state_dict(model.state_dict())
    remnant.convert(other, "unbiased:bits=8")
    found, wanted = outcome(other, x), outcome(model, x)
    assert_same(found, wanted, 0.05)
    model.eval(), other.eval()
    other.load_state_dict(model.state_dict())
    assert_same(outcome(remnant.convert(remnant.revert(other)), x), outcome(model, x))
    with torch.no_grad():
        assert torch.equal(other(x), model(x))


LAYERS = {
    "leaky": lambda: nn.Sequential(nn.Conv2d(4, 8, 3, padding="same"), nn.BatchNorm2d(8), nn.LeakyReLU(0.2)),
    "SiLU": lambda: nn.Sequential(nn.Conv2d(4, 8, 3, padding="valid"), nn.BatchNorm2d(8), nn.SiLU()),
    "depthwise": lambda: nn.Sequential(nn.Conv2d(4, 8, (3, 5), 2, (1, 2), groups=4), nn.BatchNorm2d(8), nn.ReLU()),
    "group norm": lambda: nn.Sequential(nn.Conv2d(4, 8, 3, dilation=2), nn.GroupNorm(2, 8), nn.ReLU()),
    "averaged statistics": lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8, momentum=None), nn.ReLU()),
    "no statistics": lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU()),
    "no affine": lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8, affine=False), nn.ReLU()),
    "norm last": lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)),
    "other activation": lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU6()),
    "1 dimension": lambda: nn.Sequential(nn.Unflatten(1, (4, 1)), nn.Flatten(2), nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), nn.ReLU()),
    "3 dimensions": lambda: nn.Sequential(nn.Unflatten(2, (3, 3)), nn.Conv3d(4, 8, 2), nn.BatchNorm3d(8), nn.ReLU()),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_layers(kind, training):
    torch.manual_seed(0)
    model = LAYERS[kind]().train(training)
    x = torch.randn(5, 4, 9, 9)
    other = remnant.convert(copy.deepcopy(model))
    assert len(units(other)) == 1
    for _ in range(2):  # statistics move on
        assert_same(outcome(other, x), outcome(model, x))
    remnant.revert(other)
    assert all(type(a) is type(b) for a, b in zip(other.modules(), model.modules(), strict=True))
    assert_same(outcome(other, x), outcome(model, x))


def test_double_precision_gradients_equal_numerical_ones():
    torch.manual_seed(0)
    model = remnant.convert(Net("in place").double())
    x = torch.randn(2, 3, 6, 6, dtype=torch.double, requires_grad=True)
    weight = model.layers[1].conv1.weight

    def loss(x, weight):
        return torch.func.functional_call(model, {"layers.1.conv1.weight": weight}, (x,))

    assert torch.autograd.gradcheck(loss, (x, weight.detach().clone().requires_grad_()), fast_mode=True, atol=1e-4)


def test_convolutions_without_norm_keep_codes():
    model = nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 4, 3))
    x = torch.randn(4, 4, 20, 20)
    wanted, eager = outcome(model, x), kept(model[:4], x)
    assert_same(outcome(remnant.convert(model), x), wanted)
    assert kept(model[:4], x) == eager  # each tensor is held once as it is
    remnant.convert(remnant.revert(model), "unbiased:bits=4")
    assert kept(model[:4], x) < 0.2 * eager
    draws, total, squares = 200, {}, {}
    for _ in range(draws):
        for name, g in outcome(model, x)[1].items():
            total[name], squares[name] = total.get(name, 0) + g, squares.get(name, 0) + g.square()
    for name, g in wanted[1].items():
        mean = total[name] / draws
        variance = (squares[name] / draws - mean.square()).clamp_min(0).sum() / (draws - 1)
        assert (mean - g).square().sum() < 4 * variance + 1e-8 * g.square().sum(), name


class Reads(nn.Module):
    """conv, norm and ReLU, with a reader that tracing may not see."""

    def __init__(self, reader):
        super().__init__()
        self.conv, self.bn, self.relu, self.reader = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), reader

    def forward(self, x):
        y = self.conv(x)
        z = self.bn(y)
        return self.relu(z) + self.reader(y, z)


class Late:
    """Another function after conversion than in the tracing."""

    def __init__(self):
        self.function = lambda y, z: 0

    def __call__(self, y, z):
        return self.function(y, z)


@pytest.mark.parametrize("reads", [
    lambda y, z: y.mean(), lambda y, z: z.square().mean(), lambda y, z: (y + z).tanh(), lambda y, z: y[:, :1] * z.shape[1],
    lambda y, z: torch.stack([z, y]).amax(0), lambda y, z: torch.nn.functional.relu(z), lambda y, z: z + z, lambda y, z: z - 1,
])
def test_readers_that_come_after_conversion_get_the_tensor(reads):
    torch.manual_seed(0)
    model = Reads(lambda y, z: 0)
    other = copy.deepcopy(model)
    late = other.reader = Late()
    remnant.convert(other)
    assert units(other) == ["bn"]
    x = torch.randn(4, 3, 8, 8)
    assert_same(outcome(other, x), outcome(model, x))
    late.function = model.reader = reads
    assert_same(outcome(other, x), outcome(model, x))
    remnant.convert(remnant.revert(other))
    assert units(other) != ["bn"] or other.bn.then == ""
    assert_same(outcome(other, x), outcome(model, x))


def test_in_place_readers_are_left_or_right():
    class Adds(nn.Module):
        def forward(self, x):
            x += 1
            return x

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(inplace=True), nn.Conv2d(8, 8, 3),
                          nn.BatchNorm2d(8), nn.Dropout(0.0), nn.Hardswish(inplace=True), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), Adds())
    x = torch.randn(4, 3, 8, 8)
    wanted = outcome(copy.deepcopy(model), x)
    left = remnant.conversion(remnant.convert(model)).left
    assert left["1"][1] == left["4"][1] == left["8"][1] == "what follows changes its output in place"
    assert_same(outcome(model, x), wanted)


def test_settings_by_name():
    model = remnant.convert(Net(), "exact", overrides={"layers.0.*": "unbiased:bits=4", "layers.1.bn1": "eager", "layers.2": "eager"})
    found = remnant.conversion(model)
    assert found.converted["layers.0.bn2"] == ("BatchNorm2d", "unbiased:bits=4")
    assert found.left["layers.1.bn1"][1] == "stays eager, as was asked for" and model.layers[1].conv1.then == ""
    assert type(model.layers[2].conv1) is nn.Conv2d
    wanted = outcome(copy.deepcopy(remnant.revert(copy.deepcopy(model))), torch.ones(2, 3, 8, 8))
    assert torch.allclose(model(torch.ones(2, 3, 8, 8)), wanted[0], atol=1e-4)


class Branching(nn.Module):
    """A forward that cannot be traced around parts that can."""

    def __init__(self):
        super().__init__()
        self.block, self.tail = Block(3, 8, 2, "in place"), nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.own, self.norm = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x):
        y = self.block(x)
        if y.sum() > 1e9:
            return y
        return self.norm(self.own(self.tail(y)))


def test_parts_of_a_model_that_cannot_be_traced():
    model, x = Branching(), torch.randn(4, 3, 8, 8)
    other = remnant.convert(copy.deepcopy(model))
    assert len(units(other)) == 4
    assert remnant.conversion(other).left["norm"] == ("BatchNorm2d", "tracing found no convolution that it alone follows")
    assert_same(outcome(other, x), outcome(model, x))


def test_what_cannot_join_stays():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(8), nn.ReLU(),
                          nn.Conv2d(8, 8, 2, padding="same"), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 8, 2))
    left = remnant.conversion(remnant.convert(model)).left
    assert left["0"][1] == "pads with other numbers than zeros (reflect)"
    assert left["3"][1] == "pads one side more than the other"
    assert "tracing found no convolution" in left["1"][1] and left["5"][1] == "has no twin in remnant.nn"


@pytest.mark.parametrize("memory", ["exact", "unbiased:bits=4"])
def test_hooks_see_tensors(memory):
    model, x, seen = remnant.convert(Net(), memory), torch.randn(2, 3, 8, 8), {}
    for name in ("conv", "layers.0.bn1", "layers.1.bn2"):
        model.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, o))
    y = model(x)
    other = remnant.revert(copy.deepcopy(model))
    assert torch.allclose(y, other(x), atol=1e-4) and all(type(each) is torch.Tensor for each in seen.values())


class Pair(nn.Module):
    """conv and norm in a module of their own, whose output an activation outside reads."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(inputs, outputs, 3), nn.BatchNorm2d(outputs)

    def forward(self, x):
        return self.norm(self.conv(x))


@pytest.mark.parametrize("kind", ["forward", "backward", "backward pre", "every module's", "none"])
@pytest.mark.parametrize("where", ["0", "0.conv", "0.norm", "1"])
def test_hooks_around_a_unit(kind, where):
    torch.manual_seed(0)
    model, x, seen = nn.Sequential(Pair(3, 8), nn.ReLU(), Pair(8, 8), nn.ReLU()), torch.randn(2, 3, 8, 8), []
    other = remnant.convert(copy.deepcopy(model))
    assert other[0] in other[0].norm.around and other[1] in other[0].norm.around
    wanted = outcome(model, x)
    hooked, handle = other.get_submodule(where), None
    note = lambda *values: seen.append(values[-1]) and None  # noqa: E731
    if kind == "forward":
        handle = hooked.register_forward_hook(note)
    elif kind == "backward":
        handle = hooked.register_full_backward_hook(note)
    elif kind == "backward pre":
        handle = hooked.register_full_backward_pre_hook(note)
    elif kind == "every module's":
        handle = nn.modules.module.register_module_full_backward_hook(note)
    try:
        assert_same(outcome(other, x), wanted)
    finally:
        if handle is not None:
            handle.remove()
    assert bool(seen) == (kind != "none")


def test_an_input_changed_in_place():
    class Changes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.change = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), True

        def forward(self, x):
            x = x * 1
            y = self.conv(x)
            if self.change:
                x += 1
            return functional.relu(self.bn(y)) + x

    model, x = remnant.convert(Changes()), torch.randn(2, 3, 4, 4)
    assert remnant.conversion(model).left["bn"][1] == "its convolution's input is changed in place"
    other = Changes()
    other.change = False
    remnant.convert(other)
    assert len(units(other)) == 1
    other.change = True  # eager's backward refuses it, too
    with pytest.raises(RuntimeError, match="changed in place before the norm"):
        other(x)


@pytest.mark.parametrize("memory", ["exact", "unbiased:bits=8"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(memory, reentrant):
    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 3, 8, 8)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0  # the second run would move statistics again, as in PyTorch
    remnant.convert(model, memory)
    torch.manual_seed(5)
    wanted = outcome(model, x)
    layers, plain = model.layers, model.layers.forward
    layers.forward = lambda h: checkpoint(plain, h, use_reentrant=reentrant)
    torch.manual_seed(5)
    found = outcome(model, x)
    # A region that runs twice draws codes of its own, which differ as two draws do.
    tolerance = 1e-5 if memory == "exact" or reentrant else 0.05
    for name, g in wanted[1].items():
        assert (found[1][name] - g).norm() <= tolerance * (1 + g.norm()), name


@pytest.mark.parametrize("memory", ["exact", "unbiased:bits=8"])
def test_compile(memory):
    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 3, 8, 8)
    other = remnant.convert(copy.deepcopy(model), memory)
    torch._dynamo.reset()
    found, wanted = outcome(torch.compile(other, fullgraph=True, backend="aot_eager"), x), outcome(model, x)
    assert torch.allclose(found[0], wanted[0], atol=1e-4)
    for (name, g), h in zip(wanted[1].items(), found[1].values(), strict=True):
        assert (g - h).norm() <= (1e-4 if memory == "exact" else 0.1) * (1 + g.norm()), name


@pytest.mark.parametrize("way", ["in place", "around"])
def test_a_compiled_part_behind_a_convolution(way):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())), torch.randn(2, 3, 6, 6)
    other = remnant.convert(copy.deepcopy(model))
    torch._dynamo.reset()
    if way == "in place":
        other[1].compile(backend="aot_eager")
    else:
        other[1] = torch.compile(other[1], backend="aot_eager")
    for _ in range(2):
        for (name, g), h in zip(outcome(model, x)[1].items(), outcome(other, x)[1].values(), strict=True):
            assert torch.allclose(g, h, atol=1e-3), name
    assert all(torch.allclose(a.float(), b.float()) for a, b in zip(model.buffers(), other.buffers(), strict=True))


def test_autocast_copies_and_gradients_off():
    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 3, 8, 8)
    other = remnant.convert(copy.deepcopy(model))
    with torch.autocast("cpu", torch.bfloat16):
        a, b = model(x), other(x)
        assert a.dtype == b.dtype and torch.allclose(a, b, atol=0.1)
        b.float().sum().backward()
    for each in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        each.load_state_dict(model.state_dict())
        assert_same(outcome(each, x), outcome(copy.deepcopy(model), x))
    for p in model.parameters():
        p.requires_grad_(False)
    frozen = remnant.convert(copy.deepcopy(model))
    assert kept(frozen, x) == 0
    with torch.no_grad():
        y = model.train()(x)
        assert torch.allclose(frozen.train()(x), y, atol=1e-5)


def test_traced_and_transformed_by_torch_func():
    model, x = Net().eval(), torch.randn(3, 3, 8, 8)
    other = remnant.convert(copy.deepcopy(model))
    assert torch.allclose(torch.jit.trace(other, x)(x), model(x), atol=1e-5)
    traced = torch.fx.symbolic_trace(other)
    assert traced.get_submodule("conv") is other.conv and torch.allclose(traced(x), model(x), atol=1e-5)

    def loss(of):
        return lambda parameters: torch.func.functional_call(of, parameters, (x,)).square().mean()

    wanted = torch.func.grad(loss(model))(dict(model.named_parameters()))
    for name, g in torch.func.grad(loss(other))(dict(other.named_parameters())).items():
        assert torch.allclose(g, wanted[name], atol=1e-5), name


def test_a_convolution_without_gradients_stays_cut():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            with torch.no_grad():
                y = self.conv(x)
            return functional.relu(self.bn(y))

    model = remnant.convert(Cut())
    model(torch.randn(2, 3, 6, 6)).sum().backward()
    assert model.conv.weight.grad is None and model.bn.weight.grad is not None


def test_report_names_units():
    report = remnant.memory_report(remnant.convert(Net()), torch.randn(4, 3, 8, 8))
    assert any(row["op"] == "remnant::Unit" for row in report.rows)


def test_budget_takes_units():
    torch.manual_seed(0)
    model, x = Net(), torch.randn(16, 3, 32, 32)
    before = copy.deepcopy(model.state_dict())
    peak = {bits: remnant.memory_report(remnant.convert(copy.deepcopy(model), f"unbiased:bits={bits}"), x).peak_bytes for bits in (8, 2)}
    with pytest.raises(ValueError, match="smallest"):
        remnant.convert(model, "unbiased:bits=2", budget=1000, example=x)
    remnant.convert(model, "unbiased:bits=2", budget=(peak[8] + peak[2]) // 2, example=x)
    assert model.conv.memory.bits == 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).logits


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_hugging_face_resnet(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[3, 3], layer_type=kind, num_labels=3)
    model = Logits(transformers.ResNetForImageClassification(config))
    x = torch.randn(4, 3, 64, 64)
    other = remnant.convert(copy.deepcopy(model))
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert len(units(other)) == norms
    assert kept(other, x) < 0.65 * kept(model, x)
    other.load_state_dict(model.state_dict())
    assert_same(outcome(other, x), outcome(model, x))


class Changing(nn.Module):
    """conv, norm, activation, around which something changes from what tracing saw."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU()
        self.own = None
        self.other = nn.Parameter(torch.randn(3, 3, 3, 3))

    def forward(self, x):
        return self.relu(self.bn(self.conv(x))) if self.own is None else self.own(self, x)


def _swapped(self, x):
    weight, self.conv._parameters["weight"] = self.conv.weight, self.other
    y = self.conv(x)
    self.conv._parameters["weight"] = weight
    return self.relu(self.bn(y))


def _called_functionally(self, x):
    return self.relu(self.bn(torch.func.functional_call(self.conv, {"weight": self.other}, (x,))))


def _norm_swapped(self, x):
    weight, momentum, self.bn.momentum = self.bn.weight, self.bn.momentum, 0.7
    self.bn._parameters["weight"] = self.other[:, 0, 0, 0]
    y = self.bn(self.conv(x))
    self.bn.momentum, self.bn._parameters["weight"] = momentum, weight
    return self.relu(y)


def _norm_evaluating(self, x):
    self.bn.eval()
    y = self.bn(self.conv(x))
    self.bn.train()
    return self.relu(y)


def _autocast(inside, outside):
    def run(self, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=outside):
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                y = self.conv(x)
            return self.relu(self.bn(y))

    return run


def _unread_by_inference(self, x):
    y = self.bn(self.conv(x))
    with torch.inference_mode():
        y.mean()
    return self.relu(y)


def _dropped(self, x):
    self.bn(self.conv(x))
    return x + self.conv(x).mean()


@pytest.mark.parametrize("own", [_swapped, _called_functionally, _norm_swapped, _norm_evaluating, _unread_by_inference,
                                 _autocast(True, False), _autocast(False, True), _dropped])
def test_a_layer_reads_its_state_when_it_is_called(own):
    torch.manual_seed(0)
    model, x = Changing(), torch.randn(2, 3, 6, 6) + 1
    other = remnant.convert(copy.deepcopy(model))
    assert other.bn.then == "activation"
    model.own = other.own = own
    for _ in range(2):
        (a, ga, ba), (b, gb, bb) = outcome(model, x), outcome(other, x)
        assert a.dtype == b.dtype and torch.allclose(a, b, atol=1e-4)
        for name, g in ga.items():
            assert (g is None) == (gb[name] is None) and (g is None or torch.allclose(g, gb[name], atol=1e-3)), name
        for name in ba:
            assert torch.allclose(ba[name], bb[name], atol=1e-5), name


def test_errors_come_from_where_they_belong():
    model = remnant.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    for x in (torch.randn(2, 5, 6, 6), torch.randn(2, 3, 2, 2), torch.randn(2, 3, 6, 6).double()):
        with pytest.raises(RuntimeError):
            model(x)
    assert model[1].num_batches_tracked == 0


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient * ctx.saved_tensors[0]


class Reversible(torch.autograd.Function):
    """Runs a layer again in backward, as reversible blocks do."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        ctx.save_for_backward(x)
        return layer(x)

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.layer(x)
        torch.autograd.backward(y, gradient)
        return x.grad, None


def _reentrant(f, *inputs):
    return checkpoint(f, *inputs, use_reentrant=True)


def _added_to(y, x):
    z = y
    z += x
    return y


def _relu_in_place(self, x):
    y = self.bn(self.conv(x)) + x
    functional.relu_(y)
    return y


@pytest.mark.parametrize("end", ["activation", "add activation"])
@pytest.mark.parametrize("own", [
    lambda self, x: Square.apply(self.conv(x)), lambda self, x: Square.apply(self.bn(self.conv(x))),
    lambda self, x: Square.apply(self.bn(self.conv(x)) + x), lambda self, x: Square.apply(_added_to(self.conv(x), x)),
    lambda self, x: Square.apply(_relu_in_place(self, x)), lambda self, x: self.bn(Reversible.apply(x, self.conv)),
    lambda self, x: self.relu(Reversible.apply(self.conv(x), self.bn)),
    lambda self, x: self.bn(_reentrant(self.conv, x)),
    lambda self, x: _reentrant(lambda y: self.relu(self.bn(y)), self.conv(x)),
    lambda self, x: _reentrant(lambda y, z: self.relu(y + z), self.bn(self.conv(x)), x),
])
@pytest.mark.parametrize("training", [True, False])
def test_autograd_functions_between_layers(own, end, training):
    torch.manual_seed(0)
    model, x = Changing().train(training), torch.randn(2, 3, 6, 6)
    model.bn.momentum = 0.0  # a layer that runs twice moves statistics twice, and in other places
    other = copy.deepcopy(model)
    other.own = (lambda self, x: self.relu(self.bn(self.conv(x)) + x)) if "add" in end else None
    remnant.convert(other)
    assert other.bn.then == end
    model.own = other.own = lambda self, x: own(self, 2 * x)
    wanted, found = outcome(model, x), outcome(other, x)
    assert torch.allclose(found[0], wanted[0], atol=1e-4)
    for name, g in wanted[1].items():
        other_g = found[1][name]
        assert (g is None) == (other_g is None) and (g is None or torch.allclose(other_g, g, atol=1e-3)), name


def test_a_sum_in_place_before_an_autograd_function():
    torch.manual_seed(0)
    model, x = Changing(), torch.randn(2, 3, 6, 6)
    other = copy.deepcopy(model)
    other.own = lambda self, x: self.relu(self.bn(self.conv(x)) + x)
    remnant.convert(other)
    model.own = other.own = lambda self, x: Square.apply(_added_to(self.bn(self.conv(x)), 2 * x))
    wanted, found = outcome(model, x), outcome(other, x)
    for name in ("conv.weight", "bn.weight", "bn.bias", "input"):
        assert torch.allclose(found[1][name], wanted[1][name], atol=1e-3), name


@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, lambda: functional.silu])
def test_both_runs_of_a_reentrant_checkpoint_draw_the_same(activation):
    class Drops(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
            self.act, self.drop = activation(), nn.Dropout(0.5)

        def forward(self, x):
            y = self.bn(self.conv(x))
            masks.append(self.drop(torch.ones_like(x)))
            y = self.act(y + masks[-1])
            masks.append(self.drop(torch.ones_like(x)))
            return y * masks[-1]

    masks, model, x = [], Drops(), torch.randn(2, 3, 6, 6, requires_grad=True)
    remnant.convert(model, "unbiased:bits=4")
    assert model.bn.then == "add activation"
    masks.clear()
    checkpoint(model, x, use_reentrant=True).sum().backward()
    assert len(masks) == 4 and torch.equal(masks[0], masks[2]) and torch.equal(masks[1], masks[3])


def test_tracing_leaves_nothing_behind():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.left = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            self.calls, self.grid, self.seen, self.cache = 0, None, [], {"inner": {}}

        def forward(self, x):
            self.calls += 1
            if self.grid is None:
                self.grid = torch.linspace(0, 1, 6) * x.new_ones(())
            y = functional.relu(self.bn(self.conv(x + self.grid))) + torch.rand(()) * random.random()
            self.seen.append(y)
            self.cache["inner"]["y"] = self.last = y
            return self.left(y)

    model = Keeps()
    state, python = torch.get_rng_state(), random.getstate()
    remnant.convert(model)
    found = remnant.conversion(model)
    assert "bn" in found.converted and found.left["left"][1] == "tracing found no convolution that it alone follows"
    assert model.calls == 0 and model.grid is None and model.seen == [] and model.cache == {"inner": {}}
    assert not hasattr(model, "last") and torch.equal(torch.get_rng_state(), state) and random.getstate() == python
    assert remnant.conversion(copy.deepcopy(model)).left == found.left
    model(torch.randn(2, 3, 6, 6)).sum().backward()
    remnant.conversion(model)
    assert model.calls == 1


def test_buffers_without_data_or_dense_values():
    with torch.device("meta"):
        model = remnant.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    assert units(model) == ["1"] and model[1].running_mean.is_meta
    sparse, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), torch.randn(2, 3, 6, 6)
    sparse.register_buffer("adjacency", torch.eye(4).to_sparse())
    assert units(remnant.convert(sparse)) == ["1"] and remnant.memory_report(sparse, x).kept_bytes
    lazy = remnant.convert(nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU()))
    assert lazy(x).shape == (2, 4, 4, 4)
    with torch._subclasses.FakeTensorMode():
        fake = remnant.convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), "unbiased:bits=4")
        assert fake(torch.randn(2, 3, 6, 6)).shape == (2, 4, 4, 4)
