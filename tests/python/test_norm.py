"""layer_norm, rms_norm, dropout_add and their fusion, against float64 and eager torch."""

import pytest
import torch

import remnant

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (5, 7), (3, 4, 16), (33, 65), (2, 3, 100), (70, 256), (9, 1000)]


def reference(x, weight, bias, eps, center):
    """The formula in the dtype that it is given."""
    v = x - x.mean(-1, keepdim=True) if center else x
    y = v / (v.square().mean(-1, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def call(center, x, weight, bias, eps):
    return remnant.layer_norm(x, weight, bias, eps=eps) if center else remnant.rms_norm(x, weight, eps=eps)


def relative(x, y):
    x, y = x.detach().double(), y.detach().double()
    return float((x - y).norm() / y.norm().clamp_min(1e-300))


def leaves(shape, dtype, hide=False):
    columns = shape[-1]
    x = torch.randn(shape, dtype=torch.float64) * 1.5 + 0.3
    weight = torch.rand(columns, dtype=torch.float64) + 0.5
    bias = (torch.rand(columns, dtype=torch.float64) - 0.5) * weight
    if hide:
        weight[::3] = 0
        weight[1::7] = 1e-25
        bias[2::5] = 200
    return [t.to(dtype).requires_grad_() for t in (x, weight, bias)]


@pytest.mark.parametrize("hide", [False, True])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_formula_no_worse_than_eager(dtype, shape, center, hide):
    x, weight, bias = leaves(shape, dtype, hide)
    bias = bias if center else None
    inputs = [t for t in (x, weight, bias) if t is not None]
    grad = torch.randn(shape, dtype=dtype)

    def differentiate(function, arguments):
        arguments = [t.detach().requires_grad_() if t is not None else None for t in arguments]
        y = function(*arguments)
        wanted = [t for t in arguments if t is not None]
        return [y.detach(), *torch.autograd.grad(y, wanted, grad.to(y.dtype))]

    ours = differentiate(lambda x, w, b: call(center, x, w, b, 1e-5), (x, weight, bias))
    exact = differentiate(lambda x, w, b: reference(x, w, b, 1e-5, center),
                          [None if t is None else t.double() for t in (x, weight, bias)])  # fmt: skip
    eager = differentiate(lambda x, w, b: reference(x, w, b, 1e-5, center), (x, weight, bias))
    floor = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 4e-3, torch.float16: 6e-4}[dtype]
    assert len(ours) == len(inputs) + 1
    for have, want, plain in zip(ours, exact, eager, strict=True):
        assert have.dtype == dtype and have.shape == want.shape
        if want.norm() < 1e-3:  # a single column: the gradient is 0 up to rounding
            assert float((have.double() - want).abs().max()) < 1e-2
            continue
        assert relative(have, want) <= max(2 * relative(plain, want), floor)


@pytest.mark.parametrize("with_weight,with_bias", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("center", [True, False])
def test_gradcheck(center, with_weight, with_bias):
    if not center and with_bias:
        pytest.skip("rms_norm has no bias")
    x, weight, bias = leaves((4, 9), torch.float64, hide=True)
    weight, bias = weight if with_weight else None, bias if with_bias else None
    inputs = [t for t in (x, weight, bias) if t is not None]

    def function(*tensors):
        tensors = list(tensors)
        x = tensors.pop(0)
        return call(center, x, tensors.pop(0) if with_weight else None, tensors.pop(0) if with_bias else None, 1e-3)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("need_sum", [False, True])
def test_gradcheck_of_the_fusion(p, need_sum):
    x, weight, bias = leaves((4, 9), torch.float64, hide=True)
    residual = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)

    def function(x, residual, weight, bias):
        generator = torch.Generator().manual_seed(5)
        return remnant.dropout_add_layer_norm(
            x, residual, p, weight, bias, eps=1e-3, generator=generator, need_sum=need_sum
        )

    assert torch.autograd.gradcheck(function, (x, residual, weight, bias))


def test_torch_agrees():
    x, weight, bias = leaves((6, 40), torch.float32)
    torch.testing.assert_close(
        remnant.layer_norm(x, weight, bias), torch.nn.functional.layer_norm(x, (40,), weight, bias)
    )
    torch.testing.assert_close(remnant.rms_norm(x, weight), torch.nn.functional.rms_norm(x, (40,), weight))


@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 16), (200, 65), (70, 256)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1, 0.6])
def test_fusion_equals_its_parts(dtype, shape, p):
    x, weight, bias = leaves(shape, dtype, hide=True)
    residual = torch.randn(shape, dtype=dtype, requires_grad=True)
    grad, grad_sum = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)

    def parts(x, residual, weight, bias):
        total = residual.double() + remnant.dropout(x.double(), p, generator=torch.Generator().manual_seed(3))
        return reference(total, weight.double(), bias.double(), 1e-5, True), total

    def fused(x, residual, weight, bias):
        return remnant.dropout_add_layer_norm(
            x, residual, p, weight, bias, generator=torch.Generator().manual_seed(3)
        )

    inputs = (x, residual, weight, bias)
    tolerance = {torch.float32: 3e-6, torch.float64: 1e-13, torch.bfloat16: 6e-3, torch.float16: 1e-3}[dtype]
    for which in ([0], [1], [0, 1]):  # post-norm, the sum alone, pre-norm
        results = []
        for function in (fused, parts):
            outputs = [function(*inputs)[i] for i in which]
            grads = [[grad, grad_sum][i].to(y.dtype) for i, y in zip(which, outputs, strict=True)]
            results.append([*outputs, *torch.autograd.grad(outputs, inputs, grads, allow_unused=True)])
        for have, want in zip(*results, strict=True):
            assert (have is None) == (want is None)
            if have is not None:
                assert have.dtype == dtype
                assert relative(have, want) < tolerance


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (7,), (33, 65), (3, 5000)], ids=str)
def test_dropout_add(dtype, shape):
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    residual = torch.randn(shape, dtype=dtype, requires_grad=True)
    y = remnant.dropout_add(x, residual, 0.3, generator=torch.Generator().manual_seed(3))
    mask = remnant.dropout(torch.ones(shape), 0.3, generator=torch.Generator().manual_seed(3))
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-7, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    want = residual.double() + x.double() * mask
    torch.testing.assert_close(y.double(), want, rtol=tolerance, atol=tolerance)
    grad = torch.randn(shape, dtype=dtype)
    grad_x, grad_residual = torch.autograd.grad(y, (x, residual), grad)
    assert torch.equal(grad_residual, grad)
    torch.testing.assert_close(grad_x.double(), grad.double() * mask, rtol=tolerance, atol=tolerance)


