"""Converted models and ops beside the rest of PyTorch: checkpoints by op, torch.func, export, scalers, adapters."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.utils import checkpoint

import remnant

WIDTH = 32


def model(dropout=0.0):
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(WIDTH, 4, 64, dropout, "gelu", batch_first=True) for _ in range(2)]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 8), nn.GELU(), nn.LayerNorm(8))


def batch(rows=3):
    return torch.randn(rows, 9, WIDTH, generator=torch.Generator().manual_seed(1))


def gradients(module, *inputs):
    module.zero_grad()
    y = module(*inputs)
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_equal(have, want, tolerance=2e-5):
    assert have.keys() == want.keys()
    for name, g in want.items():
        assert float((have[name] - g).abs().max()) <= tolerance * (1 + float(g.abs().max())), name


def kept(module, x):
    own = {p.untyped_storage().data_ptr() for p in (*module.parameters(), x)}
    seen = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = module(x)
    seen.pop(y.untyped_storage().data_ptr(), None)
    return sum(seen.values())


@pytest.mark.parametrize(("memory", "dropout"), [("exact", 0.0), ("exact", 0.2), ("unbiased:bits=8", 0.2)])
def test_selective_checkpointing_by_op(memory, dropout):
    """What the list names is kept, all else runs again. An op that is kept draws no numbers again, so that with
    dropout what is named must be all that draws, as with PyTorch's own dropout."""
    module = remnant.convert(model(dropout), memory=memory).train()
    ops = torch.ops.remnant
    listed = [ops.linear_coded, ops.norm_forward, ops.encode]
    if dropout > 0:
        listed = [ops.draw_seed, ops.dropout_forward, ops.multihead_attention_forward, ops.feed_forward_forward,
                  ops.feed_forward_coded, ops.attention_forward, ops.attention_packed_forward]  # fmt: skip
    listed = [op.default for op in listed]
    contexts = functools.partial(checkpoint.create_selective_checkpoint_contexts, listed)
    x = batch().requires_grad_()
    torch.manual_seed(5)
    want = gradients(module, x)
    torch.manual_seed(5)
    have = gradients(Through(lambda y: checkpoint.checkpoint(module, y, use_reentrant=False, context_fn=contexts), module), x)
    # Codes are drawn again.
    assert_equal({name.removeprefix("owner."): g for name, g in have.items()}, want, 2e-5 if memory == "exact" else 0.05)


class Through(nn.Module):
    """A function with the parameters of a module."""

    def __init__(self, function, owner):
        super().__init__()
        self.owner, self.function = owner, function

    def forward(self, *inputs):
        return self.function(*inputs)


def test_functional_gradients():
    plain = model()
    module = remnant.convert(copy.deepcopy(plain)).train()
    x = batch()

    def loss(of):
        return lambda parameters: torch.func.functional_call(of, parameters, (x,)).square().mean()

    # torch.func's transforms find PyTorch's own operations.
    want = torch.func.grad(loss(plain))(dict(plain.named_parameters()))
    assert_equal(torch.func.grad(loss(module))(dict(module.named_parameters())), want)
    assert torch.allclose(torch.func.vmap(lambda one: module(one[None])[0])(x), plain(x), atol=1e-5)


def test_functional_call_trains_like_the_module():
    module = remnant.convert(model()).train()
    x = batch()
    want = gradients(module, x)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    y = torch.func.functional_call(module, parameters, (x,))
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    assert_equal({name: p.grad for name, p in parameters.items()}, want)


def test_an_evaluated_model_exports():
    module = remnant.convert(model()).eval()
    x = batch()
    program = torch.export.export(module, (x,))
    torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize("memory", ["exact", "unbiased:bits=8"])
