"""softmax_approximation against the paper's equations, and the ten faults of the paper's release."""

import copy
import math

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import remnant
from remnant import softmax_approximation

NOTHING = -math.inf


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def energies(*shape, dtype=torch.float64, scale=2.0):
    return (scale * torch.randn(*shape, dtype=torch.float64)).to(dtype).requires_grad_()


def masked(energy, mask):
    z = energy.detach().double()
    return z if mask is None else torch.where(mask.expand_as(z), z, torch.tensor(NOTHING, dtype=z.dtype))


def softmax_gradient(p, grad):
    return p * (grad - (p * grad).sum(-1, keepdim=True))


def check(energy, mask=None, m=5, paper_text=False, tolerance=1e-9):
    out = softmax_approximation(energy, mask, m, paper_text=paper_text)
    z = masked(energy, mask)
    assert out.shape == energy.shape and out.dtype == energy.dtype
    torch.testing.assert_close(out, reference.softmax(z).to(out.dtype), rtol=tolerance, atol=tolerance)
    grad = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, energy, grad)
    want = softmax_gradient(reference.curve(z, m, paper_text), grad.double())
    torch.testing.assert_close(got, want.to(got.dtype), rtol=tolerance, atol=tolerance)
    return out, got


def decoded(z, policy, **options):
    """The softmax as attention's backward sees it: dv under an identity as upstream gradient."""
    rows, keys = z.shape[-2:]
    q, k = torch.zeros(1, 1, rows, 1, dtype=z.dtype), torch.zeros(1, 1, keys, 1, dtype=z.dtype)
    v = torch.zeros(1, 1, keys, rows, dtype=z.dtype, requires_grad=True)
    o = remnant.attention(q, k, v, mask=z, policy=policy, **options)
    (dv,) = torch.autograd.grad(o, v, torch.eye(rows, dtype=z.dtype).expand(1, 1, rows, rows))
    return dv[0, 0].T


# --- the op ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("paper_text", [False, True])
@pytest.mark.parametrize("m", [1, 2, 5, 12])
@pytest.mark.parametrize("keys", [1, 2, 7, 25, 97, 257])
def test_matches_the_paper(keys, m, paper_text):
    check(energies(3, 4, keys), m=m, paper_text=paper_text)


@pytest.mark.parametrize("keys, m", [(2, 1), (10, 5), (9, 5), (40, 20), (1, 3), (200, 100)])
@pytest.mark.parametrize("paper_text", [False, True])
def test_rows_of_at_most_2m_keys_are_exact(keys, m, paper_text):
    energy = energies(6, keys)
    out = softmax_approximation(energy, None, m, paper_text=paper_text)
    grad = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, energy, grad)
    torch.testing.assert_close(got, softmax_gradient(reference.softmax(energy.detach()), grad), rtol=1e-10, atol=1e-12)
    policy = f"curve:m={m}" + (",paper_text" if paper_text else "")
    z = energy.detach()
    torch.testing.assert_close(decoded(z, policy), reference.softmax(z), rtol=1e-10, atol=1e-14)


