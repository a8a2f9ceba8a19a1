"""Dropout and stochastic rounding, by their statistics; seeds are fixed, bounds lie at 4.5 standard errors."""

import math

import pytest
import reference
import torch

import remnant

LIMIT = 4.5


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def dropped(batch, heads, queries, keys, rate, seed):
    """True where the op drops; and the factor that it gives the others."""
    q = torch.zeros(batch, heads, queries, 1)
    k = torch.zeros(batch, heads, keys, 1)
    v = (torch.eye(keys) * keys).expand(batch, heads, keys, keys)
    generator = torch.Generator().manual_seed(seed)
    factors = remnant.attention(q, k, v, dropout=rate, generator=generator)
    return factors == 0, factors[factors != 0]


def deviation(count, total, probability):
    return (count - total * probability) / math.sqrt(total * probability * (1 - probability))


def correlation(x, y):
    """In standard errors of what independent draws give."""
    x, y = x.double().flatten(), y.double().flatten()
    x, y = x - x.mean(), y - y.mean()
    return ((x @ y) / (x.norm() * y.norm())).item() * math.sqrt(x.numel())


# --- dropout ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.1, 0.25, 0.5, 0.9, 1 / 3])
def test_dropout_rate(rate):
    gone, factors = dropped(2, 4, 256, 256, rate, seed=1)
    threshold = round(rate * 65536)
    assert abs(deviation(gone.sum().item(), gone.numel(), threshold / 65536)) < LIMIT
    torch.testing.assert_close(factors, torch.full_like(factors, 65536 / (65536 - threshold)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("keys", [100, 257])
def test_dropout_rate_of_every_row_column_and_head(rate, keys):
    gone, _ = dropped(4, 8, 128, keys, rate, seed=2)
    expected = round(rate * 65536) / 65536
    for axes in ((3,), (2,), (2, 3), (0, 1, 2), (0, 1, 3), (1, 2, 3), (0, 2, 3)):
        counts = gone.sum(axes).double()
        each = gone.numel() // counts.numel()
        z = (counts - each * expected) / math.sqrt(each * expected * (1 - expected))
        # The sum of squares of that many nearly normal deviations, and the worst one.
        freedom = counts.numel()
        assert abs((z.square().sum().item() - freedom) / math.sqrt(2 * freedom)) < LIMIT, axes
        assert z.abs().max() < 6, axes


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_dropout_of_neighbours_is_independent(rate):
    gone, _ = dropped(8, 8, 96, 136, rate, seed=3)
    for axis, lags in ((3, [*range(1, 18), 32, 64]), (2, [*range(1, 9), 16]), (1, [1, 2, 4]), (0, [1, 2, 4])):
        for lag in lags:
            n = gone.size(axis) - lag
            found = correlation(gone.narrow(axis, 0, n), gone.narrow(axis, lag, n))
            assert abs(found) < LIMIT, (axis, lag)
    for shift in (1, -1):  # diagonals
        found = correlation(gone[:, :, 1:, 1:-1], gone[:, :, :-1].roll(shift, -1)[..., 1:-1])
        assert abs(found) < LIMIT, shift


def test_dropout_of_a_pair_happens_as_often_as_independence_says():
    gone, _ = dropped(8, 8, 96, 136, 0.5, seed=4)
    for a, b in ((0, 1), (0, 7), (3, 8), (7, 8)):
        for first in (False, True):
            for second in (False, True):
                both = (gone[..., a] == first) & (gone[..., b] == second)
                assert abs(deviation(both.sum().item(), both.numel(), 0.25)) < LIMIT


def test_dropout_under_different_seeds_is_independent():
    masks = [dropped(2, 2, 128, 128, 0.5, seed)[0] for seed in range(6)]
    for i in range(6):
        for j in range(i):
            assert abs(correlation(masks[i], masks[j])) < LIMIT


def test_dropout_of_successive_calls_is_independent():
    generator = torch.Generator().manual_seed(0)
    v = (torch.eye(128) * 128).expand(2, 2, 128, 128)
    zero = torch.zeros(2, 2, 128, 1)
    masks = [remnant.attention(zero, zero, v, dropout=0.5, generator=generator) == 0 for _ in range(5)]
    for i in range(5):
        for j in range(i):
            assert abs(correlation(masks[i], masks[j])) < LIMIT


def test_dropout_keeps_the_mean():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 4, dtype=torch.float64) for n in (9, 40, 40))
    want = remnant.attention(q, k, v)
    draws = torch.stack([remnant.attention(q, k, v, dropout=0.3) for _ in range(600)])
    error = (draws.mean(0) - want) / (draws.std(0) / math.sqrt(len(draws)))
    assert error.abs().max() < LIMIT
    assert abs(error.square().mean().item() - 1) < 1  # nor is the spread imagined


# --- stochastic rounding ---------------------------------------------------------------------------

ROWS, KEYS = 24, 61


