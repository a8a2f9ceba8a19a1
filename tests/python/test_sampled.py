"""Policy sampled: which keys are drawn, with what probability, and what the gradient makes of them."""

import math

import pytest
import reference
import torch

import remnant

TILE = reference.SAMPLE_ROWS
ROWS, KEYS = 2 * TILE + 6, 61  # three tiles, the last one of 6 rows


def leaf(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


def inputs(queries=ROWS, keys=KEYS, heads=4, kv_heads=2, dtype=torch.float64, sharpness=2.0):
    q, k, v = leaf(1, heads, queries, 5), leaf(1, kv_heads, keys, 5), leaf(1, kv_heads, keys, 6)
    return [(sharpness * q).detach().to(dtype).requires_grad_(), *(x.detach().to(dtype).requires_grad_() for x in (k, v))]


def boolean(*shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(9)) < 0.5
    if shape[-2] > 1:
        mask[..., 3:7, :] = False  # rows without a key
        if shape[-2] > 2 * TILE:
            mask[..., TILE : 2 * TILE, :] = False  # and a tile of them
    return mask


def additive(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64).requires_grad_()


CASES = {
    "none": {},
    "causal": {"causal": True},
    "window": {"window": (6, 4)},
    "padding": {"mask": boolean(1, 1, 1, KEYS)},
    "boolean": {"mask": boolean(1, 4, ROWS, KEYS)},
    "additive": {"mask": additive(ROWS, KEYS)},
    "additive, a bias a key": {"mask": additive(4, 1, KEYS), "causal": True},
    "additive, a bias a row": {"mask": additive(1, 4, ROWS, 1)},
}


def residuals(q, k, v, m, seed, mask=None, causal=False, window=(), dropout=0.0):
    """output, lse, drawn keys, their inverse probabilities, seed"""
    with torch.no_grad():
        o, lse, _, codes, table, used = torch.ops.remnant.attention_forward(
            q, k, v, mask, causal, dropout, 1 / math.sqrt(q.size(-1)), f"sampled:m={m}", list(window), True,
            torch.Generator().manual_seed(seed),
        )  # fmt: skip
    return o, lse, codes, table, used


def run(q, k, v, policy, seed, grad, **options):
    generator = torch.Generator().manual_seed(seed)
    o = remnant.attention(q, k, v, policy=policy, generator=generator, **options)
    mask = options.get("mask")
    wanted = [q, k, v] + ([mask] if mask is not None and mask.requires_grad else [])
    return torch.autograd.grad(o, wanted, grad)


def probabilities(q, k, m, **options):
    """Inclusion probabilities of every tile, [B, H, tiles, Nk], from the float64 softmax."""
    p = reference.softmax(reference.logits(q, k, **options))
    w = reference.tile_weights(p)
    pi = [reference.inclusion(row, m) for row in w.reshape(-1, w.size(-1)).tolist()]
    return torch.tensor(pi, dtype=torch.float64).reshape(w.shape)


# --- the draw --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("m", [1, 7, 30])
def test_the_drawn_keys_are_those_of_the_definition(case, m):
    q, k, v = inputs()
    # Dropout, so that the seed comes back.
    _, _, codes, table, seed = residuals(q, k, v, m, seed=2, dropout=0.1, **CASES[case])
    pi = probabilities(q, k, m, **CASES[case])
    assert codes.dtype == torch.int32 and codes.shape == table.shape == (1, 4, 3, m)
    for head in range(4):
        for tile in range(3):
            row = pi[0, head, tile].tolist()
            want = reference.systematic(row, reference.tile_uniform(seed, head, tile))
            slots = codes[0, head, tile].tolist()
            assert slots == want + [-1] * (m - len(want))
            weights = [1 / row[j] for j in want] + [0.0] * (m - len(want))
            torch.testing.assert_close(table[0, head, tile], torch.tensor(weights, dtype=torch.float64))


@pytest.mark.parametrize("case", CASES)
def test_as_many_keys_are_drawn_as_asked_or_as_there_are(case):
    q, k, v = inputs()
    attended = (reference.tile_weights(reference.softmax(reference.logits(q, k, **CASES[case]))) > 0).sum(-1)
    for m in (1, 5, 20, 200):
        for seed in range(20):
            _, _, codes, table, _ = residuals(q, k, v, m, seed, **CASES[case])
            assert torch.equal((codes >= 0).sum(-1), attended.clamp_max(m))
            assert ((table >= 1 - 1e-9) == (codes >= 0)).all()
            assert (table[codes < 0] == 0).all()
            used = codes.clamp_min(0).diff(dim=-1)[codes[..., 1:] >= 0]
            assert (used > 0).all(), "drawn keys are not ascending"


def test_keys_are_drawn_as_often_as_their_probability_says():
    draws, m = 2000, 9
    q, k, v = inputs(heads=1, kv_heads=1, sharpness=12.0)
    pi = probabilities(q, k, m)[0, 0]
    # Every head draws on its own.
    codes = residuals(*(x.expand(1, draws, -1, -1) for x in (q, k, v)), m, seed=1)[2].long()
    counts = torch.zeros(1, draws, 3, KEYS, dtype=torch.float64).scatter_(-1, codes, 1.0).sum((0, 1))
    certain = pi == 1
    assert certain.any() and (counts[certain] == draws).all()
    telling = ~certain & (pi * draws > 20)
    z = (counts - draws * pi)[telling] / (draws * pi * (1 - pi))[telling].sqrt()
    assert telling.sum() > 60
    # At most 183 binomial deviations: one beyond 5 with a probability of 1e-4.
    assert z.abs().max() < 5
    rare = ~certain & ~telling & (pi > 0)
    assert rare.any()
    assert abs(counts[rare].sum() - draws * pi[rare].sum()) < 5 * (draws * pi[rare].sum()).sqrt()


def test_tiles_heads_and_calls_draw_apart():
    # Equal scores everywhere: the keys of a tile say what its random number is.
    q, k, v = (torch.zeros(2, 8, n, 1) for n in (TILE * 16, 64, 64))
    first = [residuals(q, k, v, 1, seed)[2].flatten().double() / 64 for seed in range(8)]
    numbers = torch.stack(first)  # 8 x 256 nearly uniform numbers
    assert abs(numbers.mean() - 0.5 + 1 / 128) < 5 * math.sqrt(1 / 12 / numbers.numel())
    assert abs(numbers.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / numbers.numel())
    centred = numbers - numbers.mean()
    for other in (centred.roll(1, 0), centred.roll(1, 1), centred.roll(16, 1), centred.roll(128, 1)):
        assert abs((centred * other).mean() * 12) < 5 / math.sqrt(numbers.numel())


def test_probabilities_far_apart():
    # A logit of -80 is 2e-35 of the row, of -200 nothing in float32; both are positive in float64.
    scores = torch.tensor([0.0, -80.0, -1.0, -200.0, -40.0, -1.5, -300.0, -2.0], dtype=torch.float64)
    q = torch.ones(1, 1, 40, 1, dtype=torch.float64)
    for dtype in (torch.float64, torch.float32):
        for m in (1, 2, 3, 5, 8):
            for seed in range(10):
                _, _, codes, table, _ = residuals(
                    q.to(dtype), scores.to(dtype).reshape(1, 1, 8, 1), torch.zeros(1, 1, 8, 1, dtype=dtype), m, seed
                )
                assert (codes >= 0).sum(-1).max() <= m
                assert table.isfinite().all()
    pi = probabilities(q, scores.reshape(1, 1, 8, 1), 3)
    assert (pi > 0).all()


def test_the_draw_does_not_depend_on_a_number_added_to_all_logits():
    # Causal and beyond a tile of keys: some tiles are visited by none of a row's keys.
    q, k, v = inputs(queries=300, keys=300)
    mask = torch.zeros(1, 1, dtype=torch.float64)
    want = residuals(q, k, v, 20, seed=5, mask=mask, causal=True)[2]
    for shift in (-1024.0, 1024.0):
        assert torch.equal(residuals(q, k, v, 20, seed=5, mask=mask + shift, causal=True)[2], want)


# --- the gradient ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_gradient_is_the_dense_one_of_the_reweighted_softmax(case, dropout, kv_heads):
    q, k, v = inputs(kv_heads=kv_heads)
    options = CASES[case]
    o, lse, codes, table, _ = residuals(q, k, v, 11, seed=3, dropout=dropout, **options)
    z = reference.logits(q, k, **options)
    p = reference.softmax(z)
    torch.testing.assert_close(lse, torch.logsumexp(z, -1))
    eye = torch.eye(KEYS, dtype=torch.float64).expand(1, kv_heads, KEYS, KEYS)
    seen = remnant.attention(q.detach(), k.detach(), eye, dropout=dropout,
                             generator=torch.Generator().manual_seed(3), **options)  # fmt: skip
    drop = torch.where(p > 0, seen.detach() / p.clamp_min(1e-300), 0.0)
    torch.testing.assert_close(o, reference.output(p, v, drop), rtol=1e-7, atol=1e-7)
    grad = torch.randn_like(o)
    want = reference.gradients(q, k, v, grad, reference.reweighted(p, codes, table), drop=drop, delta_of=p)
    got = run(q, k, v, "sampled:m=11", 3, grad, dropout=dropout, **options)
    for x, y in zip(got, want[:3], strict=False):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)
    if len(got) > 3:
        torch.testing.assert_close(got[3], want.mask(options["mask"].shape), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("m", [KEYS, 1000])
def test_with_every_key_drawn_the_gradient_is_exact(case, dropout, m):
    q, k, v = inputs()
    grad = torch.randn(1, 4, ROWS, 6, dtype=torch.float64)
    got = run(q, k, v, f"sampled:m={m}", 3, grad, dropout=dropout, **CASES[case])
    want = run(q, k, v, "recompute", 3, grad, dropout=dropout, **CASES[case])
    tolerance = 1e-6 if dropout else 1e-9  # the kernels scale what dropout keeps in float32
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_gradients_are_unbiased(case, dropout):
    """The mean of what a draw adds to the exact gradient under the same dropout mask, in standard errors.

    Projections on fixed random directions, 32 for each gradient, are nearly normal: with about 1,700 of them in all
    cases together, one beyond 5 has a probability of 1e-3. Single entries are not: some hang on a key that is drawn
    once in a thousand times; how often each is drawn has a test of its own.
    """
    draws, m = 400, 24
    q, k, v = inputs(heads=2, kv_heads=1, sharpness=1.0)
    options = dict(CASES[case])
    mask = options.get("mask")
    if mask is not None:
        shape = (1,) * (4 - mask.dim()) + mask.shape
        mask = mask.detach().reshape(shape)[:, :2].expand(draws, -1, -1, -1).clone()
        options["mask"] = mask.requires_grad_(mask.dtype != torch.bool)
    grad = torch.randn(1, 2, ROWS, 6, dtype=torch.float64).expand(draws, -1, -1, -1)
    tensors = [x.detach().expand(draws, -1, -1, -1).clone().requires_grad_() for x in (q, k, v)]
    got = run(*tensors, f"sampled:m={m}", 4, grad, dropout=dropout, **options)
    want = run(*tensors, "recompute", 4, grad, dropout=dropout, **options)
    for name, x, y in zip(("query", "key", "value", "mask"), got, want, strict=False):
        added = (x - y).flatten(1)
        directions = torch.randn(added.size(1), 32, dtype=torch.float64)
        projected = added @ directions
        assert (projected.std(0) > 0).all(), f"{name} does not depend on the draw"
        z = projected.mean(0) / (projected.std(0) / math.sqrt(draws))
        assert z.abs().max() < 5, name


@pytest.mark.parametrize("options", [{"causal": True, "dropout": 0.25}, {"window": (200, 3)}], ids=str)
def test_gradients_are_unbiased_beyond_a_tile_of_keys(options):
    """Rows of more keys than the CPU's kernels look at together, weighed while sums still grow; false alarms: 2e-4."""
    draws, m = 400, 24
    q, k, v = inputs(queries=TILE + 9, keys=300, heads=2, kv_heads=1, sharpness=1.0)
    grad = torch.randn(1, 2, TILE + 9, 6, dtype=torch.float64).expand(draws, -1, -1, -1)
    tensors = [x.detach().expand(draws, -1, -1, -1).clone().requires_grad_() for x in (q, k, v)]
    got = run(*tensors, f"sampled:m={m}", 4, grad, **options)
    want = run(*tensors, "recompute", 4, grad, **options)
    for name, x, y in zip(("query", "key", "value"), got, want, strict=True):
        added = (x - y).flatten(1)
        projected = added @ torch.randn(added.size(1), 32, dtype=torch.float64)
        z = projected.mean(0) / (projected.std(0) / math.sqrt(draws))
        assert z.abs().max() < 5, name


def test_gradient_error_shrinks_with_m():
    q, k, v = (x.detach().expand(40, -1, -1, -1).clone().requires_grad_() for x in inputs())
    grad = torch.randn(1, 4, ROWS, 6, dtype=torch.float64).expand(40, -1, -1, -1)
    want = run(q, k, v, "recompute", 0, grad)
    errors = []
    for m in (4, 12, 36, 61):
        got = run(q, k, v, f"sampled:m={m}", 0, grad)
        errors.append(sum((x - y).square().sum().item() for x, y in zip(got, want, strict=True)))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 10 * errors[2] and errors[-1] < 1e-15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    # Few keys carry nearly all: the same ones are certain, the others weigh little.
    q, k, v = inputs(dtype=dtype)
    o, lse, codes, table, _ = residuals(q, k, v, 20, seed=1, causal=True, dropout=0.2)
    assert lse.dtype == table.dtype == torch.float32 and o.dtype == dtype
    p = reference.softmax(reference.logits(q, k, causal=True))
    eye = torch.eye(KEYS, dtype=dtype).expand(1, 2, KEYS, KEYS)
    seen = remnant.attention(q.detach(), k.detach(), eye, causal=True, dropout=0.2,
                             generator=torch.Generator().manual_seed(1)) != 0  # fmt: skip
    threshold = round(0.2 * 65536)
    drop = seen.double() * 65536 / (65536 - threshold)
    grad = torch.randn(o.shape, dtype=torch.float64).to(dtype)
    want = reference.gradients(q, k, v, grad, reference.reweighted(p, codes, table), drop=drop, delta_of=p)
    got = run(q, k, v, "sampled:m=20", 1, grad, causal=True, dropout=0.2)
    allowance = 1e-4 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for x, y in zip(got, want[:3], strict=True):
        assert x.dtype == dtype
        assert ((x.double() - y).norm() / y.norm()).item() < allowance


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["query", "key"])
def test_nan_reaches_the_gradient_whatever_is_drawn(bad, where):
    q, k, v = (x.detach() for x in inputs(queries=33, keys=200, heads=1, kv_heads=1))
    (q if where == "query" else k)[0, 0, 3, 2] = bad
    tensors = [x.requires_grad_() for x in (q, k, v)]
    for seed in range(10):
        dq, dk, dv = run(*tensors, "sampled:m=2", seed, torch.ones(1, 1, 33, 6, dtype=torch.float64))
        assert not dq.isfinite().all() and not dk.isfinite().all() and not dv.isfinite().all()
        if where == "query":
            assert dq[0, 0, 3].isnan().all()
            assert dq[0, 0, [*range(3), *range(4, 33)]].isfinite().all()


def test_backward_memory_is_that_of_the_drawn_keys():
    n, m = 4096, 16
    q, k, v = (torch.randn(1, 1, n, 8, requires_grad=True) for _ in range(3))
    mask = torch.zeros(n, requires_grad=True)
    o = remnant.attention(q, k, v, mask=mask, policy=f"sampled:m={m}", dropout=0.1)
    seen = reference.allocations(lambda: torch.autograd.grad(o.sum(), [q, k, v, mask]))
    # Some twenty tensors of n m elements and more, of up to 8 bytes: far from n x n.
    assert seen.peak < 200 * n * m < n * n
