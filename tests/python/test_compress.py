"""remnant.compress: what it codes, what it leaves alone, and gradients whose mean is the gradient."""

import contextlib
import gc
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import remnant
from remnant._compress import _shared

BITS = [8, 4, 2]
LARGE = (32, 64)  # above the size that is left alone


def leaf(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, requires_grad=True)


def kept(function, *context, leave=()):
    """Bytes of the storages that function() saves, and its result; leaves and what is named are left out."""
    storages = {}

    def pack(x):
        if not (x.is_leaf and x.requires_grad):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x.detach()

    with saved_tensors_hooks(pack, lambda x: x), contextlib.ExitStack() as stack:
        for each in context:
            stack.enter_context(each)
        result = function()
    for x in leave:
        storages.pop(x.untyped_storage().data_ptr(), None)
    return sum(storages.values()), result


def gradients(function, inputs, grad, bits=None):
    with remnant.compress(bits) if bits else contextlib.nullcontext():
        y = function()
    return torch.autograd.grad(y, inputs, grad)


def check_unbiased(function, inputs, bits, draws=300, noisy=True):
    """The squared distance of the mean from the gradient is variance / draws, give or take chance."""
    y = function()
    grad = torch.randn_like(y)
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(y, inputs, grad)])
    errors = torch.stack(
        [torch.cat([g.flatten() for g in gradients(function, inputs, grad, bits)]) - exact for _ in range(draws)]
    )
    variance = errors.var(0).sum()
    if noisy:
        assert variance > 1e-12 * exact.square().sum()
        assert errors.mean(0).square().sum() < 1.5 * variance / draws
        return float(variance / exact.square().sum())
    assert float(variance) == 0 and float(errors.abs().max()) == 0
    return 0.0


def through(x, function):
    """function of something that is neither a leaf nor a view of one."""
    return function(x * 1.5)


# --- unbiased ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_an_mlp(bits):
    model = nn.Sequential(
        nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 64), nn.ReLU(), nn.LayerNorm(64), nn.Linear(64, 40)
    ).double()
    x = torch.randn(40, 64, dtype=torch.float64)
    spread = check_unbiased(lambda: model(x), list(model.parameters()), bits)
    assert spread < {8: 1e-3, 4: 0.05, 2: 1.0}[bits]


@pytest.mark.parametrize("bits", BITS)
def test_convolutions(bits):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, stride=2),
        nn.LeakyReLU(0.1), nn.ConvTranspose2d(8, 4, 3),
    ).double()  # fmt: skip
    x = torch.randn(2, 3, 18, 18, dtype=torch.float64)
    check_unbiased(lambda: model(x), list(model.parameters()), bits, draws=150)


@pytest.mark.parametrize(
    "name",
    ["linear", "matmul", "at", "mm", "bmm", "mv", "inner", "tensordot", "einsum", "three", "addmm", "addbmm", "baddbmm",
     "addmv", "bilinear", "conv1d", "conv3d", "transposed", "mul", "times", "multiply", "addcmul"],
)  # fmt: skip
def test_every_product_is_coded_and_unbiased(name):
    a, b = leaf(40, 32), leaf(40, 32)
    batch, weight = leaf(2, 32, 40), leaf(6, 32, 32)
    cases = {
        "linear": (a, b, lambda x, y: F.linear(x, y)),
        "matmul": (a, b, lambda x, y: x.matmul(y.t())),
        "at": (a, b, lambda x, y: x @ y.t()),
        "mm": (a, b, lambda x, y: torch.mm(x, y.t())),
        "bmm": (batch, leaf(2, 40, 32), torch.bmm),
        "mv": (a, leaf(32), lambda x, y: torch.mv(x, y)),
        "inner": (a, b, torch.inner),
        "tensordot": (a, b, lambda x, y: torch.tensordot(x, y, dims=([1], [1]))),
        "einsum": (a, b, lambda x, y: torch.einsum("ij,kj->ik", x, y)),
        "three": (a, b, lambda x, y: torch.einsum("ij,kj,kl->il", x, y, y * 0.5)),
        "addmm": (a, b, lambda x, y: torch.addmm(torch.ones(40, dtype=x.dtype), x, y.t(), alpha=2)),
        "addbmm": (batch, leaf(2, 40, 32), lambda x, y: torch.addbmm(torch.ones(32, 32, dtype=x.dtype), x, y)),
        "baddbmm": (batch, leaf(2, 40, 32), lambda x, y: torch.baddbmm(torch.ones(2, 32, 32, dtype=x.dtype), x, y)),
        "addmv": (a, leaf(32), lambda x, y: torch.addmv(torch.ones(40, dtype=x.dtype), x, y)),
        "bilinear": (a, b, lambda x, y: F.bilinear(x, y, weight)),
        "conv1d": (batch, leaf(8, 32, 3), lambda x, y: F.conv1d(x, y)),
        "conv3d": (leaf(1, 2, 8, 9, 10), leaf(3, 2, 3, 3, 3), lambda x, y: F.conv3d(x, y)),
        "transposed": (batch, leaf(32, 8, 3), lambda x, y: F.conv_transpose1d(x, y)),
        "mul": (a, b, torch.mul),
        "times": (a, b, lambda x, y: x * y),
        "multiply": (a, b, lambda x, y: x.multiply(y)),
        "addcmul": (a, b, lambda x, y: torch.addcmul(torch.zeros(32, dtype=x.dtype), x, y, value=0.5)),
    }
    x, y, function = cases[name]

    def run():
        return function(x.sin(), y.cos())  # their gradients' own factors are kept exactly

    check_unbiased(run, (x, y), 4, draws=150)
    assert kept(run, remnant.compress(4))[0] < kept(run)[0]


