"""linear with its input at a few bits, and the codes themselves."""

import gc
import math
import threading

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

import remnant

ops = torch.ops.remnant
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = [1, 2, 31, 63, 64, 65, 100, 128, 4096 + 13]
BITS = [8, 4, 2]


def relative(x, y):
    x, y = x.detach().double(), y.detach().double()
    return float((x - y).norm() / y.norm())


def coded(x, bits, seed=1):
    seed = ops.draw_seed(x, torch.Generator().manual_seed(seed))
    return ops.encode(x, seed, bits)


def there_and_back(x, bits, seed=1):
    codes, table = coded(x, bits, seed)
    return ops.decode(codes, table, bits, x.shape, x.dtype)


def steps_of(x, bits):
    """The step of each element's group, as the table has it."""
    _, table = coded(x, bits)
    return table[:, 1].double().repeat_interleave(64)[: x.numel()].view(x.shape)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_codes_are_within_a_step(size, dtype, bits):
    x = (torch.randn(size, dtype=torch.float64) * 3 + 1).to(dtype)
    codes, table = coded(x, bits)
    assert codes.numel() == math.ceil(size * bits / 8) and codes.dtype == torch.uint8
    assert table.shape == (math.ceil(size / 64), 2)
    assert codes.numel() + table.numel() * 2 == remnant.linear_code_bytes(size, bits)
    step = steps_of(x, bits)
    rounding = {torch.float32: 1e-6, torch.float64: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    error = (there_and_back(x, bits).double() - x.double()).abs()
    assert (error <= step * 1.0001 + rounding * (x.double().abs() + step) + 1e-12).all()
    # The range is at most what rounding minimum and step outwards adds to it.
    for k in range(table.size(0)):
        group = x[64 * k : 64 * k + 64].double()
        low, top = float(table[k, 0]), float(table[k, 0]) + float(table[k, 1]) * (2**bits - 1)
        assert low <= group.min() and top >= float(group.max()) * (1 - 1e-6) - 1e-12
        assert top - low <= (float(group.max() - group.min()) + 2**-7 * float(group.min().abs())) * (1 + 2**-7) + 1e-30


@pytest.mark.parametrize("bits", BITS)
def test_levels_are_kept_exactly(bits):
    """A ReLU's zeros, a constant, and what lies on a level come back as they were."""
    x = torch.relu(torch.randn(4, 100))
    back = there_and_back(x, bits)
    whole = x.flatten()[:384].view(6, 64)
    assert torch.equal(back.flatten()[:384].view(6, 64)[whole == 0], torch.zeros(int((whole == 0).sum())))
    assert torch.equal(there_and_back(torch.full((70,), 1.5), bits), torch.full((70,), 1.5))
    levels = torch.arange(64).remainder(2**bits).float() * 0.25 - 3
    levels[-1] = (2**bits - 1) * 0.25 - 3  # the group's range is its levels'
    assert torch.equal(there_and_back(levels, bits), levels)
    assert there_and_back(torch.empty(0, 5), bits).shape == (0, 5)
    for tiny in (1e-45, 1e-38):
        values = torch.tensor([0.0, tiny, -tiny])
        assert (there_and_back(values, bits) - values).abs().max() < 1e-35


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codes_are_unbiased_with_the_variance_of_rounding(bits, dtype):
    x = (torch.randn(150) * 2 + 0.5).to(dtype)
    wide = x.double()
    _, table = coded(x, bits)
    step = steps_of(x, bits)
    low = table[:, 0].double().repeat_interleave(64)[:150]
    fraction = ((wide - low) / step).remainder(1)
    draws = 4000
    back = torch.stack([there_and_back(wide, bits, seed).double() for seed in range(draws)])
    variance = step.square() * fraction * (1 - fraction)
    deviation = (variance / draws).sqrt()
    # 5 standard deviations, and the 2^-17 of a step that 16 random bits leave.
    assert ((back.mean(0) - wide).abs() <= 5 * deviation + 2**-16 * step).all()
    expected, measured = float(variance.mean()), float((back - wide).square().mean())
    assert abs(measured / expected - 1) < 0.05
    # Neighbours round independently.
    noise = (back - wide) / variance.sqrt().clamp_min(1e-9)
    for lag in (1, 2, 8, 16, 32, 64):
        assert abs(float((noise[:, lag:] * noise[:, :-lag]).mean())) < 5 / math.sqrt(draws * (150 - lag)) + 1e-3


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_reach_the_decoded_values(bits, bad, dtype):
    for size, place in ((200, 70), (65, 64), (3, 1)):
        x = torch.randn(size).to(dtype)
        x[place] = bad
        back = there_and_back(x, bits)
        same = torch.arange(size) // 64 == place // 64
        assert back[same].isnan().all() and back[~same].isfinite().all()


def test_far_values():
    """Large offsets widen the range, nothing more; a range beyond float counts as Inf."""
    x = torch.randn(64) + 1000
    assert (there_and_back(x, 8) - x).abs().max() < 0.1
    assert there_and_back(torch.tensor([3e38, -3e38]), 8).isnan().all()
    assert there_and_back(torch.tensor([3e38, 2e38]), 8).isfinite().all()


def make(dtype, rows=(3, 50), inputs=40, outputs=24):
    x = torch.randn(*rows, inputs, dtype=dtype, requires_grad=True)
    weight = (torch.randn(outputs, inputs, dtype=torch.float64) / math.sqrt(inputs)).to(dtype).requires_grad_()
    bias = torch.randn(outputs, dtype=dtype, requires_grad=True)
    return x, weight, bias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("policy", ["exact", "quantized:bits=8", "quantized:bits=4", "quantized:bits=2"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(dtype, policy, with_bias):
    x, weight, bias = make(dtype)
    bias = bias if with_bias else None
    inputs = [t for t in (x, weight, bias) if t is not None]
    y = remnant.linear(x, weight, bias, policy=policy)
    want = F.linear(x, weight, bias)
    assert torch.equal(y, want)
    grad = torch.randn_like(y)
    have, plain = torch.autograd.grad(y, inputs, grad), torch.autograd.grad(want, inputs, grad)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for k, (a, b) in enumerate(zip(have, plain, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape
        noise = {"exact": 0, "quantized:bits=8": 0.01, "quantized:bits=4": 0.2, "quantized:bits=2": 1.0}[policy]
        assert relative(a, b) < (noise + tolerance if k == 1 else tolerance)
        if k == 1 and policy == "quantized:bits=2":
            assert relative(a, b) > 0.05  # the codes are what it was computed from


def test_weight_gradient_comes_from_the_codes():
    x, weight, _ = make(torch.float64)
    y = remnant.linear(x, weight, policy="quantized:bits=4", generator=torch.Generator().manual_seed(1))
    grad = torch.randn_like(y)
    have = torch.autograd.grad(y, weight, grad)[0]
    back = there_and_back(x.detach(), 4)
    torch.testing.assert_close(have, grad.flatten(0, 1).t() @ back.flatten(0, 1))


def test_long_inputs_are_decoded_in_chunks():
    x = torch.randn(5000, 300, requires_grad=True)
    weight = torch.randn(7, 300, requires_grad=True)
    y = remnant.linear(x, weight, policy="quantized:bits=4", generator=torch.Generator().manual_seed(1))
    grad = torch.randn_like(y)
    want = grad.double().t() @ there_and_back(x.detach(), 4).double()
    assert relative(torch.autograd.grad(y, weight, grad)[0], want) < 1e-5


@pytest.mark.parametrize("bits", BITS)
def test_weight_gradient_is_unbiased(bits):
    x, weight, _ = make(torch.float64, rows=(20,), inputs=10, outputs=3)
    grad = torch.randn(20, 3, dtype=torch.float64)
    exact = grad.t() @ x.detach()
    draws = 3000
    gradients = []
    for seed in range(draws):
        y = remnant.linear(x, weight, policy=f"quantized:bits={bits}", generator=torch.Generator().manual_seed(seed))
        gradients.append(torch.autograd.grad(y, weight, grad)[0])
    gradients = torch.stack(gradients)
    step = steps_of(x.detach(), bits)
    _, table = coded(x.detach(), bits)
    low = table[:, 0].double().repeat_interleave(64)[:200].view(20, 10)
    fraction = ((x.detach() - low) / step).remainder(1)
    variance = grad.square().t() @ (step.square() * fraction * (1 - fraction))
    assert ((gradients.mean(0) - exact).abs() <= 5 * (variance / draws).sqrt() + 1e-4).all()
    assert abs(float(gradients.var(0).mean() / variance.mean()) - 1) < 0.1


def kept_storages(function):
    """Unique saved storages and their bytes, uint8 codes alone."""
    found = {}

    def pack(t):
        if t.dtype in (torch.uint8,):
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        result = function()
    return result, found


def test_readers_of_one_tensor_share_its_codes():
    source = torch.randn(30, 64, requires_grad=True)
    weights = [torch.randn(16, 64, requires_grad=True) for _ in range(3)]
    x = source * 1
    ys, found = kept_storages(
        lambda: [remnant.linear(v, w, policy="quantized:bits=4") for v, w in zip((x, x.view(5, 6, 64), x), weights, strict=True)]
    )
    assert list(found.values()) == [30 * 64 // 2]
    # Other bits, another place: codes of their own.
    more, found = kept_storages(
        lambda: [remnant.linear(x, weights[0], policy="quantized:bits=8"),
                 remnant.linear(x[1:], weights[0], policy="quantized:bits=4"),
                 remnant.linear(x[::2], weights[0], policy="quantized:bits=4")]
    )  # fmt: skip
    assert len(found) == 3
    (sum(y.sum() for y in ys) + sum(y.sum() for y in more)).backward()
    for weight in weights:
        assert weight.grad.isfinite().all()


def test_changing_a_tensor_in_place_ends_the_sharing():
    weight = torch.randn(16, 64, requires_grad=True)
    x = torch.randn(30, 64)
    first, one = kept_storages(lambda: remnant.linear(x, weight, policy="quantized:bits=8"))
    x.mul_(-3)
    second, other = kept_storages(lambda: remnant.linear(x, weight, policy="quantized:bits=8"))
    assert one.keys() != other.keys()
    grad = torch.randn(30, 16)
    old = torch.autograd.grad(first, weight, grad)[0]  # codes are not x: nothing was lost
    new = torch.autograd.grad(second, weight, grad)[0]
    assert relative(new, grad.t() @ x) < 0.02 and relative(old, grad.t() @ x / -3) < 0.02


def test_codes_go_with_their_readers():
    weight = torch.randn(16, 64, requires_grad=True)
    x = torch.randn(30, 64)
    torch.manual_seed(1)
    first = torch.autograd.grad(remnant.linear(x, weight, policy="quantized:bits=2").sum(), weight)[0]
    gc.collect()
    # The graph is gone, and the codes with it: this rounds anew.
    second = torch.autograd.grad(remnant.linear(x, weight, policy="quantized:bits=2").sum(), weight)[0]
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    third = torch.autograd.grad(remnant.linear(x, weight, policy="quantized:bits=2").sum(), weight)[0]
    assert torch.equal(first, third)


def test_sharing_among_threads():
    weight = torch.randn(8, 64, requires_grad=True)
    shared = torch.randn(40, 64)
    failures = []

    def work():
        try:
            for _ in range(100):
                own = torch.randn(40, 64)
                ys = [remnant.linear(t, weight, policy="quantized:bits=8") for t in (shared, own, shared, own)]
                for y, t in zip(ys, (shared, own, shared, own), strict=True):
                    grad = torch.autograd.grad(y.sum(), weight)[0]
                    if relative(grad, t.sum(0).expand(8, 64)) > 0.05:
                        failures.append("a gradient of other values")
        except Exception as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("policy", ["exact", "quantized:bits=4"])
@pytest.mark.parametrize("rows,inputs,outputs", [(3, 0, 4), (3, 4, 0), (0, 4, 3), (0, 0, 0)])
def test_sizes_of_zero(rows, inputs, outputs, policy):
    x, w = torch.randn(rows, inputs, requires_grad=True), torch.randn(outputs, inputs, requires_grad=True)
    b = torch.randn(outputs, requires_grad=True)
    y = remnant.linear(x, w, b, policy=policy)
    assert torch.equal(y, torch.nn.functional.linear(x, w, b))
    y.sum().backward()
    assert x.grad.shape == x.shape and w.grad.eq(0).all() and b.grad.eq(rows).all()


def test_nothing_is_kept_that_no_gradient_needs():
    x, weight, bias = make(torch.float32)
    _, found = kept_storages(lambda: remnant.linear(x, weight.detach(), bias, policy="quantized:bits=4"))
    assert not found
    with torch.no_grad():
        assert remnant.linear(x, weight, bias, policy="quantized:bits=4").grad_fn is None


def test_nan_in_the_input_reaches_the_weight_gradient():
    x, weight, _ = make(torch.float32)
    with torch.no_grad():
        x[1, 2, 3] = float("nan")
    y = remnant.linear(x, weight, policy="quantized:bits=4")
    assert torch.autograd.grad(y.sum(), weight)[0].isnan().any()


def test_mistakes_are_named():
    x, weight, bias = make(torch.float32)
    with pytest.raises(RuntimeError, match="linear: unknown policy 'quantized:bits=3'; expected one of 'exact', 'quantized:bits=8'"):
        remnant.linear(x, weight, policy="quantized:bits=3")
    with pytest.raises(RuntimeError, match="linear: input's last dimension must be weight's K = 40"):
        remnant.linear(x[..., :5], weight)
    with pytest.raises(RuntimeError, match=r"linear: bias must be \[24\]"):
        remnant.linear(x, weight, bias[:3])
    y = remnant.linear(x, weight, bias, policy="quantized:bits=4")
    with pytest.raises(RuntimeError, match="no gradient of its gradient"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
