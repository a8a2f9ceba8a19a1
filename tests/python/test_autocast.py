"""torch.autocast on CPU: products in bfloat16, norms and losses computed in float32."""

import pytest
import torch
import torch.nn.functional as F

import remnant

BFLOAT16 = torch.bfloat16


def autocast(enabled=True):
    return torch.autocast("cpu", dtype=BFLOAT16, enabled=enabled)


def leaf(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def relative(x, y):
    x, y = x.detach().double(), y.detach().double()
    return float((x - y).norm() / y.norm())


def saved_dtypes(function):
    found = []

    def pack(t):
        found.append((t.dtype, t.numel()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = function()
    return result, found


@pytest.mark.parametrize("policy", ["exact", "recompute", "quantized:bits=4", "curve:m=3"])
def test_attention(policy):
    q, k, v = (leaf(2, 3, 8, 16) for _ in range(3))
    mask = torch.randn(8, 8)
    with autocast():
        (y, weights), saved = saved_dtypes(
            lambda: remnant.attention(q, k, v, mask=mask, policy=policy, need_weights=True)
        )
        alone = remnant.attention(q, k.to(BFLOAT16), v, mask=mask, policy=policy)
        torch_does = F.scaled_dot_product_attention(q, k, v, mask)
    assert y.dtype == torch_does.dtype == alone.dtype == weights.dtype == BFLOAT16
    assert (torch.float32, q.numel()) not in saved
    assert relative(y, F.scaled_dot_product_attention(q, k, v, mask)) < 0.02
    grads = torch.autograd.grad(y.float().sum(), (q, k, v))
    assert all(g.dtype == torch.float32 for g in grads)


def test_attention_packed():
    q = leaf(9, 2, 16)
    bounds = torch.tensor([0, 4, 9])
    with autocast():
        y = remnant.attention_packed(q, q, q, bounds, bounds)
    assert y.dtype == BFLOAT16
    assert relative(y, remnant.attention_packed(q, q, q, bounds, bounds)) < 0.02


@pytest.mark.parametrize("policy", ["exact", "quantized:bits=8"])
def test_linear(policy):
    x, weight, bias = leaf(12, 64), leaf(8, 64), leaf(8)
    grad = torch.randn(12, 8)
    results = []
    for function in (lambda: remnant.linear(x, weight, bias, policy=policy), lambda: F.linear(x, weight, bias)):
        with autocast():
            y = function()
        assert y.dtype == BFLOAT16
        results.append([y, *torch.autograd.grad(y, (x, weight, bias), grad.to(BFLOAT16))])
    for have, want in zip(*results, strict=True):
        assert have.dtype == want.dtype
        assert relative(have, want) < 0.02


def test_readers_share_codes_under_autocast():
    x = leaf(12, 64) * 1
    weights = [leaf(8, 64) for _ in range(3)]
    storages = set()

    def pack(t):
        if t.dtype == torch.uint8:
            storages.add(t.untyped_storage().data_ptr())
        return t

    with autocast(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ys = [remnant.linear(x, w, policy="quantized:bits=4") for w in weights]
    assert len(storages) == 1 and len(ys) == 3


def test_blocks():
    def small(*shape):  # products of the size of their inputs, as a trained layer's are
        return (torch.randn(shape) * shape[-1] ** -0.5).requires_grad_()

    x, weights, biases = leaf(2, 6, 32), [small(64, 32), small(32, 64)], [small(64), small(32)]
    in_weight, in_bias, out_weight, out_bias = small(96, 32), small(96), small(32, 32), small(32)

    def hidden(y):
        return remnant.feed_forward(y, weights[0], biases[0], weights[1], biases[1])

    def attend(y):
        return remnant.multihead_attention(y, None, in_weight, in_bias, out_weight, out_bias, 4)

    for function, parameters in (
        (hidden, (*weights, *biases)),
        (attend, (in_weight, in_bias, out_weight, out_bias)),
    ):
        want = function(x)
        want_grads = torch.autograd.grad(want.square().sum(), (x, *parameters))
        with autocast():
            y, saved = saved_dtypes(lambda: function(x))  # noqa: B023
        assert y.dtype == BFLOAT16 and relative(y, want) < 0.03
        assert (torch.float32, x.numel()) not in saved
        for have, wanted in zip(
            torch.autograd.grad(y.float().square().sum(), (x, *parameters)), want_grads, strict=True
        ):
            assert have.dtype == torch.float32
            assert relative(have, wanted) < 0.04


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_linear_cross_entropy(reduction):
    x, weight, bias = leaf(12, 16), leaf(30, 16), leaf(30)
    target = torch.randint(0, 30, (12,))
    with autocast():
        loss = remnant.linear_cross_entropy(x, weight, bias, target, reduction=reduction)
        plain = F.cross_entropy(F.linear(x, weight, bias), target, reduction=reduction)
    assert loss.dtype == plain.dtype == torch.float32
    assert relative(loss, plain) < 0.02
    grads = [torch.autograd.grad(y.sum(), (x, weight, bias)) for y in (loss, plain)]
    for have, want in zip(*grads, strict=True):
        assert have.dtype == torch.float32
        assert relative(have, want) < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16], ids=str)
def test_norms_keep_their_inputs_dtype_as_torch_does(dtype):
    x, weight, bias = leaf(6, 40, dtype=dtype), leaf(40), leaf(40)
    with autocast():
        y, z = remnant.layer_norm(x, weight, bias), remnant.rms_norm(x, weight)
        assert y.dtype == F.layer_norm(x, (40,), weight, bias).dtype == dtype
        assert z.dtype == dtype
    # From float32 arithmetic: no more than the output's own rounding.
    assert relative(y, F.layer_norm(x.double(), (40,), weight.double(), bias.double())) < 2e-3
    assert [g.dtype for g in torch.autograd.grad(y.sum(), (x, weight, bias))] == [dtype, torch.float32, torch.float32]
    with autocast():  # parameters of a bfloat16 model
        half = remnant.layer_norm(leaf(6, 40), leaf(40, dtype=BFLOAT16), leaf(40, dtype=BFLOAT16))
    assert half.dtype == torch.float32


def test_residuals_take_the_wider_dtype():
    x, residual, weight = leaf(6, 40, dtype=BFLOAT16), leaf(6, 40), leaf(40)
    with autocast():
        total = remnant.dropout_add(x, residual, 0.1)
        y, kept = remnant.dropout_add_layer_norm(x, residual, 0.1, weight)
        post = remnant.dropout_add_layer_norm(x, residual, 0.0, weight, need_sum=False)
        halves = remnant.dropout_add(x, x, 0.1)
    assert total.dtype == y.dtype == kept.dtype == post.dtype == torch.float32
    assert halves.dtype == BFLOAT16
    assert relative(post, F.layer_norm(x.float() + residual, (40,), weight)) < 1e-5
    grads = torch.autograd.grad(y.sum() + kept.sum() + total.sum(), (x, residual, weight))
    assert [g.dtype for g in grads] == [BFLOAT16, torch.float32, torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16], ids=str)
def test_elementwise_ops_run_as_they_come(dtype):
    x = leaf(6, 40, dtype=dtype)
    with autocast():
        for y in (remnant.dropout(x, 0.1), remnant.relu(x), remnant.leaky_relu(x), remnant.gelu(x), remnant.silu(x)):
            assert y.dtype == dtype
            assert torch.autograd.grad(y.sum(), x)[0].dtype == dtype


def test_a_layer_trains():
    weights = [leaf(64, 64) for _ in range(4)]
    gamma, beta = leaf(64), leaf(64)
    x = leaf(2, 8, 64)
    with autocast():
        q, k, v = (remnant.linear(x, w, policy="quantized:bits=8").unflatten(-1, (4, 16)).transpose(1, 2)
                   for w in weights[:3])  # fmt: skip
        o = remnant.attention(q, k, v, causal=True, dropout=0.1).transpose(1, 2).flatten(2)
        o = remnant.linear(o, weights[3], policy="quantized:bits=8")
        y, _ = remnant.dropout_add_layer_norm(o, x, 0.1, gamma, beta)
        loss = remnant.linear_cross_entropy(
            y.flatten(0, 1), weights[0], None, torch.randint(0, 64, (16,)), label_smoothing=0.1
        )
    assert y.dtype == loss.dtype == torch.float32
    for grad in torch.autograd.grad(loss, (*weights, gamma, beta, x)):
        assert grad.dtype == torch.float32 and grad.isfinite().all()


def test_switched_off_inside():
    q = leaf(1, 1, 4, 8)
    with autocast():
        with autocast(enabled=False):
            assert remnant.attention(q, q, q).dtype == torch.float32
            assert remnant.linear(q, leaf(3, 8)).dtype == torch.float32
