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


@pytest.mark.parametrize("geometry", [GEOMETRIES[0], GEOMETRIES[9], GEOMETRIES[16]], ids=str)
@pytest.mark.parametrize("layout", ["channels last", "strided"])
def test_layouts_and_expanded_gradients(geometry, layout):
    inputs, outputs, kernel, stride, padding, dilation, groups = geometry
    x, weight, bias = make(inputs, outputs, kernel, size=(33, 20))
    with torch.no_grad():
        if layout == "channels last":
            x = x.contiguous(memory_format=torch.channels_last)
        else:
            x = torch.stack([x, x], -1)[..., 0]
    x.requires_grad_()
    want = F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    expanded = torch.randn(1, outputs, 1, 1, dtype=torch.float64).expand_as(want)
    for grad in (expanded, torch.randn_like(want).mT.contiguous().mT):
        plain = torch.autograd.grad(want, (x, weight, bias), grad, retain_graph=True)
        for policy in ("invert", "quantized:bits=8"):
            have = torch.autograd.grad(call(x, weight, bias, geometry, policy), (x, weight, bias), grad)
            for k, (a, b) in enumerate(zip(have, plain, strict=True)):
                assert relative(a, b) < (1e-8 if policy == "invert" or k != 1 else 0.1)


@pytest.mark.parametrize("geometry", [GEOMETRIES[0], (4, 4, (3, 3), 2, 1, 1, 2)], ids=str)
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_coded_weight_gradient_is_unbiased(geometry, bits):
    """Borders too: the outer taps' gradients are compared with the others."""
    inputs, outputs, kernel, *_, groups = geometry
    x, weight, _ = make(inputs, outputs, kernel, size=(6, 5), groups=groups, batch=2)
    y = call(x, weight, None, geometry, "exact")
    grad = torch.randn_like(y)
    exact = torch.autograd.grad(y, weight, grad)[0]
    draws = torch.stack([
        torch.autograd.grad(
            call(x, weight, None, geometry, f"quantized:bits={bits}", generator=torch.Generator().manual_seed(seed)),
            weight, grad)[0]
        for seed in range(1500)
    ])  # fmt: skip
    deviation = draws.std(0) / math.sqrt(len(draws))
    assert float(draws.std(0).min()) > 0
    assert ((draws.mean(0) - exact).abs() <= 5 * deviation + 1e-6).all()


def test_kept_bytes():
    x, weight, bias = make(16, 16, (3, 3), size=(32, 32), dtype=torch.float32)
    for policy, least, most in (("exact", 1, 1), ("quantized:bits=4", 0.125, 0.142), ("invert", 0.12, 0.2),
                                ("min_norm", 0.128, 0.13)):  # fmt: skip
        y, found = kept(lambda policy=policy: remnant.conv2d(x, weight, bias, 1, 1, policy=policy))
        for t in (y, weight, bias):
            found.pop(t.untyped_storage().data_ptr(), None)
        assert least <= sum(found.values()) / (x.numel() * 4) <= most, policy
        if policy == "exact":
            continue
        # A weight that nobody trains keeps nothing of the input.
        y, found = kept(lambda policy=policy: remnant.conv2d(x, weight.detach(), bias, 1, 1, policy=policy))
        assert sum(found.values()) <= weight.numel() * 4
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0],
                                   torch.autograd.grad(F.conv2d(x, weight, bias, 1, 1).sum(), x)[0])  # fmt: skip


def test_he_weights_are_rebuilt_in_float32():
    x, weight = torch.randn(8, 16, 32, 32), torch.empty(16, 16, 3, 3)
    torch.nn.init.kaiming_normal_(weight)
    error, share = remnant.conv2d_inversion_error(x, weight, None, 1, 1)
    assert error <= 1e-5 and share <= 0.2