def test_one_tensor_in_a_chain_of_products_is_drawn_twice():
    """Its square would show in the gradient, with a variance as bias, if both readers had one code."""
    x, w = leaf(40, 32), leaf(32)

    def function():
        h = x.sin()
        return (w.cos() * h) * h

    spread = check_unbiased(function, (w,), 2, draws=600)
    assert spread > 1e-4


def test_readers_that_end_in_parameters_share_and_stay_unbiased():
    x, w1, w2, w3 = leaf(40, 64), leaf(64, 64), leaf(64, 64), leaf(64, 64)

    def function():
        h = x.sin()
        return F.linear(F.linear(h, w1) * F.linear(h, w2), w3) * h

    check_unbiased(function, (x, w1, w2, w3), 2, draws=400)


# --- exact ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.softmax(-1), lambda x: F.log_softmax(x, -1), lambda x: F.layer_norm(x, (64,)), F.gelu, F.silu,
        torch.exp, torch.tanh, torch.sigmoid, torch.sqrt, lambda x: x.pow(3), lambda x: x / x.cos(), torch.cumsum,
        lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]),
        lambda x: F.cross_entropy(x, torch.arange(32)), lambda x: x.std(0), lambda x: x.sort(-1)[0],
        F.relu, torch.relu, lambda x: F.leaky_relu(x, 0.3), lambda x: F.relu(x * 2, inplace=True),
        lambda x: F.leaky_relu(x * 2, 0.1, inplace=True), lambda x: (x * 2).relu_(),
        lambda x: x[:, 0] * x[:, 1], lambda x: x.sum() * 3, lambda x: x * torch.arange(64.0),
    ],
)  # fmt: skip
def test_other_ops_give_the_same_bits(function):
    x = torch.rand(32, 64).requires_grad_()
    if function is torch.cumsum:
        function = lambda x: torch.cumsum(x, 0)  # noqa: E731
    y = through(x, function)
    grad = torch.randn_like(y)
    want = torch.autograd.grad(y, x, grad)[0]
    for bits in BITS:
        (have,) = gradients(lambda: through(x, function), (x,), grad, bits)
        assert torch.equal(have, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1024, 1031])
def test_dropout_keeps_a_bit_and_its_gradient(size, dtype):
    x = torch.randn(3, size, dtype=dtype, requires_grad=True)
    grad = torch.randn_like(x)
    for function in (lambda: F.dropout(x, 0.3), lambda: F.dropout(x * 1, 0.3, inplace=True), lambda: F.dropout(x, 1.0)):
        results = []
        for bits in (None, 4):
            torch.manual_seed(5)
            with remnant.compress(bits) if bits else contextlib.nullcontext():
                y = function()
            results.append((y, torch.autograd.grad(y, x, grad)[0]))
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    size_in_bytes, _ = kept(lambda: F.dropout(x, 0.3), remnant.compress(2))
    assert size_in_bytes == -(-3 * size // 8)


def test_relu_keeps_nan():
    x = torch.randn(*LARGE)
    x[3, 4] = float("nan")
    x.requires_grad_()
    for function in (F.relu, lambda t: F.leaky_relu(t, 0.1)):
        with remnant.compress(4):
            y = through(x, function)
        want = torch.autograd.grad(through(x, function).sum(), x)[0]
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], want)


