"""conv_norm_act against torch's separate operations: gradients, kept bytes, and codes whose bias is known."""

import numpy
import pytest
import torch
import torch.nn.functional as F
from test_codes import kept
from torch.library import opcheck

import remnant

CODED = ["unbiased:bits=8", "unbiased:bits=4", "unbiased:bits=2"]
ACTIVATIONS = ["relu", "leaky:slope=0.2", "silu", "identity"]
NORMS = ["batch", "group:groups=2", "none"]


def activate(x, activation):
    name, _, slope = activation.partition(":slope=")
    return {
        "relu": F.relu,
        "leaky": lambda x: F.leaky_relu(x, float(slope or 0.01)),
        "silu": F.silu,
        "identity": lambda x: x,
    }[name](x)


def reference(x, w, bias=None, *, norm_weight=None, norm_bias=None, running_mean=None, running_var=None, residual=None,
              norm="batch", training=True, momentum=0.1, eps=1e-5, activation="relu", **conv):  # fmt: skip
    """torch's operations, one after the other."""
    convolution = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.dim()]
    z = convolution(x, w, bias, **conv)
    if norm == "batch":
        z = F.batch_norm(z, running_mean, running_var, norm_weight, norm_bias, training, momentum, eps)
    elif norm != "none":
        z = F.group_norm(z, int(norm.split("=")[1]), norm_weight, norm_bias, eps)
    return activate(z if residual is None else z + residual, activation)


