"""max_pool2d against PyTorch's: values, gradients, what is kept."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional

import remnant

FORMATS = [torch.contiguous_format, torch.channels_last]
CASES = [
    ((2, 3, 8, 8), 2, None, 0, 1, False), ((2, 70, 9, 7), 3, 2, 1, 1, False), ((1, 5, 11, 6), (3, 2), (2, 1), (1, 0), (1, 2), False),
    ((3, 16, 7, 7), 3, 2, 0, 1, True), ((1, 1, 4, 4), 4, 4, 2, 1, True), ((2, 33, 20, 20), 5, 3, 2, 2, True), ((2, 4, 16, 16), 16, 1, 8, 1, False),
    ((0, 4, 6, 6), 2, 2, 0, 1, False),
]


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_torch(case, dtype, layout):
    shape, *windows = case
    x = torch.randn(shape).round(decimals=1).to(dtype).to(memory_format=layout)  # with equal neighbours
    x.requires_grad_()
    y, z = remnant.max_pool2d(x, *windows), functional.max_pool2d(x, *windows)
    assert torch.equal(y, z) and y.dtype == dtype and (y.is_contiguous(memory_format=layout) or not y.numel())
    g = torch.randn(z.shape).to(dtype)
    found, = torch.autograd.grad(y, x, g)
    wide = x.detach().double().requires_grad_()
    wanted, = torch.autograd.grad(functional.max_pool2d(wide, *windows), wide, g.double())
    assert found.is_contiguous(memory_format=layout) or not x.numel()
    tolerance = {4: 1e-5, 8: 1e-12, 2: 4e-3}[dtype.itemsize]
    assert ((found.double() - wanted).abs() <= tolerance * (1 + wanted.abs())).all()


@pytest.mark.parametrize("layout", FORMATS)
def test_strides_of_a_gradient_and_an_input(layout):
    x = torch.randn(6, 8, 4, 12).transpose(0, 2)[:, :, :, ::2].requires_grad_()
    y = remnant.max_pool2d(x, 2)
    y.sum().backward()  # an expanded gradient
    wanted = torch.autograd.grad(functional.max_pool2d(x, 2).sum(), x)[0]
    assert torch.equal(x.grad, wanted)
    other = torch.randn(y.shape).to(memory_format=layout)
    found, = torch.autograd.grad(remnant.max_pool2d(x, 2), x, other)
    assert torch.equal(found, torch.autograd.grad(functional.max_pool2d(x, 2), x, other)[0])


def test_what_is_kept():
    x = torch.randn(4, 16, 32, 32, requires_grad=True)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append((t.dtype, t.numel())) or t, lambda t: t):
        remnant.max_pool2d(x, 3, 2, 1)
    assert seen == [(torch.uint8, 4 * 16 * 16 * 16)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity(value):
    for layout, at in itertools.product(FORMATS, [(0, 0, 0, 0), (1, 2, 3, 4)]):
        x = torch.full((2, 3, 6, 6), float("-inf")) if value == float("-inf") else torch.randn(2, 3, 6, 6)
        x[at] = value
        x = x.to(memory_format=layout).requires_grad_()
        y, z = remnant.max_pool2d(x, 3, 2, 1), functional.max_pool2d(x, 3, 2, 1)
        assert torch.equal(y.isnan(), z.isnan()) and torch.equal(y.nan_to_num(), z.nan_to_num())
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(z.sum(), x)[0])


def test_gradcheck_and_double_backward():
    x = torch.randn(2, 3, 6, 7, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: remnant.max_pool2d(x, (3, 2), (2, 1), (1, 0)), x)
    y = remnant.max_pool2d(x, 2)
    with pytest.raises(RuntimeError, match="no gradient of its gradient"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_shapes_without_values_agree():
    for layout in FORMATS:
        x = torch.randn(2, 5, 9, 10).to(memory_format=layout)
        arguments = ((3, 2), (2, 3), (1, 1), (1, 2), True)
        y, places = torch.ops.remnant.max_pool2d_forward(x, *arguments)
        meta = torch.ops.remnant.max_pool2d_forward(x.to("meta"), *arguments)
        assert [each.shape for each in meta] == [y.shape, places.shape] and meta[0].stride() == y.stride()


def test_mistakes_are_named():
    x = torch.randn(1, 2, 8, 8)
    for arguments, text in (((17,), "at most 256 elements"), ((2, 0), "stride should be at least 1"), ((2, 2, 2), "at most half"),
                            ((9,), "larger than input"), ((3, 1, 0, 0), "dilation should be at least 1")):
        with pytest.raises(RuntimeError, match=text):
            remnant.max_pool2d(x, *arguments)
    with pytest.raises(RuntimeError, match=r"must be \[N, C, H, W\]"):
        remnant.max_pool2d(x[0], 2)
    with pytest.raises(RuntimeError, match="input"):
        remnant.max_pool2d(x.long(), 2)


def test_convert():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, return_indices=False), nn.AdaptiveMaxPool2d(1))
    x = torch.randn(2, 3, 16, 16)
    wanted = torch.autograd.grad(model(x).square().sum(), model[0].weight)[0]
    remnant.convert(model)
    assert type(model[1]) is remnant.nn.MaxPool2d
    assert torch.allclose(torch.autograd.grad(model(x).square().sum(), model[0].weight)[0], wanted, atol=1e-5)
    indices = remnant.convert(nn.MaxPool2d(2, return_indices=True))(x)
    assert len(indices) == 2
    with torch.no_grad():
        assert torch.equal(model[1](x), functional.max_pool2d(x, 3, 2, 1))
    assert remnant.convert(nn.MaxPool2d(2))(x[0]).shape == (3, 8, 8)
