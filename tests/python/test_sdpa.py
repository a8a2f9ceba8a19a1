"""remnant.scaled_dot_product_attention against torch's own."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import remnant

ours = remnant.scaled_dot_product_attention
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}


def leaf(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


def close(have, want, dtype):
    assert have.dtype == want.dtype and have.shape == want.shape
    assert (have.double() - want.double()).norm() <= TOLERANCE[dtype] * (1e-3 + want.double().norm())


def check(query, key, value, mask=None, store="recompute", **options):
    have = ours(query, key, value, mask, store=store, **options)
    # The math path in float64 is the reference; a low precision is held against it.
    wide = [x.detach().double().requires_grad_() for x in (query, key, value)]
    wide_mask = mask
    if mask is not None and mask.is_floating_point():
        wide_mask = mask.detach().double().requires_grad_(mask.requires_grad)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        want = F.scaled_dot_product_attention(*wide, wide_mask, **options)
    close(have, want.to(query.dtype), query.dtype)
    grad = torch.randn_like(have)
    inputs, references = [query, key, value], wide
    if mask is not None and mask.requires_grad:
        inputs, references = [*inputs, mask], [*references, wide_mask]
    gradients = torch.autograd.grad(have, inputs, grad)
    for x, y in zip(gradients, torch.autograd.grad(want, references, grad.double()), strict=True):
        close(x, y.to(x.dtype), query.dtype)
    return have


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 2, 3), (1, 2, 1, 3)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_any_number_of_leading_dimensions(lead, causal):
    out = check(leaf(*lead, 7, 8), leaf(*lead, 9, 8), leaf(*lead, 9, 5), is_causal=causal)
    assert out.shape == (*lead, 7, 5)


@pytest.mark.parametrize(
    "leads",
    [
        ((2, 3), (1, 3), (1, 3)), ((1, 3), (2, 3), (2, 3)), ((2, 3), (2, 1), (2, 1)), ((2, 1), (2, 3), (2, 3)),
        ((2, 3), (3,), (3,)), ((3,), (2, 3), (2, 3)), ((2, 3), (1, 1), (2, 3)), ((4, 2, 3), (2, 1), (4, 1, 3)),
        ((3,), (), (1,)),
    ],
    ids=str,
)  # fmt: skip
def test_leading_dimensions_broadcast(leads):
    query, key, value = (leaf(*lead, n, 8) for lead, n in zip(leads, (6, 10, 10), strict=True))
    lead = torch.broadcast_shapes(*leads)
    check(query, key, value)
    check(query, key, value, torch.rand(*lead, 6, 10) < 0.8)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 2, 3)], ids=str)
@pytest.mark.parametrize("kind", ["boolean", "float", "learned"])
def test_masks_that_broadcast(lead, kind):
    query, key, value = leaf(*lead, 6, 8), leaf(*lead, 9, 8), leaf(*lead, 9, 8)
    choices = [(1, size) if size > 1 else (1,) for size in (*lead, 6, 9)]
    shapes = list(itertools.product(*choices)) + [(9,), (6, 9), (6, 1)]
    for shape in shapes:
        if kind == "boolean":
            mask = torch.rand(shape) < 0.7
            mask[..., 0] = True
        else:
            mask = torch.randn(shape, dtype=torch.float64, requires_grad=kind == "learned")
        check(query, key, value, mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_types(dtype):
    query, key, value = (leaf(2, 3, 12, 16, dtype=dtype) for _ in range(3))
    check(query, key, value, is_causal=True)
    check(query, key, value, torch.randn(12, 12, dtype=dtype).requires_grad_())
    check(query, key, value, torch.randn(2, 1, 1, 12), scale=0.3)


@pytest.mark.parametrize("store", ["exact", "recompute", "quantized:bits=8", "sampled:m=64"])
def test_policies(store):
    query, key, value = (leaf(2, 2, 20, 8) for _ in range(3))
    want = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    have = ours(query, key, value, is_causal=True, store=store)
    torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-9)
    grad = torch.randn_like(have)
    for x, y in zip(
        torch.autograd.grad(have, (query, key, value), grad),
        torch.autograd.grad(want, (query, key, value), grad),
        strict=True,
    ):
        assert (x - y).norm() <= (0.02 if store == "quantized:bits=8" else 1e-9) * y.norm()


@pytest.mark.parametrize("heads", [(6, 3, 3), (6, 1, 1), (6, 6, 6), (6, 3, 2), (6, 2, 6)], ids=str)
@pytest.mark.parametrize("lead", [(), (2,), (2, 2)], ids=str)
def test_grouped_heads(heads, lead):
    query, key, value = (leaf(*lead, h, n, 8) for h, n in zip(heads, (6, 10, 10), strict=True))
    check(query, key, value, enable_gqa=True)
    check(query, key, value, torch.randn(6, 6, 10, dtype=torch.float64), enable_gqa=True)


def test_grouped_heads_are_not_repeated():
    """Two heads of keys are kept as two, and so is one that torch would broadcast."""
    for count in (2, 1):
        query, key, value = leaf(2, 8, 16, 8), leaf(2, count, 16, 8), leaf(2, count, 16, 8)
        saved = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda x: saved.append(tuple(x.shape)) or x.detach(),  # noqa: B023
            lambda x: x,
        )
        with hooks:
            ours(query, key, value, enable_gqa=count > 1)
        assert saved.count((2, count, 16, 8)) == 2 and (2, 8, 16, 8) in saved


def test_rows_without_keys_give_zero():
    query, key, value = (leaf(2, 3, 5, 8) for _ in range(3))
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    mask[2] = False
    for each in (mask, torch.zeros(5, 5, dtype=torch.float64).masked_fill(~mask, float("-inf"))):
        out = ours(query, key, value, each)
        assert (out[:, :, 2] == 0).all()
        (grad,) = torch.autograd.grad(out.sum(), query)
        assert (grad[:, :, 2] == 0).all() and grad.isfinite().all()


def test_sizes_of_zero():
    for queries, keys in ((0, 5), (5, 0), (0, 0)):
        query, key, value = leaf(2, 3, queries, 8), leaf(2, 3, keys, 8), leaf(2, 3, keys, 8)
        out = ours(query, key, value)
        assert out.shape == (2, 3, queries, 8) and (out == 0).all()


def test_dropout():
    query, key = leaf(4, 8, 32, 8), leaf(4, 8, 32, 8)
    value = torch.ones(4, 8, 32, 8, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    out = ours(query, key, value, dropout_p=0.25)
    assert not torch.equal(out, torch.ones_like(out)) and abs(out.detach().mean().item() - 1) < 0.02
    torch.manual_seed(1)
    assert torch.equal(out, ours(query, key, value, None, 0.25))
    gone = ours(query, key, value, dropout_p=1.0)
    assert (gone == 0).all()
    assert (torch.autograd.grad(gone.sum(), value)[0] == 0).all()


def test_the_positional_order_is_torchs():
    query, key, value = (leaf(2, 3, 5, 8) for _ in range(3))
    mask = torch.rand(5, 5) < 0.9
    mask[:, 0] = True
    want = F.scaled_dot_product_attention(query, key, value, mask, 0.0, False, scale=0.5)
    torch.testing.assert_close(ours(query, key, value, mask, 0.0, False, 0.5, False), want)


def test_autocast_and_compile():
    query, key, value = (leaf(2, 3, 16, 8, dtype=torch.float32) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(query, key, value).dtype == torch.bfloat16
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for options in ({}, {"is_causal": True}, {"attn_mask": torch.rand(16, 16) < 0.9}):
        torch.testing.assert_close(compiled(query, key, value, **options), ours(query, key, value, **options))


def test_double_backward_needs_exact():
    query, key, value = (leaf(1, 2, 4, 8) for _ in range(3))
    assert torch.autograd.gradgradcheck(lambda *x: ours(*x, store="exact"), (query, key, value))
    with pytest.raises(RuntimeError, match="exact"):
        (grad,) = torch.autograd.grad(ours(query, key, value).square().sum(), query, create_graph=True)
        grad.sum().backward()


def test_mistakes_are_named():
    x = torch.randn(2, 4, 5, 8)
    two = torch.randn(2, 2, 5, 8)
    square = torch.ones(5, 5, dtype=torch.bool)
    for arguments, options, words in (
        ((x, x, x, square), {"is_causal": True}, ["is_causal", "attn_mask None"]),
        ((x[0, 0, 0], x, x), {}, ["query", "two dimensions", "[8]"]),
        ((x, two, two), {}, ["[2, 4, 5, 8], [2, 2, 5, 8]", "enable_gqa"]),
        ((x, torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)), {"enable_gqa": True}, ["key's heads", "4", "got 3"]),
        ((x[0, 0], x[0, 0], x[0, 0]), {"enable_gqa": True}, ["enable_gqa", "heads", "[5, 8]"]),
        ((x, x, x, square[:3]), {}, ["attn_mask", "[2, 4, 5, 5]", "[3, 5]"]),
        ((x, x, x, square.expand(3, 2, 4, 5, 5)), {}, ["attn_mask", "[3, 2, 4, 5, 5]"]),
        ((x, x, x, square.int()), {}, ["attn_mask", "boolean", "torch.int32"]),
        ((x, x, x, square.double()), {}, ["attn_mask", "torch.float64"]),
        ((x, x, x), {"dropout_p": 1.5}, ["dropout_p", "1.5"]),
        ((x, x, x), {"store": "recompile"}, ["recompute"]),
        ((x, x.double(), x), {}, ["key"]),
        ((x, x[..., :4], x), {}, ["key"]),
        ((x, x, x[:, :, :3]), {}, ["value"]),
    ):
        with pytest.raises(RuntimeError) as error:
            ours(*arguments, **options)
        message = str(error.value)
        assert all(word in message for word in words), message
        assert "\n" not in message.strip() and len(message) < 300