def test_dropout_add_twice_differentiable():
    x, residual = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def function(x, residual):
        return remnant.dropout_add(x, residual, 0.4, generator=torch.Generator().manual_seed(1)).square()

    assert torch.autograd.gradcheck(function, (x, residual))
    assert torch.autograd.gradgradcheck(function, (x, residual))


@pytest.mark.parametrize("threads", [2, 3])
def test_dropout_does_not_depend_on_threads(threads):
    x, weight, bias = leaves((301, 300), torch.float32)
    residual = torch.randn(301, 300)
    before = torch.get_num_threads()
    results = []
    for count in (1, threads):
        torch.set_num_threads(count)
        y, total = remnant.dropout_add_layer_norm(
            x, residual, 0.2, weight, bias, generator=torch.Generator().manual_seed(3)
        )
        results.append([y.detach(), total.detach(), torch.autograd.grad(y.sum(), x)[0]])
    torch.set_num_threads(before)
    for one, several in zip(*results, strict=True):
        assert torch.equal(one, several)


def test_strides_and_leading_dimensions():
    x = torch.randn(4, 6, 5).transpose(0, 2).requires_grad_()
    weight = torch.rand(12)[::2].requires_grad_()
    y = remnant.layer_norm(x.transpose(1, 2).transpose(1, 2), None, None)
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (4,)))
    z = torch.randn(5, 6, 3).transpose(1, 2).requires_grad_()
    grads = [torch.autograd.grad((f * torch.arange(6.0)).sum(), (z, weight))
             for f in (remnant.layer_norm(z, weight), torch.nn.functional.layer_norm(z, (6,), weight))]  # fmt: skip
    for have, want in zip(*grads, strict=True):
        torch.testing.assert_close(have, want)


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows):
    x, weight, bias = leaves((rows, 5), torch.float32)
    y = remnant.layer_norm(x, weight, bias)
    assert y.shape == (rows, 5)
    for grad, leaf in zip(torch.autograd.grad(y.sum(), (x, weight, bias)), (x, weight, bias), strict=True):
        assert grad.shape == leaf.shape


def test_float32_parameters_beside_half_inputs():
    x, weight, bias = leaves((6, 40), torch.bfloat16)
    weight, bias = (t.detach().float().requires_grad_() for t in (weight, bias))
    y = remnant.layer_norm(x, weight, bias)
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y.sum(), (x, weight, bias))
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]
    assert torch.autograd.grad(remnant.layer_norm(x.detach(), weight.detach(), bias).sum(), bias)[0].equal(
        torch.full((40,), 6.0)
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_reach_output_and_gradient(bad):
    x, weight, bias = leaves((4, 40), torch.float32)
    with torch.no_grad():
        x[2, 5] = bad
    y = remnant.layer_norm(x, weight, bias)
    grad_x, grad_weight = torch.autograd.grad(y.sum(), (x, weight))
    assert y[2].isnan().any() and grad_x[2].isnan().any() and grad_weight.isnan().any()
    assert not y[[0, 1, 3]].isnan().any() and not grad_x[[0, 1, 3]].isnan().any()


def test_a_changed_output_is_refused():
    x, weight, bias = leaves((4, 8), torch.float32)
    y = remnant.layer_norm(x, weight, bias)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_second_backward_and_double_backward():
    x, weight, bias = leaves((4, 8), torch.float32)
    y = remnant.layer_norm(x, weight, bias)
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y.sum(), x)[0])
    y = remnant.layer_norm(x, weight, bias)
    with pytest.raises(RuntimeError, match="no gradient of their gradient"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


def test_nothing_is_kept_without_a_gradient():
    x, weight, bias = leaves((4, 8), torch.float32)
    with torch.no_grad():
        assert remnant.layer_norm(x, weight, bias).grad_fn is None
    assert remnant.layer_norm(x.detach(), weight.detach()).grad_fn is None


def test_mistakes_are_named():
    x = torch.randn(4, 8)
    with pytest.raises(RuntimeError, match=r"layer_norm: weight must be \[8\]"):
        remnant.layer_norm(x, torch.ones(7))
    with pytest.raises(RuntimeError, match="rms_norm: weight must have input's dtype"):
        remnant.rms_norm(x, torch.ones(8, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="layer_norm: input must be float32"):
        remnant.layer_norm(torch.ones(4, 8, dtype=torch.long))
    with pytest.raises(RuntimeError, match="dropout_add: residual must have input's shape"):
        remnant.dropout_add(x, torch.randn(8), 0.1)
    with pytest.raises(RuntimeError, match=r"p must be in \[0, 1\)"):
        remnant.dropout_add_layer_norm(x, x, 1.0)
