"""remnant.attention against the float64 reference, and against torch where equality is promised."""

import math
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import remnant

STORED_EXACTLY = ["exact", "recompute"]  # their gradients are exact
POLICIES = ["exact", "recompute", "curve:m=3", "curve:m=3,paper_text", "quantized:bits=4", "sampled:m=4"]
ALL = [*POLICIES, "top:m=4"]  # top takes few masks: test_top.py
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
HERE = Path(__file__).resolve().parent


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def leaf(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


def inputs(batch=2, heads=4, kv_heads=2, queries=7, keys=9, dim=5, value_dim=6, dtype=torch.float64):
    return (
        leaf(batch, heads, queries, dim, dtype=dtype),
        leaf(batch, kv_heads, keys, dim, dtype=dtype),
        leaf(batch, kv_heads, keys, value_dim, dtype=dtype),
    )


def relative(got, want):
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-300)).item()


def estimate(policy, z):
    """The softmax that a deterministic policy's backward works with."""
    if not policy.startswith(("curve", "top")):
        return reference.softmax(z)
    m = int(re.search(r"m=(\d+)", policy).group(1))
    return reference.top(z, m) if policy.startswith("top") else reference.curve(z, m, "paper_text" in policy)


def drawn_softmax(policy, p, q, k, v, generator, mask=None, causal=False, window=None, scale=None, dropout=0.0):
    """What the backward of sampled works with, given the generator's state before the call."""
    c = scale if scale is not None else 1 / math.sqrt(max(q.size(-1), 1))
    with torch.no_grad():
        _, _, _, codes, table, _ = torch.ops.remnant.attention_forward(
            q, k, v, mask, causal, dropout, c, policy, window or [], True, generator
        )
    return reference.reweighted(p, codes, table)


def check_against_reference(policy, q, k, v, mask=None, causal=False, window=None, scale=None, tolerance=1e-9):
    """Output and every gradient in float64; for quantized only what its rounding leaves certain."""
    options = dict(mask=mask, causal=causal, window=window, scale=scale)
    generator = torch.Generator().manual_seed(5)
    o = remnant.attention(q, k, v, policy=policy, generator=generator, **options)
    grad = torch.randn_like(o)
    wanted = [x for x in (q, k, v, mask) if x is not None and x.requires_grad]
    got = dict(zip(map(id, wanted), torch.autograd.grad(o, wanted, grad), strict=True))
    z = reference.logits(q, k, mask, causal, window, scale)
    p = reference.softmax(z)
    torch.testing.assert_close(o, reference.output(p, v), rtol=tolerance, atol=tolerance)
    quantized = policy.startswith("quantized")
    if policy.startswith("sampled"):
        drawn = drawn_softmax(policy, p, q, k, v, generator.manual_seed(5), **options)
        want = reference.gradients(q, k, v, grad, drawn, scale, delta_of=p)
    else:
        want = reference.gradients(q, k, v, grad, estimate(policy, z), scale)
    bounds = reference.gradient_magnitudes(q, k, v, grad, torch.ones_like(p) * p.amax(-1, keepdim=True), scale)
    for x, name in ((q, "query"), (k, "key"), (v, "value")):
        if id(x) not in got:
            continue
        assert got[id(x)].shape == x.shape and got[id(x)].dtype == x.dtype
        if quantized:
            error = (got[id(x)] - getattr(want, name)).abs()
            assert (error <= getattr(bounds, name) + 1e-12).all(), name
            assert got[id(x)].isfinite().all()
        else:
            torch.testing.assert_close(
                got[id(x)], getattr(want, name), rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
            )
    if mask is not None and mask.requires_grad:
        assert got[id(mask)].shape == mask.shape
        if not quantized:
            torch.testing.assert_close(got[id(mask)], want.mask(mask.shape), rtol=tolerance, atol=tolerance)
    return o, got


# --- the reference itself --------------------------------------------------------------------------


def test_reference_gradients_are_those_of_autograd():
    q, k, v = inputs()
    mask = leaf(1, 4, 7, 9)
    o = reference.eager_attention(q, k, v, mask)
    grad = torch.randn_like(o)
    want = torch.autograd.grad(o, [q, k, v, mask], grad)
    p = reference.softmax(reference.logits(q, k, mask))
    got = reference.gradients(q, k, v, grad, p)
    for x, y in zip((got.query, got.key, got.value, got.mask(mask.shape)), want, strict=True):
        torch.testing.assert_close(x, y)
    torch.testing.assert_close(reference.output(p, v), o)


# --- forward and gradients -------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ALL)
@pytest.mark.parametrize("causal", [False, True])
def test_matches_reference(policy, causal):
    check_against_reference(policy, *inputs(queries=23, keys=23), causal=causal)


MASK_SHAPES = [
    shape for rank in range(5) for shape in product(*[(1, n) for n in (2, 4, 7, 9)[4 - rank :]])
]


@pytest.mark.parametrize("policy", POLICIES)
def test_additive_mask_of_every_broadcastable_shape(policy):
    for shape in MASK_SHAPES:
        check_against_reference(policy, *inputs(), mask=leaf(*shape))


@pytest.mark.parametrize("policy", POLICIES)
def test_boolean_mask_of_every_broadcastable_shape(policy):
    for shape in MASK_SHAPES:
        mask = torch.rand(shape) < 0.7
        check_against_reference(policy, *inputs(), mask=mask)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("window", [(0, 0), (3, -1), (-1, 2), (2, 4), (-1, -1), (100, 0)])
@pytest.mark.parametrize("causal", [False, True])
def test_window(policy, window, causal):
    check_against_reference(policy, *inputs(queries=19, keys=13), window=window, causal=causal)


@pytest.mark.parametrize("policy", ALL)
@pytest.mark.parametrize("queries, keys", [(1, 1), (1, 97), (97, 1), (97, 97), (40, 257), (257, 31)])
def test_lengths(policy, queries, keys):
    q, k, v = inputs(1, 2, 1, queries, keys)
    check_against_reference(policy, q, k, v, causal=queries == keys)


@pytest.mark.parametrize("policy", ["recompute", "curve:m=10", "quantized:bits=8", "exact", "sampled:m=50", "top:m=50"])
def test_a_thousand_keys(policy):
    check_against_reference(policy, *inputs(1, 1, 1, 24, 1000, 8, 8))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (6, 6), (6, 3), (6, 2), (6, 1)])
def test_grouped_heads(policy, heads, kv_heads):
    q, k, v = inputs(heads=heads, kv_heads=kv_heads)
    check_against_reference(policy, q, k, v)
    check_against_reference(policy, q, k, v, mask=leaf(heads, 7, 9), causal=True)


@pytest.mark.parametrize("policy", ALL)
def test_scale(policy):
    for scale in (1.0, 0.03, -0.7, 0.0):
        check_against_reference(policy, *inputs(), scale=scale)