def test_gradient_scaler(memory):
    """A scaled loss gives the same step, and an overflow skips one."""
    steps = []
    for scale in (1.0, 1024.0):
        module = remnant.convert(model(), memory=memory).train()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        torch.manual_seed(3)
        scaler.scale(module(batch()).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        steps.append({name: p.detach().clone() for name, p in module.named_parameters()})
    assert_equal(steps[1], steps[0], 1e-6)
    before = copy.deepcopy(module.state_dict())
    optimizer.zero_grad()
    scaler.scale(module(batch() * float("inf")).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert scaler.get_scale() < 1024.0


class Adapter(nn.Module):
    """Low-rank adaptation of a frozen linear layer."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, rank, bias=False), nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("memory", ["exact", "unbiased:bits=4"])
def test_adapters_on_frozen_layers(memory):
    """A frozen layer keeps nothing of its own: no input, no codes."""
    torch.manual_seed(0)
    plain = nn.Sequential(Adapter(nn.Linear(256, 256)), nn.Linear(256, 256).requires_grad_(False))
    module = remnant.convert(copy.deepcopy(plain), memory=memory).train()
    x = torch.randn(512, 256)
    bits = {"exact": 32, "unbiased:bits=4": 4}[memory]
    rank = 512 * 2 * bits // 8 + (0 if bits == 32 else 512 * 2 // 64 * 4)
    codes = 0 if bits == 32 else 512 * 256 * bits // 8 + 512 * 256 // 64 * 4
    assert kept(module, x) == rank + codes  # up's input, and codes of x for down; x itself is the caller's
    if memory == "exact":
        assert_equal(gradients(module, x), gradients(plain, x))
    assert all(p.grad is None for p in module[1].parameters())


def test_accumulated_gradients_are_those_of_one_batch():
    module = remnant.convert(model()).train()
    x = batch(6)
    want = {}
    module.zero_grad()
    module(x).square().sum().backward()
    want = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    for part in x.chunk(3):
        module(part).square().sum().backward()
    assert_equal({name: p.grad for name, p in module.named_parameters()}, want)


@pytest.mark.parametrize("memory", ["exact", "unbiased:bits=4"])
def test_deterministic_mode_and_equal_seeds(memory):
    module = remnant.convert(model(dropout=0.3), memory=memory).train()
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            torch.manual_seed(11)
            runs.append(gradients(module, batch()))
    finally:
        torch.use_deterministic_algorithms(before)
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_scripted_and_converted_models():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    with pytest.raises((TypeError, ValueError), match="[Ss]cript"):
        remnant.convert(scripted)
    module = remnant.convert(model())
    with pytest.raises(ValueError, match=r"converted already.*revert"):
        remnant.convert(module, memory="unbiased:bits=4")
    assert type(remnant.revert(module)[2]) is nn.Linear


class Shared(nn.Module):
    """Three readers of one tensor, then dropout."""

    def __init__(self):
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(WIDTH), nn.Dropout(0.5)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.gelu = nn.GELU()

    def forward(self, x):
        y = self.norm(x)
        return self.o(self.dropout(self.q(y) + self.k(y) * self.gelu(self.v(y))))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("which", ["shared", "encoder", "frozen"])
def test_a_checkpoint_drops_the_same_again(which, reentrant):
    """Codes are shared, and not kept without gradients: neither may move the dropout of what follows."""
    torch.manual_seed(0)
    module = model(0.3) if which == "encoder" else Shared()
    module = remnant.convert(module, memory="unbiased:bits=8").train()
    if which == "frozen":
        module.q.requires_grad_(False)
        module.norm.requires_grad_(False)
    x = batch().requires_grad_()
    outputs = []

    def run(function):
        torch.manual_seed(3)
        x.grad = None
        y = function(x)
        outputs.append(y.detach())
        return {**gradients_of(module, y), "x": x.grad}

    want = run(module)
    have = run(lambda y: checkpoint.checkpoint(module, y, use_reentrant=reentrant))
    torch.testing.assert_close(outputs[1], outputs[0])
    assert_equal(have, want, 0.05)  # codes may be others, dropout may not
    with torch.no_grad():
        torch.manual_seed(3)
        torch.testing.assert_close(module(x), outputs[0])


def gradients_of(module, y):
    module.zero_grad()
    y.sum().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("policy", ["quantized:bits=8", "sampled:m=4", "recompute", "curve:m=2"])
def test_attention_draws_alike_without_gradients(policy):
    q, k, v = (torch.randn(1, 2, 5, 4, requires_grad=True) for _ in range(3))
    states = []
    for enabled in (True, False):
        torch.manual_seed(1)
        with torch.set_grad_enabled(enabled):
            remnant.attention(q, k, v, dropout=0.1, policy=policy)
        states.append(torch.rand(3))
    assert torch.equal(*states)


@pytest.mark.parametrize("activation", ["relu", "silu", "identity"])
@pytest.mark.parametrize("chain", [1, 2])
def test_conv_units_draw_alike_without_gradients(activation, chain):
    x, w = torch.randn(2, 4, 6, 6), torch.randn(4, 4, 3, 3, requires_grad=True)
    one = torch.ones(4, requires_grad=True)
    states = []
    for enabled in (True, False):
        torch.manual_seed(1)
        with torch.set_grad_enabled(enabled):
            y = x
            for _ in range(chain):
                y = remnant.conv_norm_act(y, w, norm_weight=one, norm_bias=one, padding=1, activation=activation,
                                          memory="unbiased:bits=4")  # fmt: skip
        states.append(torch.rand(3))
    assert torch.equal(*states)
