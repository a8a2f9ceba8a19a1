"""Ops that keep low-bit codes of what they need: bytes, sharing, and gradients whose mean is the gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

import remnant

BITS = [8, 4, 2]


def leaf(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def kept(function):
    """Bytes of the storages that function() saves, parameters and inputs (leaves) apart, and its result."""
    storages = {}

    def pack(x):
        if not x.is_leaf or not x.requires_grad:
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        y = function()
    return sum(storages.values()), y


def check_unbiased(function, inputs, want, draws=400, bias=0.0):
    """The squared distance of the mean from `want` is variance / draws, give or take chance, and `bias` of |want|."""
    grad = torch.randn_like(function())
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(want(), inputs, grad)])
    errors = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(function(), inputs, grad)]) - exact
            for _ in range(draws)
        ]
    )
    variance = errors.var(0).sum()
    distance = errors.mean(0).square().sum()
    assert variance > 0
    assert distance < 1.5 * variance / draws + (bias * exact.norm()) ** 2
    return float(variance / exact.square().sum())


@pytest.mark.parametrize("bits", BITS)
def test_gelu_and_silu(bits):
    x = leaf(40, 64)
    for ours, torchs in ((remnant.gelu, F.gelu), (remnant.silu, F.silu)):
        policy = f"quantized:bits={bits}"
        size, y = kept(lambda: ours(x, policy=policy))  # noqa: B023
        assert size == remnant.linear_code_bytes(x.numel(), bits)
        assert torch.equal(y, torchs(x))
        check_unbiased(lambda: ours(x, policy=policy), (x,), lambda: torchs(x))  # noqa: B023
    tanh = remnant.gelu(x, approximate="tanh", policy="quantized:bits=8")
    want = torch.autograd.grad(F.gelu(x, approximate="tanh").sum(), x)[0]
    assert (torch.autograd.grad(tanh.sum(), x)[0] - want).abs().max() < 0.02


@pytest.mark.parametrize("bits", BITS)
def test_norms(bits):
    x, residual = leaf(24, 96), leaf(24, 96)
    weight = (torch.rand(96, dtype=torch.float64) + 0.5).requires_grad_()
    bias = leaf(96)
    policy = f"quantized:bits={bits}"
    size, y = kept(lambda: remnant.layer_norm(x, weight, bias, policy=policy))
    assert torch.allclose(y, F.layer_norm(x, (96,), weight, bias))
    assert size == remnant.linear_code_bytes(x.numel(), bits) + 24 * 8
    # What the rounding adds to a product of two coded numbers is its variance over C: far below the noise at 8 and
    # 4 bits, and a percent at 2.
    allowed = {8: 0.0, 4: 0.002, 2: 0.02}[bits]
    check_unbiased(
        lambda: remnant.layer_norm(x, weight, bias, policy=policy),
        (x, weight, bias),
        lambda: F.layer_norm(x, (96,), weight, bias),
        bias=allowed,
    )
    check_unbiased(
        lambda: remnant.rms_norm(x, weight, policy=policy),
        (x, weight),
        lambda: F.rms_norm(x, (96,), weight),
        bias=allowed,
    )
    check_unbiased(
        lambda: remnant.dropout_add_layer_norm(x, residual, 0.0, weight, bias, need_sum=False, policy=policy),
        (x, residual, weight, bias),
        lambda: F.layer_norm(x + residual, (96,), weight, bias),
        bias=allowed,
    )


@pytest.mark.parametrize("small", [3, 100], ids=["a few columns", "most columns"])
@pytest.mark.parametrize("columns", [128, 150])
@pytest.mark.parametrize("bits", [8, 4])
def test_small_weights_of_a_norm_do_not_amplify_rounding(bits, columns, small):
    x, target = leaf(24, columns), torch.randn(24, columns, dtype=torch.float64)
    bias = (0.1 * torch.randn(columns, dtype=torch.float64)).requires_grad_()
    even = torch.ones(columns, dtype=torch.float64, requires_grad=True)
    uneven = torch.ones(columns, dtype=torch.float64)
    uneven[torch.randperm(columns)[:small]] = 1e-3
    uneven.requires_grad_()

    def noise(weight):
        """Of grad_x and grad_weight, relative to them."""
        def gradients(y):
            return torch.autograd.grad((y * target).sum(), (x, weight))

        want = gradients(F.layer_norm(x, (columns,), weight, bias))
        draws = [gradients(remnant.layer_norm(x, weight, bias, policy=f"quantized:bits={bits}")) for _ in range(8)]
        return [sum((d[i] - w).square().sum() for d in draws).item() / 8 / w.square().sum().item() for i, w in enumerate(want)]

    for found, plain in zip(noise(uneven), noise(even), strict=True):
        assert found < 4 * plain + 1e-12  # 1e6 times without care
    size, _ = kept(lambda: remnant.layer_norm(x, uneven, bias, policy=f"quantized:bits={bits}"))
    apart = 24 * small * 8  # doubles
    codes = remnant.linear_code_bytes(x.numel(), bits)
    assert size == 24 * 8 + (codes if apart > x.numel() * bits // 8 else codes + apart)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("causal", [False, True])
def test_attention(causal, bits):
    q, k, v = leaf(2, 4, 12, 16), leaf(2, 2, 12, 16), leaf(2, 2, 12, 16)
    mask = torch.ones(2, 1, 1, 12, dtype=torch.bool)
    mask[1, ..., 9:] = False

    def ours():
        return remnant.attention(q, k, v, mask=mask, causal=causal, bits=bits)

    def exact():
        return remnant.attention(q, k, v, mask=mask, causal=causal)

    size, y = kept(ours)
    assert torch.equal(y, exact())
    y = y.detach()  # a living graph would lend its codes to every draw below
    codes = sum(remnant.linear_code_bytes(x.numel(), b) for x, b in ((q, 8), (k, 8), (v, bits), (y, bits)))
    assert size == codes + 2 * 4 * 12 * 8 + mask.numel()
    # Queries and keys at 8 bits go through an exponential, whose bias is of second order.
    spread = check_unbiased(ours, (q, k, v), exact, bias=1e-3)
    assert spread < {8: 1e-3, 4: 0.05, 2: 1.0}[bits]


def test_attention_drops_what_it_dropped():
    q, k, v = leaf(2, 4, 40, 16), leaf(2, 4, 40, 16), leaf(2, 4, 40, 16)
    grads = []
    for bits in (0, 8):
        torch.manual_seed(3)
        y = remnant.attention(q, k, v, dropout=0.3, bits=bits)
        grads.append([y, *torch.autograd.grad(y.square().sum(), (q, k, v))])
    assert torch.equal(grads[0][0], grads[1][0])
    for have, want in zip(grads[1][1:], grads[0][1:], strict=True):
        assert (have - want).norm() < 0.02 * want.norm()


def test_a_layer_shares_codes():
    """The norm's output and the product that reads it, and attention's output and the next product, keep one copy."""
    x, weight = leaf(2, 8, 64, dtype=torch.float32), leaf(64, 64, dtype=torch.float32)

    def norm_then_product():
        return remnant.linear(remnant.layer_norm(x, policy="quantized:bits=4"), weight, policy="quantized:bits=4")

    size, _ = kept(norm_then_product)
    assert size == remnant.linear_code_bytes(x.numel(), 4) + 16 * 4

    q, k, v = (leaf(2, 4, 8, 16, dtype=torch.float32) for _ in range(3))

    def attention_then_product():
        y = remnant.attention(q, k, v, bits=4)
        return remnant.linear(y.transpose(1, 2).flatten(2), weight, policy="quantized:bits=4")

    size, _ = kept(attention_then_product)
    each = remnant.linear_code_bytes(q.numel(), 4)
    assert size == 2 * remnant.linear_code_bytes(q.numel(), 8) + 2 * each + 2 * 4 * 8 * 4


def test_errors():
    q = leaf(1, 2, 4, 8)
    with pytest.raises(ValueError, match="bits needs policy 'recompute'"):
        remnant.attention(q, q, q, policy="exact", bits=4)
    with pytest.raises(RuntimeError, match="bits must be 0, 8, 4 or 2, got 3"):
        remnant.attention(q, q, q, bits=3)
    with pytest.raises(RuntimeError, match="quantized:bits=4"):
        remnant.layer_norm(q, policy="quantized:bits=5")
    with pytest.raises(RuntimeError, match="quantized:bits=4"):
        remnant.gelu(q, policy="quantized:bits=3")
    for y in (remnant.attention(q, q, q, bits=4), remnant.gelu(q, policy="quantized:bits=4")):
        with pytest.raises(RuntimeError, match="no gradient of"):
            torch.autograd.grad(y.sum(), q, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_types(dtype):
    q, k, v = (torch.randn(1, 2, 20, 16, dtype=dtype, requires_grad=True) for _ in range(3))
    y = remnant.attention(q, k, v, causal=True, bits=8)
    assert y.dtype == dtype
    want = torch.autograd.grad(remnant.attention(q, k, v, causal=True).float().square().sum(), (q, k, v))
    for have, g in zip(torch.autograd.grad(y.float().square().sum(), (q, k, v)), want, strict=True):
        assert have.dtype == dtype
        assert (have.float() - g.float()).norm() < 0.05 * g.float().norm()