def test_rows_made_short_by_a_mask_are_exact():
    energy = energies(30, 50)
    mask = torch.zeros(30, 50, dtype=torch.bool)
    for row in range(30):
        mask[row, torch.randperm(50)[: row % 11]] = True
    out = softmax_approximation(energy, mask, 5)
    grad = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, energy, grad)
    want = softmax_gradient(reference.softmax(masked(energy, mask)), grad)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_default_sums_to_one_and_keeps_the_lowest_while_the_papers_text_does_not():
    z = 2 * torch.randn(8, 60, dtype=torch.float64)
    p = reference.softmax(z)
    rescaled, text = decoded(z, "curve:m=3"), decoded(z, "curve:m=3,paper_text")
    torch.testing.assert_close(rescaled.sum(-1), torch.ones(8, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert ((text.sum(-1) - 1).abs() > 1e-3).all()
    highest, lowest = p.topk(3).indices, p.topk(3, largest=False).indices
    for kept in (highest, lowest):
        torch.testing.assert_close(rescaled.gather(-1, kept), p.gather(-1, kept), rtol=1e-9, atol=0)
    # The text's curve ends beside l_m, not on it; l_1 and l_2 stay.
    torch.testing.assert_close(text.gather(-1, lowest[:, :2]), p.gather(-1, lowest[:, :2]), rtol=1e-9, atol=0)
    end = lowest[:, 2:]
    assert ((text.gather(-1, end) / p.gather(-1, end) - 1).abs() > 1e-3).all()


def test_every_element_of_the_middle_keeps_its_rank():
    z = 2 * torch.randn(8, 300, dtype=torch.float64)
    order = z.argsort(-1, descending=True)
    for m in (1, 4):
        middle = decoded(z, f"curve:m={m}").gather(-1, order)[:, m:-m]
        assert (middle[:, 1:] < middle[:, :-1]).all()


@pytest.mark.parametrize("shape", [(9,), (1, 9), (7, 1), (7, 9), (3, 1, 1, 9), (1, 4, 7, 9), (3, 4, 7, 9), (1,), ()])
def test_masks_of_every_broadcastable_shape(shape):
    for paper_text in (False, True):
        mask = torch.rand(shape) < 0.75
        out, grad = check(energies(3, 4, 7, 9), mask, 2, paper_text)
        gone = ~mask.expand(3, 4, 7, 9)
        assert (out[gone] == 0).all() and (grad[gone] == 0).all()


def test_rows_fully_masked_give_zero():
    energy = energies(4, 40)
    mask = torch.ones(4, 40, dtype=torch.bool)
    mask[2] = False
    out, grad = check(energy, mask, 3)
    assert (out[2] == 0).all() and (grad[2] == 0).all()
    assert out.isfinite().all() and grad.isfinite().all()


def test_layouts_of_energy_mask_and_gradient():
    base = torch.randn(30, 7, 6, dtype=torch.float64)
    for view in (base.permute(2, 1, 0), base[::2].transpose(0, 2), base[:1].expand(30, 7, 6), base[..., 1::2]):
        energy = view.detach().requires_grad_()
        mask = (torch.rand(energy.shape[-1], energy.shape[-2]) < 0.8).T
        check(energy, mask, 2)
        out = softmax_approximation(energy, mask, 2)
        (got,) = torch.autograd.grad(out.sum(), energy)  # an expanded gradient
        torch.testing.assert_close(got, torch.zeros_like(got), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(0,), (0, 9), (3, 0), (2, 0, 9)])
def test_sizes_of_zero(shape):
    energy = energies(*shape)
    out = softmax_approximation(energy, None, 2)
    (grad,) = torch.autograd.grad(out.sum(), energy)
    assert out.shape == grad.shape == energy.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keys", [40, 300])
def test_low_precision(dtype, keys):
    spaced = torch.stack([torch.randperm(keys) for _ in range(16)]) * (1 / 16 if keys == 300 else 1 / 8)
    energy = spaced.to(dtype).requires_grad_()
    order = energy.detach().double().sort(-1).values
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}[dtype]
    out = softmax_approximation(energy, None, 4)
    grad = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, energy, grad)
    z = energy.detach().double()
    assert dtype == torch.bfloat16 or (order.diff() > 0).all()
    want = softmax_gradient(reference.curve(z, 4), grad.double())
    assert (out.double() - reference.softmax(z)).norm() <= tolerance * reference.softmax(z).norm()
    assert (got.double() - want).norm() <= tolerance * want.norm()


def test_peaked_rows_whose_tail_underflows():
    z = torch.zeros(6, 64, dtype=torch.float32)
    z[:, 0] = torch.tensor([30.0, 60.0, 90.0, 120.0, 200.0, 1000.0])
    z -= torch.arange(64) * 0.25
    energy = z.requires_grad_()
    for m in (1, 4):
        for paper_text in (False, True):
            out = softmax_approximation(energy, None, m, paper_text=paper_text)
            (got,) = torch.autograd.grad(out, energy, torch.randn_like(out))
            assert got.isfinite().all()
            assert decoded(z.detach().double(), f"curve:m={m}").isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equal_logits_share_their_mass(dtype):
    # Ties may rank in any order, but a flat row must stay flat.
    z = torch.zeros(3, 50, dtype=dtype)
    torch.testing.assert_close(decoded(z, "curve:m=4"), torch.full_like(z, 1 / 50), rtol=1e-5, atol=0)


@settings(max_examples=100)
@given(
    st.integers(1, 40), st.integers(1, 6), st.booleans(), st.floats(0.1, 20), st.sampled_from([0.1, 0.6, 1.0]),
    st.integers(0, 2**31),
)  # fmt: skip
def test_any_row(keys, m, paper_text, spread, density, seed):
    torch.manual_seed(seed)
    check(energies(4, keys, scale=spread), torch.rand(4, keys) < density, m, paper_text, tolerance=1e-8)


