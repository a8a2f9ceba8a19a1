"""relu, leaky_relu, gelu and silu: exact against float64, few-bit against the best step function."""

import pytest
import torch
import torch.nn.functional as F

import remnant

ops = torch.ops.remnant
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = [1, 7, 63, 64, 65, 511, 512, 513, 5000]
SMOOTH = {
    "gelu": (lambda x, policy="exact": remnant.gelu(x, policy=policy), F.gelu),
    "gelu_tanh": (lambda x, policy="exact": remnant.gelu(x, approximate="tanh", policy=policy),
                  lambda x: F.gelu(x, approximate="tanh")),
    "silu": (lambda x, policy="exact": remnant.silu(x, policy=policy), F.silu),
}  # fmt: skip
PIECEWISE = {"relu": (remnant.relu, F.relu), "leaky_relu": (lambda x: remnant.leaky_relu(x, 0.2), lambda x: F.leaky_relu(x, 0.2))}


def derivative(function, x):
    x = x.detach().double().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


@pytest.mark.parametrize("name", PIECEWISE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_piecewise_equals_torch(name, dtype, size):
    ours, theirs = PIECEWISE[name]
    x = torch.randn(size, dtype=dtype)
    x[0] = 0
    x.requires_grad_()
    grad = torch.randn(size, dtype=dtype)
    for have, want in zip(
        [ours(x), *torch.autograd.grad(ours(x), x, grad)], [theirs(x), *torch.autograd.grad(theirs(x), x, grad)],
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(have, want, rtol=0 if name == "relu" else 1e-2, atol=0)


def test_piecewise_on_special_values():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40, -1e-40], requires_grad=True)
    torch.testing.assert_close(remnant.relu(x), F.relu(x), equal_nan=True)
    grad = torch.autograd.grad(remnant.relu(x).sum(), x)[0]
    assert grad.tolist() == torch.autograd.grad(F.relu(x).sum(), x)[0].tolist()


