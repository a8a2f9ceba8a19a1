"""conv2d with its input at a few bits, rebuilt from its output, or projected."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks

import remnant

CODED = ["quantized:bits=8", "quantized:bits=4", "quantized:bits=2"]


def relative(x, y):
    x, y = x.detach().double(), y.detach().double()
    return float((x - y).norm() / y.norm())


def make(inputs, outputs, kernel, size=(9, 7), groups=1, batch=3, dtype=torch.float64):
    x = torch.randn(batch, inputs, *size, dtype=dtype, requires_grad=True)
    fan = inputs // groups * kernel[0] * kernel[1]
    weight = (torch.randn(outputs, inputs // groups, *kernel, dtype=torch.float64) / math.sqrt(fan)).to(dtype)
    return x, weight.requires_grad_(), torch.randn(outputs, dtype=dtype, requires_grad=True)


def kept(function):
    """Bytes of the tensors that a forward saves, storages once."""
    found = {}

    def pack(t):
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        output = function()
    return output, found


# (inputs, outputs, kernel, stride, padding, dilation, groups)
GEOMETRIES = [
    (4, 4, (3, 3), 1, 1, 1, 1),
    (4, 6, (3, 3), 1, 0, 1, 1),
    (3, 4, (2, 2), 1, 0, 1, 1),
    (3, 4, (4, 2), 1, (2, 1), 1, 1),
    (3, 4, (1, 3), 1, (0, 1), 1, 1),
    (3, 3, (5, 3), 1, (2, 1), 1, 1),
    (3, 4, (3, 3), 1, 3, 1, 1),
    (3, 4, (3, 3), 1, 2, 2, 1),
    (3, 4, (3, 2), 1, (0, 2), (2, 3), 1),
    (2, 10, (3, 3), 2, 1, 1, 1),
    (2, 9, (2, 2), 2, 0, 1, 1),
    (2, 8, (3, 3), (2, 1), (1, 2), 1, 1),
    (2, 14, (3, 3), 2, 1, 2, 1),
    (4, 6, (3, 3), 1, 1, 1, 2),
    (4, 12, (3, 3), (1, 2), 1, 1, 2),
    (5, 4, (3, 3), 1, 1, 1, 1),
    (4, 4, (1, 1), 1, 0, 1, 1),
    (4, 7, (1, 1), 1, 1, 1, 1),
    (7, 4, (1, 1), 1, 0, 1, 1),
    (6, 8, (1, 1), 2, 0, 1, 2),
    (6, 4, (1, 1), (3, 2), (1, 2), 1, 2),
]


def call(x, weight, bias, geometry, policy, **more):
    _, _, _, stride, padding, dilation, groups = geometry
    return remnant.conv2d(x, weight, bias, stride, padding, dilation, groups, policy=policy, **more)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("policy", ["exact", "invert", *CODED])
def test_forward_and_gradients_are_those_of_torch(geometry, policy):
    inputs, outputs, kernel, stride, padding, dilation, groups = geometry
    # A wide or strided system keeps much of a small input: enough that it is rebuilt at all is asserted below.
    x, weight, bias = make(inputs, outputs, kernel, groups=groups)
    y = call(x, weight, bias, geometry, policy)
    want = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    assert torch.equal(y, want)
    grad = torch.randn_like(y)
    have, plain = (torch.autograd.grad(t, (x, weight, bias), grad) for t in (y, want))
    noise = {"exact": 0, "invert": 1e-8, "quantized:bits=8": 0.03, "quantized:bits=4": 0.5, "quantized:bits=2": 2}
    for k, (a, b) in enumerate(zip(have, plain, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert relative(a, b) < (noise[policy] + 1e-12 if k == 1 else 1e-12)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_input_is_rebuilt(geometry):
    """Large positions, so that the ring is worth while: no tensor of the input's size is kept but the output."""
    inputs, outputs, kernel, stride, padding, dilation, groups = geometry
    x, weight, bias = make(inputs, outputs, kernel, size=(33, 41), groups=groups, batch=2)
    plan = remnant.conv2d_inversion(weight, (33, 41), stride, padding, dilation, groups)
    if stride == dilation == 2:  # three quarters of the input meet no tap
        assert plan.startswith("exact: what the output does not tell is")
        return
    assert plan.startswith("invert"), plan
    share = float(plan.split()[2])
    remnant.reset_inversion_counters()
    y, found = kept(lambda: call(x, weight, bias, geometry, "invert"))
    ours = sum(found.values()) - sum(
        found.get(t.untyped_storage().data_ptr(), 0) for t in (y, weight, bias)
    )
    assert x.untyped_storage().data_ptr() not in found
    assert ours <= (share + 0.02) * x.numel() * 8
    grad = torch.randn_like(y)
    dw = torch.autograd.grad(y, weight, grad)[0]
    want = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    assert relative(dw, torch.autograd.grad(want, weight, grad)[0]) < 1e-8
    assert remnant.inversion_counters() == {"rebuilt": 1, "kept": 0, "failed": 0, "repeated": 0}


@pytest.mark.parametrize("geometry", GEOMETRIES[::2], ids=str)
def test_gradcheck(geometry):
    inputs, outputs, kernel, *_, groups = geometry
    x, weight, bias = make(inputs, outputs, kernel, size=(8, 9), groups=groups, batch=1)
    assert gradcheck(lambda *t: call(*t, geometry, "invert"), (x, weight, bias), eps=1e-6, atol=1e-5)