@pytest.mark.parametrize("policy", POLICIES)
def test_rows_without_a_key_give_zero_and_zero_gradient(policy):
    q, k, v = inputs(queries=150, keys=9)
    boolean = torch.rand(2, 1, 150, 9) < 0.6
    boolean[:, :, 3:140] = False
    additive = torch.zeros(150, 9, dtype=torch.float64)
    additive[5:149] = -math.inf
    for mask, dead in ((boolean, slice(3, 140)), (additive.requires_grad_(), slice(5, 149))):
        o, grads = check_against_reference(policy, q, k, v, mask=mask)
        assert (o[:, :, dead] == 0).all()
        assert (grads[id(q)][:, :, dead] == 0).all()
        assert all(x.isfinite().all() for x in grads.values())
    all_dead = torch.zeros(9, dtype=torch.bool)
    o = remnant.attention(q, k, v, mask=all_dead, policy=policy)
    for x in (o, *torch.autograd.grad(o.sum(), [q, k, v])):
        assert (x == 0).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_window_past_the_last_key_leaves_rows_empty(policy):
    q, k, v = inputs(queries=12, keys=3)
    o, grads = check_against_reference(policy, q, k, v, window=(1, 0))
    assert (o[:, :, 4:] == 0).all() and (grads[id(q)][:, :, 4:] == 0).all()


@pytest.mark.parametrize("policy", ALL)
@pytest.mark.parametrize("zero", ["batch", "heads", "queries", "keys", "dim", "value_dim"])
def test_sizes_of_zero(policy, zero):
    sizes = dict(batch=2, heads=2, queries=4, keys=9, dim=3, value_dim=5)
    sizes[zero] = 0
    q, k, v = inputs(kv_heads=sizes["heads"], **sizes)
    for dropout in (0.0, 0.5):
        o = remnant.attention(q, k, v, policy=policy, dropout=dropout, causal=True)
        assert o.shape == (sizes["batch"], sizes["heads"], sizes["queries"], sizes["value_dim"])
        grads = torch.autograd.grad(o.sum(), [q, k, v])
        for x, grad in zip((q, k, v), grads, strict=True):
            assert grad.shape == x.shape and grad.isfinite().all()
        if zero == "keys":
            assert (o == 0).all() and (grads[0] == 0).all()
    if zero in ("dim", "value_dim"):
        check_against_reference(policy, q, k, v)


def strided(x, kind):
    """The same values under other strides; expanded axes take the values of their first slice."""
    b, h, n, d = x.shape
    if kind == "heads beside each other":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "columns apart":
        whole = torch.full((b, h, n, 3 * d), math.nan, dtype=x.dtype)
        whole[..., 1::3] = x
        return whole[..., 1::3]
    if kind == "columns first":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if kind == "padded rows":
        whole = torch.full((b, h, n + 1, d + 3), math.nan, dtype=x.dtype)
        whole[:, :, 1:, 2 : 2 + d] = x
        return whole[:, :, 1:, 2 : 2 + d]
    if kind == "every other row":
        whole = torch.full((b, h, 2 * n, d), math.nan, dtype=x.dtype)
        whole[:, :, ::2] = x
        return whole[:, :, ::2]
    if kind == "batch expanded":
        return x[:1].contiguous().expand(b, h, n, d)
    if kind == "heads expanded":
        return x[:, :1].contiguous().expand(b, h, n, d)
    if kind == "rows expanded":
        return x[:, :, :1].contiguous().expand(b, h, n, d)
    if kind == "columns expanded":
        return x[..., :1].contiguous().expand(b, h, n, d)
    assert kind == "contiguous"
    return x.contiguous()


LAYOUTS = [
    "contiguous",
    "heads beside each other",
    "columns apart",
    "columns first",
    "padded rows",
    "every other row",
    "batch expanded",
    "heads expanded",
    "rows expanded",
    "columns expanded",
]


