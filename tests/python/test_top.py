"""Policy top against its dense float64 definition; the masks that it knows; that it says what it is."""

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

import remnant

BATCH, HEADS = 2, 4


def leaf(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


def inputs(queries, keys, kv_heads=2, dim=5, value_dim=6, dtype=torch.float64):
    return [
        leaf(BATCH, HEADS, queries, dim, dtype=dtype),
        leaf(BATCH, kv_heads, keys, dim, dtype=dtype),
        leaf(BATCH, kv_heads, keys, value_dim, dtype=dtype),
    ]


def padding(*shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(7)) < 0.6
    mask[..., 0] = False  # the first rows of a causal mask then attend nothing
    return mask


def check(q, k, v, m, drop=None, tolerance=1e-9, seed=3, **options):
    o = remnant.attention(q, k, v, policy=f"top:m={m}", generator=torch.Generator().manual_seed(seed), **options)
    grad = torch.randn(o.shape, dtype=torch.float64).to(o.dtype)
    wanted = [x for x in (q, k, v) if x.requires_grad]
    got = torch.autograd.grad(o, wanted, grad)
    options.pop("dropout", None)
    z = reference.logits(q, k, **options)
    p = reference.softmax(z)
    torch.testing.assert_close(o.double(), reference.output(p, v, drop), rtol=tolerance, atol=tolerance)
    estimate = reference.top(z, m)
    if drop is not None:
        # Dropout's decisions count at the kept keys; the others stand for their expectation.
        kept = torch.zeros_like(z, dtype=torch.bool)
        kept.scatter_(-1, z.topk(min(m, z.size(-1))).indices, True)
        drop = torch.where(kept, drop, 1.0)
    want = reference.gradients(q, k, v, grad, estimate, options.get("scale"), drop=drop)
    want = [x for x, leaf in zip(want[:3], (q, k, v), strict=True) if leaf.requires_grad]
    for x, y, leaf in zip(got, want, wanted, strict=True):
        assert x.dtype == leaf.dtype
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance)
    return o, got


LENGTHS = [(1, 1), (1, 150), (150, 1), (70, 70), (200, 131), (67, 150), (130, 130)]
MASKS = {
    "none": lambda keys: None,
    "padding": lambda keys: padding(BATCH, 1, 1, keys),
    "one row of keys": lambda keys: padding(keys),
    "by head": lambda keys: padding(BATCH, HEADS, 1, keys),
    "a whole sentence": lambda keys: torch.tensor([True, False]).view(BATCH, 1, 1, 1),
}


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("m", [1, 9])
def test_gradient_is_the_dense_one(lengths, causal, mask, m):
    check(*inputs(*lengths), m, mask=MASKS[mask](lengths[1]), causal=causal)


@pytest.mark.parametrize("right", [0, 1, 20, 63, 64, 500])
@pytest.mark.parametrize("lengths", [(70, 70), (20, 150), (150, 20)], ids=str)
def test_window_with_a_bound_on_the_right(right, lengths):
    check(*inputs(*lengths), 4, window=(-1, right))
    check(*inputs(*lengths), 4, window=(-1, right), mask=padding(BATCH, 1, 1, lengths[1]))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_grouped_heads(kv_heads, causal):
    q, k, v = inputs(80, 80, kv_heads)
    check(q, k, v, 5, causal=causal)
    check(q, k, v, 5, causal=causal, mask=padding(BATCH, HEADS, 1, 80), scale=-0.3)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", ["none", "padding"])
@pytest.mark.parametrize("m", [5, 200])
def test_dropout_counts_at_the_kept_keys(causal, mask, m):
    q, k, v = inputs(70, 90, HEADS)
    options = dict(causal=causal, mask=MASKS[mask](90))
    eye = torch.eye(90, dtype=torch.float64).expand(BATCH, HEADS, 90, 90)
    seen = remnant.attention(torch.zeros_like(q), torch.zeros_like(k), eye, dropout=0.3,
                             generator=torch.Generator().manual_seed(3)).detach()  # fmt: skip
    check(q, k, v, m, drop=90 * seen, dropout=0.3, tolerance=1e-6, **options)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("m", [60, 1000])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_with_every_key_kept_the_gradient_is_exact(causal, mask, m, dropout):
    q, k, v = inputs(75, 60)
    results = []
    for policy in (f"top:m={m}", "recompute"):
        torch.manual_seed(2)
        o = remnant.attention(q, k, v, mask=MASKS[mask](60), causal=causal, dropout=dropout, policy=policy)
        results.append([o, *torch.autograd.grad(o, [q, k, v], torch.ones_like(o))])
    tolerance = 1e-6 if dropout else 1e-9
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("needs", [x for x in product([False, True], repeat=3) if any(x)])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_a_subset_of_inputs(needs, causal):
    tensors = [x.requires_grad_(need) for x, need in zip(inputs(70, 70), needs, strict=True)]
    check(*tensors, 6, causal=causal, mask=padding(BATCH, 1, 1, 70))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_low_precision(dtype, causal):
    # Logits well apart, so that which keys are highest does not hang on rounding.
    q = torch.ones(BATCH, HEADS, 200, 1, dtype=dtype).requires_grad_()
    k = (torch.stack([torch.randperm(200) for _ in range(BATCH * HEADS)]) / 32).view(BATCH, HEADS, 200, 1)
    k = k.to(dtype).requires_grad_()
    v = leaf(BATCH, HEADS, 200, 6, dtype=dtype)
    o = remnant.attention(q, k, v, policy="top:m=8", causal=causal)
    grad = torch.randn_like(o)
    got = torch.autograd.grad(o, [q, k, v], grad)
    want = reference.gradients(q, k, v, grad, reference.top(reference.logits(q, k, causal=causal), 8))
    allowance = 1e-4 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for x, y in zip(got, want[:3], strict=True):
        assert x.dtype == dtype
        assert ((x.double() - y).norm() / y.norm()).item() < allowance


