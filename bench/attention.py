"""Attention's time and bytes, each policy beside eager PyTorch and scaled_dot_product_attention in one run."""

import math

import torch
from _measure import alternate, arguments, kept_bytes, peak_bytes, write

import remnant

POLICIES = ["exact", "recompute", "curve:m=4", "curve:m=5", "quantized:bits=4"]
# batch, heads, length, head size, dropout
CASES = [
    (128, 8, 40, 32, 0.1),
    (32, 12, 512, 64, 0.1),
    (8, 8, 512, 32, 0.1),
    (2, 8, 1024, 64, 0.1),
    (2, 8, 1024, 64, 0.0),
]


def eager(q, k, v, mask, dropout):
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    weights = torch.softmax(scores.masked_fill(~mask, -math.inf), -1)
    return torch.nn.functional.dropout(weights, dropout) @ v


def main():
    options = arguments(__doc__)
    torch.manual_seed(0)
    rows, figures = [], {}
    for batch, heads, length, dim, dropout in CASES:
        q, k, v = (torch.randn(batch, length, heads, dim).transpose(1, 2).requires_grad_() for _ in range(3))
        mask = torch.ones(batch, 1, 1, length, dtype=torch.bool)
        grad = torch.randn(batch, heads, length, dim)
        forwards = {
            "eager": lambda q=q, k=k, v=v, m=mask, p=dropout: eager(q, k, v, m, p),
            "sdpa": lambda q=q, k=k, v=v, m=mask, p=dropout: torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=m, dropout_p=p),
        }
        for policy in POLICIES:
            forwards[policy] = lambda q=q, k=k, v=v, m=mask, p=dropout, policy=policy: remnant.attention(
                q, k, v, mask=m, dropout=p, policy=policy)
        big = batch * heads * length * length > 5e7
        times = alternate({name: (f, grad) for name, f in forwards.items()}, 3 if big else options.repeats)
        case = f"{batch},{heads},{length},{dim} p={dropout}"
        kept = {}
        for name, forward in forwards.items():
            kept[name] = kept_bytes(forward, (q, k, v, mask))
            rows.append({"case": case, "impl": name, **times[name], "kept_bytes": kept[name],
                         "peak_bytes": peak_bytes(lambda f=forward, g=grad: f().backward(g)),
                         "vs_eager": times[name]["step_ms"] / times["eager"]["step_ms"]})
        key = f"b{batch}_h{heads}_n{length}_d{dim}{'_dropout' if dropout else ''}"
        for name in ("exact", "recompute", "curve:m=4"):
            figure = name.replace(":m=", "")
            figures[f"{key}_{figure}_kept_vs_eager"] = kept[name] / kept["eager"]
            figures[f"{key}_{figure}_vs_eager"] = times[name]["step_ms"] / times["eager"]["step_ms"]
    q = torch.randn(1, 1, 1000, 64, requires_grad=True)
    softmax_input_and_output = 2 * 4 * 1000 * 1000
    figures["curve10_n1000_kept_over_softmax_input_and_output"] = (
        kept_bytes(lambda: remnant.attention(q, q, q, policy="curve:m=10"), (q,)) / softmax_input_and_output)
    write("attention", rows, figures)


if __name__ == "__main__":
    main()