@pytest.mark.parametrize("policy", ALL)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(policy, layout):
    q, k, v = (strided(x.detach(), layout) for x in inputs())
    for x in (q, k, v):
        x.requires_grad_()
    torch.manual_seed(3)
    o = remnant.attention(q, k, v, policy=policy)
    grad = strided(torch.randn(o.shape, dtype=o.dtype), layout)
    got = torch.autograd.grad(o, [q, k, v], grad)
    dense = [x.detach().contiguous().requires_grad_() for x in (q, k, v)]
    torch.manual_seed(3)
    o_dense = remnant.attention(*dense, policy=policy)
    want = torch.autograd.grad(o_dense, dense, grad.contiguous())
    for x, y in zip((o, *got), (o_dense, *want), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("policy", POLICIES)
def test_mask_strides(policy):
    q, k, v = inputs()
    boolean = torch.rand(2, 4, 9, 7) < 0.7
    additive = torch.randn(18, 7, dtype=torch.float64)[::2].T  # [7, 9], neither axis dense
    check_against_reference(policy, q, k, v, mask=boolean.transpose(2, 3))
    check_against_reference(policy, q, k, v, mask=boolean[:1, :, :1, :1].expand(2, 4, 7, 9))
    check_against_reference(policy, q, k, v, mask=additive)
    check_against_reference(policy, q, k, v, mask=additive.requires_grad_())


@pytest.mark.parametrize("needs", [x for x in product([False, True], repeat=4) if any(x)])
@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_of_a_subset_of_inputs(policy, needs):
    q, k, v = inputs()
    mask = leaf(4, 7, 9)
    for x, need in zip((q, k, v, mask), needs, strict=True):
        x.requires_grad_(need)
    check_against_reference(policy, q, k, v, mask=mask)


# --- precision -------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", STORED_EXACTLY)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [8, 32, 64])
def test_error_at_most_twice_that_of_torch(policy, dtype, dim):
    check_precision(policy, *inputs(2, 4, 2, 61, 83, dim, dim, dtype=dtype), mask=None, causal=False)
    mask = leaf(4, 61, 83, dtype=dtype)
    check_precision(policy, *inputs(2, 4, 2, 61, 83, dim, dim, dtype=dtype), mask=mask, causal=True)


def check_precision(policy, q, k, v, mask, causal, floor=1.0):
    dtype = q.dtype
    wanted = [q, k, v] + ([mask] if mask is not None and mask.requires_grad else [])
    z = reference.logits(q, k, mask, causal)
    p = reference.softmax(z)
    grad = torch.randn(z.shape[:3] + v.shape[3:], dtype=torch.float64).to(dtype)
    exact = reference.gradients(q, k, v, grad, p)
    sizes = reference.gradient_magnitudes(q, k, v, grad, p)
    want = [reference.output(p, v), exact.query, exact.key, exact.value]
    size = [reference.output(p, v.abs()), sizes.query, sizes.key, sizes.value]
    if mask is not None and mask.requires_grad:
        want.append(exact.mask(mask.shape))
        size.append(sizes.mask(mask.shape))

    def measured(o):
        results = [o, *torch.autograd.grad(o, wanted, grad)]
        return [(x.double() - y).norm().item() for x, y in zip(results, want, strict=True)]

    ours = measured(remnant.attention(q, k, v, mask=mask, causal=causal, policy=policy))
    torchs = measured(reference.eager_attention(q, k, v, mask, causal))
    names = ["output", "query", "key", "value", "mask"]
    for name, our, their, s in zip(names, ours, torchs, size, strict=False):
        least = floor * torch.finfo(dtype).eps * s.norm().item()
        assert our <= 2 * their + least, f"{name}: error {our:.3g}, torch's {their:.3g}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_gradient_is_the_same_whichever_others_are_wanted(policy, dtype):
    q, k, v = inputs(2, 4, 2, 21, 70, dtype=dtype)
    grad = torch.randn(2, 4, 21, v.size(3), dtype=torch.float64).to(dtype)

    def gradients(*wanted):
        tensors = [x.detach().requires_grad_(name in wanted) for name, x in zip("qkv", (q, k, v), strict=True)]
        o = remnant.attention(*tensors, policy=policy, generator=torch.Generator().manual_seed(2))
        return dict(zip(wanted, torch.autograd.grad(o, [x for x in tensors if x.requires_grad], grad), strict=True))

    every = gradients("q", "k", "v")
    for wanted in ("q", "k", "v", "qk", "qv", "kv"):
        for name, x in gradients(*wanted).items():
            assert relative(x, every[name].double()) < 1e-6, f"{name} of {wanted}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("policy", ["curve:m=2", "curve:m=4,paper_text", "curve:m=20"])
@pytest.mark.parametrize("keys", [40, 300])
def test_curve_in_low_precision(policy, dtype, keys):
    # Logits well apart, so that their order does not hang on rounding.
    q, k, v = inputs(1, 2, 2, 16, keys, 8, 8, dtype=dtype)
    with torch.no_grad():
        q.mul_(1e-3)
        mask = torch.stack([torch.randperm(keys) for _ in range(16)]) * (8.0 / keys)
    o = remnant.attention(q, k, v, mask=mask, policy=policy)
    grad = torch.randn_like(o)
    got = torch.autograd.grad(o, [q, k, v], grad)
    z = reference.logits(q, k, mask)
    want = reference.gradients(q, k, v, grad, estimate(policy, z))
    allowance = 4 * torch.finfo(dtype).eps if dtype != torch.float32 else 2e-5
    assert relative(o, reference.output(reference.softmax(z), v)) < allowance
    for name, x, y in zip(("query", "key", "value"), got, want[:3], strict=True):
        assert x.dtype == dtype
        assert relative(x, y) < allowance, name


@pytest.mark.parametrize("policy", ALL)
def test_large_logits_neither_overflow_nor_vanish(policy):
    q, k, v = inputs(queries=11, keys=40)
    check_against_reference(policy, (q.detach() * 60).requires_grad_(), k, v, tolerance=1e-7)
    q, k, v = inputs(queries=11, keys=40, dtype=torch.float32)
    o = remnant.attention(q * 1000, k, v, policy=policy)
    assert o.isfinite().all()
    assert all(x.isfinite().all() for x in torch.autograd.grad(o.sum(), [q, k, v]))


# --- properties ------------------------------------------------------------------------------------

sizes = st.integers(1, 12)


@st.composite
def calls(draw):
    batch, groups, kv_heads = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    shape = dict(
        batch=batch,
        heads=groups * kv_heads,
        kv_heads=kv_heads,
        queries=draw(sizes),
        keys=draw(sizes),
        dim=draw(st.integers(1, 9)),
        value_dim=draw(st.integers(1, 9)),
    )
    broadcast = draw(st.lists(st.booleans(), min_size=4, max_size=4))
    full = (batch, groups * kv_heads, shape["queries"], shape["keys"])
    mask_shape = tuple(1 if narrow else n for narrow, n in zip(broadcast, full, strict=True))[draw(st.integers(0, 3)) :]
    return dict(
        shape=shape,
        mask=draw(st.sampled_from(["none", "boolean", "additive", "additive with gradient"])),
        mask_shape=mask_shape,
        density=draw(st.sampled_from([0.2, 0.7, 1.0])),
        causal=draw(st.booleans()),
        window=draw(st.none() | st.tuples(st.integers(-1, 5), st.integers(-1, 5))),
        layouts=draw(st.lists(st.sampled_from(LAYOUTS[:6]), min_size=3, max_size=3)),
        seed=draw(st.integers(0, 2**31)),
    )


def build(call, dtype):
    torch.manual_seed(call["seed"])
    tensors = inputs(**call["shape"], dtype=dtype)
    q, k, v = (strided(x.detach(), y).requires_grad_() for x, y in zip(tensors, call["layouts"], strict=True))
    keep = torch.rand(call["mask_shape"]) < call["density"]
    if call["mask"] == "none":
        mask = None
    elif call["mask"] == "boolean":
        mask = keep
    else:
        mask = torch.randn(call["mask_shape"], dtype=torch.float64).masked_fill(~keep, -math.inf).to(dtype)
        mask.requires_grad_("gradient" in call["mask"])
    return q, k, v, mask


@settings(max_examples=120)
@given(calls(), st.sampled_from(POLICIES + ["curve:m=1", "quantized:bits=2", "quantized:bits=8"]))
def test_any_call_matches_reference(call, policy):
    q, k, v, mask = build(call, torch.float64)
    check_against_reference(policy, q, k, v, mask=mask, causal=call["causal"], window=call["window"])


@settings(max_examples=80)
@given(calls(), st.sampled_from(STORED_EXACTLY), st.sampled_from(DTYPES))
def test_any_dtype_is_as_precise_as_torch(call, policy, dtype):
    # torch gives NaN for rows without a key: only masks that leave every row one.
    call = {**call, "density": 1.0}
    q, k, v, mask = build(call, dtype)
    check_precision(policy, q, k, v, mask, call["causal"], floor=2.0)


@settings(max_examples=60)
@given(calls(), st.sampled_from(POLICIES), st.sampled_from([0.1, 0.5]))
def test_any_call_with_dropout_agrees_with_the_extracted_mask(call, policy, dropout):
    q, k, v, mask = build(call, torch.float64)
    options = dict(mask=mask, causal=call["causal"], window=call["window"])
    b, h, n = q.shape[:3]
    drop = dropout_factors(b, h, n, k.size(2), dropout, seed=call["seed"])
    generator = torch.Generator().manual_seed(call["seed"])
    o = remnant.attention(q, k, v, policy=policy, dropout=dropout, generator=generator, **options)
    z = reference.logits(q, k, **options)
    p = reference.softmax(z)
    torch.testing.assert_close(o, reference.output(p, v, drop), rtol=1e-6, atol=1e-6)
    if policy.startswith("quantized"):
        return
    grad = torch.randn_like(o)
    if policy.startswith("sampled"):
        generator.manual_seed(call["seed"])
        drawn = drawn_softmax(policy, p, q, k, v, generator, dropout=dropout, **options)
        want = reference.gradients(q, k, v, grad, drawn, drop=drop, delta_of=p)
    else:
        want = reference.gradients(q, k, v, grad, estimate(policy, z), drop=drop)
    for x, y in zip(torch.autograd.grad(o, [q, k, v], grad), want[:3], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


# --- exact is torch --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", ["none", "boolean", "additive"])
@pytest.mark.parametrize("dim", [8, 16])
def test_exact_equals_torch_bit_for_bit(dtype, causal, kind, dim):
    q, k, v = inputs(2, 3, 3, 33, 47, dim, dim, dtype=dtype)
    mask = None
    if kind == "boolean":
        mask = torch.rand(2, 1, 33, 47) < 0.8
        mask[..., 0] = True
    elif kind == "additive":
        mask = leaf(1, 33, 47, dtype=dtype)
    wanted = [x for x in (q, k, v, mask) if x is not None and x.requires_grad]
    ours = remnant.attention(q, k, v, mask=mask, causal=causal, policy="exact")
    torchs = reference.eager_attention(q, k, v, mask, causal)
    grad = torch.randn_like(torchs)
    assert torch.equal(ours, torchs)
    for x, y in zip(torch.autograd.grad(ours, wanted, grad), torch.autograd.grad(torchs, wanted, grad), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_forward_does_not_depend_on_the_policy_or_on_a_gradient(dtype):
    q, k, v = inputs(queries=70, keys=90, dtype=dtype)
    tolerance = 32 * torch.finfo(dtype).eps
    want = remnant.attention(q, k, v, causal=True)
    with torch.no_grad():
        assert torch.equal(remnant.attention(q, k, v, causal=True), want)
    for policy in POLICIES:
        got = remnant.attention(q, k, v, causal=True, policy=policy)
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def test_same_result_in_every_run_and_for_either_thread_count():
    q, k, v = inputs(2, 4, 1, 70, 90, dtype=torch.float32)
    grad = torch.randn(2, 4, 70, 6)
    for policy in POLICIES:
        results = []
        for threads in (1, 1, 2, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(1)
            o = remnant.attention(q, k, v, policy=policy, dropout=0.1)
            results.append([o, *torch.autograd.grad(o, [q, k, v], grad)])
        for same in ((0, 1), (2, 3)):
            assert all(torch.equal(x, y) for x, y in zip(results[same[0]], results[same[1]], strict=True)), policy
        for x, y in zip(results[0], results[2], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


# --- dropout ---------------------------------------------------------------------------------------


def dropout_factors(batch, heads, queries, keys, dropout, seed, policy="recompute", **options):
    """The op's own factors, 0 or 1 / (1 - r), seen through equal weights and an identity as value."""
    torch.manual_seed(seed)
    q = torch.zeros(batch, heads, queries, 1, dtype=torch.float64, requires_grad=True)
    k = torch.zeros(batch, heads, keys, 1, dtype=torch.float64)
    v = torch.eye(keys, dtype=torch.float64).expand(batch, heads, keys, keys)
    with torch.set_grad_enabled(True):
        weighted = remnant.attention(q, k, v, policy=policy, dropout=dropout, **options).detach()
    p = reference.softmax(reference.logits(q, k, **options))
    return torch.where(p > 0, weighted / p.clamp_min(1e-300), torch.zeros_like(p))


@pytest.mark.parametrize("policy", ALL)
def test_dropout_mask_is_the_same_whatever_the_policy_threads_or_mask(policy):
    shape = (2, 3, 37, 53)
    want = dropout_factors(*shape, 0.3, seed=5)
    kept = set(want.unique().tolist())
    assert len(kept) == 2 and 0.0 in kept
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.testing.assert_close(dropout_factors(*shape, 0.3, seed=5, policy=policy), want, rtol=1e-6, atol=0)
    attend = reference.allowed(37, 53, causal=True)
    causal = dropout_factors(*shape, 0.3, seed=5, policy=policy, causal=True)
    torch.testing.assert_close(causal, torch.where(attend, want, 0.0), rtol=1e-6, atol=0)
    mask = torch.rand(2, 1, 1, 53) < 0.6
    masked = dropout_factors(*shape, 0.3, seed=5, policy=policy, mask=mask)
    torch.testing.assert_close(masked, torch.where(mask, want, 0.0), rtol=1e-6, atol=0)
    # An element's fate depends on its place alone, not on how long the rows are.
    longer = dropout_factors(2, 3, 41, 97, 0.3, seed=5, policy=policy)
    torch.testing.assert_close(longer[:, :, :37, :53], want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dropout_mask_injected_into_eager_code_gives_the_same(policy, dtype):
    q, k, v = inputs(2, 4, 2, 37, 53, dtype=dtype)
    mask = leaf(37, 53, dtype=dtype)
    drop = dropout_factors(2, 4, 37, 53, 0.25, seed=9).to(dtype)
    torch.manual_seed(9)
    o = remnant.attention(q, k, v, mask=mask, policy=policy, dropout=0.25)
    eager = reference.eager_attention(q, k, v, mask, drop=drop)
    tolerance = dict(rtol=1e-6, atol=1e-6) if dtype == torch.float64 else dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(o, eager, **tolerance)
    if policy in STORED_EXACTLY:
        grad = torch.randn_like(o)
        ours = torch.autograd.grad(o, [q, k, v, mask], grad)
        for x, y in zip(ours, torch.autograd.grad(eager, [q, k, v, mask], grad), strict=True):
            torch.testing.assert_close(x, y, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_mask_is_the_same_for_every_dtype(dtype):
    want = dropout_factors(2, 3, 37, 53, 0.5, seed=2)
    for policy in POLICIES:
        torch.manual_seed(2)
        q = torch.zeros(2, 3, 37, 1, dtype=dtype, requires_grad=True)
        v = torch.eye(53, dtype=dtype).expand(2, 3, 53, 53)
        o = remnant.attention(q, torch.zeros(2, 3, 53, 1, dtype=dtype), v, policy=policy, dropout=0.5)
        assert torch.equal(o != 0, want != 0), policy


@pytest.mark.parametrize("policy", ALL)
def test_seeds(policy):
    q, k, v = inputs(queries=20, keys=20)

    def run(**options):
        o = remnant.attention(q, k, v, policy=policy, dropout=0.2, **options)
        return [o, *torch.autograd.grad(o.square().sum(), [q, k, v])]

    def same(a, b):
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    torch.manual_seed(1)
    first, second = run(), run()
    assert not torch.equal(first[0], second[0]), "two calls drew one mask"
    torch.manual_seed(1)
    assert same(run(), first)
    torch.manual_seed(2)
    assert not torch.equal(run()[0], first[0])
    generator = torch.Generator().manual_seed(1)
    state = torch.get_rng_state()
    assert same(run(generator=generator), first)
    assert torch.equal(torch.get_rng_state(), state), "a generator was given, the default one was used"
    assert same(run(generator=generator), second)


def test_no_random_number_is_drawn_that_is_not_needed():
    q, k, v = inputs()
    state = torch.get_rng_state()
    for policy in ("exact", "recompute", "curve:m=3", "top:m=3"):
        remnant.attention(q, k, v, policy=policy).sum().backward()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("policy", ["quantized:bits=4", "sampled:m=4"])
def test_as_much_is_drawn_without_gradients(policy):
    """A reentrant checkpoint runs first without them: what follows has to be dropped alike."""
    q, k, v = inputs()
    states = []
    for enabled in (True, False):
        torch.manual_seed(3)
        with torch.set_grad_enabled(enabled):
            remnant.attention(q, k, v, policy=policy)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("policy", ALL)
def test_checkpoint_sees_the_same_dropout(policy):
    q, k, v = inputs(queries=20, keys=20)

    def layer(q, k, v):
        return remnant.attention(q, k, v, policy=policy, dropout=0.3, causal=True).square()

    torch.manual_seed(4)
    plain = layer(q, k, v)
    want = torch.autograd.grad(plain.sum(), [q, k, v])
    torch.manual_seed(4)
    recomputed = checkpoint(layer, q, k, v, use_reentrant=False, preserve_rng_state=True)
    torch.rand(3)  # the generator moves on before the backward pass
    assert torch.equal(recomputed, plain)
    for x, y in zip(torch.autograd.grad(recomputed.sum(), [q, k, v]), want, strict=True):
        assert torch.equal(x, y)


def test_tiny_and_huge_rates():
    for rate, low, high in ((1e-6, 0.0, 0.001), (0.999, 0.99, 1.0)):
        dropped = (dropout_factors(1, 2, 64, 64, rate, seed=0) == 0).double().mean().item()
        assert low <= dropped <= high


# --- instruction sets and the device-independent path ----------------------------------------------

VARIANT_CASES = [
    dict(shape=dict(queries=37, keys=53), dropout=0.0),
    dict(shape=dict(queries=53, keys=53), dropout=0.3, causal=True),
    dict(shape=dict(queries=40, keys=300, kv_heads=1), dropout=0.1),
    dict(shape=dict(queries=150, keys=31, kv_heads=4), dropout=0.0, window=(4, 9)),
    dict(shape=dict(queries=21, keys=40), dropout=0.2, mask="boolean"),
    dict(shape=dict(queries=21, keys=40), dropout=0.2, mask="additive"),
    dict(shape=dict(queries=3, keys=0), dropout=0.5),
]


# A last bit may decide another draw of sampled, whose gradient is then another: float64 only.
VARIANTS = [x for x in product(VARIANT_CASES, POLICIES, (torch.float64, torch.float32, torch.bfloat16))
            if x[2] == torch.float64 or not x[1].startswith("sampled")]  # fmt: skip


def variant_results():
    results = []
    for case, policy, dtype in VARIANTS:
        torch.manual_seed(17)
        q, k, v = inputs(**case["shape"], dtype=dtype)
        mask = None
        if case.get("mask") == "boolean":
            mask = torch.rand(2, 1, q.size(2), k.size(2)) < 0.6
            mask[0, :, 5] = False
        elif case.get("mask") == "additive":
            mask = leaf(q.size(2), k.size(2), dtype=dtype)
        options = {x: case[x] for x in ("causal", "window", "dropout") if x in case}
        o = remnant.attention(q, k, v, mask=mask, policy=policy, **options)
        grad = torch.randn(o.shape, dtype=torch.float64).to(dtype)
        wanted = [x for x in (q, k, v, mask) if x is not None and x.requires_grad]
        results.append([o.detach(), *torch.autograd.grad(o, wanted, grad)])
    energy = leaf(5, 7, 150, dtype=torch.float32)
    soft = remnant.softmax_approximation(energy, torch.rand(7, 150) < 0.8, 4)
    results.append([soft.detach(), *torch.autograd.grad(soft, energy, torch.randn_like(soft))])
    masks = [dropout_factors(2, 3, 70, n, 0.3, seed=n) for n in (1, 7, 8, 97, 257)]
    return {"results": results, "masks": masks}


def save_variant_results(path):
    torch.set_num_threads(2)
    torch.save(variant_results(), path)


@pytest.fixture(scope="module")
def results_here():
    return variant_results()["results"]


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    """What the same calls give on each path that this machine has, from a process of its own."""
    folder = tmp_path_factory.mktemp("variants")
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    names = ["composite", "portable"]
    names += ["avx2"] if re.search(r"\bavx2\b", flags) else []
    names += ["avx512"] if re.search(r"\bavx512bw\b", flags) else []
    names += ["amx"] if re.search(r"\bamx_bf16\b", flags) else []
    found = {}
    for name in names:
        path = folder / f"{name}.pt"
        environment = {**os.environ, "REMNANT_CPU": name, "REMNANT_LIBRARY": str(remnant.library_path)}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(remnant.__file__).resolve().parents[1]), str(HERE)])
        code = f"import test_attention; test_attention.save_variant_results({str(path)!r})"
        subprocess.run([sys.executable, "-c", code], env=environment, cwd=HERE, check=True, timeout=300)
        found[name] = torch.load(path)
    return found


@pytest.mark.parametrize("name", ["composite", "portable", "avx2", "avx512", "amx"])
def test_every_path_drops_the_same_elements(variants, name):
    if name not in variants:
        pytest.skip(f"this machine lacks {name}")
    for n, mask in zip((1, 7, 8, 97, 257), variants[name]["masks"], strict=True):
        want = dropout_factors(2, 3, 70, n, 0.3, seed=n)
        torch.testing.assert_close(mask, want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["composite", "portable", "avx2", "avx512", "amx"])
def test_every_path_computes_the_same(variants, results_here, name):
    if name not in variants:
        pytest.skip(f"this machine lacks {name}")
    cases = [*VARIANTS, "softmax"]
    for case, ours, theirs in zip(cases, results_here, variants[name]["results"], strict=True):
        policy, dtype = case[1:] if case != "softmax" else ("curve", torch.float32)
        # The CPU's kernels weigh keys on their one way through tiles of 128, the composite path from the whole row:
        # beyond a tile they draw other keys, unbiased either way (test_sampled).
        draws_others = (name == "composite" and policy.startswith("sampled")
                        and case[0]["shape"].get("keys", 0) > 128)  # fmt: skip
        for i, (x, y) in enumerate(zip(ours, theirs, strict=True)):
            assert x.shape == y.shape and x.dtype == y.dtype
            if i > 0 and draws_others:
                continue
            error = relative(x, y.double()) if y.numel() and y.norm() > 0 else float(x.norm())
            allowance = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.03}[dtype]
            # A rounding or a rank may fall otherwise where the last bit of a logit differs.
            if i > 0 and dtype != torch.float64 and policy not in STORED_EXACTLY:
                allowance = 0.03
            assert error <= allowance, f"{case}, result {i}"


# --- what is kept ----------------------------------------------------------------------------------

KEEPING = ["exact", "recompute", "curve:m=1", "curve:m=5", "curve:m=60", "curve:m=5,paper_text",
           "quantized:bits=2", "quantized:bits=4", "quantized:bits=8", "sampled:m=1", "sampled:m=20",
           "sampled:m=1000", "top:m=1", "top:m=20", "top:m=1000"]  # fmt: skip


@pytest.mark.parametrize("policy", KEEPING)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_bytes_are_the_closed_form(policy, dropout, dtype):
    for queries, keys in ((17, 50), (13, 97), (5, 257), (3, 1), (65, 40)):
        q, k, v = inputs(2, 3, 3, queries, keys, 8, 4, dtype=dtype)
        got, _ = reference.saved_bytes(lambda q=q, k=k, v=v: remnant.attention(q, k, v, policy=policy, dropout=dropout))
        rows = 2 * 3 * queries
        residual = reference.residual_bytes(policy, 6, queries, keys, q.element_size()) + (16 if dropout else 0)
        assert remnant.attention_residual_bytes(policy, 6, queries, keys, q.element_size(), dropout > 0) == residual
        whole = sum(x.untyped_storage().nbytes() for x in (q, k, v))
        # Only policies that rest on an exact or unbiased softmax take delta from the output; exact does
        # where it runs the kernel of recompute, with dropout.
        from_output = policy.startswith(("recompute", "quantized", "sampled")) or (policy == "exact" and dropout > 0)
        o = rows * 4 * q.element_size() if from_output else 0
        assert got == residual + whole + o, (queries, keys)


@pytest.mark.parametrize("policy", ALL)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_kept_bytes_without_rows(policy, dropout):
    q, k, v = inputs(2, 3, 3, 0, 5)
    got, _ = reference.saved_bytes(lambda: remnant.attention(q, k, v, policy=policy, dropout=dropout))
    whole = sum(x.untyped_storage().nbytes() for x in (q, k, v))
    assert got - whole == remnant.attention_residual_bytes(policy, 6, 0, 5, 8, dropout > 0)


def saved_storages(run):
    return {x.untyped_storage().data_ptr() for x in reference.saved_bytes(run)[1] if x.numel() > 0}


@pytest.mark.parametrize("policy", ALL)
def test_frozen_inputs_keep_less(policy):
    q, k, v = inputs(2, 3, 3, 17, 50)

    def keeps(needs):
        for x, need in zip((q, k, v), needs, strict=True):
            x.requires_grad_(need)
        o = None

        def run():
            nonlocal o
            o = remnant.attention(q, k, v, policy=policy)
            return o

        found = saved_storages(run)
        return [x.untyped_storage().data_ptr() in found for x in (q, k, v, o)]

    rebuilds = policy.startswith(("recompute", "sampled", "top"))
    exact = policy == "exact"
    from_output = policy.startswith(("recompute", "quantized", "sampled"))
    assert keeps((False, False, True)) == [rebuilds, rebuilds, False, False]
    assert keeps((True, False, False)) == [rebuilds or exact, True, True, from_output]
    assert keeps((False, True, False)) == [True, rebuilds or exact, True, from_output]
    assert keeps((True, True, True)) == [True, True, True, from_output]


@pytest.mark.parametrize("policy", ALL)
def test_nothing_is_kept_without_a_gradient(policy):
    q, k, v = inputs()
    with torch.no_grad():
        got, saved = reference.saved_bytes(lambda: remnant.attention(q, k, v, policy=policy, dropout=0.1))
        assert got == 0 and not saved
    frozen = [x.detach() for x in (q, k, v)]
    got, saved = reference.saved_bytes(lambda: remnant.attention(*frozen, policy=policy, dropout=0.1))
    assert got == 0 and not saved
    with torch.inference_mode():
        assert not remnant.attention(*frozen, policy=policy).requires_grad


@pytest.mark.parametrize("policy", ["recompute", "curve:m=5", "quantized:bits=4", "sampled:m=9"])
def test_masks_are_not_expanded(policy):
    q, k, v = inputs(2, 3, 3, 64, 64)
    mask = torch.rand(2, 1, 1, 64) < 0.8
    plain, _ = reference.saved_bytes(lambda: remnant.attention(q, k, v, policy=policy))
    masked, _ = reference.saved_bytes(lambda: remnant.attention(q, k, v, policy=policy, mask=mask))
    causal, _ = reference.saved_bytes(lambda: remnant.attention(q, k, v, policy=policy, causal=True, window=(9, 0)))
    assert masked <= plain + mask.numel()
    assert causal == plain


@pytest.mark.parametrize("policy", ["recompute", "curve:m=4", "quantized:bits=2", "sampled:m=32"])
def test_no_square_is_allocated_in_the_forward(policy):
    n = 2048
    q, k, v = inputs(1, 1, 1, n, n, 8, 8, dtype=torch.float32)
    square = n * n * 4
    for options in ({}, {"causal": True, "dropout": 0.1}, {"mask": torch.rand(n) < 0.9, "window": (300, 10)}):
        seen = reference.allocations(lambda o=options: remnant.attention(q, k, v, policy=policy, **o))
        kept = remnant.attention_residual_bytes(policy, 1, n, n, 4)
        assert seen.largest < max(square / 2, kept + 1), options
        assert seen.peak < square / 2 + kept, options


def test_no_square_is_allocated_in_recompute_backward():
    n = 2048
    q, k, v = inputs(1, 1, 1, n, n, 8, 8, dtype=torch.float32)
    o = remnant.attention(q, k, v, causal=True, dropout=0.1)
    seen = reference.allocations(lambda: torch.autograd.grad(o.sum(), [q, k, v]))
    assert seen.peak < n * n * 4 / 2


# --- NaN and Inf -----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "where, bad",
    # -Inf in a mask is how one masks.
    [x for x in product(["query", "key", "value", "grad", "mask"], [math.nan, math.inf, -math.inf])
     if x != ("mask", -math.inf)],
)  # fmt: skip
def test_nan_and_inf_reach_output_and_gradients(policy, dtype, where, bad):
    for keys in (20, 150):
        q, k, v = inputs(1, 2, 2, 6, keys, dtype=dtype)
        mask = torch.zeros(6, keys, dtype=dtype)
        grad = torch.randn(1, 2, 6, 6, dtype=dtype)
        tensors = dict(query=q, key=k, value=v, grad=grad, mask=mask)
        with torch.no_grad():
            tensors[where][(..., 3, 2)] = bad
        o = remnant.attention(q, k, v, mask=mask, policy=policy)
        got = [o, *torch.autograd.grad(o, [q, k, v], grad)]
        eager = reference.eager_attention(q, k, v, mask)
        want = [eager, *torch.autograd.grad(eager, [q, k, v], grad)]
        for name, x, y in zip(("output", "query", "key", "value"), got, want, strict=True):
            hidden = ~y.isfinite() & x.isfinite()
            # Where torch's NaN is 0 * Inf, of a softmax that is 0 only to rounding, finite is right too.
            rows = hidden.flatten(0, 1).any(-1).any(0)
            if y.isfinite().all():
                continue
            assert not x.isfinite().all(), f"{name} hides it"
            if where in ("query", "mask", "grad") and name in ("output", "query"):
                assert not rows[3], f"{name} hides it in row 3"


@pytest.mark.parametrize("policy", ALL)
def test_a_row_of_infinite_logits_is_not_taken_for_masked(policy):
    # Nothing is masked: the logits are -Inf because of the query, and 0 would hide that.
    q = torch.full((1, 1, 3, 1), math.inf, requires_grad=True)
    o = remnant.attention(q, -torch.ones(1, 1, 3, 1), torch.ones(1, 1, 3, 1), policy=policy)
    assert o.isnan().all()


# --- more than one backward, derivatives of derivatives --------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_second_backward_with_retained_graph(policy):
    q, k, v = inputs()
    mask = leaf(4, 7, 9)
    o = remnant.attention(q, k, v, mask=mask, policy=policy, dropout=0.2)
    grad = torch.randn_like(o)
    first = torch.autograd.grad(o, [q, k, v, mask], grad, retain_graph=True)
    first = [x.clone() for x in first]
    second = torch.autograd.grad(o, [q, k, v, mask], grad)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(o, [q, k, v, mask], grad)


@pytest.mark.parametrize("policy", ALL)
def test_changing_a_saved_input_in_place_is_an_error(policy):
    q, k, v = inputs()
    scaled = v * 1
    o = remnant.attention(q, k, scaled, policy=policy)
    scaled.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


def seeded(policy, mask=None, dropout=0.0, **options):
    def call(*tensors):
        generator = torch.Generator().manual_seed(6)
        own = tensors[3] if len(tensors) > 3 else mask
        return remnant.attention(
            *tensors[:3], mask=own, dropout=dropout, policy=policy, generator=generator, **options
        )

    return call


GRADCHECK_CASES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (1, 1)},
    "dropout": {"dropout": 0.4},
    "boolean": {"mask": torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)},
    "scale": {"scale": -0.8},
    "additive": {"additive": (2, 3, 4), "dropout": 0.4},
    "additive broadcast": {"additive": (1, 2, 1, 4), "causal": True},
}