def leaf(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def parameters(channels, dtype=torch.float64):
    weight = (torch.rand(channels, dtype=dtype) + 0.5) * torch.where(torch.arange(channels) % 3 == 1, -1.0, 1.0)
    return dict(
        norm_weight=weight.to(dtype).requires_grad_(),
        norm_bias=(torch.randn(channels, dtype=dtype) * 0.5).requires_grad_(),
    )


def gradients(y, tensors, grad):
    return torch.autograd.grad(y, [t for t in tensors if t is not None], grad)


def compare(function, tensors, tolerance=1e-10, grad=None):
    """function(op) with our op and torch's: the same output and gradients."""
    ours, want = function(remnant.conv_norm_act), function(reference)
    torch.testing.assert_close(ours, want, rtol=tolerance, atol=tolerance)
    grad = torch.randn_like(want) if grad is None else grad(want)
    for have, expected in zip(gradients(ours, tensors, grad), gradients(want, tensors, grad), strict=True):
        assert have.dtype == expected.dtype
        scale = float(expected.double().abs().max()) + 1e-30
        torch.testing.assert_close(have / scale, expected / scale, rtol=0, atol=tolerance)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_equals_torch(layout, norm, activation, with_residual):
    x = torch.randn(3, 5, 9, 7, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    w, bias = leaf(6, 5, 3, 2), leaf(6)
    residual = leaf(3, 6, 5, 6) if with_residual else None
    p = {} if norm == "none" else parameters(6)

    def function(op):
        return op(x, w, bias, **p, residual=residual, norm=norm, activation=activation, stride=(2, 1), padding=(1, 0))

    # bias's gradient is 0 before a batch norm: rounding apart, nothing to compare relatively.
    compare(function, [x, w, *p.values(), residual], 1e-9)
    assert function(remnant.conv_norm_act).is_contiguous(memory_format=layout)


@pytest.mark.parametrize(
    "shape,kernel,conv",
    [
        ((2, 4, 11), (3,), dict(padding=1, stride=2)),
        ((2, 4, 6, 6), (2, 2), dict()),
        ((2, 4, 6, 5), (3, 3), dict(padding=2, dilation=2)),
        ((2, 4, 6, 6), (3, 1), dict(groups=2, padding=(1, 0))),
        ((2, 4, 6, 6), (3, 3), dict(groups=4, padding=1, stride=2)),
        ((2, 4, 4, 5, 3), (2, 3, 1), dict(padding=(1, 1, 0), stride=(1, 2, 1))),
        ((2, 4, 7, 6), (4, 2), dict(padding=(2, 1), stride=(1, 2), groups=2, dilation=(1, 2))),
    ],
    ids=str,
)
@pytest.mark.parametrize("recompute", [False, True])
def test_gradcheck(recompute, shape, kernel, conv):
    x, w = leaf(*shape), leaf(8, shape[1] // conv.get("groups", 1), *kernel)
    p = parameters(8)

    def function(x, w, norm_weight, norm_bias):
        return remnant.conv_norm_act(
            x, w, norm_weight=norm_weight, norm_bias=norm_bias, activation="leaky:slope=0.3", eps=1e-2,
            recompute=recompute, **conv,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, (x, w, *p.values()))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_residual_network(layout):
    """Two blocks, where inputs and residuals are other units' outputs."""
    x = torch.randn(4, 6, 8, 8, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    weights = [leaf(6, 6, 3, 3) for _ in range(4)]
    ps = [parameters(6) for _ in range(4)]

    def function(op):
        y = op(x, weights[0], **ps[0], padding=1)
        for i in (1, 2):
            z = op(y, weights[i], **ps[i], padding=1)
            y = op(z, weights[3], **ps[3], padding=1, residual=y)
        return y.square()

    compare(function, [x, *weights, *(t for p in ps for t in p.values())], 1e-9)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", ["relu", "leaky:slope=0.2", "identity"])
def test_channels_that_hide_the_normalised_values(activation, with_residual):
    x, w = leaf(3, 5, 6, 6), leaf(6, 5, 3, 3)
    residual = leaf(3, 6, 6, 6) if with_residual else None
    p = parameters(6)
    with torch.no_grad():
        p["norm_weight"][0] = 0
        p["norm_weight"][2] = 1e-25
        p["norm_bias"][3] = 400
    compare(lambda op: op(x, w, **p, residual=residual, padding=1, activation=activation), [x, w, *p.values()], 1e-9)
    with torch.no_grad():
        p["norm_weight"].zero_()
    compare(lambda op: op(x, w, **p, residual=residual, padding=1, activation=activation), [w, *p.values()], 1e-9)


@pytest.mark.parametrize("affine", [True, False])
def test_evaluation_and_frozen_norm(affine):
    x, w = leaf(3, 5, 6, 6), leaf(6, 5, 3, 3)
    p = parameters(6) if affine else {}
    mean, var = torch.randn(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64) + 0.5
    before = mean.clone(), var.clone()

    def function(op):
        return op(x, w, **p, running_mean=mean, running_var=var, training=False)

    compare(function, [x, w, *p.values()], 1e-10)
    assert torch.equal(mean, before[0]) and torch.equal(var, before[1])
    size, _ = kept(lambda: remnant.conv_norm_act(x, w, running_mean=mean, running_var=var, training=False))
    assert size == 3 * 6 * 16 * 8 + 2 * 6 * 8  # the output, whose sign is enough, and a scale


@pytest.mark.parametrize("memory", ["exact", "unbiased:bits=4"])
def test_running_statistics_are_updated_once(memory):
    x, w = leaf(3, 5, 6, 6, dtype=torch.float32), leaf(6, 5, 3, 3, dtype=torch.float32)
    ours, want = [(torch.zeros(6), torch.ones(6)) for _ in range(2)]
    y = remnant.conv_norm_act(x, w, running_mean=ours[0], running_var=ours[1], momentum=0.3, memory=memory)
    y.sum().backward()
    reference(x, w, running_mean=want[0], running_var=want[1], momentum=0.3)
    torch.testing.assert_close(ours, want)


@pytest.mark.parametrize("memory", ["exact", "unbiased:bits=8"])
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 6e-2)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_other_dtypes(layout, dtype, tolerance, memory):
    x = torch.randn(4, 16, 8, 8).to(dtype).contiguous(memory_format=layout).requires_grad_()
    w = (torch.randn(32, 16, 3, 3) * 0.1).to(dtype).requires_grad_()
    p = parameters(32, torch.float32)
    y = remnant.conv_norm_act(x, w, **p, padding=1, memory=memory)
    wide = [t.detach().double().requires_grad_() for t in (x, w, *p.values())]
    want = reference(wide[0], wide[1], norm_weight=wide[2], norm_bias=wide[3], padding=1)
    assert y.dtype == dtype
    grad = torch.randn_like(y)
    tolerance = max(tolerance, 0.02) if memory != "exact" else tolerance
    assert (y.double() - want).norm() <= tolerance * want.norm()
    pairs = zip(gradients(y, (x, w, *p.values()), grad), gradients(want, wide, grad.double()), strict=True)
    for have, expected in pairs:
        assert (have.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("gradient", ["expanded", "strided"])
def test_gradients_of_any_strides(gradient):
    x, w = leaf(3, 5, 6, 6), leaf(6, 5, 3, 3)

    def grad(y):
        if gradient == "expanded":
            return torch.randn(1, 6, 1, 1, dtype=y.dtype).expand_as(y)
        return torch.randn(*reversed(y.shape), dtype=y.dtype).permute(3, 2, 1, 0)

    for norm in ("batch", "none"):
        compare(lambda op: op(x.transpose(2, 3), w, norm=norm), [x, w], 1e-9, grad)  # noqa: B023


def units(x, weights, p, memory, generator=None):
    y = remnant.conv_norm_act(x, weights[0], **p, padding=1, memory=memory, generator=generator)
    for w in weights[1:]:
        z = remnant.conv_norm_act(y, w, **p, padding=1, memory=memory, generator=generator)
        y = remnant.conv_norm_act(z, w, **p, padding=1, residual=y, memory=memory, generator=generator)
    return y


def test_kept_bytes():
    """One tensor a unit where torch keeps two; codes: one a unit, two where a residual comes in."""
    x = torch.randn(8, 16, 8, 8)
    weights = [leaf(16, 16, 3, 3, dtype=torch.float32) for _ in range(3)]
    p = parameters(16, torch.float32)
    size, _ = kept(lambda: units(x, weights, p, "exact"))
    tensor, rows = x.numel() * 4, 4 * 16 * 8
    assert size == 6 * tensor + 5 * rows  # 5 sums and x
    for bits in (8, 4, 2):
        size, _ = kept(lambda: units(x, weights, p, f"unbiased:bits={bits}"))  # noqa: B023
        # 5 units: 2 residual ones with two codes, x's codes, and a factor and an offset a unit.
        assert size == 8 * remnant.linear_code_bytes(x.numel(), bits) + 5 * (rows + 2 * 16 * 4)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_unit_that_convolves_again(layout, norm, activation, with_residual):
    """Its own gradients, and those of two units that take its output as input and as residual."""
    x = torch.randn(3, 5, 9, 7, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    w, after, bias = leaf(6, 5, 3, 2), leaf(6, 6, 3, 3), leaf(6)
    residual = leaf(3, 6, 5, 6) if with_residual else None
    p, q = ({} if norm == "none" else parameters(6) for _ in range(2))
    if norm != "none":
        with torch.no_grad():
            p["norm_weight"][2] = 0  # no x^ from a sum: it comes from the convolution

    def function(op):
        more = dict(recompute=True) if op is remnant.conv_norm_act else {}
        more.update(residual=residual, norm=norm, activation=activation)
        y = op(x, w, bias, **p, stride=(2, 1), padding=(1, 0), **more)
        z = op(y, after, **q, norm=norm, padding=1)
        return op(z, after, **q, norm=norm, padding=1, residual=y)

    compare(function, [x, w, after, *p.values(), *q.values(), residual], 1e-9)


SHORTCUTS = ["1x1", "every other", "average"]


def shortcut(x, kind, w, p, ours, memory="exact"):
    if kind == "1x1":
        if ours:
            return remnant.conv_norm_act(x, w, **p, stride=2, activation="identity", memory=memory, recompute=True)
        return reference(x, w, **p, stride=2, activation="identity")
    if ours:
        return remnant.shortcut(x, 2, w.shape[0], average=kind == "average")
    x = F.avg_pool2d(x, 2) if kind == "average" else x[:, :, ::2, ::2]
    return F.pad(x, (0, 0, 0, 0, 0, w.shape[0] - x.shape[1]))


def stages(x, weights, ps, kind, activation, ours, memory="exact"):
    """A first unit that convolves again, a block, and one that halves the image and doubles the channels."""
    stem, narrow, widen, wide, point = weights
    small, large = ps

    def unit(*args, **settings):
        if not ours:
            settings.pop("recompute", None)
            return reference(*args, padding=1, activation=activation, **settings)
        return remnant.conv_norm_act(*args, padding=1, activation=activation, memory=memory, **settings)

    y = unit(x, stem, **small, recompute=True)
    y = unit(unit(y, narrow, **small), narrow, **small, residual=y)
    r = shortcut(y, kind, point, large, ours, memory)
    y = unit(unit(y, widen, **large, stride=2), wide, **large, residual=r)
    return unit(unit(y, wide, **large), wide, **large, residual=y)


def stage_weights(dtype):
    weights = [leaf(4, 3, 3, 3), leaf(4, 4, 3, 3), leaf(8, 4, 3, 3), leaf(8, 8, 3, 3), leaf(8, 4, 1, 1)]
    return [w.detach().to(dtype).requires_grad_() for w in weights], [parameters(4, dtype), parameters(8, dtype)]


@pytest.mark.parametrize("activation", ["relu", "leaky:slope=0.2", "silu"])
@pytest.mark.parametrize("kind", SHORTCUTS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_stages_with_shortcuts(layout, kind, activation):
    x = torch.randn(3, 3, 8, 6, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    weights, ps = stage_weights(torch.float64)
    ours, want = (stages(x, weights, ps, kind, activation, mine) for mine in (True, False))
    torch.testing.assert_close(ours, want)
    grad = torch.randn_like(want)
    inputs = [x, *weights[: 5 if kind == "1x1" else 4], *(t for p in ps for t in p.values())]
    for have, expected in zip(gradients(ours, inputs, grad), gradients(want, inputs, grad), strict=True):
        torch.testing.assert_close(have, expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", SHORTCUTS)
def test_shortcuts_and_units_that_convolve_again_keep_nothing(kind):
    """Of seven units in three stages only the five sums in blocks of the first and second stage are kept."""
    x = torch.randn(4, 3, 16, 16)
    weights, ps = stage_weights(torch.float32)
    size, _ = kept(lambda: stages(x, weights, ps, kind, "relu", True))
    small, large = 4 * 4 * 256 * 4, 4 * 8 * 64 * 4
    rows = lambda units, channels: units * channels * 4 * 8  # noqa: E731
    again = 4 * 4 * 4 + (4 * 8 * 4 if kind == "1x1" else 0)  # scale, shift, factor and offset of a channel
    points = 1 if kind == "1x1" else 0
    # x is excluded where it is a step's data; here it is kept, once, and every sum but the first unit's.
    assert size == x.numel() * 4 + 2 * small + 4 * large + rows(3, 4) + rows(4 + points, 8) + again


@pytest.mark.parametrize("memory", ["exact", "unbiased:bits=4"])
def test_hooks_that_detach_do_not_hide_what_is_kept(memory):
    """They put another tensor over the same memory in the saved one's place."""
    x = torch.randn(8, 16, 8, 8)
    weights = [leaf(16, 16, 3, 3, dtype=torch.float32) for _ in range(3)]
    p = parameters(16, torch.float32)
    want, _ = kept(lambda: units(x, weights, p, memory))
    held, left_out = {}, {t.data_ptr() for t in (*weights, *p.values())}

    def pack(t):
        held[t.data_ptr()] = t.detach()
        return held[t.data_ptr()]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = units(x, weights, p, memory)
    assert sum(t.untyped_storage().nbytes() for at, t in held.items() if at not in left_out) == want
    ours = gradients(y, weights, torch.ones_like(y))
    if memory == "exact":
        for a, b in zip(ours, gradients(units(x, weights, p, memory), weights, torch.ones_like(y)), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("changed", ["input", "weight"])
def test_what_was_changed_in_place_is_not_convolved_again(changed):
    """A reader that comes after the change keeps the output as it is."""
    x, w, after = leaf(2, 4, 6, 6).detach(), leaf(4, 4, 1, 1), leaf(4, 4, 3, 3)
    y = remnant.conv_norm_act(x, w, recompute=True)
    want = torch.autograd.grad(reference(y.detach(), after, padding=1).square().sum(), after)[0]
    with torch.no_grad():
        (x if changed == "input" else w).mul_(3)
    have = torch.autograd.grad(remnant.conv_norm_act(y, after, padding=1).square().sum(), after)[0]
    torch.testing.assert_close(have, want)


def test_a_unit_whose_input_comes_from_codes_does_not_convolve_again():
    x, w = leaf(2, 4, 6, 6, dtype=torch.float32), leaf(4, 4, 3, 3, dtype=torch.float32)

    def function(recompute):
        y = remnant.conv_norm_act(x, w, padding=1, memory="unbiased:bits=4")
        return remnant.conv_norm_act(y, w, padding=1, activation="identity", recompute=recompute)

    assert kept(lambda: function(True))[0] == kept(lambda: function(False))[0]


def test_a_weight_changed_before_the_backward_is_noticed():
    x, w = leaf(2, 4, 6, 6), leaf(4, 4, 1, 1)
    y = remnant.conv_norm_act(x, w, recompute=True)
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 3, 6, 5), (2, 3, 4, 5, 6)], ids=str)
def test_shortcut(shape, average):
    x = leaf(*shape)
    pool = {3: F.avg_pool1d, 4: F.avg_pool2d, 5: F.avg_pool3d}[x.dim()]
    every = (slice(None), slice(None), *[slice(None, None, 2)] * (x.dim() - 2))
    taken = pool(x, 2) if average else x[every]
    y = remnant.shortcut(x, 2, 5, average=average)
    torch.testing.assert_close(y, torch.cat([taken, torch.zeros_like(taken[:, :2])], 1))
    torch.testing.assert_close(remnant.shortcut(x, 2, 3, average=average), taken)
    assert torch.autograd.gradcheck(lambda x: remnant.shortcut(x, 2, 5, average=average), (x,))
    assert remnant.shortcut(x, 1, 3).data_ptr() != x.data_ptr()


def test_shortcut_errors():
    for arguments, message in [
        ((torch.zeros(2, 3), 2, 3), r"\[N, C, L\]"),
        ((torch.zeros(2, 3, 4), 0, 3), "stride must be positive, got 0"),
        ((torch.zeros(2, 3, 4), 2, 2), "channels must be at least input's 3, got 2"),
        ((torch.zeros(2, 3, 4, dtype=torch.long), 2, 3), "shortcut: input must be"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            remnant.shortcut(*arguments)


def test_an_output_outlives_its_sum_and_the_other_way_round():
    x = leaf(2, 4, 6, 6)
    weights = [leaf(4, 4, 3, 3) for _ in range(2)]
    y = remnant.conv_norm_act(x, weights[0], padding=1)
    detached = y.detach()
    torch.autograd.grad(y.sum(), x)  # frees the sum
    z = remnant.conv_norm_act(detached.requires_grad_(), weights[1], padding=1)
    want = reference(detached, weights[1], padding=1)
    have, expected = (torch.autograd.grad(t.square().sum(), weights[1])[0] for t in (z, want))
    torch.testing.assert_close(have, expected)


def test_a_changed_output_is_not_taken_for_the_old_one():
    x = leaf(2, 4, 6, 6)
    weights = [leaf(4, 4, 3, 3) for _ in range(2)]

    def function(op):
        y = op(x, weights[0], padding=1)
        with torch.no_grad():
            y.mul_(3)
        return op(y, weights[1], padding=1, norm="none", activation="identity")

    have, want = (torch.autograd.grad(function(op).sum(), weights[1])[0] for op in (remnant.conv_norm_act, reference))
    torch.testing.assert_close(have, want)


@pytest.mark.parametrize("memory,recompute", [("exact", False), ("exact", True), ("unbiased:bits=4", False)])
def test_second_backward_and_second_step(memory, recompute):
    x, w = leaf(2, 4, 6, 6), leaf(4, 4, 3, 3)
    p = parameters(4)

    def step():
        generator = torch.Generator().manual_seed(3)
        y = remnant.conv_norm_act(x, w, padding=1, recompute=recompute)
        return units(y, [w, w], p, memory, generator).square().sum()

    loss = step()
    inputs = (x, w, *p.values())
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs)
    fresh = torch.autograd.grad(step(), inputs)
    for a, b, c in zip(first, second, fresh, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    with pytest.raises(RuntimeError, match="no gradient of its gradient"):
        torch.autograd.grad(step(), x, create_graph=True)


def read_signed(codes, table, size, bits):
    """Signed codes by NumPy: groups of 64, a sign and a level each, a step for the numbers below 0 and one above."""
    codes, levels = codes.numpy(), 2 ** (bits - 1) - 1
    steps = table.float().double().numpy()
    out = numpy.empty(size)
    for group, first in enumerate(range(0, size, 64)):
        e = numpy.arange(min(64, size - first))
        stride = (len(e) * bits + 7) // 8
        code = codes[first * bits // 8 + e % stride] >> (e // stride * bits) & (2**bits - 1)
        negative = code > levels
        level = (code & levels) * numpy.where(negative, -steps[group, 0], steps[group, 1])
        out[first : first + len(e)] = numpy.where(negative & (level == 0), -0.0, level)
    return torch.from_numpy(out)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_are_those_that_the_codes_say(layout, bits):
    """Everything a backward gives, from the codes as NumPy reads them: mask, x^ and the next convolution's input."""
    x, w, after = leaf(2, 3, 7, 5), leaf(6, 3, 3, 3), leaf(4, 6, 3, 3)
    p = parameters(6)
    gamma, beta = (t.detach().view(1, -1, 1, 1) for t in p.values())
    saved = []

    def pack(t):
        saved.append(t)
        return t

    memory = f"unbiased:bits={bits}"
    inputs = x.detach().contiguous(memory_format=layout)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = remnant.conv_norm_act(inputs, w, **p, padding=1, memory=memory)
    codes, table = next((a, b) for a, b in zip(saved, saved[1:], strict=False)
                        if a.dtype == torch.uint8 and a.numel() == (y.numel() * bits + 7) // 8)  # fmt: skip
    assert table.dtype == torch.bfloat16
    flat = read_signed(codes, table, y.numel(), bits)
    n, c, h, width = y.shape
    u = flat.view(n, h, width, c).permute(0, 3, 1, 2) if layout == torch.channels_last else flat.view(n, c, h, width)
    z = F.conv2d(inputs, w.detach(), padding=1)
    centred = z - z.mean((0, 2, 3), keepdim=True)
    true = centred / (centred.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt() + beta / gamma
    assert torch.equal(torch.signbit(u), true <= 0)
    steps = table.float().max()
    assert (u - true).abs().max() <= 1.001 * steps
    sums = gamma * u
    grad = torch.randn_like(y.detach())
    mask = torch.where(torch.signbit(sums), 0.0, 1.0)  # a 0's sign is kept: +0 passes
    d_gamma, d_beta = torch.autograd.grad(y, list(p.values()), grad, retain_graph=True)
    torch.testing.assert_close(d_beta, (grad * mask).sum((0, 2, 3)))
    torch.testing.assert_close(d_gamma, (grad * mask * (u - beta / gamma)).sum((0, 2, 3)), rtol=1e-6, atol=1e-6)
    out = remnant.conv_norm_act(y, after, padding=1, norm="none", activation="identity", memory=memory)
    upper = torch.randn_like(out.detach())
    have = torch.autograd.grad(out, after, upper)[0]
    want = torch.autograd.grad(F.conv2d(sums * mask, after, padding=1), after, upper)[0]
    torch.testing.assert_close(have, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("memory", ["exact", "unbiased:bits=4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_reach_output_and_gradient(bad, memory):
    x, w = leaf(2, 4, 6, 6, dtype=torch.float32), leaf(4, 4, 3, 3, dtype=torch.float32)
    with torch.no_grad():
        x[0, 0, 2, 2] = bad
    y = remnant.conv_norm_act(x, w, memory=memory)
    assert y.isnan().any()
    for grad in torch.autograd.grad(y.sum(), (x, w)):
        assert grad.isnan().any()


def draws_of(function, inputs, want, draws):
    grad = torch.randn_like(function())
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(want(), inputs, grad)])
    samples = [torch.cat([g.flatten() for g in torch.autograd.grad(function(), inputs, grad)]) for _ in range(draws)]
    return torch.stack(samples) - exact, exact


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_weight_gradients_are_unbiased(with_residual, activation, bits):
    """Of the unit's norm parameters, and of a following convolution that reads the same codes."""
    x, weights = leaf(4, 3, 8, 8), [leaf(6, 3, 3, 3), leaf(5, 6, 3, 3)]
    residual = leaf(4, 6, 8, 8) if with_residual else None
    p = parameters(6)
    with torch.no_grad():
        p["norm_weight"][3], p["norm_bias"][4] = 0, 30
    memory = f"unbiased:bits={bits}"

    def chain(op, **more):
        y = op(x, weights[0], **p, padding=1, residual=residual, activation=activation, **more)
        return op(y, weights[1], norm="none", activation="identity", **more)

    inputs = (weights[1], *p.values())
    errors, _ = draws_of(lambda: chain(remnant.conv_norm_act, memory=memory), inputs, lambda: chain(reference), 300)
    # Each coordinate's mean in its own standard errors: one noisy channel must not speak for all of them.
    noisy = errors.std(0) > 1e-9
    assert noisy.sum() > 200
    scores = errors.mean(0)[noisy] / errors.std(0)[noisy] * len(errors) ** 0.5
    assert scores.square().mean() < 1.6 and scores.abs().max() < 5.5
    assert errors.mean(0)[~noisy].abs().max() < 1e-6 if (~noisy).any() else True


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("far", [8.0, -8.0, 15.9])
def test_a_far_kink_does_not_spoil_the_neighbours(layout, far):
    """One channel's beta / gamma far beyond any x^: the others' noise stays as it was."""
    channels, draws = 16, 12
    torch.manual_seed(0)
    x = torch.randn(8, channels, 12, 12).contiguous(memory_format=layout).requires_grad_()
    identity = torch.eye(channels).view(channels, channels, 1, 1)
    after = (torch.randn(channels, channels, 3, 3) / 12).requires_grad_()

    def noise(ratio):
        gamma, beta = torch.ones(channels), torch.zeros(channels)
        beta[0] = ratio

        def gradient(memory):
            y = remnant.conv_norm_act(x, identity, norm_weight=gamma, norm_bias=beta, memory=memory)
            y = remnant.conv_norm_act(y, after, norm="none", activation="identity", padding=1, memory=memory)
            g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
            return torch.autograd.grad((y * g).sum(), after)[0][:, 1:]

        wanted = gradient("eager")
        found = [gradient("unbiased:bits=4") for _ in range(draws)]
        return float(sum((each - wanted).square().sum() for each in found) / draws / wanted.square().sum())

    assert noise(far) < 2.5 * noise(0.0)


def test_a_far_kink_that_is_reached_masks_without_bias():
    """x^ of a sparse channel reaches far: its mask is exact, beta's gradient with it."""
    torch.manual_seed(0)
    x = torch.randn(4, 2, 32, 32)
    x[:, 0] = 0
    x[0, 0, 0, 0], x[1, 0, 0, 0], x[2, 0, 0, :3] = 10, 9, 3
    x.requires_grad_()
    weight = torch.eye(2).view(2, 2, 1, 1)
    gamma, beta = torch.ones(2, requires_grad=True), torch.tensor([-20.0, 0.0], requires_grad=True)
    assert 0 < int((remnant.conv_norm_act(x, weight, norm_weight=gamma, norm_bias=beta, memory="eager")[:, 0] > 0).sum()) < 5
    wanted = torch.autograd.grad(
        remnant.conv_norm_act(x, weight, norm_weight=gamma, norm_bias=beta, memory="eager").sum(), beta)[0]
    for _ in range(20):
        y = remnant.conv_norm_act(x, weight, norm_weight=gamma, norm_bias=beta, memory="unbiased:bits=4")
        assert torch.equal(torch.autograd.grad(y.sum(), beta)[0], wanted)


@pytest.mark.parametrize("bits,allowed", [(8, 1e-4), (4, 5e-3), (2, 5e-2)])
def test_the_norms_bias_is_of_second_order(bits, allowed):
    x, w = leaf(4, 3, 8, 8), leaf(6, 3, 3, 3)
    p = parameters(6)
    memory = f"unbiased:bits={bits}"
    errors, exact = draws_of(
        lambda: remnant.conv_norm_act(x, w, **p, padding=1, memory=memory),
        (x, w),
        lambda: reference(x, w, **p, padding=1),
        400,
    )
    assert errors.mean(0).square().sum() < 1.5 * errors.var(0).sum() / len(errors) + (allowed * exact.norm()) ** 2


def test_codes_survive_an_optimizer_step_between_forward_and_backward():
    x, w = leaf(2, 4, 6, 6), leaf(4, 4, 3, 3)
    p = parameters(4)
    grads = []
    for change in (False, True):
        generator = torch.Generator().manual_seed(3)
        y = remnant.conv_norm_act(x, w, **p, padding=1, memory="unbiased:bits=4", generator=generator)
        z = remnant.conv_norm_act(y, w, norm="none", activation="identity", memory="unbiased:bits=4")
        if change:
            with torch.no_grad():
                for t in p.values():
                    t.add_(3)
        grads.append(torch.autograd.grad(z.sum(), (x, w)))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("memory", ["exact", "unbiased:bits=8"])
def test_autocast_runs_the_unit_in_the_lower_precision(memory):
    x, w = leaf(2, 8, 6, 6, dtype=torch.float32), leaf(8, 8, 3, 3, dtype=torch.float32)
    p = parameters(8, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = units(x, [w, w], p, memory)
        want = reference(x, w, **p, padding=1)
        z = reference(want, w, **p, padding=1)
        want = reference(z, w, **p, padding=1, residual=want)
    assert y.dtype == torch.bfloat16
    inputs = (w, *p.values())
    grad = torch.randn_like(want)
    for have, expected in zip(gradients(y, inputs, grad.to(y.dtype)), gradients(want, inputs, grad), strict=True):
        assert have.dtype == torch.float32
        assert (have - expected).norm() < 0.1 * expected.norm()


def test_nothing_is_kept_without_a_gradient():
    x, w = torch.randn(2, 4, 6, 6), leaf(4, 4, 3, 3, dtype=torch.float32)
    with torch.no_grad():
        assert remnant.conv_norm_act(x, w).grad_fn is None


def test_a_zero_sum_has_the_gradient_that_torch_gives():
    x, w = leaf(2, 4, 6, 6), leaf(4, 4, 3, 3)
    p = dict(norm_weight=torch.zeros(4, dtype=x.dtype), norm_bias=torch.zeros(4, dtype=x.dtype, requires_grad=True))
    for memory in ("exact", *CODED):
        y = remnant.conv_norm_act(x, w, **p, memory=memory)
        assert torch.autograd.grad(y.sum(), p["norm_bias"])[0].eq(0).all()


@pytest.mark.parametrize("memory", ["exact", *CODED])
def test_zeros_do_not_pass_among_numbers_above_zero(memory):
    """A group of codes without a number below 0: its zeros keep their sign all the same."""
    x = torch.rand(1, 1, 8, 8) + 0.5
    x[..., ::2] = 0
    w, residual = torch.ones(1, 1, 1, 1, requires_grad=True), torch.zeros(1, 1, 8, 8, requires_grad=True)
    for options in (dict(norm="none"), dict(norm="none", residual=residual)):
        bias = torch.zeros(1, requires_grad=True)
        y = remnant.conv_norm_act(x, w, bias, memory=memory, **options)
        assert torch.autograd.grad(y.sum(), bias)[0].item() == 32


def test_mistakes_are_named():
    x, w = torch.randn(2, 4, 6, 6), torch.randn(6, 4, 3, 3)
    for message, call in [
        ("activation must be 'relu'", dict(activation="gelu")),
        ("norm must be 'batch'", dict(norm="layer")),
        ("norm_weight must be", dict(norm_weight=torch.ones(4))),
        ("residual must have the output's shape", dict(residual=torch.ones(2, 6, 6, 6))),
        ("needs running_mean", dict(training=False)),
        ("expects 8 input channels", dict(groups=2)),
        ("stride must have 1 or 2 numbers", dict(stride=(1, 2, 3))),
        ("a budget is for", dict(memory="budget=60MB")),
        ("must divide the output's channels", dict(norm="group:groups=4")),
    ]:
        with pytest.raises(RuntimeError, match=message):
            remnant.conv_norm_act(x, w, **call)


@pytest.mark.parametrize("memory", ["exact", "eager"])
def test_opcheck(memory):
    x, w = leaf(2, 4, 6, 6, dtype=torch.float32), leaf(4, 4, 3, 3, dtype=torch.float32)
    p = parameters(4, torch.float32)
    arguments = (x, w, None, *p.values(), torch.zeros(4), torch.ones(4))
    opcheck(torch.ops.remnant.conv_norm_act.default, arguments, dict(memory=memory, padding=[1]))
