"""torch's own checks of custom ops: schemas, autograd registration, fake tensors, tracing."""

import pytest
import torch
from torch.library import opcheck

import remnant

ops = torch.ops.remnant
POLICIES = ["exact", "recompute", "curve:m=3"]  # without dropout deterministic, which opcheck wants
RANDOM = ["quantized:bits=4", "sampled:m=3"]
MASKS = ["none", "boolean", "additive"]


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def samples(mask, requires_grad, dtype=torch.float32, kv_heads=2):
    torch.manual_seed(0)

    def make(*shape):
        return torch.randn(shape, dtype=dtype, requires_grad=requires_grad)

    q, k, v = make(2, 4, 6, 4), make(2, kv_heads, 7, 4), make(2, kv_heads, 7, 5)
    masks = {"none": lambda: None, "boolean": lambda: torch.rand(2, 1, 6, 7) < 0.8, "additive": lambda: make(6, 7)}
    return q, k, v, masks[mask]()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("op", [ops.attention.default, ops.attention_with_weights.default], ids=str)
def test_attention(op, policy, mask, requires_grad):
    q, k, v, m = samples(mask, requires_grad)
    opcheck(op, (q, k, v), dict(mask=m, causal=mask != "none", policy=policy, window=[3, 2]))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_with_top(requires_grad, padded):
    q, k, v, _ = samples("none", requires_grad)
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 0], dtype=torch.bool) if padded else None
    opcheck(ops.attention.default, (q, k, v), dict(mask=mask, causal=True, policy="top:m=3"))
    arguments = (*(x.detach() for x in (q, k, v)), mask, True, 0.0, 0.5, "top:m=3", [], True)
    opcheck(ops.attention_forward.default, arguments)
    _, *kept = ops.attention_forward(*arguments)
    for needs in NEEDS[1:]:
        opcheck(
            ops.attention_backward.default,
            (torch.randn(2, 4, 6, 5), *arguments[:4], None, *kept, 2, 7, True, 0.0, 0.5, "top:m=3", [], needs),
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_attention_in_other_dtypes(dtype):
    q, k, v, m = samples("additive", True, dtype)
    utilities = ["test_schema", "test_autograd_registration", "test_faketensor"]
    for policy in POLICIES:
        opcheck(ops.attention.default, (q, k, v, m), dict(policy=policy), test_utils=utilities)


@pytest.mark.parametrize("policy", POLICIES + RANDOM)
def test_attention_with_random_draws(policy):
    q, k, v, m = samples("boolean", True)
    options = dict(mask=m, dropout=0.3, policy=policy)
    utilities = ["test_schema", "test_autograd_registration", "test_faketensor"]
    opcheck(ops.attention.default, (q, k, v), options, test_utils=utilities)


def forward_arguments(mask, policy, requires_grad, keep=True, kv_heads=2):
    q, k, v, m = samples(mask, requires_grad, kv_heads=kv_heads)
    return q, k, v, m, True, 0.0, 0.5, policy, [3, 1], keep


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_attention_forward(policy, mask, requires_grad):
    opcheck(ops.attention_forward.default, forward_arguments(mask, policy, requires_grad))


@pytest.mark.parametrize("policy", POLICIES)
def test_attention_forward_that_keeps_nothing(policy):
    opcheck(ops.attention_forward.default, forward_arguments("boolean", policy, False, keep=False))


NEEDS = [[True, True, True, True], [True, True, True, False], [False, False, True, False], [True, False, False, False]]


@pytest.mark.parametrize("policy", POLICIES + RANDOM)
@pytest.mark.parametrize("needs", NEEDS, ids=str)
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_attention_backward(policy, needs, kv_heads):
    q, k, v, m, *rest = forward_arguments("additive", policy, False, kv_heads=kv_heads)
    output, *kept = ops.attention_forward(q, k, v, m, *rest)
    causal, dropout, scale, _, window, _ = rest
    kept_output = output if policy.startswith(("recompute", "quantized", "sampled")) else None
    opcheck(
        ops.attention_backward.default,
        (torch.randn_like(output), q, k, v, m, kept_output, *kept, kv_heads, 7, causal, dropout, scale, policy, window,
         needs),
    )  # fmt: skip


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_attention_weights(mask, requires_grad):
    q, k, _, m = samples(mask, requires_grad)
    opcheck(ops.attention_weights.default, (q, k, m, True, 0.5, [3, 1]))


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_softmax_approximation(mask, requires_grad):
    torch.manual_seed(0)
    energy = torch.randn(3, 5, 9, requires_grad=requires_grad)
    m = torch.rand(5, 9) < 0.7 if mask else None
    for paper_text in (False, True):
        opcheck(ops.softmax_approximation.default, (energy, m, 2, paper_text))
    opcheck(ops.softmax_approximation_forward.default, (energy, m, 2, True))
    opcheck(ops.softmax_approximation_forward.default, (energy.detach(), m, 2, False))
    _, codes, table = ops.softmax_approximation_forward(energy.detach(), m, 2, True)
    opcheck(ops.softmax_approximation_backward.default, (torch.randn(3, 5, 9), codes, table, 2, False))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_softmax_input_from_output(requires_grad):
    output = torch.rand(3, 4).add_(0.1).requires_grad_(requires_grad)
    opcheck(ops.softmax_input_from_output.default, (output, torch.rand(3, requires_grad=requires_grad)))


UTILITIES = ["test_schema", "test_autograd_registration", "test_faketensor"]  # for what draws random numbers


@pytest.mark.parametrize("requires_grad", [False, True])
def test_dropout(requires_grad):
    x, residual = (torch.randn(3, 5, requires_grad=requires_grad) for _ in range(2))
    opcheck(ops.dropout.default, (x, 0.3), test_utils=UTILITIES)
    opcheck(ops.dropout_forward.default, (x, 0.3), test_utils=UTILITIES)
    seed = ops.draw_seed(x.detach())
    opcheck(ops.draw_seed.default, (x.detach(),), test_utils=UTILITIES)
    opcheck(ops.dropout_backward.default, (x, seed, 0.3))
    opcheck(ops.dropout_add.default, (x, residual, 0.3), test_utils=UTILITIES)
    opcheck(ops.dropout_add.default, (x, residual, 0.0))
    opcheck(ops.dropout_add_forward.default, (x, residual, seed, 0.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_norms(requires_grad, dtype):
    x, residual = (torch.randn(3, 5, 8, dtype=dtype, requires_grad=requires_grad) for _ in range(2))
    weight, bias = (torch.randn(8, dtype=dtype, requires_grad=requires_grad) for _ in range(2))
    # Compiled code keeps x^, eager code the rounded output.
    close = dict(rtol=2e-2, atol=2e-2) if dtype == torch.bfloat16 else {}
    opcheck(ops.layer_norm.default, (x,))
    opcheck(ops.layer_norm.default, (x, weight, bias, 1e-3), **close)
    opcheck(ops.rms_norm.default, (x, weight), **close)
    opcheck(ops.dropout_add_layer_norm.default, (x, residual, 0.3, weight, bias), test_utils=UTILITIES)
    for need_sum in (False, True):
        opcheck(ops.dropout_add_layer_norm.default, (x, residual, 0.0, weight, bias), dict(need_sum=need_sum), **close)
    x, residual, weight, bias = (t.detach() for t in (x, residual, weight, bias))
    seed = ops.draw_seed(x)
    for hidden, everything in [([], False), ([1, 4], False), ([], True)]:
        arguments = (x, residual, weight, bias, seed, 0.3, 1e-5, True, True, True, hidden, everything)
        opcheck(ops.norm_forward.default, arguments)
        y, _, rstd, aside = ops.norm_forward(*arguments)
        kept = None if everything else y
        for needs in ([True] * 4, [True, False, False, False], [False, True, False, False], [False, False, True, True]):
            rest = (kept, rstd if needs[0] or needs[1] else None, aside, weight, bias, seed, 0.3, True, hidden, needs)
            opcheck(ops.norm_backward.default, (torch.randn_like(y), torch.randn_like(y), *rest))
            opcheck(ops.norm_backward.default, (torch.randn_like(y), None, *rest))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_activations(requires_grad):
    x = torch.randn(3, 43, requires_grad=requires_grad)
    opcheck(ops.relu.default, (x,))
    opcheck(ops.leaky_relu.default, (x, 0.2))
    for policy in ("exact", "fewbit:bits=3"):
        opcheck(ops.gelu.default, (x, "tanh", policy))
        opcheck(ops.silu.default, (x, policy))
    for kind, bits in ((0, 1), (1, 0), (2, 3)):
        opcheck(ops.activation_forward.default, (x, kind, 0.1, bits, True))
        _, codes = ops.activation_forward(x.detach(), kind, 0.1, bits, True)
        kept = x.detach() if bits == 0 else None
        opcheck(ops.activation_backward.default, (torch.randn(3, 43), kept, codes, kind, 0.1, bits))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_linear(requires_grad):
    x, weight = (torch.randn(size, 40, requires_grad=requires_grad) for size in (7, 5))
    bias = torch.randn(5, requires_grad=requires_grad)
    opcheck(ops.linear.default, (x, weight, bias))
    opcheck(ops.linear.default, (x, weight, bias, "quantized:bits=4"), test_utils=UTILITIES)
    opcheck(ops.linear_coded.default, (x, weight, None, 8), test_utils=UTILITIES)
    x, weight = x.detach(), weight.detach()
    seed = ops.draw_seed(x)
    for bits in (8, 4, 2):
        opcheck(ops.encode.default, (x, seed, bits))
        codes, table = ops.encode(x, seed, bits)
        opcheck(ops.decode.default, (codes, table, bits, [7, 40], torch.float32))
        for needs in ([True, True, True], [False, True, False], [True, False, False], [False, False, True]):
            kept = (codes, table) if needs[1] else (None, None)
            opcheck(
                ops.linear_coded_backward.default,
                (torch.randn(7, 5), *kept, weight if needs[0] else None, 40, bits, needs),
            )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_max_pool2d(layout):
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    windows = ([3, 2], [2, 1], [1, 0], [1, 2])
    opcheck(ops.max_pool2d.default, (x, *windows, True))
    opcheck(ops.max_pool2d_forward.default, (x.detach(), *windows, False))
    y, places = ops.max_pool2d_forward(x.detach(), *windows, False)
    opcheck(ops.max_pool2d_backward.default, (torch.randn_like(y), places, x.shape, *windows))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_shortcut(requires_grad):
    x = torch.randn(2, 3, 6, 4, requires_grad=requires_grad)
    opcheck(ops.shortcut.default, (x, 2, 5))
    opcheck(ops.shortcut.default, (x, 2, 3, True))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_conv2d(requires_grad):
    x = torch.randn(2, 4, 8, 9, requires_grad=requires_grad)
    weight, bias = (torch.randn(*size, requires_grad=requires_grad) for size in ((6, 2, 3, 3), (6,)))
    opcheck(ops.conv2d.default, (x, weight, bias, [1, 2], [1, 0], [1, 1], 2))
    opcheck(ops.conv2d.default, (x, weight, bias, [1, 2], [1, 0], [1, 1], 2, "quantized:bits=4"), test_utils=UTILITIES)
    arguments = (x, weight, None, [1, 1], [1, 1], [1, 1], 2)
    opcheck(ops.conv2d_coded.default, (*arguments, 8), test_utils=UTILITIES)
    x, weight = x.detach(), weight.detach()
    codes, table = ops.encode(x, ops.draw_seed(x), 4)
    for needs in ([True, True, True], [False, True, False], [True, False, False], [False, False, True]):
        kept = (codes, table) if needs[1] else (None, None)
        grad = torch.randn(2, 6, 8, 9)
        opcheck(ops.conv2d_coded_backward.default, (grad, *kept, weight, x.shape, *arguments[3:], 4, needs))


def test_compiled_conv2d():
    """What rebuilds its input keeps it under torch.compile, where values cannot be read."""
    x, weight = ((0.2 * torch.randn(4, 4, size, size)).requires_grad_() for size in (9, 3))
    for policy in ("exact", "invert"):
        compare_compiled(lambda x, w, p=policy: remnant.conv2d(x * 2, w, None, 1, 1, policy=p), x, weight, dynamic=False)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_ops_that_keep_codes(requires_grad):
    q = torch.randn(2, 2, 6, 8, requires_grad=requires_grad)
    mask = torch.randn(6, 6, requires_grad=requires_grad)
    opcheck(ops.attention_coded.default, (q, q, q, mask, True, 0.0, None, None, 4), test_utils=UTILITIES)
    x, weight = torch.randn(5, 16, requires_grad=requires_grad), torch.ones(16, requires_grad=requires_grad)
    opcheck(ops.activation_coded.default, (x, 1, 4), test_utils=UTILITIES)
    opcheck(ops.layer_norm.default, (x, weight, None, 1e-5, "quantized:bits=4"), test_utils=UTILITIES)
    opcheck(ops.rms_norm.default, (x, weight, None, "quantized:bits=8"), test_utils=UTILITIES)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_feed_forward(requires_grad):
    shapes = ((2, 5, 8), (16, 8), (16,), (6, 16), (6,))
    inputs = [torch.randn(shape, requires_grad=requires_grad) for shape in shapes]
    opcheck(ops.feed_forward_forward.default, (*inputs, "gelu", 0.0))
    opcheck(ops.feed_forward_coded.default, (*inputs, "relu", 0.3, 4), test_utils=UTILITIES)
    x, w1, b1, w2, b2 = (each.detach() for each in inputs)
    grad = torch.randn(2, 5, 6)
    for dropout in (0.0, 0.3):
        _, seed = ops.feed_forward_forward(x, w1, b1, w2, b2, "gelu", dropout)
        _, coded_seed, codes = ops.feed_forward_coded(x, w1, b1, w2, b2, "relu", dropout, 4)
        kept = ops.encode(x, ops.draw_seed(x), 4)
        for needs in ([True] * 5, [True, False, False, False, False], [False, True, True, False, False],
                      [False, False, False, True, True]):
            opcheck(ops.feed_forward_backward.default, (grad, x, w1, b1, w2, seed, "gelu", dropout, needs))
            input_codes = kept if needs[1] else (None, None)
            opcheck(ops.feed_forward_coded_backward.default,
                    (grad, *input_codes, w1, w2, coded_seed, codes, "relu", dropout, 4, needs))


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("other", [False, True])
def test_multihead_attention(requires_grad, other):
    def make(*shape):
        return torch.randn(shape, requires_grad=requires_grad)

    query, memory = make(2, 5, 8), make(2, 6, 8) if other else None
    weights = make(24, 8), make(24), make(8, 8), make(8)
    mask = torch.rand(2, 1, 1, 6 if other else 5) < 0.8
    # Not traced: where autograd is off it keeps nothing, and backward makes it again.
    opcheck(ops.multihead_attention_forward.default, (query, memory, *weights, 2, mask, not other, 0.0, True),
            test_utils=UTILITIES)
    query, in_weight, in_bias, out_weight, out_bias = (x.detach() for x in (query, *weights))
    memory = memory.detach() if other else None
    for keep, dropout in ((False, 0.0), (True, 0.3)):
        _, *kept = ops.multihead_attention_forward(
            query, memory, in_weight, in_bias, out_weight, out_bias, 2, mask, not other, dropout, keep)
        for needs in ([True, other, True, True, True, True], [True, False, False, False, False, False],
                      [False, False, False, False, True, True]):
            opcheck(ops.multihead_attention_backward.default,
                    (torch.randn(2, 5, 8), query, memory, in_weight, in_bias, out_weight, *kept, 2, mask, not other, dropout,
                     needs))


@pytest.mark.parametrize("policy", POLICIES + RANDOM)
def test_attention_packed(policy):
    q, k, v = (torch.randn(7, heads, 4) for heads in (4, 2, 2))
    ends = [0, 3, 7]
    arguments = (ends, ends, True, 0.0, 0.5, policy, [], True)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    opcheck(ops.attention_packed_forward.default, (*leaves, *arguments),
            test_utils=UTILITIES if policy in RANDOM else "ALL")
    output, *kept = ops.attention_packed_forward(q, k, v, *arguments)
    for needs in ([True, True, True], [True, False, False], [False, False, True]):
        opcheck(ops.attention_packed_backward.default,
                (torch.randn_like(output), q, k, v, output, ends, ends, *kept, 2, *arguments[2:-1], needs))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_conv2d_rebuilt(requires_grad):
    x = torch.randn(2, 4, 8, 9, requires_grad=requires_grad)
    for least in (False, True):
        opcheck(ops.conv2d_rebuilt.default, (x, 0.2 * torch.randn(4, 4, 3, 3), torch.randn(4), [1, 1], [1, 1], [1, 1], 1, least))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_reversible_chain(requires_grad):
    weights = [(0.2 * torch.randn(4, 4, 3, 3)).requires_grad_(requires_grad)]
    arguments = (torch.randn(2, 4, 6, 6), weights, [torch.ones(4)], [torch.zeros(4)], [], [], 0.1, 1e-5, 0.5)
    # Its forward with gradients reads values, which tracing does not have.
    traced = () if requires_grad else ("test_schema", "test_aot_dispatch_dynamic")
    opcheck(ops.reversible_chain.default, arguments, test_utils=("test_autograd_registration", "test_faketensor", *traced))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_linear_cross_entropy(requires_grad):
    x, weight, bias = (torch.randn(*size, requires_grad=requires_grad) for size in ((7, 8), (11, 8), (11,)))
    target = torch.randint(0, 11, (7,))
    for reduction in (0, 1, 2):
        opcheck(ops.linear_cross_entropy.default, (x, weight, bias, target, -100, 0.1, reduction))
    arguments = (x.detach(), weight.detach(), bias.detach(), target, -100, 0.1)
    for needs in ([True, True, True], [False, True, False]):
        opcheck(ops.linear_cross_entropy_backward.default, (torch.randn(7), *arguments, needs))


# --- torch.compile ---------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES + RANDOM)
@pytest.mark.parametrize("mask", MASKS)
def test_compiled_code_gives_the_same(policy, mask):
    torch._dynamo.reset()
    q, k, v, m = samples(mask, True)

    def function(q, k, v, m):
        return remnant.attention(q * 2, k, v, mask=m, causal=True, policy=policy).square()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    wanted = [x for x in (q, k, v, m) if x is not None and x.requires_grad]
    results = []
    for run in (function, compiled):
        torch.manual_seed(1)
        o = run(q, k, v, m)
        results.append([o, *torch.autograd.grad(o.sum(), wanted)])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def test_compiled_dropout_and_weights():
    torch._dynamo.reset()
    q, k, v, _ = samples("none", True)

    def function(q, k, v):
        return remnant.attention(q, k, v, dropout=0.4, need_weights=True)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for run in (function, compiled):
        torch.manual_seed(1)
        o, weights = run(q, k, v)
        results.append([o, weights, *torch.autograd.grad(o.square().sum(), [q, k, v])])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def test_compiled_softmax_approximation():
    torch._dynamo.reset()
    energy = torch.randn(3, 5, 40, requires_grad=True)
    mask = torch.rand(5, 40) < 0.7

    def function(energy):
        return remnant.softmax_approximation(energy * 2, mask, 3).square()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for x, y in zip(
        torch.autograd.grad(function(energy).sum(), energy), torch.autograd.grad(compiled(energy).sum(), energy),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(x, y)


def compare_compiled(function, *inputs, dynamic=None):
    """Outputs and gradients of the function, compiled and not, from the same random state."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    results = []
    for run in (function, compiled):
        torch.manual_seed(1)
        y = run(*inputs)
        y = list(y) if isinstance(y, tuple) else [y]
        grads = torch.autograd.grad(sum(t.square().sum() for t in y), inputs)
        results.append([*y, *grads])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_compiled_norms():
    x, residual = (torch.randn(3, 5, 8, requires_grad=True) for _ in range(2))
    weight, bias = (torch.randn(8, requires_grad=True) for _ in range(2))
    compare_compiled(lambda x, w, b: remnant.layer_norm(x * 2, w, b), x, weight, bias)
    compare_compiled(lambda x, w: remnant.rms_norm(x * 2, w), x, weight, dynamic=True)
    compare_compiled(
        lambda x, r, w, b: remnant.dropout_add_layer_norm(x * 2, r, 0.3, w, b), x, residual, weight, bias
    )
    compare_compiled(lambda x, r: remnant.dropout_add(x * 2, r, 0.3), x, residual, dynamic=True)


def test_compiled_linear():
    x, weight, bias = (torch.randn(*size, requires_grad=True) for size in ((7, 40), (5, 40), (5,)))
    for policy in ("exact", "quantized:bits=8"):
        compare_compiled(lambda x, w, b, p=policy: remnant.linear(x * 2, w, b, policy=p), x, weight, bias, dynamic=True)


def test_compiled_activations():
    x = torch.randn(3, 43, requires_grad=True)
    for function in (remnant.relu, remnant.leaky_relu, remnant.gelu, remnant.silu):
        compare_compiled(lambda x, f=function: f(x * 2), x, dynamic=True)
    compare_compiled(lambda x: remnant.gelu(x * 2, policy="fewbit:bits=3"), x, dynamic=True)


@pytest.mark.parametrize("policy", ["recompute", "sampled:m=6", "top:m=6"])
def test_compiled_code_takes_other_lengths(policy):
    torch._dynamo.reset()

    def function(q, k, v):
        return remnant.attention(q, k, v, causal=True, policy=policy)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (5, 8, 40):  # fewer and more keys than are drawn, one tile of rows and two
        q, k, v = (torch.randn(2, 2, n, 4, requires_grad=True) for _ in range(3))
        torch.manual_seed(1)
        want = function(q, k, v)
        torch.manual_seed(1)
        got = compiled(q, k, v)
        torch.testing.assert_close(got, want)
        for x, y in zip(
            torch.autograd.grad(got.sum(), [q, k, v]), torch.autograd.grad(want.sum(), [q, k, v]), strict=True
        ):
            torch.testing.assert_close(x, y)