def test_rows_without_a_key_give_zero_and_zero_gradient():
    q, k, v = inputs(150, 80)
    mask = torch.ones(BATCH, 1, 1, 80, dtype=torch.bool)
    mask[0, ..., :10] = False
    mask[1] = False
    o, (dq, dk, dv) = check(q, k, v, 4, mask=mask, causal=True)
    for x in (o, dq):
        assert (x[0, :, :10] == 0).all() and (x[1] == 0).all()
    for x in (dk, dv):
        assert (x[0, :, :10] == 0).all() and (x[1] == 0).all() and x.isfinite().all()


def test_what_padding_holds_does_not_matter():
    q, k, v = inputs(70, 90)
    mask = padding(BATCH, 1, 1, 90)
    grad = torch.randn(BATCH, HEADS, 70, 6, dtype=torch.float64)
    results = []
    for garbage in (0.0, 1e30):
        tensors = [q, *(torch.where(mask.transpose(2, 3), x.detach(), garbage).requires_grad_() for x in (k, v))]
        o = remnant.attention(*tensors, mask=mask, policy="top:m=4")
        results.append(torch.autograd.grad(o, tensors, grad))
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("where", ["query", "key", "value", "grad"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_reach_the_gradients(where, bad, causal):
    q, k, v = inputs(100, 100, HEADS)
    grad = torch.randn(BATCH, HEADS, 100, 6, dtype=torch.float64)
    with torch.no_grad():
        dict(query=q, key=k, value=v, grad=grad)[where][..., 30, 2] = bad
    o = remnant.attention(q, k, v, causal=causal, policy="top:m=3")
    got = torch.autograd.grad(o, [q, k, v], grad)
    eager = reference.eager_attention(q, k, v, causal=causal)
    want = torch.autograd.grad(eager, [q, k, v], grad)
    for x, y in zip(got, want, strict=True):
        assert y.isfinite().all() or not x.isfinite().all()
    if where in ("query", "grad"):
        assert not got[0][:, :, 30].isfinite().any()


def test_backward_memory_is_linear_in_the_number_of_rows():
    n, m = 4096, 4
    q, k, v = (torch.randn(1, 1, n, 8, requires_grad=True) for _ in range(3))
    for options in ({"causal": True}, {"mask": torch.rand(n) < 0.9, "dropout": 0.1}):
        o = remnant.attention(q, k, v, policy=f"top:m={m}", **options)
        seen = reference.allocations(lambda o=o: torch.autograd.grad(o.sum(), [q, k, v]))
        assert seen.peak < n * n  # a byte each of the softmax's elements, at 4 each


def test_an_unattended_outlier_misleads_it_and_no_other_policy():
    """docs/numerics.md, top(m): a key of tiny p and large value gets weight it must not have."""
    n, dim = 256, 8
    q, k, v = (torch.randn(1, 1, n, dim, dtype=torch.float64) for _ in range(3))
    q[..., 0], k[..., 0] = 1, 0
    k[:, :, 5, 0] = -10 * math.sqrt(dim)  # its logits lie 10 lower
    grad = torch.randn(1, 1, n, dim, dtype=torch.float64)
    errors = {}
    for size in (1, 100):
        v[:, :, 5] = size * torch.randn(dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        tensors = [x.clone().requires_grad_() for x in (q, k, v)]
        for policy in ("recompute", "top:m=32", "curve:m=16", "sampled:m=128"):
            o = remnant.attention(*tensors, policy=policy, generator=torch.Generator().manual_seed(2))
            (errors[size, policy], *_) = torch.autograd.grad(o, tensors, grad)
        exact = errors.pop((size, "recompute"))
        for policy in ("top:m=32", "curve:m=16", "sampled:m=128"):
            errors[size, policy] = ((errors[size, policy] - exact).norm() / exact.norm()).item()
    assert errors[1, "top:m=32"] < 0.5 and errors[100, "top:m=32"] > 10
    for policy in ("curve:m=16", "sampled:m=128"):
        assert errors[100, policy] < 2 * errors[1, policy]


TRAINS = """
import sys, torch, remnant
x = torch.randn(1, 1, 8, 4)
remnant.attention(x, x, x, policy="top:m=2")
remnant.attention(x.requires_grad_(), x, x, policy="recompute")
print("training", file=sys.stderr, flush=True)
for _ in range(3):
    remnant.attention(x, x, x, policy="top:m=2").sum().backward()
"""


def test_warns_once_in_training():
    environment = {**os.environ, "REMNANT_LIBRARY": str(remnant.library_path)}
    environment["PYTHONPATH"] = str(Path(remnant.__file__).resolve().parents[1])
    done = subprocess.run([sys.executable, "-c", TRAINS], env=environment, check=True, capture_output=True, text=True)
    before, after = done.stderr.split("training\n")
    assert "top" not in before
    assert re.search(r"'top:m=2' gives biased gradients.*peaked.*'sampled'", after)
    assert after.count("gives biased") == 1