@pytest.mark.parametrize(
    ("weight", "size", "groups", "reason"),
    [
        (torch.randn(6, 1, 3, 3), (16, 16), 6, "depthwise"),
        (torch.randn(4, 4, 3, 3).half(), (16, 16), 1, "half precision"),
        (torch.zeros(4, 4, 3, 3), (16, 16), 1, "weight is 0"),
        (torch.full((4, 4, 3, 3), math.nan), (16, 16), 1, "weight has NaN or Inf"),
        (torch.randn(4, 4, 3, 3), (3, 3), 1, "what the output does not tell"),
    ],
)  # fmt: skip
def test_what_is_not_rebuilt_says_why(weight, size, groups, reason):
    assert remnant.conv2d_inversion(weight, size, 1, 1, 1, groups).startswith(f"exact: {reason}")
    x = torch.randn(2, weight.size(1) * groups, *size, dtype=weight.dtype)
    weight = weight.clone().requires_grad_()
    remnant.reset_inversion_counters()
    y = remnant.conv2d(x, weight, None, 1, 1, 1, groups, policy="invert")
    grad = torch.randn_like(y)
    have = torch.autograd.grad(y, weight, grad)[0]
    want = torch.autograd.grad(F.conv2d(x, weight, None, 1, 1, 1, groups), weight, grad)[0]
    torch.testing.assert_close(have, want, equal_nan=True)
    assert remnant.inversion_counters()["kept"] == 1 and remnant.inversion_counters()["rebuilt"] == 0


@pytest.mark.parametrize("kernel", [(3, 3), (1, 1)])
def test_certificate_fires(kernel):
    """Changes that autograd's version check cannot see."""
    x, weight, bias = make(6, 6, kernel, size=(20, 20))
    padding = kernel[0] // 2

    def run():
        return remnant.conv2d(x, weight, bias, 1, padding, policy="invert")

    good = torch.autograd.grad(run().square().sum(), weight)[0]
    remnant.reset_inversion_counters()
    y = run()
    loss = y.square().sum()
    y.data[1, 2, 5:9] += 0.5
    with pytest.raises(RuntimeError, match="rebuilt is off by .* use policy 'exact'"):
        torch.autograd.grad(loss, weight)
    y = run()
    loss = y.square().sum()
    weight.data[0] += 0.1
    with pytest.raises(RuntimeError, match="rebuilt is off by"):
        torch.autograd.grad(loss, weight)
    weight.data[0] -= 0.1
    assert remnant.inversion_counters()["failed"] == 2
    assert relative(torch.autograd.grad(run().square().sum(), weight)[0], good) < 1e-8
    y = run()
    with torch.no_grad():
        y += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), weight)


