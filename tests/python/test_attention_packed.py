"""attention_packed against attention of each sequence, and of the padded batch."""

import pytest
import torch
from torch.library import opcheck

import remnant

LENGTHS = [(3, 3), (70, 200), (0, 5), (130, 66), (1, 1), (9, 0)]  # queries and keys; some without either
HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 20, 12


def ends(lengths):
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def inputs(dtype=torch.float64, lengths=LENGTHS):
    torch.manual_seed(0)
    queries, keys = (list(x) for x in zip(*lengths, strict=True))

    def make(rows, heads, dim):
        return torch.randn(rows, heads, dim, dtype=torch.float64).to(dtype).requires_grad_()

    q, k, v = make(sum(queries), HEADS, DIM), make(sum(keys), KV_HEADS, DIM), make(sum(keys), KV_HEADS, VALUE_DIM)
    return q, k, v, ends(queries), ends(keys), torch.randn(sum(queries), HEADS, VALUE_DIM, dtype=torch.float64).to(dtype)


def packed(q, k, v, cu_q, cu_k, grad, **options):
    output = remnant.attention_packed(q, k, v, cu_q, cu_k, **options)
    return [output.detach(), *torch.autograd.grad(output, (q, k, v), grad)]


def one_by_one(q, k, v, cu_q, cu_k, grad, **options):
    """Sequences on their own: only for what draws nothing at random."""
    outputs = []
    for b in range(len(cu_q) - 1):
        rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        part = [x.transpose(0, 1).unsqueeze(0) for x in (q[rows], k[keys], v[keys])]
        outputs.append(remnant.attention(*part, **options)[0].transpose(0, 1))
    output = torch.cat(outputs)
    return [output.detach(), *torch.autograd.grad(output, (q, k, v), grad)]


def padded(q, k, v, cu_q, cu_k, grad, **options):
    """The batch with padding, masked: draws the same dropout."""
    batch = len(cu_q) - 1
    longest_q, longest_k = (int(x.diff().max()) for x in (cu_q, cu_k))

    def pad(x, cu, longest):
        rows = [torch.nn.functional.pad(x[cu[b] : cu[b + 1]], (0, 0, 0, 0, 0, longest - int(cu[b + 1] - cu[b])))
                for b in range(batch)]  # fmt: skip
        return torch.stack(rows).transpose(1, 2)

    mask = (torch.arange(longest_k) < cu_k.diff()[:, None])[:, None, None]
    output = remnant.attention(pad(q, cu_q, longest_q), pad(k, cu_k, longest_k), pad(v, cu_k, longest_k), mask=mask,
                               **options)  # fmt: skip
    output = torch.cat([output[b, :, : cu_q[b + 1] - cu_q[b]].transpose(0, 1) for b in range(batch)])
    return [output.detach(), *torch.autograd.grad(output, (q, k, v), grad)]


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (20, 3)}, {"scale": 0.7}], ids=str)
@pytest.mark.parametrize("policy", ["exact", "recompute", "curve:m=3"])
def test_equals_each_sequence_on_its_own(policy, options):
    for have, want in zip(packed(*inputs(), policy=policy, **options), one_by_one(*inputs(), policy=policy, **options),
                          strict=True):  # fmt: skip
        torch.testing.assert_close(have, want, rtol=1e-9, atol=1e-10)


# Not `sampled`: rows that pad a tile would weigh in its draw.
@pytest.mark.parametrize("policy", ["exact", "recompute", "curve:m=3", "quantized:bits=8"])
def test_draws_what_the_padded_batch_draws(policy):
    results = []
    for way in (packed, padded):
        torch.manual_seed(3)
        results.append(way(*inputs(), policy=policy, dropout=0.3, causal=True))
    for have, want in zip(*results, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-6, atol=1e-7)  # dropout's scale is a float in one of them


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    wide = packed(*inputs(), policy="recompute")
    have = packed(*inputs(dtype), policy="recompute")
    for a, b in zip(have, wide, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).norm() <= 4 * torch.finfo(dtype).eps * b.norm() + 1e-6