def gradcheck_inputs(additive=None, **_):
    tensors = [leaf(1, 2, 3, 2), leaf(1, 1, 4, 2), leaf(1, 1, 4, 2)]
    return tensors + ([leaf(*additive)] if additive else [])


@pytest.mark.parametrize("policy", [*STORED_EXACTLY, "sampled:m=4"])  # of 4 keys
@pytest.mark.parametrize("case", GRADCHECK_CASES)
def test_gradcheck(policy, case):
    options = {x: y for x, y in GRADCHECK_CASES[case].items() if x != "additive"}
    assert torch.autograd.gradcheck(seeded(policy, **options), gradcheck_inputs(**GRADCHECK_CASES[case]))


@pytest.mark.parametrize("case", GRADCHECK_CASES)
def test_exact_can_be_differentiated_twice(case):
    options = {x: y for x, y in GRADCHECK_CASES[case].items() if x != "additive"}
    assert torch.autograd.gradgradcheck(seeded("exact", **options), gradcheck_inputs(**GRADCHECK_CASES[case]))


@pytest.mark.parametrize("needs", [x for x in product([False, True], repeat=3) if any(x)])
def test_exact_twice_with_frozen_inputs(needs):
    tensors = [x.requires_grad_(need) for x, need in zip(gradcheck_inputs(), needs, strict=True)]
    assert torch.autograd.gradgradcheck(seeded("exact", dropout=0.3), tensors)