# --- bytes ------------------------------------------------------------------------------------------


def linears(*sizes):
    return nn.Sequential(*(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_kept_bytes(bits, dtype):
    model = nn.Sequential(*(nn.Sequential(nn.Linear(128, 128), nn.ReLU(), nn.Dropout(0.1)) for _ in range(4))).to(dtype)
    x = torch.randn(64, 128, dtype=dtype)
    size, y = kept(lambda: model(x), remnant.compress(bits), leave=[x, *model.parameters()])
    elements = 64 * 128
    # A ReLU's bits and a dropout's, four times; codes of what the last three layers read.
    assert size == 4 * 2 * elements // 8 + 3 * remnant.linear_code_bytes(elements, bits)
    y.sum().backward()


def test_each_tensor_is_coded_once_and_freed():
    x, weights = leaf(*LARGE, dtype=torch.float32), [leaf(64, 64, dtype=torch.float32) for _ in range(3)]
    code = remnant.linear_code_bytes(32 * 64, 4)
    h = x.sin()
    size, ys = kept(
        lambda: [F.linear(v, w) for v, w in zip((h, h.view(4, 8, 64), h), weights, strict=True)],
        remnant.compress(4),
        leave=weights,
    )
    assert size == code and len(_shared) == 1
    with remnant.compress(4):
        products = [torch.einsum("bi,oi->bo", h, w) for w in weights]
        assert len(_shared) == 1
    del products
    # Without other hooks around, a later context joins the living code; other places and bits have their own.
    with remnant.compress(4):
        first = F.linear(h, weights[0])
        again = F.linear(h, weights[1])
        assert len(_shared) == 1
        part = F.linear(h[1:], weights[0])
        assert len(_shared) == 2
    with remnant.compress(8):
        more = F.linear(h, weights[0])
    assert len(_shared) == 3
    grad = torch.randn_like(first)
    del ys
    a, b = (torch.autograd.grad(y, w, grad)[0] for y, w in ((first, weights[0]), (again, weights[1])))
    assert torch.equal(a, b)  # from the same codes
    torch.autograd.grad(part.sum() + more.sum(), weights[0])
    gc.collect()
    assert len(_shared) == 0


def test_no_cycle_holds_a_graph():
    x, small = leaf(*LARGE, dtype=torch.float32), leaf(8, 8, dtype=torch.float32)
    gc.collect()
    gc.disable()
    try:
        with remnant.compress(4):
            y = F.linear(x.sin(), torch.randn(64, 64, requires_grad=True))
            outputs = [F.relu(x), F.relu(small), F.dropout(small)]
        storages = [StorageWeakRef(t.untyped_storage()) for t in (y, *outputs)]
        del y, outputs
        assert all(storage.expired() for storage in storages) and len(_shared) == 0
    finally:
        gc.enable()


def test_what_is_left_alone():
    parameter = nn.Parameter(torch.randn(64, 64))
    buffer, mask = torch.randn(32, 64), torch.rand(32, 64) < 0.5
    x = leaf(*LARGE, dtype=torch.float32)
    h = x.sin().detach().requires_grad_() * 1

    def saved(function):
        found = []
        with saved_tensors_hooks(lambda t: found.append(t) or t.detach(), lambda t: t), remnant.compress(4):
            function()
        return found

    half = torch.randn(64, 64).requires_grad_()
    for function, left in (
        (lambda: F.linear(h, parameter), parameter),
        (lambda: h @ parameter.t(), parameter),
        (lambda: F.linear(h.bfloat16(), half.bfloat16()), None),
        (lambda: F.linear(h, parameter[:32]), parameter),
        (lambda: h * buffer, buffer),
        (lambda: F.linear(x, parameter), x),
        (lambda: h * h.sum(), None),
    ):
        found = saved(function)
        storages = {t.untyped_storage().data_ptr() for t in found}
        assert left is None or left.untyped_storage().data_ptr() in storages
    assert [t.dtype for t in saved(lambda: h.masked_fill(mask, 0.0))] == [torch.bool]
    # A cast of a parameter is the parameter's; what is small, or smaller than its code, stays.
    assert not any(t.dtype == torch.uint8 for t in saved(lambda: half.bfloat16() * parameter.bfloat16()))
    assert not any(t.dtype == torch.uint8 for t in saved(lambda: (h[:4] * 1) * (h[4:8] * 1)))
    wide = leaf(64, dtype=torch.float32).sin().expand(32, 64)
    assert sum(t.dtype == torch.uint8 for t in saved(lambda: wide * h)) == 1
    # A softmax keeps its output anyway: a code would come on top.
    weights = leaf(32, 32, dtype=torch.float32).sin().softmax(-1)
    found = saved(lambda: weights @ h)
    assert weights.untyped_storage().data_ptr() in {t.untyped_storage().data_ptr() for t in found}


def test_multihead_attention_is_seen_inside():
    attention = nn.MultiheadAttention(64, 4, dropout=0.1, batch_first=True)
    x = leaf(4, 40, 64, dtype=torch.float32)

    def run():
        h = x.sin()
        return attention(h, h, h, need_weights=True)[0]

    eager, _ = kept(run)
    coded, y = kept(run, remnant.compress(4))
    softmax = 4 * 4 * 40 * 40 * 4
    assert coded < softmax + (eager - softmax) * 0.4
    y.sum().backward()
    torch.manual_seed(0)
    want = run()
    torch.manual_seed(0)
    with remnant.compress(4, generator=torch.Generator().manual_seed(1)):
        assert torch.equal(run(), want)


# --- behaviour --------------------------------------------------------------------------------------


def test_the_forward_is_exact_and_the_generator_decides():
    model, x = linears(64, 64, 64), torch.randn(*LARGE)
    results = []
    for seed in (1, 1, 2):
        with remnant.compress(2, generator=torch.Generator().manual_seed(seed)):
            y = model(x)
        assert torch.equal(y, model(x))
        results.append(torch.autograd.grad(y.sum(), model[1].weight)[0])
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_changes_in_place():
    w = leaf(64, 64, dtype=torch.float32)
    h = leaf(*LARGE, dtype=torch.float32).sin()
    with remnant.compress(8):
        y = F.linear(h, w)
    before = h.detach().clone()
    with torch.no_grad():
        h.mul_(-3)
    (grad,) = torch.autograd.grad(y, w, torch.ones_like(y))  # a code is a copy
    want = torch.ones(64, 32) @ before
    assert (grad - want).norm() < 0.05 * want.norm()
    with remnant.compress(8):
        y = F.linear(h, w)
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation.*version"):
        y.sum().backward()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("bits", BITS)
def test_nan_and_inf_reach_the_gradient(bits, bad):
    w = leaf(64, 64, dtype=torch.float32)
    h = leaf(*LARGE, dtype=torch.float32) * 1
    with torch.no_grad():
        h[3, 5] = bad
    with remnant.compress(bits):
        y = F.linear(h, w)
    assert torch.autograd.grad(y.nan_to_num(0, 0, 0).sum(), w)[0].isnan().any()


def test_double_backward():
    x, w = leaf(*LARGE), leaf(64, 64)
    with remnant.compress(8, generator=torch.Generator().manual_seed(1)):
        y = F.linear(F.relu(x.sin()), w)
    grad = torch.randn_like(y).requires_grad_()
    first = torch.autograd.grad(y, (x, w), grad, create_graph=True)
    have = torch.autograd.grad(first[0].sum() + first[1].sum(), (x, w, grad))
    y = F.linear(F.relu(x.sin()), w)
    first = torch.autograd.grad(y, (x, w), grad, create_graph=True)
    want = torch.autograd.grad(first[0].sum() + first[1].sum(), (x, w, grad))
    for a, b in zip(have, want, strict=True):
        assert (a - b).norm() < 0.02 * b.norm()


def test_twice_through_one_graph():
    x, w = leaf(*LARGE), leaf(64, 64)
    with remnant.compress(4):
        y = F.linear(x.sin(), w)
    first = torch.autograd.grad(y.sum(), w, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(y.sum(), w)[0])


def test_the_innermost_context_decides():
    w, h = leaf(64, 64, dtype=torch.float32), leaf(*LARGE, dtype=torch.float32).sin()
    n = 32 * 64
    size, _ = kept(lambda: F.linear(h, w), remnant.compress(2), remnant.compress(8), leave=[w])
    assert size == remnant.linear_code_bytes(n, 8)
    context = remnant.compress(4)
    size, _ = kept(lambda: F.linear(h, w), context, context, leave=[w])
    assert size == remnant.linear_code_bytes(n, 4)
    size, _ = kept(lambda: F.linear(h, w), leave=[w])
    assert size == n * 4  # and nothing stays behind


def test_an_error_inside_leaves_nothing_behind():
    h = leaf(*LARGE, dtype=torch.float32).sin()
    for attempt in (lambda: F.linear(h, torch.randn(3, 3)), lambda: 1 / 0):
        with pytest.raises((RuntimeError, ZeroDivisionError)), remnant.compress(4):
            attempt()
        assert torch._C._len_torch_function_stack() == 0
        assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backward_inside", [False, True])
def test_under_checkpoint(reentrant, backward_inside):
    model, x = linears(64, 64, 64, 64), leaf(*LARGE, dtype=torch.float32)
    model(x).sum().backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with remnant.compress(8) as context:
        y = checkpoint(lambda h: model[1](model[0](h)), x, use_reentrant=reentrant)
        loss = model[2](y).sum()
        if backward_inside:
            loss.backward()
    assert repr(context) == "remnant.compress(bits=8)"
    if not backward_inside:
        loss.backward()
    for p, g in zip(model.parameters(), want, strict=True):
        assert (p.grad - g).norm() < 0.02 * g.norm()


def test_under_autocast():
    model, x = linears(64, 64, 64), torch.randn(*LARGE)
    with remnant.compress(8), torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    have = torch.autograd.grad(y.float().sum(), model[1].weight)[0]
    want = torch.autograd.grad(model(x).sum(), model[1].weight)[0]
    assert have.dtype == torch.float32 and (have - want).norm() < 0.05 * want.norm()
    autocast = torch.autocast("cpu", torch.bfloat16)
    size, _ = kept(lambda: model(x), remnant.compress(8), autocast, leave=[x, *model.parameters()])
    casts = model[1].weight.numel() * 2  # the first layer's is not kept: its input wants no gradient
    assert size == remnant.linear_code_bytes(32 * 64, 8) + casts + x.numel() * 2


def test_under_no_grad_and_in_inference_mode():
    model, x = linears(64, 64, 64), torch.randn(*LARGE)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), remnant.compress(4):
            assert model(x).grad_fn is None
    assert len(_shared) == 0


def test_hooks_around_get_the_codes():
    w, h = leaf(64, 64, dtype=torch.float32), leaf(*LARGE, dtype=torch.float32).sin()
    with save_on_cpu(), remnant.compress(8):
        y = F.linear(h, w)
    want = torch.autograd.grad(F.linear(h, w).sum(), w)[0]
    assert (torch.autograd.grad(y.sum(), w)[0] - want).norm() < 0.02 * want.norm()
    moved = []
    elsewhere = saved_tensors_hooks(lambda t: moved.append(t.dtype) or t.double(), lambda t: t.to(torch.uint8))
    with elsewhere, remnant.compress(2):
        y = F.relu(h)
    assert moved == [torch.uint8]
    assert torch.equal(torch.autograd.grad(y.sum(), h)[0], (h > 0).float())


def test_compiled_code_runs_eagerly_inside():
    model, x = linears(64, 64, 64), torch.randn(*LARGE)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    size, y = kept(lambda: compiled(x), remnant.compress(4), leave=[x, *model.parameters()])
    assert size == remnant.linear_code_bytes(32 * 64, 4)
    y.sum().backward()
    contexts = [remnant.compress(4), remnant.compress(8)]
    traced = []

    def backend(graph, inputs):
        traced.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    with contexts[0], contexts[1]:
        compiled(x)
    assert not traced
    compiled(x)
    assert traced  # and compiled again afterwards

    def function(x):
        with remnant.compress(4):
            return model(x)

    with pytest.raises(RuntimeError, match="compress: torch.compile cannot trace this context"):
        torch.compile(function, backend="aot_eager")(x)


def test_functional_transforms_are_refused():
    x = torch.randn(*LARGE)
    with remnant.compress(4), pytest.raises(RuntimeError, match="saved tensor hooks"):
        torch.func.grad(lambda x: (x * x).sum())(x)


def test_threads_keep_to_themselves():
    model, x, sizes = linears(64, 64, 64), torch.randn(*LARGE), []

    def work(bits):
        for _ in range(20):
            with remnant.compress(bits):
                y = model(x)
            y.sum().backward()
        sizes.append(kept(lambda: model(x), remnant.compress(bits), leave=[x, *model.parameters()])[0])

    threads = [threading.Thread(target=work, args=(bits,)) for bits in BITS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(sizes) == sorted(remnant.linear_code_bytes(32 * 64, bits) for bits in BITS)


@pytest.mark.parametrize("bits", [0, 1, 3, 16, -4, 4.5, True, "4", None])
def test_bits(bits):
    with pytest.raises(ValueError, match="compress: bits must be 8, 4 or 2, got"):
        remnant.compress(bits)