def problem(seed=0, rows=ROWS, keys=KEYS):
    torch.manual_seed(seed)
    q, k, v = (torch.randn(1, 1, n, 5, dtype=torch.float64) for n in (rows, keys, keys))
    return (2 * q).requires_grad_(), k.requires_grad_(), v.requires_grad_()


def kept_softmax(q, k, bits, seed, **options):
    """The softmax as quantized keeps it, read off value's gradient under an identity from above."""
    v = torch.zeros(1, 1, k.size(2), q.size(2), dtype=torch.float64, requires_grad=True)
    generator = torch.Generator().manual_seed(seed)
    o = remnant.attention(q.detach(), k.detach(), v, policy=f"quantized:bits={bits}", generator=generator, **options)
    (dv,) = torch.autograd.grad(o, v, torch.eye(q.size(2), dtype=torch.float64).expand(1, 1, -1, -1))
    return dv.transpose(-2, -1)


def rounding(p, bits):
    """Step between levels and the variance of rounding to one of the two next to p."""
    step = p.amax(-1, keepdim=True) / (2**bits - 1)
    level = torch.where(step > 0, p / step, torch.zeros_like(p))
    fraction = level - level.floor()
    return step, level, fraction * (1 - fraction) * step.square()


MASKS = {
    "none": {},
    "causal": {"causal": True},
    "boolean": {"mask": torch.rand(ROWS, KEYS, generator=torch.Generator().manual_seed(9)) < 0.5},
    "window": {"window": (6, 4)},
}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("mask", MASKS)
def test_quantized_keeps_one_of_the_two_nearest_levels(bits, mask):
    q, k, _ = problem()
    p = reference.softmax(reference.logits(q, k, **MASKS[mask]))
    step, level, _ = rounding(p, bits)
    for seed in range(5):
        kept = kept_softmax(q, k, bits, seed, **MASKS[mask])
        code = torch.where(step > 0, kept / step, torch.zeros_like(p))
        torch.testing.assert_close(code, code.round(), rtol=0, atol=1e-9)
        assert ((code.round() - level).abs() < 1 + 1e-6).all()
        assert (kept[p == 0] == 0).all()
        assert code.max() <= 2**bits - 1 + 1e-9
        highest = p.argmax(-1, keepdim=True)  # a level itself: it is kept whatever the draw
        torch.testing.assert_close(kept.gather(-1, highest), p.gather(-1, highest), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("mask", MASKS)
def test_quantized_is_unbiased_with_the_variance_of_stochastic_rounding(bits, mask):
    draws = 400
    q, k, _ = problem()
    p = reference.softmax(reference.logits(q, k, **MASKS[mask]))
    step, level, variance = rounding(p, bits)
    errors = torch.stack([kept_softmax(q, k, bits, seed, **MASKS[mask]) for seed in range(draws)]) - p
    # Where one of the levels is nearly certain, 400 draws say nothing.
    telling = variance > 0.02 * step.square()
    freedom = int(telling.sum())
    assert freedom > 30
    z = errors.mean(0)[telling] / (variance[telling] / draws).sqrt()
    assert abs(z.mean().item() * math.sqrt(freedom)) < LIMIT
    assert abs((z.square().sum().item() - freedom) / math.sqrt(2 * freedom)) < LIMIT
    ratio = errors.square().mean(0)[telling] / variance[telling]
    fraction = (level - level.floor())[telling]
    # Of a squared error of rounding: var(e^2) / var(e)^2 = 1 / (f (1 - f)) - 4.
    spread = (1 / (fraction * (1 - fraction)) - 4).mean().item() / (draws * freedom)
    assert abs(ratio.mean().item() - 1) < LIMIT * math.sqrt(spread) + 1e-6


def test_rounding_of_neighbours_is_independent():
    q, k, _ = problem(rows=200, keys=160)
    p = reference.softmax(reference.logits(q, k))
    _, _, variance = rounding(p, 4)
    z = torch.cat([(kept_softmax(q, k, 4, seed) - p) / variance.sqrt().clamp_min(1e-12) for seed in range(4)])
    z = z.clamp(-3, 3)
    for axis, lags in ((3, [1, 2, 3, 4, 5, 8, 16]), (2, [1, 2, 4])):
        for lag in lags:
            n = z.size(axis) - lag
            assert abs(correlation(z.narrow(axis, 0, n), z.narrow(axis, lag, n))) < LIMIT, (axis, lag)
    assert abs(correlation(z[:2], z[2:])) < LIMIT


def gradients_over_seeds(q, k, v, grad, bits, draws, **options):
    results = []
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        o = remnant.attention(q, k, v, policy=f"quantized:bits={bits}", generator=generator, **options)
        results.append(torch.autograd.grad(o, [q, k, v], grad))
    return [torch.stack(x) for x in zip(*results, strict=True)]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("mask", MASKS)
def test_gradients_of_quantized_are_unbiased(bits, mask):
    draws = 300
    q, k, v = problem()
    grad = torch.randn(1, 1, ROWS, 5, dtype=torch.float64)
    p = reference.softmax(reference.logits(q, k, **MASKS[mask]))
    want = reference.gradients(q, k, v, grad, p)
    drawn = gradients_over_seeds(q, k, v, grad, bits, draws, **MASKS[mask])
    for name, draw, exact in zip(("query", "key", "value"), drawn, want[:3], strict=True):
        moving = draw.std(0) > 1e-12
        z = ((draw.mean(0) - exact) / (draw.std(0) / math.sqrt(draws)))[moving]
        # The entries of a row share their rounding errors: count the rows, not the entries.
        freedom = z.numel() / 5
        assert abs(z.square().mean().item() - 1) < LIMIT * math.sqrt(2 / freedom), name
        assert abs(z.mean().item()) * math.sqrt(freedom) < LIMIT, name


@pytest.mark.parametrize("bits", [2, 4])
def test_gradient_variance_of_quantized_is_that_of_stochastic_rounding(bits):
    draws = 400
    q, k, v = problem()
    grad = torch.randn(1, 1, ROWS, 5, dtype=torch.float64)
    p = reference.softmax(reference.logits(q, k))
    _, _, variance = rounding(p, bits)
    a = grad @ v.detach().transpose(-2, -1)
    # delta comes from the exact output: every gradient is linear in the rounding errors, which are independent.
    slope = (a - (p * a).sum(-1, keepdim=True)).square()
    c = 1 / math.sqrt(5)
    theory = [
        c**2 * (variance * slope) @ k.detach().square(),
        c**2 * (variance * slope).transpose(-2, -1) @ q.detach().square(),
        variance.transpose(-2, -1) @ grad.square(),
    ]
    drawn = gradients_over_seeds(q, k, v, grad, bits, draws)
    for name, draw, want in zip(("query", "key", "value"), drawn, theory, strict=True):
        ratio = (draw.var(0).sum() / want.sum()).item()
        assert abs(ratio - 1) < 0.1, name


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantized_under_dropout_is_unbiased_for_the_mask_it_drew(bits):
    n, draws, rate = 40, 300, 0.25
    q, k, _ = problem(rows=n, keys=n)
    p = reference.softmax(reference.logits(q, k, causal=True))
    step, _, variance = rounding(p, bits)
    keep = 1 - round(rate * 65536) / 65536
    total, count = torch.zeros_like(p), torch.zeros_like(p)
    eye = torch.eye(n, dtype=torch.float64).expand(1, 1, n, n)
    for seed in range(draws):
        v = eye.clone().requires_grad_()
        o = remnant.attention(
            q.detach(), k.detach(), v, causal=True, dropout=rate, policy=f"quantized:bits={bits}",
            generator=torch.Generator().manual_seed(seed),
        )  # fmt: skip
        (dv,) = torch.autograd.grad(o, v, eye)
        kept = o.detach() != 0
        rounded = dv.transpose(-2, -1)
        assert (rounded[~kept] == 0).all(), "the backward dropped other elements than the forward"
        total += torch.where(kept, rounded * keep - p, torch.zeros_like(p))
        count += kept
    telling = variance > 0.02 * step.square()
    z = (total / (variance * count).sqrt())[telling]
    freedom = z.numel()
    assert abs((z.square().sum().item() - freedom) / math.sqrt(2 * freedom)) < LIMIT
    assert abs(z.mean().item() * math.sqrt(freedom)) < LIMIT


def test_rounding_and_dropout_are_drawn_apart():
    n = 120
    q, k, _ = problem(rows=n, keys=n)
    p = reference.softmax(reference.logits(q, k))
    _, _, variance = rounding(p, 4)
    telling = variance > 0
    pairs = []
    for seed in range(6):
        up = kept_softmax(q, k, 4, seed) > p  # without dropout the draws for rounding are the same
        gone, _ = dropped(1, 1, n, n, 0.5, seed)
        pairs.append((up[telling], gone[telling]))
    up, gone = (torch.cat(x) for x in zip(*pairs, strict=True))
    assert abs(correlation(up, gone)) < LIMIT


@pytest.mark.parametrize("paper_text", [False, True])
def test_curve_error_shrinks_with_m_and_vanishes_at_half_the_row(paper_text):
    torch.manual_seed(0)
    q, k, v = problem(rows=32, keys=64)
    grad = torch.randn(1, 1, 32, 5, dtype=torch.float64)
    want = reference.gradients(q, k, v, grad, reference.softmax(reference.logits(q, k)))
    errors = []
    for m in (1, 4, 16, 32):
        policy = f"curve:m={m}" + (",paper_text" if paper_text else "")
        got = torch.autograd.grad(remnant.attention(q, k, v, policy=policy), [q, k, v], grad)
        errors.append(sum(((x - y).norm() / y.norm()).item() for x, y in zip(got, want[:3], strict=True)))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1e-3 and errors[-1] < 1e-9