@pytest.mark.parametrize("policy", [x for x in ALL if x != "exact"])
def test_double_backward_of_other_policies_names_the_way_out(policy):
    q, k, v = inputs()
    o = remnant.attention(q, k, v, policy=policy)
    torch.manual_seed(0)
    plain = torch.autograd.grad(o.sum(), [q, k, v], retain_graph=True)
    created = torch.autograd.grad(o.sum(), [q, k, v], create_graph=True)  # not yet an error
    assert all(torch.equal(x, y) for x, y in zip(plain, created, strict=True))
    with pytest.raises(RuntimeError, match="'exact'") as error:
        torch.autograd.grad(created[0].square().sum(), [q, k, v])
    assert policy in str(error.value)


@pytest.mark.parametrize("policy", [x for x in ALL if x != "exact"])
@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_created_graph_with_a_frozen_input(policy, frozen):
    tensors = list(inputs())
    tensors[frozen].requires_grad_(False)
    wanted = [x for x in tensors if x.requires_grad]
    o = remnant.attention(*tensors, policy=policy)
    plain = torch.autograd.grad(o.sum(), wanted, retain_graph=True)
    created = torch.autograd.grad(o.sum(), wanted, create_graph=True)
    assert all(torch.equal(x, y) for x, y in zip(plain, created, strict=True))