@pytest.mark.parametrize("kernel", [(3, 3), (1, 1)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("policy", ["invert", "min_norm", "quantized:bits=4"])
def test_nan_and_inf_reach_the_gradient(policy, bad, kernel):
    x, weight, bias = make(6, 6, kernel, size=(20, 20))
    with torch.no_grad():
        x[1, 2, 3, 4] = bad
    y = remnant.conv2d(x, weight, bias, 1, kernel[0] // 2, policy=policy)
    assert not torch.autograd.grad(y, weight, torch.ones_like(y))[0].isfinite().all()


@pytest.mark.parametrize("options,sentence", [
    ({"stride": 0}, "stride and dilation must be at least 1"),
    ({"dilation": 0}, "stride and dilation must be at least 1"),
    ({"padding": -1}, "padding at least 0"),
    ({"groups": 0}, "groups must divide weight's 4 outputs, got 0"),
    ({"groups": 3}, "groups must divide weight's 4 outputs, got 3"),
    ({"dilation": 5}, "larger than the padded input"),
])
def test_inversion_refuses_bad_numbers(options, sentence):
    with pytest.raises(RuntimeError, match=sentence):
        remnant.conv2d_inversion(torch.randn(4, 2, 3, 3), (8, 8), **options)


def test_small_batches_beside_large_systems_keep_their_input():
    weight = torch.randn(64, 64, 3, 3)
    said = remnant.conv2d_inversion(weight, (32, 32), 1, 1)
    assert "invert: keeps" in said and "a batch of fewer than 39 samples" in said
    for batch, whole in ((2, True), (39, False)):
        x = torch.randn(batch, 64, 32, 32)
        share = remnant.conv2d_inversion_error(x, weight, None, 1, 1)[1]
        assert (share == 1) == whole


def test_a_pointwise_input_that_the_bias_hides_is_kept():
    x, weight = torch.randn(8, 16, 9, 9) * 1e-5, torch.randn(16, 16, 1, 1, requires_grad=True)
    bias = torch.ones(16)
    F.conv2d(x, weight, bias).square().sum().backward()
    wanted, weight.grad = weight.grad, None
    remnant.conv2d(x, weight, bias, policy="invert").square().sum().backward()
    assert relative(weight.grad, wanted) < 1e-5


def test_a_pointwise_output_that_sees_no_input():
    x, weight = torch.randn(2, 3, 5, 1), torch.randn(2, 3, 1, 1, requires_grad=True)
    y = remnant.conv2d(x, weight, None, (1, 2), (0, 1), policy="invert")
    assert torch.equal(y, F.conv2d(x, weight, None, (1, 2), (0, 1)))
    y.sum().backward()
    assert weight.grad.eq(0).all()


def test_second_backward_equals_the_first():
    x, weight, bias = make(6, 6, (3, 3), size=(20, 20))
    y = remnant.conv2d(x, weight, bias, 1, 1, policy="invert")
    first = torch.autograd.grad(y.square().sum(), (x, weight, bias), retain_graph=True)
    second = torch.autograd.grad(y.square().sum(), (x, weight, bias))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def descend(policy, steps, rate):
    """Losses of a 1 x 1 regression from 32 channels to 24, and the weight before and after."""
    torch.manual_seed(1)
    x, target = torch.randn(64, 32, 2, 2, dtype=torch.float64), torch.randn(24, 32, 1, 1, dtype=torch.float64)
    start = torch.randn(24, 32, 1, 1, dtype=torch.float64) / math.sqrt(32)
    weight, want, losses = start.clone().requires_grad_(), F.conv2d(x, target), []
    for _ in range(steps):
        loss = (remnant.conv2d(x, weight, policy=policy) - want).square().mean()
        losses.append(loss.item())
        grad = torch.autograd.grad(loss, weight)[0]
        with torch.no_grad():
            weight -= rate * grad
    return losses, start.flatten(1), weight.detach().flatten(1)


def test_min_norm_never_leaves_its_row_space():
    """What the name warns of: 8 of 32 input directions stay as they were, and a quarter of the loss with them."""
    for policy in ("exact", "invert"):
        losses, *_ = descend(policy, 300, 4.0)
        assert losses[-1] < 1e-6 * losses[0]
    losses, start, end = descend("min_norm", 300, 4.0)
    assert 0.1 < losses[-1] / losses[0] < 0.45
    rows, moved = torch.linalg.qr(start.mT)[0], end - start
    assert float((moved - moved @ rows @ rows.mT).norm()) < 1e-9 * float(moved.norm())


@pytest.mark.parametrize("policy", ["invert", "min_norm", *CODED])
def test_double_backward_is_refused(policy):
    x, weight, bias = make(4, 4, (3, 3), size=(20, 20))
    y = remnant.conv2d(x, weight, bias, 1, 1, policy=policy)
    with pytest.raises(RuntimeError, match="no gradient of its gradient"):
        torch.autograd.grad(y.sum(), weight, create_graph=True)


def test_mistakes_are_sentences():
    x, weight, _ = make(4, 4, (3, 3))
    for message, arguments, policy in (
        ("unknown policy 'inverted'", (x, weight), "inverted"),
        ("input must be", (x[0], weight), "invert"),
        ("bias must be", (x, weight, torch.randn(3, dtype=torch.float64)), "invert"),
        ("groups must divide", (x, weight, None, 1, 0, 1, 3), "invert"),
        ("weight must have input's dtype", (x, weight.float()), "invert"),
        ("stride and dilation must be at least 1", (x, weight, None, 0), "invert"),
    ):
        with pytest.raises(RuntimeError, match=message):
            remnant.conv2d(*arguments, policy=policy)


def test_autocast():
    x, weight, bias = make(4, 4, (3, 3), size=(20, 20), dtype=torch.float32)
    for policy in ("exact", "quantized:bits=8", "invert"):
        with torch.autocast("cpu", torch.bfloat16):
            y = remnant.conv2d(x, weight, bias, 1, 1, policy=policy)
        assert y.dtype == torch.bfloat16
        assert torch.autograd.grad(y.float().sum(), weight)[0].dtype == torch.float32


# --- chains ----------------------------------------------------------------------------------------


def chain_parameters(layers, width, dtype=torch.float64):
    weights = []
    for _ in range(layers):
        weight = 0.05 * torch.randn(width, width, 3, 3, dtype=dtype)
        weight[:, :, 1, 1] += torch.linalg.qr(torch.randn(width, width, dtype=dtype))[0]
        weights.append(weight.requires_grad_())
    scales = [(0.75 + 0.5 * torch.rand(width, dtype=dtype)).requires_grad_() for _ in range(layers)]
    shifts = [(0.2 * torch.randn(width, dtype=dtype)).requires_grad_() for _ in range(layers)]
    return weights, scales, shifts


def eager_chain(x, weights, scales, shifts, activation, slope=0.5):
    for weight, scale, shift in zip(weights, scales, shifts, strict=True):
        x = F.batch_norm(F.conv2d(x, weight, padding=weight.size(2) // 2), None, None, scale, shift, True)
        if activation == "leaky":
            x = F.leaky_relu(x, slope)
        else:
            a, b = x.chunk(2, 1)
            x = torch.cat([torch.maximum(a, b), torch.minimum(a, b)], 1)
    return x


@pytest.mark.parametrize("activation", ["leaky", "maxmin"])
@pytest.mark.parametrize("plan", [((), ()), ((2,), ()), ((), (1, 3)), ((1, 2, 3), ())], ids=str)
def test_chain(activation, plan):
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64, requires_grad=True)
    lists = chain_parameters(4, 4)
    errors = torch.empty(4, dtype=torch.float64)
    y = remnant.reversible_chain(x, *lists, activation=activation, anchors=plan[0], residues=plan[1], errors=errors)
    want = eager_chain(x, *lists, activation)
    torch.testing.assert_close(y, want)
    inputs = [x, *(t for group in lists for t in group)]
    grad = torch.randn_like(y)
    have, plain = torch.autograd.grad(y, inputs, grad), torch.autograd.grad(want, inputs, grad)
    for a, b in zip(have, plain, strict=True):
        assert relative(a, b) < 1e-9
    assert [math.isnan(e) for e in errors.tolist()] == [i == 0 or i in plan[0] for i in range(4)]
    assert float(errors[1:].nan_to_num(0).max()) < 1e-10


def test_chain_gradcheck():
    x = torch.randn(1, 4, 5, 4, dtype=torch.float64, requires_grad=True)
    weights, scales, shifts = chain_parameters(2, 4)
    assert gradcheck(
        lambda x, a, b, c, d, e, f: remnant.reversible_chain(x, [a, b], [c, d], [e, f], activation="maxmin"),
        (x, *weights, *scales, *shifts),
    )


def test_residues_take_the_error_away():
    """float32, and a slope at which an error grows five times a layer."""
    torch.manual_seed(3)
    lists = [[t.detach().requires_grad_() for t in group] for group in chain_parameters(12, 8, torch.float32)]
    x, errors = torch.randn(4, 8, 16, 16), torch.empty(12, dtype=torch.float64)

    def worst(residues):
        remnant.reversible_chain(x, *lists, slope=0.1, residues=residues, errors=errors).sum().backward()
        return float(errors.nan_to_num(0).max())

    alone, reset = worst(()), worst((4, 8))
    assert reset < alone / 10
    assert float(errors[4]) < 3e-6 < float(errors[5])
    anchors, residues = remnant.reversible_chain_plan(x, *lists, slope=0.1, limit=2e-4)
    assert not anchors and residues
    assert worst(residues) < 4e-4


def test_chain_under_autocast_stays_in_float32():
    lists = chain_parameters(2, 4, torch.float32)
    x = torch.randn(2, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = remnant.reversible_chain(x.bfloat16(), *lists)
    assert y.dtype == torch.float32
    y.sum().backward()


def test_chains_mistakes_are_sentences():
    x, (weights, scales, shifts) = torch.randn(2, 4, 8, 8, dtype=torch.float64), chain_parameters(2, 4)
    for message, arguments, more in (
        ("slope must be above 0", (x, weights, scales, shifts), {"slope": 0.0}),
        ("activation must be 'leaky' or 'maxmin'", (x, weights, scales, shifts), {"activation": "relu"}),
        ("anchors and residues must be layers", (x, weights, scales, shifts), {"anchors": [2]}),
        ("float32 or float64", (x.half(), weights, scales, shifts), {}),
        ("every layer must have", (x, weights, scales[:1], shifts), {}),
        ("one odd kernel", (x[:, :3], weights, scales, shifts), {}),
    ):
        with pytest.raises(RuntimeError, match=message):
            remnant.reversible_chain(*arguments, **more)
