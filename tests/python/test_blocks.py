"""feed_forward and multihead_attention against the same block in separate PyTorch operations."""

import math

import pytest
import torch
from torch.library import opcheck
from torch.nn import functional

import remnant

ops = torch.ops.remnant


def leaves(dtype, *shapes, scale=0.3):
    return [(torch.randn(shape, dtype=torch.float64) * scale).to(dtype).requires_grad_() for shape in shapes]


def gradients(output, inputs, seed=1):
    g = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.autograd.grad(output, inputs, g.to(output.dtype))


def kept_bytes(function, *inputs):
    """Unique storages that the graph of function() holds beyond its inputs' and its output's."""
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = function()
    for x in (*inputs, output):
        storages.pop(x.untyped_storage().data_ptr(), None)
    return sum(storages.values())


def hidden_mask(rows, features, p, seed):
    """What dropout multiplies a hidden layer by, read off identity weights."""
    one = torch.eye(features, dtype=torch.float64)
    torch.manual_seed(seed)
    return remnant.feed_forward(torch.ones(rows, features, dtype=torch.float64), one, None, one, None, dropout=p)


def eager_feed_forward(x, w1, b1, w2, b2, activation, mask=1.0):
    hidden = getattr(functional, activation)(functional.linear(x, w1, b1))
    return functional.linear(hidden * mask, w2, b2)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize(("rows", "dim", "features"), [(5, 3, 7), (700, 16, 1030), (300, 24, 2048)])