@pytest.mark.parametrize("name", PIECEWISE)
def test_piecewise_twice_differentiable(name):
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(PIECEWISE[name][0], x)
    assert torch.autograd.gradgradcheck(lambda x: PIECEWISE[name][0](x).square(), x)


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_smooth_is_no_worse_than_torch(name, dtype, size):
    ours, theirs = SMOOTH[name]
    x = (torch.randn(size, dtype=torch.float64) * 3).to(dtype).requires_grad_()
    grad = torch.randn(size, dtype=dtype)
    for policy in ("exact", "fewbit:bits=4"):
        y, want = ours(x, policy), theirs(x.detach().double())
        plain = (theirs(x).double() - want).abs().max()
        floor = {torch.float32: 3e-7, torch.float64: 1e-14, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
        assert (y.double() - want).abs().max() <= max(2 * plain, floor)
    grad_x = torch.autograd.grad(ours(x), x, grad)[0]
    want = derivative(theirs, x) * grad.double()
    assert grad_x.dtype == dtype
    scale = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert ((grad_x.double() - want).abs() <= scale * (1 + want.abs())).all()


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_everywhere(name):
    ours, theirs = SMOOTH[name]
    x = torch.linspace(-30, 30, 200001).requires_grad_()
    y = ours(x)
    assert (y.double() - theirs(x.detach().double())).abs().max() < 2e-6
    grad = torch.autograd.grad(y.sum(), x)[0]
    assert (grad.double() - derivative(theirs, x)).abs().max() < 1e-6
    # The far tail keeps its relative precision, where 1 + erf would have lost all of it.
    tail = torch.tensor([-6.0])
    assert abs(float(ours(tail)) / float(-6 * torch.special.ndtr(torch.tensor(-6.0, dtype=torch.float64))) - 1) < 1e-5 \
        or name != "gelu"  # fmt: skip


@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_gradcheck(name):
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(SMOOTH[name][0], x)
    with pytest.raises(RuntimeError, match="no gradient of their gradient"):
        torch.autograd.grad(SMOOTH[name][0](x).sum(), x, create_graph=True)


def steps(name, bits):
    """Where the few-bit derivative jumps, and its levels, read off the op itself."""
    x = torch.linspace(-9, 9, 18 * 64 * 4 + 1, dtype=torch.float64).requires_grad_()
    d = torch.autograd.grad(SMOOTH[name][0](x, f"fewbit:bits={bits}").sum(), x)[0]
    return x.detach(), d


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("name", SMOOTH)
def test_few_bit_is_the_best_step_function(name, bits):
    x, d = steps(name, bits)
    assert int((d.diff() != 0).sum()) == 2**bits - 1
    inside = x.abs() <= 8
    exact = derivative(SMOOTH[name][1], x)[inside]
    found = d[inside]
    error = float((found - exact).square().sum())
    # A level is its interval's mean.
    for level in found.unique():
        assert abs(float(exact[found == level].mean() - level)) < 5e-3
    # No other cut between two neighbouring intervals is better: moving one by a cell either way.
    jumps = (found.diff() != 0).nonzero().flatten() + 1
    edges = [0, *jumps.tolist(), len(found)]
    for k in range(1, len(edges) - 1):
        for move in (-8, 8):
            cut = edges[k] + move
            if not edges[k - 1] < cut < edges[k + 1]:
                continue
            part = exact[edges[k - 1] : edges[k + 1]]
            local = (found - exact)[edges[k - 1] : edges[k + 1]].square().sum()
            left, right = part[: cut - edges[k - 1]], part[cut - edges[k - 1] :]
            moved = (left - left.mean()).square().sum() + (right - right.mean()).square().sum()
            assert float(moved) > float(local) - 1e-3 * error - 1e-4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_few_bit_looks_every_element_up(dtype, size):
    for bits in (2, 3, 4):
        x = (torch.randn(size, dtype=torch.float64) * 2).to(dtype).requires_grad_()
        grad = torch.randn(size, dtype=dtype)
        have = torch.autograd.grad(remnant.gelu(x, policy=f"fewbit:bits={bits}"), x, grad)[0]
        wide = x.detach().double().requires_grad_()
        want = torch.autograd.grad(remnant.gelu(wide, policy=f"fewbit:bits={bits}"), wide, grad.double())[0]
        tolerance = {torch.float32: 1e-6, torch.float64: 0, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
        torch.testing.assert_close(have.double(), want, rtol=tolerance, atol=1e-7)


# docs/numerics.md: relative error of the gradient, normal inputs, white incoming gradient.
@pytest.mark.parametrize("bits,most", [(2, 0.165), (3, 0.11), (4, 0.055)])
@pytest.mark.parametrize("name", SMOOTH)
def test_few_bit_error(name, bits, most):
    x = torch.randn(1 << 16, requires_grad=True)
    grad = torch.randn(1 << 16)
    have = torch.autograd.grad(SMOOTH[name][0](x, f"fewbit:bits={bits}"), x, grad)[0].double()
    want = derivative(SMOOTH[name][1], x) * grad
    assert float((have - want).norm() / want.norm()) < most


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("policy", ["exact", "fewbit:bits=2", "fewbit:bits=3", "fewbit:bits=4"])
def test_nan_and_inf_reach_the_gradient(policy, bad):
    for size, place in ((1000, 700), (65, 64), (3, 1)):
        x = torch.randn(size)
        x[place] = bad
        x.requires_grad_()
        y = remnant.gelu(x, policy=policy)
        grad = torch.autograd.grad(y, x, torch.ones(size))[0]
        assert not y[place].isfinite()
        assert grad[place].isnan()
        other = torch.arange(size) // 64 != place // 64
        assert grad[other].isfinite().all()


def test_shapes_and_strides():
    x = torch.randn(3, 5, 40).transpose(0, 2).requires_grad_()
    for ours, theirs in [*PIECEWISE.values(), *SMOOTH.values()]:
        grad = torch.randn(5, 3, 40).permute(2, 0, 1)
        torch.testing.assert_close(ours(x), theirs(x))
        torch.testing.assert_close(
            torch.autograd.grad(ours(x), x, grad)[0], torch.autograd.grad(theirs(x), x, grad)[0]
        )
    empty = torch.empty(0, 4, requires_grad=True)
    for policy in ("exact", "fewbit:bits=2"):
        assert torch.autograd.grad(remnant.gelu(empty, policy=policy).sum(), empty)[0].shape == (0, 4)


@pytest.mark.parametrize("name", ["gelu", "silu"])
def test_numbers_without_dimensions(name):
    x = torch.tensor(0.7, requires_grad=True)
    y = getattr(remnant, name)(x, policy="quantized:bits=4")
    y.backward()
    wanted = getattr(torch.nn.functional, name)(x)
    assert y.shape == () and torch.allclose(y, wanted)
    assert torch.allclose(x.grad, torch.autograd.grad(wanted, x)[0], atol=0.1)


def test_threads_do_not_matter():
    before = torch.get_num_threads()
    x = torch.randn(100003, requires_grad=True)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append([torch.autograd.grad(f(x).square().sum(), x)[0]
                        for f in (remnant.relu, lambda x: remnant.silu(x, policy="fewbit:bits=3"))])  # fmt: skip
    torch.set_num_threads(before)
    for other in results[1:]:
        for one, several in zip(results[0], other, strict=True):
            assert torch.equal(one, several)


def test_mistakes_are_named():
    x = torch.randn(4)
    with pytest.raises(RuntimeError, match="gelu: unknown policy 'fewbit:bits=5'; expected one of 'exact', 'fewbit:bits=2'"):
        remnant.gelu(x, policy="fewbit:bits=5")
    with pytest.raises(RuntimeError, match="gelu: approximate must be 'none' or 'tanh'"):
        remnant.gelu(x, approximate="erf")
    with pytest.raises(RuntimeError, match="relu: input must be float32"):
        remnant.relu(torch.arange(3))