@pytest.mark.parametrize("m", [1, 5, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("keys", [1, 2, 40, 97, 257, 1000])
def test_kept_bytes(m, dtype, keys):
    energy = energies(3, 7, keys, dtype=dtype)
    got, saved = reference.saved_bytes(lambda: softmax_approximation(energy, None, m))
    assert got == 21 * reference.curve_row_bytes(keys, m, energy.element_size())
    assert not any(x.is_floating_point() and x.shape == energy.shape and keys > 2 * m + 2 for x in saved)
    masked_bytes, _ = reference.saved_bytes(lambda: softmax_approximation(energy, torch.rand(keys) < 0.5, m))
    assert masked_bytes == got
    with torch.no_grad():
        assert reference.saved_bytes(lambda: softmax_approximation(energy, None, m))[0] == 0


def test_a_thousand_keys_keep_at_most_17_percent_of_softmax_input_and_output():
    energy = energies(2, 1000, dtype=torch.float32)
    got, _ = reference.saved_bytes(lambda: softmax_approximation(energy, None, 10))
    assert got <= 0.17 * 2 * energy.numel() * 4
    assert remnant.attention_residual_bytes("curve:m=10", 1, 2, 1000, 4) <= 0.17 * 2 * energy.numel() * 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("keys", [20, 150])
def test_nan_and_inf_reach_output_and_gradient(bad, keys):
    energy = energies(3, keys)
    with torch.no_grad():
        energy[1, 4] = bad
    out = softmax_approximation(energy, None, 3)
    (got,) = torch.autograd.grad(out, energy, torch.ones_like(out))
    assert out[1].isnan().all() and got[1].isnan().any()
    assert out[0].isfinite().all() and got[0].isfinite().all()
    energy = energies(3, keys)
    out = softmax_approximation(energy, None, 3)
    grad = torch.ones_like(out)
    grad[1, 4] = bad
    (got,) = torch.autograd.grad(out, energy, grad)
    assert not got[1].isfinite().any() and got[0].isfinite().all()


def test_backward_twice_and_double_backward():
    energy = energies(3, 40)
    out = softmax_approximation(energy, None, 3)
    grad = torch.randn_like(out)
    (first,) = torch.autograd.grad(out, energy, grad, retain_graph=True)
    (second,) = torch.autograd.grad(out, energy, grad, retain_graph=True)
    assert torch.equal(first, second)
    (created,) = torch.autograd.grad(out, energy, grad.requires_grad_(), create_graph=True)
    assert torch.equal(created, first)
    with pytest.raises(RuntimeError, match="gradient of its gradient"):
        created.sum().backward()


def test_release_spelling():
    energy = energies(3, 40)
    mask = torch.rand(3, 40) < 0.8
    want = softmax_approximation(energy, mask, 5)
    for have in (
        softmax_approximation(energy, mask),
        softmax_approximation(energy, mask, m=5),
        softmax_approximation.apply(energy, mask),
        softmax_approximation.apply(energy, mask, m=5),
    ):
        assert torch.equal(have, want)
    assert torch.equal(softmax_approximation.apply(energy, None, 3), softmax_approximation(energy, None, 3))
    assert "Saves for backward" in softmax_approximation.__doc__ and softmax_approximation.apply.__doc__
    assert repr(copy.deepcopy(softmax_approximation)) == "remnant.softmax_approximation"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_masks_of_zeros_and_ones(dtype):
    """The release compares its mask with 0, so that integers served as well."""
    energy = energies(2, 3, 4, 40)
    mask = torch.rand(2, 1, 1, 40) < 0.8
    for call in (softmax_approximation, softmax_approximation.apply):
        out = call(energy, mask.to(dtype) * 3, 4)
        assert torch.equal(out, softmax_approximation(energy, mask, 4))
        grad = torch.randn_like(out)
        (have,) = torch.autograd.grad(out, energy, grad)
        (want,) = torch.autograd.grad(softmax_approximation(energy, mask, 4), energy, grad)
        assert torch.equal(have, want)


def test_in_a_compiled_attention_of_the_release():
    def attend(query, key, value, mask):
        energy = query @ key.transpose(-2, -1) / math.sqrt(8)
        return softmax_approximation.apply(energy, mask, 2) @ value

    query, key, value = (torch.randn(2, 3, 20, 8, requires_grad=True) for _ in range(3))
    mask = torch.ones(2, 1, 1, 20, dtype=torch.bool)
    mask[1, ..., 15:] = False
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    results = []
    for function in (attend, compiled):
        out = function(query, key, value, mask)
        results.append([out, *torch.autograd.grad(out.square().sum(), (query, key, value))])
    for have, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(have, want)


def test_mistakes_are_named():
    energy = torch.randn(3, 9)
    for arguments, words in (
        ((torch.tensor(1.0),), ["energy", "dimension"]),
        ((torch.arange(9),), ["energy", "floating"]),
        ((energy, None, 0), ["m must be at least 1", "got 0"]),
        ((energy, torch.ones(3, 9)), ["mask", "boolean", "Float"]),
        ((energy, torch.ones(3, 8, dtype=torch.bool)), ["mask", "[3, 8]", "broadcast", "[3, 9]"]),
        ((energy, torch.ones(2, 3, 9, dtype=torch.bool)), ["mask", "3 dimensions", "2"]),
    ):
        for gradient in (False, True):
            first = arguments[0]
            if gradient and first.is_floating_point():
                first = first.clone().requires_grad_()
            with pytest.raises(RuntimeError) as error:
                softmax_approximation(first, *arguments[1:])
            message = str(error.value)
            assert all(word in message for word in words), message
            assert "\n" not in message.strip() and len(message) < 300


@pytest.mark.parametrize("shape", [(3, 9), (4,), (1,), ()])
def test_rebuilding_the_input_names_a_wrong_lse(shape):
    with pytest.raises(RuntimeError, match="lse"):
        remnant.softmax_input_from_output(torch.rand(3, 9), torch.rand(shape))


# --- the ten faults of the release -----------------------------------------------------------------


@pytest.mark.parametrize("keys", [256, 257, 300, 1000, 5000])
def test_fault_01_ranks_beyond_256_do_not_wrap(keys):
    z = torch.randn(3, keys, dtype=torch.float64)
    torch.testing.assert_close(decoded(z, "curve:m=4"), reference.curve(z, 4), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("kind", ["left padding", "holes", "causal"])
def test_fault_02_masks_other_than_right_padding_keep_every_row(kind):
    n = 60
    mask = torch.ones(2, 1, n, n, dtype=torch.bool)
    if kind == "left padding":
        mask[1, ..., :25] = False
    elif kind == "holes":
        mask = torch.rand(2, 1, n, n) < 0.6
    else:
        mask = reference.allowed(n, n, causal=True).expand(2, 1, n, n)
    check(energies(2, 3, n, n), mask, 3)
    q, k, v = (torch.randn(2, 3, n, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    o = remnant.attention(q, k, v, mask=mask, policy="curve:m=3")
    grad = torch.randn_like(o)
    want = reference.gradients(q, k, v, grad, reference.curve(reference.logits(q, k, mask), 3))
    for x, y in zip(torch.autograd.grad(o, [q, k, v], grad), want[:3], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("policy", ["exact", "recompute", "curve:m=3", "quantized:bits=4", "sampled:m=50"])
def test_fault_03_causal_attention_does_not_see_the_future(policy):
    q, k, v = (torch.randn(1, 2, 50, 4, requires_grad=True) for _ in range(3))
    o = remnant.attention(q, k, v, causal=True, policy=policy)
    grads = torch.autograd.grad(o[:, :, :20].sum(), [q, k, v])
    for grad in grads:
        assert (grad[:, :, 20:] == 0).all() and grad.isfinite().all()
    assert (grads[2][:, :, :20] != 0).all()
    with torch.no_grad():
        k[:, :, 20:] += 5
        v[:, :, 20:] -= 3
        assert torch.equal(remnant.attention(q, k, v, causal=True, policy=policy)[:, :, :20], o[:, :, :20])


def test_fault_04_backward_memory_is_linear_in_a_row():
    rows, n = 4, 1024
    energy = energies(rows, n, dtype=torch.float32)
    out = softmax_approximation(energy, None, 4)
    grad = torch.randn_like(out)
    seen = reference.allocations(lambda: torch.autograd.grad(out, energy, grad))
    assert seen.peak <= 64 * rows * n * 4  # the release's Jacobian: n times rows n
    q, k, v = (torch.randn(1, 2, 512, 8, requires_grad=True) for _ in range(3))
    o = remnant.attention(q, k, v, policy="curve:m=4")
    seen = reference.allocations(lambda: torch.autograd.grad(o.sum(), [q, k, v]))
    assert seen.peak <= 4 * 2 * 512 * 512 * 4


@pytest.mark.parametrize("policy", ["exact", "recompute", "curve:m=3", "quantized:bits=4", "sampled:m=5"])
def test_fault_05_nan_is_not_hidden(policy):
    energy = energies(3, 20)
    with torch.no_grad():
        energy[1, 4] = math.nan
    out = softmax_approximation(energy, None, 3)
    assert out[1].isnan().all()
    (grad,) = torch.autograd.grad(out.square().sum(), energy)
    assert grad[1].isnan().any()
    q, k, v = (torch.randn(1, 1, 12, 4, requires_grad=True) for _ in range(3))
    with torch.no_grad():
        q[0, 0, 5, 1] = math.nan
    o = remnant.attention(q, k, v, policy=policy)
    assert o[0, 0, 5].isnan().all() and o[0, 0, 4].isfinite().all()
    for grad in torch.autograd.grad(o.sum(), [q, k, v]):
        assert grad.isnan().any()


@pytest.mark.parametrize("shape", [(40,), (6, 40), (2, 6, 40), (2, 3, 6, 40), (2, 1, 3, 2, 40)])
def test_fault_06_any_rank_and_an_m_of_its_own_for_every_call(shape):
    energy, other = energies(*shape), energies(*shape)
    first = softmax_approximation(energy, None, 2)
    second = softmax_approximation(other, None, 7)
    grad = torch.randn(shape, dtype=torch.float64)
    for out, x, m in ((first, energy, 2), (second, other, 7)):
        (got,) = torch.autograd.grad(out, x, grad)
        want = softmax_gradient(reference.curve(x.detach(), m), grad)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    meta = softmax_approximation(torch.empty(shape, device="meta"), None, 2)
    assert meta.device.type == "meta" and meta.shape == shape


@pytest.mark.parametrize("policy", ["recompute", "curve:m=4", "quantized:bits=4"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_fault_07_the_product_with_value_does_not_keep_the_softmax(policy, dropout):
    n = 128
    q, k, v = (torch.randn(2, 3, n, 4, requires_grad=True) for _ in range(3))
    got, saved = reference.saved_bytes(lambda: remnant.attention(q, k, v, policy=policy, dropout=dropout))
    assert not any(x.is_floating_point() and x.numel() >= 2 * 3 * n * n for x in saved)
    assert got < 2 * 3 * n * n * 4 / 2
    # The stand-alone softmax cannot help it, as its documentation says.
    energy = torch.randn(2, 3, n, n, requires_grad=True)
    kept, _ = reference.saved_bytes(lambda: softmax_approximation(energy, None, 4) @ v)
    assert kept >= energy.numel() * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fault_08_the_input_is_rebuilt_from_output_and_lse(dtype):
    z = energies(5, 6, 70, dtype=dtype, scale=3.0).detach()
    z[2, 3, 40:] = NOTHING
    p = softmax_approximation(z, None, 5)
    got = remnant.softmax_input_from_output(p, reference.log_sum_exp(z))
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(got, z, rtol=tolerance, atol=tolerance)
    assert (got[2, 3, 40:] == NOTHING).all()


@pytest.mark.parametrize("policy", ["exact", "recompute", "curve:m=4", "quantized:bits=8"])
def test_fault_09_automatic_mixed_precision_works(policy):
    torch.manual_seed(0)
    project = torch.nn.Linear(16, 48)
    x = torch.randn(4, 30, 16)

    def loss():
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in project(x).chunk(3, -1))
        o = remnant.attention(q, k, v, policy=policy, causal=True)
        weights = softmax_approximation(q @ k.transpose(-2, -1), None, 4)
        return o, weights, o.float().square().mean() + weights.float().square().mean()

    want = torch.autograd.grad(loss()[2], project.weight)[0]
    with torch.autocast("cpu", torch.bfloat16):
        o, weights, value = loss()
    assert o.dtype == weights.dtype == torch.bfloat16
    got = torch.autograd.grad(value, project.weight)[0]
    assert got.dtype == torch.float32
    assert (got - want).norm() <= 0.05 * want.norm()


@pytest.mark.parametrize("policy", ["recompute", "curve:m=4", "quantized:bits=4"])
def test_fault_10_the_forward_peak_is_below_the_plain_softmax(policy):
    n = 512
    q, k, v = (torch.randn(1, 4, n, 8, requires_grad=True) for _ in range(3))
    plain = reference.allocations(lambda: reference.eager_attention(q, k, v))
    ours = reference.allocations(lambda: remnant.attention(q, k, v, policy=policy))
    assert ours.peak < plain.peak / 2
    energy = torch.randn(4, n, n, requires_grad=True)
    mask = torch.rand(n) < 0.9
    for m in (None, mask):
        plain = reference.allocations(
            lambda m=m: torch.softmax(energy if m is None else energy.masked_fill(~m, NOTHING), -1)
        )
        ours = reference.allocations(lambda m=m: softmax_approximation(energy, m, 4))
        # Beyond torch's peak: what is kept, a row of scratch for each thread, and the inverted mask.
        kept = 4 * n * reference.curve_row_bytes(n, 4)
        assert ours.peak <= plain.peak + kept + 2 * n * 64 + 2 * n