def test_feed_forward_equals_separate_operations(activation, p, biases, rows, dim, features):
    x, w1, b1, w2, b2 = leaves(torch.float64, (rows, dim), (features, dim), (features,), (dim + 1, features), (dim + 1,))
    if not biases:
        b1 = b2 = None
    mask = hidden_mask(rows, features, p, 7) if p else 1.0
    torch.manual_seed(7)
    have = remnant.feed_forward(x, w1, b1, w2, b2, activation=activation, dropout=p)
    want = eager_feed_forward(x, w1, b1, w2, b2, activation, mask)
    torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-9)
    inputs = [t for t in (x, w1, b1, w2, b2) if t is not None]
    for a, b in zip(gradients(have, inputs), gradients(want, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_feed_forward_in_other_dtypes(activation, dtype):
    shapes = (2, 90, 32), (130, 32), (130,), (32, 130), (32,)
    inputs = leaves(dtype, *shapes)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    have = remnant.feed_forward(*inputs, activation=activation)
    want = eager_feed_forward(*exact, activation)
    plain = eager_feed_forward(*inputs, activation)
    assert have.dtype == dtype
    columns = zip([have, *gradients(have, inputs)], [plain, *gradients(plain, inputs)],
                  [want, *gradients(want, exact)], strict=True)
    for a, b, c in columns:
        floor = 4 * torch.finfo(dtype).eps * c.abs().max()
        assert (a - c).abs().max() <= 2 * (b - c).abs().max() + floor


def test_gelu_is_relatively_exact_in_its_tails():
    x = torch.linspace(-9, 9, 2001)[:, None].requires_grad_()
    one = torch.ones(1, 1)
    y = remnant.feed_forward(x, one, None, one, None, activation="gelu")
    (slope,) = torch.autograd.grad(y.sum(), x)
    wide = x.detach().double().requires_grad_()
    want = wide * torch.special.ndtr(wide)
    (want_slope,) = torch.autograd.grad(want.sum(), wide)
    torch.testing.assert_close(y.double(), want, rtol=3e-5, atol=1e-12)
    torch.testing.assert_close(slope.double(), want_slope, rtol=1e-4, atol=1e-7)


def test_feed_forward_keeps_its_input_alone():
    x, w1, b1, w2, b2 = leaves(torch.float32, (64, 16), (512, 16), (512,), (16, 512), (16,))
    assert kept_bytes(lambda: remnant.feed_forward(x, w1, b1, w2, b2), x, w1, b1, w2) == 0
    assert kept_bytes(lambda: remnant.feed_forward(x, w1, b1, w2, b2, dropout=0.1), x, w1, b1, w2) == 16
    with torch.no_grad():
        assert kept_bytes(lambda: remnant.feed_forward(x, w1, b1, w2, b2, dropout=0.1), x) == 0


# --- feed_forward from codes -----------------------------------------------------------------------


def decoded(x, activation, bits, generator=None):
    """What the backward makes of a hidden layer's codes: activation and derivative, of x's shape."""
    rows, features = x.shape
    one, ones = torch.eye(features, dtype=x.dtype), torch.ones(rows, features, dtype=x.dtype, requires_grad=True)
    x = x.clone().requires_grad_()
    y = remnant.feed_forward(x, one, None, ones, None, activation=activation, policy=f"quantized:bits={bits}",
                             generator=generator)  # fmt: skip
    slope, value = torch.autograd.grad(y, (x, ones), torch.eye(rows, dtype=x.dtype))
    return value, slope


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_code_gives_activation_and_derivative_without_bias(activation, bits, dtype):
    x = torch.cat([torch.linspace(-9, 9, 128 * 15), torch.linspace(9, 400, 128)]).to(dtype).view(128, 16)
    wide = x.double().requires_grad_()
    want = eager_activation(activation)(wide)
    (slope,) = torch.autograd.grad(want.sum(), wide)
    draws = 1500
    sums = [torch.zeros(2, *x.shape, dtype=torch.float64) for _ in range(2)]
    jumps = torch.zeros(2, *x.shape, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    for _ in range(draws):
        for i, have in enumerate(decoded(x, activation, bits, generator)):
            sums[0][i] += have
            sums[1][i] += have.double() ** 2
            jumps[i] = torch.maximum(jumps[i], (have - (want.detach(), slope)[i]).abs())
    for i, exact in enumerate((want.detach(), slope)):
        mean = sums[0][i] / draws
        # A corner drawn rarely may be missing: one draw of it more or less has to be allowed for.
        once = jumps[i].amax(1, keepdim=True) / draws
        deviation = ((sums[1][i] / draws - mean**2).clamp_min(0) / draws + once**2).sqrt()
        # 1e-4: 16 random bits, and the grid's own exactness.
        z = (mean - exact).abs() / (deviation + 1e-4 * (1 + exact.abs()))
        assert float(z.max()) < 5.0, (i, float(z.max()))
        assert float(z.square().mean()) < 1.1


def eager_activation(name):
    return functional.gelu if name == "gelu" else torch.relu


# Mean square errors for x of N(0, 1), a tenth above those measured.
@pytest.mark.parametrize(("bits", "value", "slope"), [(8, 1.1e-4, 4e-5), (4, 1.55e-3, 4.7e-4), (2, 7.7e-2, 2.5e-2)])
def test_variance_of_a_gelu_code(bits, value, slope):
    x = torch.randn(512, 1024, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    y = functional.gelu(x)
    (d,) = torch.autograd.grad(y.sum(), x)
    have = decoded(x.detach(), "gelu", bits, torch.Generator().manual_seed(3))
    assert value / 2 < float((have[0] - y).detach().square().mean()) < value
    assert slope / 2 < float((have[1] - d).square().mean()) < slope


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_gradients_from_8_bits_are_close(activation, dtype):
    inputs = leaves(dtype, (70, 12), (130, 12), (130,), (7, 130), (7,))
    torch.manual_seed(5)
    have = gradients(remnant.feed_forward(*inputs, activation=activation, policy="quantized:bits=8"), inputs)
    want = gradients(eager_feed_forward(*inputs, activation), inputs)
    for a, b in zip(have, want, strict=True):
        assert float((a - b).double().norm() / b.double().norm()) < 0.03


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_codes_drop_what_the_forward_dropped(activation):
    one = torch.eye(200, dtype=torch.float64)
    x = torch.full((90, 200), 1.5, dtype=torch.float64, requires_grad=True)
    y = remnant.feed_forward(x, one, None, one, None, activation=activation, dropout=0.3, policy="quantized:bits=4")
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(slope == 0, y == 0) and 0.25 < float((y == 0).double().mean()) < 0.35


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_bytes_of_codes(activation):
    x, w1, w2 = leaves(torch.float32, (64, 16), (520, 16), (16, 520))
    row = {"relu": 520 // 2 + 9 * 2, "gelu": 520 // 2 + 520 // 4}[activation]
    inputs = 64 * 16 // 2 + 64 * 16 // 64 * 4  # 4 bits an element and a bfloat16 pair a group

    def run():
        return remnant.feed_forward(x, w1, None, w2, None, activation=activation, dropout=0.1, policy="quantized:bits=4")

    assert kept_bytes(run, w1, w2) == 64 * row + inputs + 16


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_what_no_code_stands_for_is_nan(activation):
    hidden = torch.full((130, 1), 0.5)
    hidden[3], hidden[70], hidden[71], hidden[129] = math.nan, math.inf, -math.inf, 1e6
    ones = torch.ones(1, 130, requires_grad=True)
    y = remnant.feed_forward(torch.ones(1, 1), hidden.requires_grad_(), None, ones, None, activation=activation,
                             policy="quantized:bits=4")  # fmt: skip
    slope, value = torch.autograd.grad(y, (hidden, ones))
    bad = torch.zeros(130, dtype=torch.bool)
    if activation == "gelu":
        bad[[3, 70, 71, 129]] = True
    else:  # their groups; 1e6 is within reach
        bad[:128] = True
    assert torch.equal(value[0].isnan(), bad) and torch.equal(slope[:, 0].isnan(), bad)


@pytest.mark.parametrize("frozen", range(5))
def test_codes_with_one_thing_wanted(frozen):
    inputs = leaves(torch.float64, (9, 4), (6, 4), (6,), (5, 6), (5,))
    for i, t in enumerate(inputs):
        t.requires_grad_(i == frozen)
    torch.manual_seed(1)
    (have,) = gradients(remnant.feed_forward(*inputs, activation="gelu", policy="quantized:bits=8"), [inputs[frozen]])
    (want,) = gradients(eager_feed_forward(*inputs, "gelu"), [inputs[frozen]])
    torch.testing.assert_close(have, want, atol=0.05, rtol=0.05)


def test_codes_refuse_a_second_derivative_and_unknown_bits():
    x, w1, w2 = leaves(torch.float64, (3, 4), (5, 4), (4, 5))
    with pytest.raises(RuntimeError, match="no gradient of its gradient"):
        y = remnant.feed_forward(x, w1, None, w2, None, policy="quantized:bits=4")
        torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="bits"):
        remnant.feed_forward(x, w1, None, w2, None, policy="quantized:bits=3")
    empty = torch.empty(0, 4, dtype=torch.float64, requires_grad=True)
    y = remnant.feed_forward(empty, w1, None, w2, None, policy="quantized:bits=4")
    assert torch.autograd.grad(y.sum(), w1)[0].abs().sum() == 0


@pytest.mark.parametrize("frozen", range(5))
def test_feed_forward_with_one_thing_wanted(frozen):
    inputs = leaves(torch.float64, (9, 4), (6, 4), (6,), (5, 6), (5,))
    for i, t in enumerate(inputs):
        t.requires_grad_(i == frozen)
    (have,) = gradients(remnant.feed_forward(*inputs), [inputs[frozen]])
    (want,) = gradients(eager_feed_forward(*inputs, "relu"), [inputs[frozen]])
    torch.testing.assert_close(have, want)


def test_nan_and_inf_pass_through_the_hidden_layer():
    x, w1, w2 = leaves(torch.float32, (4, 3), (5, 3), (3, 5))
    with torch.no_grad():
        x[1, 0], x[2, 1] = math.nan, math.inf
    for activation in ("relu", "gelu"):
        y = remnant.feed_forward(x, w1, None, w2, None, activation=activation)
        assert y[1].isnan().all()
        assert not y[2].isfinite().all()
        assert y[[0, 3]].isfinite().all()
        _, dw1, _ = gradients(y, [x, w1, w2])
        assert dw1.isnan().any()


def eager_attention(x, memory, w, b, wo, bo, heads, mask, causal, p, generator_seed, group):
    """Separate operations around remnant.attention, `group` sequences at a time, each drawing a seed."""
    torch.manual_seed(generator_seed)
    source = x if memory is None else memory
    outputs = []
    for first in range(0, len(x), group):
        part, other = x[first : first + group], source[first : first + group]
        weights = w.chunk(3)
        biases = b.chunk(3) if b is not None else (None,) * 3
        q, k, v = (
            functional.linear(t, wi, bi).unflatten(-1, (heads, -1)).transpose(1, 2)
            for t, wi, bi in zip((part, other, other), weights, biases, strict=True)
        )
        m = mask[first : first + group] if mask is not None and mask.dim() == 4 and len(mask) > 1 else mask
        o = remnant.attention(q, k, v, mask=m, causal=causal, dropout=p)
        outputs.append(functional.linear(o.transpose(1, 2).flatten(2), wo, bo))
    return torch.cat(outputs)


MASKS = {
    "none": lambda b, n, m: None,
    "padding": lambda b, n, m: torch.arange(m) < torch.arange(1, b + 1)[:, None, None, None] * m // b,
    "arbitrary": lambda b, n, m: torch.randn(n, m, dtype=torch.float64),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("cross", [True, False])
@pytest.mark.parametrize("biases", [True, False])
def test_multihead_attention_equals_separate_operations(mask, p, keep, cross, biases):
    batch, length, dim, heads = 5, 400, 12, 3
    other = 300 if cross else length
    x, memory, w, b, wo, bo = leaves(
        torch.float64, (batch, length, dim), (batch, other, dim), (3 * dim, dim), (3 * dim,), (dim + 2, dim), (dim + 2,)
    )
    if not cross:
        memory = None
    if not biases:
        b = bo = None
    m = MASKS[mask](batch, length, other)
    torch.manual_seed(3)
    have = remnant.multihead_attention(
        x, memory, w, b, wo, bo, heads, mask=m, causal=not cross, dropout=p, keep_output=keep
    )
    want = eager_attention(x, memory, w, b, wo, bo, heads, m, not cross, p, 3, 1024 // length)
    torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-9)
    inputs = [t for t in (x, memory, w, b, wo, bo) if t is not None]
    for a, c in zip(gradients(have, inputs), gradients(want, inputs), strict=True):
        torch.testing.assert_close(a, c, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("cross", [True, False])
def test_heads_of_a_long_sequence_take_turns(keep, cross):
    length, dim, heads, at_once = 2500, 8, 4, 4 * 2048 // 2500
    x, memory, w, b, wo, bo = leaves(
        torch.float64, (2, length, dim), (2, 300, dim), (3 * dim, dim), (3 * dim,), (dim, dim), (dim,)
    )
    if not cross:
        memory = None
    m = torch.rand(1, heads, 1, 300 if cross else length) < 0.9
    torch.manual_seed(5)
    have = remnant.multihead_attention(x, memory, w, b, wo, bo, heads, mask=m, dropout=0.2, keep_output=keep)
    torch.manual_seed(5)
    outputs = []
    for one in range(2):  # each sequence is a group
        query = x[one : one + 1]
        source = query if memory is None else memory[one : one + 1]
        q, k, v = (
            functional.linear(t, wi, bi).unflatten(-1, (heads, -1)).transpose(1, 2)
            for t, wi, bi in zip((query, source, source), w.chunk(3), b.chunk(3), strict=True)
        )
        attended = [
            remnant.attention(*(t[:, i : i + at_once] for t in (q, k, v)), mask=m[:, i : i + at_once], dropout=0.2)
            for i in range(0, heads, at_once)
        ]
        outputs.append(functional.linear(torch.cat(attended, 1).transpose(1, 2).flatten(2), wo, bo))
    want = torch.cat(outputs)
    torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-9)
    inputs = [t for t in (x, memory, w, b, wo, bo) if t is not None]
    for a, c in zip(gradients(have, inputs), gradients(want, inputs), strict=True):
        torch.testing.assert_close(a, c, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep", [True, False])
def test_multihead_attention_in_other_dtypes(dtype, keep):
    inputs = leaves(dtype, (3, 50, 32), (96, 32), (96,), (32, 32), (32,))
    exact = [t.detach().double().requires_grad_() for t in inputs]

    def eager(x, w, b, wo, bo):
        q, k, v = functional.linear(x, w, b).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        p = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        return functional.linear((p @ v).transpose(1, 2).flatten(2), wo, bo)

    x, w, b, wo, bo = inputs
    have = remnant.multihead_attention(x, None, w, b, wo, bo, 4, keep_output=keep)
    plain, want = eager(*inputs), eager(*exact)
    columns = zip([have, *gradients(have, inputs)], [plain, *gradients(plain, inputs)],
                  [want, *gradients(want, exact)], strict=True)
    for a, c, d in columns:
        floor = 8 * torch.finfo(dtype).eps * d.abs().max()
        assert (a - d).abs().max() <= 2 * (c - d).abs().max() + floor


def test_multihead_attention_keeps_what_it_says():
    batch, length, dim, heads = 6, 256, 16, 2
    x, memory, w, b, wo, bo = leaves(
        torch.float32, (batch, length, dim), (batch, 100, dim), (3 * dim, dim), (3 * dim,), (dim, dim), (dim,)
    )
    known = (x, memory, w, b, wo)

    def kept(**options):
        return kept_bytes(lambda: remnant.multihead_attention(x, memory, w, b, wo, bo, heads, **options), *known)

    groups = 2  # of 1024 // 256 sequences
    assert kept() == 0
    assert kept(dropout=0.1) == 16 * groups
    assert kept(keep_output=True) == 4 * batch * length * (dim + heads)
    assert kept(keep_output=True, dropout=0.1) == 4 * batch * length * (dim + heads) + 16 * groups


@pytest.mark.parametrize("wanted", range(6))
def test_multihead_attention_with_one_thing_wanted(wanted):
    inputs = leaves(torch.float64, (2, 7, 8), (2, 5, 8), (24, 8), (24,), (6, 8), (6,))
    for i, t in enumerate(inputs):
        t.requires_grad_(i == wanted)
    for keep in (True, False):
        (have,) = gradients(remnant.multihead_attention(*inputs, 2, keep_output=keep), [inputs[wanted]])
        (want,) = gradients(eager_attention(*inputs, 2, None, False, 0.0, 0, 2), [inputs[wanted]])
        torch.testing.assert_close(have, want)


def test_gradients_by_differences():
    torch.manual_seed(1)
    block = leaves(torch.float64, (2, 5, 4), (2, 3, 4), (12, 4), (12,), (4, 4), (4,))
    assert torch.autograd.gradcheck(lambda *t: remnant.multihead_attention(*t, 2), block)
    assert torch.autograd.gradcheck(
        lambda *t: remnant.multihead_attention(t[0], None, *t[2:], 2, causal=True, keep_output=True), block
    )
    layer = leaves(torch.float64, (7, 4), (6, 4), (6,), (3, 6), (3,))
    assert torch.autograd.gradcheck(lambda *t: remnant.feed_forward(*t, activation="gelu"), layer)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_opcheck(requires_grad):
    layer = [t.detach().requires_grad_(requires_grad) for t in leaves(torch.float32, (7, 4), (6, 4), (6,), (3, 6), (3,))]
    opcheck(ops.feed_forward.default, tuple(layer))
    opcheck(ops.feed_forward.default, tuple(layer), dict(dropout=0.5), test_utils=("test_schema", "test_faketensor"))
    coded = (*layer, "gelu", 0.1, 4)
    opcheck(ops.feed_forward_coded.default, coded, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))
    block = [
        t.detach().requires_grad_(requires_grad)
        for t in leaves(torch.float32, (2, 5, 4), (2, 3, 4), (12, 4), (12,), (4, 4), (4,))
    ]
    opcheck(ops.multihead_attention.default, (*block, 2))
    opcheck(ops.multihead_attention.default, (block[0], None, *block[2:], 2), dict(causal=True, keep_output=True))


def test_threads_do_not_change_what_is_dropped():
    x, w1, w2 = leaves(torch.float32, (600, 16), (600, 16), (16, 600))
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(2)
            results.append(remnant.feed_forward(x, w1, None, w2, None, dropout=0.5))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(*results)


def test_a_second_derivative_is_refused():
    x, w1, w2 = leaves(torch.float64, (3, 4), (5, 4), (4, 5))
    (g,) = torch.autograd.grad(remnant.feed_forward(x, w1, None, w2, None).sum(), x, create_graph=False)
    assert g.shape == x.shape
    with pytest.raises(RuntimeError, match="no gradient of its gradient"):
        torch.autograd.grad(remnant.feed_forward(x, w1, None, w2, None).sum(), x, create_graph=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(activation="tanh"), "'relu' or 'gelu', got 'tanh'"),
        (dict(dropout=1.0), r"dropout must be in \[0, 1\)"),
    ],
)
def test_feed_forward_names_the_mistake(change, message):
    x, w1, w2 = leaves(torch.float32, (3, 4), (5, 4), (4, 5))
    with pytest.raises(RuntimeError, match=message):
        remnant.feed_forward(x, w1, None, w2, None, **change)


def test_shapes_that_do_not_fit_are_named():
    x, w1, w2 = leaves(torch.float32, (3, 4), (5, 6), (4, 5))
    with pytest.raises(RuntimeError, match="input has 4 features, weight1 6"):
        remnant.feed_forward(x, w1, None, w2, None)
    q, w, wo = leaves(torch.float32, (2, 3, 8), (24, 8), (8, 8))
    with pytest.raises(RuntimeError, match="heads must divide E = 8, got 3"):
        remnant.multihead_attention(q, None, w, None, wo, None, 3)
    with pytest.raises(RuntimeError, match=r"memory must be \[2, M, 8\]"):
        remnant.multihead_attention(q, q[:1], w, None, wo, None, 2)
    mask = torch.zeros(3, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="mask must not need a gradient"):
        remnant.multihead_attention(q, None, w, None, wo, None, 2, mask=mask)
    with pytest.raises(RuntimeError, match="does not broadcast"):
        remnant.multihead_attention(q, None, w, None, wo, None, 2, mask=torch.ones(4, 4, dtype=torch.bool))