# --- autocast --------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mask_gradient", [False, True])
def test_autocast_casts_the_inputs_and_nothing_inside(policy, mask_gradient):
    q, k, v = inputs(queries=30, keys=30, dtype=torch.float32)
    mask = torch.randn(30, 30, requires_grad=mask_gradient)
    wanted = [q, k, v] + ([mask] if mask_gradient else [])
    results = []
    for inside in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            given = (q, k, v) if inside else (x.to(torch.bfloat16) for x in (q, k, v))
            o = remnant.attention(*given, mask=mask, policy=policy)
        assert o.dtype == torch.bfloat16
        results.append([o, *torch.autograd.grad(o.float().sum(), wanted)])
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


def test_weights_under_autocast():
    q, k, v = inputs(queries=30, keys=30, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        _, weights = remnant.attention(q, k, v, need_weights=True)
    _, want = remnant.attention(*(x.to(torch.bfloat16) for x in (q, k, v)), need_weights=True)
    assert torch.equal(weights, want)


def test_float64_inputs_keep_their_precision_under_autocast():
    q, k, v = inputs(queries=30, keys=30, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        o, weights = remnant.attention(q, k, v, need_weights=True)
    assert o.dtype == torch.float64
    torch.testing.assert_close(weights, reference.softmax(reference.logits(q, k)), rtol=1e-10, atol=1e-12)


# --- weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_on_request(policy, dtype):
    q, k, v = inputs(queries=300, keys=41, dtype=dtype)
    mask = torch.rand(2, 1, 300, 41) < 0.7
    mask[:, :, 7] = False
    options = dict(mask=mask, causal=True, window=(30, -1))
    torch.manual_seed(1)
    plain = remnant.attention(q, k, v, policy=policy, dropout=0.1, **options)
    torch.manual_seed(1)
    o, weights = remnant.attention(q, k, v, policy=policy, dropout=0.1, need_weights=True, **options)
    assert torch.equal(o, plain)
    assert weights.shape == (2, 4, 300, 41) and weights.dtype == dtype and not weights.requires_grad
    want = reference.softmax(reference.logits(q, k, **options))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(weights.double(), want, rtol=8 * eps, atol=8 * eps if eps < 1e-4 else 1e-5)
    assert (weights[:, :, 7] == 0).all()
    plain_bytes, _ = reference.saved_bytes(lambda: remnant.attention(q, k, v, policy=policy))
    with_bytes, _ = reference.saved_bytes(lambda: remnant.attention(q, k, v, policy=policy, need_weights=True))
    assert plain_bytes == with_bytes, "weights were kept for backward"


def test_weights_without_keys():
    q, k, v = inputs(keys=0)
    o, weights = remnant.attention(q, k, v, need_weights=True)
    assert weights.shape == (2, 4, 7, 0) and (o == 0).all()


# --- errors ----------------------------------------------------------------------------------------


def t(*shape, dtype=torch.float32):
    return torch.zeros(*shape, dtype=dtype)


Q, K, V = t(2, 4, 7, 5), t(2, 2, 9, 5), t(2, 2, 9, 6)
INT = torch.int64
MISTAKES = {
    "query of 3 dimensions": ((t(4, 7, 5), K, V), {}, ["query", "4 dimensions", "got 3"]),
    "key of 5 dimensions": ((Q, t(1, 2, 2, 9, 5), V), {}, ["key", "4 dimensions", "got 5"]),
    "value of 2 dimensions": ((Q, K, t(9, 6)), {}, ["value", "4 dimensions", "got 2"]),
    "integers": ((Q.long(), K.long(), V.long()), {}, ["query", "float32", "Long"]),
    "two dtypes": ((Q, K.double(), V), {}, ["one dtype", "Double"]),
    "batch": ((Q, t(3, 2, 9, 5), V), {}, ["batch", "2", "3"]),
    "heads of key and value": ((Q, K, t(2, 4, 9, 6)), {}, ["heads", "2", "4"]),
    "heads that do not divide": ((Q, t(2, 3, 9, 5), t(2, 3, 9, 6)), {}, ["divide", "4 query", "3 key"]),
    "no key heads": ((Q, t(2, 0, 9, 5), t(2, 0, 9, 6)), {}, ["heads", "got 4"]),
    "key and value lengths": ((Q, K, t(2, 2, 8, 6)), {}, ["length", "9", "8"]),
    "head sizes": ((Q, t(2, 2, 9, 4), V), {}, ["head size", "5", "4"]),
    "dropout 1": ((Q, K, V), {"dropout": 1.0}, ["dropout", "[0, 1)", "got 1"]),
    "dropout below 0": ((Q, K, V), {"dropout": -0.1}, ["dropout", "[0, 1)", "-0.1"]),
    "dropout NaN": ((Q, K, V), {"dropout": math.nan}, ["dropout", "[0, 1)", "nan"]),
    "mask that does not broadcast": ((Q, K, V), {"mask": t(7, 8)}, ["mask", "[7, 8]", "broadcast", "7, 9]"]),
    "mask of a wider batch": ((Q, K, V), {"mask": t(3, 1, 1, 9)}, ["mask", "[3, 1, 1, 9]", "broadcast"]),
    "mask of 5 dimensions": ((Q, K, V), {"mask": t(1, 2, 4, 7, 9)}, ["mask", "4 dimensions", "got 5"]),
    "mask of integers": ((Q, K, V), {"mask": t(7, 9, dtype=INT)}, ["mask", "boolean", "floating", "Long"]),
    "window of one": ((Q, K, V), {"window": [3]}, ["window", "left, right"]),
    "window below -1": ((Q, K, V), {"window": (-2, 0)}, ["window", "-1"]),
    "another device": ((Q, K.to("meta"), V), {}, ["device", "cpu", "meta"]),
    "misspelt policy": ((Q, K, V), {"policy": "recompte"}, ["recompte", "did you mean 'recompute'?"]),
    "misspelt curve": ((Q, K, V), {"policy": "curv:m=4"}, ["curv", "did you mean 'curve'?"]),
    "unknown policy": ((Q, K, V), {"policy": "zzzzzzzzzz"}, ["zzzzzzzzzz", "exact, recompute, curve:m=4", "sampled:m=128"]),
    "empty policy": ((Q, K, V), {"policy": ""}, ["unknown attention policy"]),
    "unknown parameter": ((Q, K, V), {"policy": "curve:n=4"}, ["unknown parameter 'n'", "did you mean 'm'?"]),
    "parameter of another": ((Q, K, V), {"policy": "recompute:m=4"}, ["unknown parameter 'm'"]),
    "missing value": ((Q, K, V), {"policy": "curve:m"}, ["m", "needs a value"]),
    "not a number": ((Q, K, V), {"policy": "curve:m=four"}, ["whole number", "four"]),
    "fraction": ((Q, K, V), {"policy": "curve:m=4.5"}, ["whole number", "4.5"]),
    "m of 0": ((Q, K, V), {"policy": "curve:m=0"}, ["m must be at least 1", "got 0"]),
    "misspelt sampled": ((Q, K, V), {"policy": "sampel:m=4"}, ["sampel", "did you mean 'sampled'?"]),
    "no sample": ((Q, K, V), {"policy": "sampled:m=0"}, ["sampled", "m must be at least 1", "got 0"]),
    "sampled bits": ((Q, K, V), {"policy": "sampled:bits=4"}, ["unknown parameter 'bits'"]),
    "misspelt top": ((Q, K, V), {"policy": "topp:m=4"}, ["topp", "did you mean 'top'?"]),
    "nothing on top": ((Q, K, V), {"policy": "top:m=0"}, ["top", "m must be at least 1", "got 0"]),
    "top with an additive mask": ((Q, K, V), {"policy": "top", "mask": t(7, 9)}, ["'top'", "additive", "'sampled'"]),
    "top with any boolean mask": ((Q, K, V), {"policy": "top", "mask": t(7, 9) == 0}, ["'top'", "[1, 1, 7, 9]",
                                                                                      "[B, 1, 1, Nk]", "'recompute'"]),
    "top with a window": ((Q, K, V), {"policy": "top", "window": (3, 0)}, ["'top'", "left", "got 3", "'sampled'"]),
    "3 bits": ((Q, K, V), {"policy": "quantized:bits=3"}, ["2, 4 or 8", "got 3"]),
    "nothing after the colon": ((Q, K, V), {"policy": "curve:"}, ["nothing after ':'"]),
    "nothing after the comma": ((Q, K, V), {"policy": "curve:m=4,"}, ["nothing after ','"]),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("need_weights", [False, True])
def test_mistakes_are_named(mistake, need_weights):
    tensors, options, words = MISTAKES[mistake]
    with pytest.raises(RuntimeError) as error:
        remnant.attention(*tensors, need_weights=need_weights, **options)
    message = str(error.value)
    for word in words:
        assert word in message, message
    assert "\n" not in message.strip() and len(message) < 300, message


def test_mistakes_are_named_with_a_gradient_too():
    q, k, v = (x.clone().requires_grad_() for x in (Q, K, V))
    with pytest.raises(RuntimeError, match="did you mean 'recompute'"):
        remnant.attention(q, k, v, policy="recompte")
    with pytest.raises(RuntimeError, match="broadcast"):
        remnant.attention(q, k, v, mask=t(7, 8))


@pytest.mark.parametrize("name, arguments", [
    ("policy", ("recompte", 4, 4, 4, 4, False)),
    ("heads", ("exact", -1, 4, 4, 4, False)),
    ("queries", ("exact", 4, -1, 4, 4, False)),
    ("keys", ("exact", 4, 4, -1, 4, False)),
])  # fmt: skip
def test_residual_bytes_names_mistakes(name, arguments):
    with pytest.raises(RuntimeError, match=name):
        remnant.attention_residual_bytes(*arguments)