def test_keeps_rows_and_not_padding():
    q, k, v, cu_q, cu_k, _ = inputs(torch.float32)
    sizes = []

    def pack(x):
        sizes.append((x.untyped_storage().data_ptr(), x.untyped_storage().nbytes()))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = remnant.attention_packed(q, k, v, cu_q, cu_k)
    known = {x.untyped_storage().data_ptr() for x in (q, k, v, output)}
    assert sum({p: n for p, n in sizes if p not in known}.values()) == q.size(0) * HEADS * 4


def test_saves_less_where_less_is_wanted():
    q, k, v, cu_q, cu_k, grad = inputs()
    full = packed(q, k, v, cu_q, cu_k, grad)
    for wanted in range(3):
        parts = [x.detach() for x in (q, k, v)]
        parts[wanted].requires_grad_()
        remnant.attention_packed(*parts, cu_q, cu_k).backward(grad)
        torch.testing.assert_close(parts[wanted].grad, full[1 + wanted])


def test_sampled_with_as_many_keys_as_there_are_is_recompute():
    for dropout in (0.0, 0.3):
        results = []
        for policy in ("sampled:m=200", "recompute"):
            torch.manual_seed(5)
            results.append(packed(*inputs(), policy=policy, dropout=dropout, causal=True))
        for have, want in zip(*results, strict=True):
            torch.testing.assert_close(have, want)


def test_sampled_is_unbiased():
    arguments = inputs(torch.float32, [(40, 90), (70, 200)])
    want = packed(*arguments, policy="recompute")[1:]
    draws = [packed(*arguments, policy="sampled:m=20")[1:] for _ in range(400)]
    generator = torch.Generator().manual_seed(1)
    for exact, *drawn in zip(want, *draws, strict=True):
        directions = torch.randn(exact.numel(), 16, generator=generator)
        values = torch.stack([x.flatten() @ directions for x in drawn]).double()
        z = (values.mean(0) - (exact.flatten() @ directions)) / (values.std(0) / len(draws) ** 0.5)
        assert z.abs().max() < 5  # 48 nearly normal numbers: beyond 5 with a probability of 3e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(cu_seqlens_q=torch.tensor([0, 5])), "the same number of sequences"),
        (lambda a: a.update(cu_seqlens_k=a["cu_seqlens_k"] // 2), "must rise from 0 to the number of rows"),
        (lambda a: a.update(cu_seqlens_q=a["cu_seqlens_q"].float()), "int32 or int64"),
        (lambda a: a.update(cu_seqlens_q=a["cu_seqlens_q"].flip(0)), "must rise from 0"),
        (lambda a: a.update(query=a["query"][None]), "must have 3 dimensions"),
        (lambda a: a.update(dropout=1.5), "dropout must be in"),
        (lambda a: a.update(policy="curvy"), "curve"),
    ],
)
def test_mistakes_get_one_sentence(change, message):
    q, k, v, cu_q, cu_k, _ = inputs()
    arguments = {"query": q, "key": k, "value": v, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    change(arguments)
    with pytest.raises(RuntimeError, match=message):
        remnant.attention_packed(**arguments)


def test_falling_boundaries_are_refused():
    q, k, v, *_ = inputs()
    cu = torch.tensor([0, 9, 4, q.size(0)])
    with pytest.raises(RuntimeError, match="must not fall, got 9 before 4"):
        remnant.attention_packed(q, q, q, cu, cu)


def test_double_backward_says_what_to_do():
    q, k, v, cu_q, cu_k, grad = inputs()
    output = remnant.attention_packed(q, k, v, cu_q, cu_k)
    with pytest.raises(RuntimeError, match="use `attention` with policy 'exact'"):
        torch.autograd.grad(output, q, grad, create_graph=True)


@pytest.mark.parametrize("policy", ["exact", "recompute", "curve:m=3"])
def test_opcheck(policy):
    q, k, v, cu_q, cu_k, _ = inputs(torch.float32)
    opcheck(torch.ops.remnant.attention_packed_forward.default,
            (q, k, v, cu_q.tolist(), cu_k.tolist(), True, 0.0, 0.3, policy, [], True))  # fmt: skip
