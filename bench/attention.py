"""Attention's time and bytes: every policy beside eager PyTorch, scaled_dot_product_attention, torch.compile
and the method's released algorithm, in one run."""

import dataclasses
import math
import os
import sys
import time

import torch
from _measure import alternate, arguments, kept_bytes, machine, peak_bytes, write

import remnant

POLICIES = ["exact", "recompute", "curve:m=5", "quantized:bits=4", "sampled:m=128", "top:m=32"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROW_SECONDS = 1.5  # timed turns of a row, beyond its first three


@dataclasses.dataclass(frozen=True)
class Case:
    shape: tuple  # batch, heads, length, head size
    dropout: float = 0.0
    mask: str = "none"  # none, causal, padding or arbitrary
    dtype: str = "fp32"
    compiled: bool = False  # the compiler takes longer than the rest of a case, so not everywhere

    def __str__(self):
        return f"{','.join(map(str, self.shape))} {self.dtype} p={self.dropout:g} {self.mask}"

    @property
    def scores(self):
        batch, heads, length, _ = self.shape
        return batch * heads * length * length


TRANSLATION = (128, 8, 40, 32)
N512 = (8, 8, 512, 32)
N1024 = (2, 8, 1024, 64)
N2048 = (1, 8, 2048, 64)
N4096 = (1, 8, 4096, 64)
N8192 = (1, 1, 8192, 64)
CASES = [
    Case(TRANSLATION, 0.1, compiled=True),
    Case(TRANSLATION, 0.0),
    Case(TRANSLATION, 0.1, "padding", compiled=True),
    Case(TRANSLATION, 0.1, "causal"),
    Case(N512, 0.1, compiled=True),
    Case(N512, 0.0, "padding"),
    Case(N512, 0.1, "padding", "bf16"),
    Case((4, 12, 384, 64), 0.1, "padding", compiled=True),
    Case((64, 4, 197, 64), 0.0),
    Case((64, 4, 197, 64), 0.1, dtype="bf16"),
    Case(N1024, 0.1, compiled=True),
    Case(N1024, 0.0, compiled=True),
    Case(N1024, 0.0, "arbitrary", compiled=True),
    Case(N1024, 0.1, "arbitrary"),
    Case(N1024, 0.1, dtype="bf16", compiled=True),
    Case(N1024, 0.0, dtype="bf16"),
    Case(N2048, 0.1),
    Case(N2048, 0.0, "causal", compiled=True),
    Case(N2048, 0.1, "causal"),
    Case(N4096, 0.0, "causal"),
    Case(N4096, 0.1, "causal"),
    Case(N8192, 0.0),
    Case(N8192, 0.1, "causal"),
]
DECODE = "8,8,1,64 fp32 2048 keys, forward"
BYTES = [(TRANSLATION, 0.1), ((32, 12, 512, 64), 0.1), (N512, 0.1), (N1024, 0.1), (N1024, 0.0)]
BYTES_POLICIES = ["exact", "recompute", "curve:m=4", "quantized:bits=4"]

# figure: case, what is timed, beside what.
RATIOS = {
    "dropout_n1024_vs_eager": (Case(N1024, 0.1), "recompute", "eager"),
    "dropout_n1024_vs_sdpa": (Case(N1024, 0.1), "recompute", "sdpa"),
    "n1024_vs_sdpa_flash": (Case(N1024, 0.0), "recompute", "sdpa"),
    "causal_n2048_vs_sdpa_flash": (Case(N2048, 0.0, "causal"), "recompute", "sdpa"),
    "arbitrary_mask_n1024_vs_sdpa": (Case(N1024, 0.0, "arbitrary"), "recompute", "sdpa"),
    "multi30k_dropout_vs_eager": (Case(TRANSLATION, 0.1), "recompute", "eager"),
    "bf16_dropout_n1024_vs_eager": (Case(N1024, 0.1, dtype="bf16"), "recompute", "eager"),
    "curve_n512_vs_eager_dropout": (Case(N512, 0.1), "curve:m=5", "eager"),
    "sampled_causal_n4096_vs_recompute": (Case(N4096, 0.0, "causal"), "sampled:m=128", "recompute"),
    "decode_vs_sdpa": (DECODE, "recompute", "sdpa"),
}
TARGETS = {
    "dropout_n1024_vs_eager": ("<=", 0.25),
    "dropout_n1024_vs_sdpa": ("<=", 0.25),
    # MKL, which the flash kernel calls, is far from the peak on AMD's processors and nearer to it on others.
    "n1024_vs_sdpa_flash": ("<=", 0.80 if "AMD" in machine()["cpu"] else 1.00),
    "causal_n2048_vs_sdpa_flash": ("<=", 0.90),
    "arbitrary_mask_n1024_vs_sdpa": ("<=", 1.00),
    "multi30k_dropout_vs_eager": ("<=", 0.35),
    "bf16_dropout_n1024_vs_eager": ("<=", 0.30),
    "recompute_extra_bytes_per_row": ("<=", 8),
    "recompute_scratch_bytes_n8192_over_n1024": ("<=", 1.1),
    "curve_n512_vs_eager_dropout": ("<=", 0.6),
    "sampled_causal_n4096_vs_recompute": ("<=", 0.60),
    "decode_vs_sdpa": ("<=", 1.00),
    "thread_scaling_2_over_1": (">=", 1.8),
}


def eager(q, k, v, mask, dropout):
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return torch.nn.functional.dropout(torch.softmax(scores, -1), dropout) @ v


class ReleasedSoftmax(torch.autograd.Function):
    """softmax as the method's release behaves: full sort, one-byte ranks, and a backward through the Jacobian.

    The keys of a row are a prefix of `count`: other masks do not fit its ranks.
    """

    @staticmethod
    def forward(ctx, scores, count, m):
        length = scores.shape[-1]
        valid = torch.arange(length) < count
        weights = torch.softmax(scores.masked_fill(~valid, -math.inf), -1)
        descending, order = weights.masked_fill(~valid, -1).sort(dim=-1, descending=True)
        descending = descending.clamp(min=0)
        ranks = order.argsort(-1).to(torch.uint8)
        rows = weights.shape[:-1]
        first_lowest = (count - m).clamp(min=0)
        lowest_ranks = (first_lowest + torch.arange(m)).clamp(max=length - 1).expand(*rows, m)
        highest, lowest = descending[..., :m].clone(), descending.gather(-1, lowest_ranks)
        alpha, following = highest[..., -1:], descending[..., m:m + 1]
        tiny = torch.finfo(weights.dtype).tiny
        drop = (alpha.clamp(min=tiny) / lowest[..., :1].clamp(min=tiny)).log() + 2 * (alpha - following)
        beta = drop / ((count - 2 * m + 2).clamp(min=1) * (1 - alpha).clamp(min=2.0**-24))
        ctx.save_for_backward(highest, lowest, beta, weights.exp().sum(-1, keepdim=True), ranks, count)
        return weights

    @staticmethod
    def backward(ctx, grad):
        highest, lowest, beta, _, ranks, count = ctx.saved_tensors
        m, ranks = highest.shape[-1], ranks.long()
        first_lowest = (count - m).clamp(min=0)
        middle = (ranks >= m) & (ranks < first_lowest)
        weights = torch.where(middle, highest[..., -1:] * torch.exp(-beta * (ranks - (m - 1))), 0.0)
        rest = 1 - highest.sum(-1, keepdim=True) - lowest.sum(-1, keepdim=True)
        weights = weights * (rest.clamp(min=0) / weights.sum(-1, keepdim=True).clamp(min=1e-30))
        weights = torch.where(ranks < m, highest.gather(-1, ranks.clamp(max=m - 1)), weights)
        low = (ranks >= first_lowest) & (ranks >= m) & (ranks < count)
        weights = torch.where(low, lowest.gather(-1, (ranks - first_lowest).clamp(0, m - 1)), weights)
        jacobian = torch.diag_embed(weights) - weights.unsqueeze(-1) * weights.unsqueeze(-2)
        return (jacobian @ grad.unsqueeze(-1)).squeeze(-1), None, None


def released(q, k, v, count, dropout, m=5):
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return torch.nn.functional.dropout(ReleasedSoftmax.apply(scores, count, m), dropout) @ v


def remnant_policies():
    """The policies of this build, and a row for each that it does not have."""
    have, rows = [], []
    for policy in POLICIES:
        try:
            remnant.attention_residual_bytes(policy, 1, 1, 1, 4)
            have.append(policy)
        except RuntimeError as error:
            if "unknown attention policy" not in str(error):
                raise
            rows.append({"case": "all", "impl": policy, "skipped": "this build has no such policy"})
    return have, rows


def draw_inputs(shape, dtype=torch.float32):
    """q, k, v with their heads side by side, as a linear layer leaves them, and the output's gradient."""
    batch, heads, length, dim = shape
    inputs = [torch.randn(batch, length, heads, dim, dtype=dtype).transpose(1, 2).requires_grad_() for _ in range(3)]
    return inputs, torch.randn(shape, dtype=dtype)


def draw_mask(kind, shape):
    """The boolean mask that eager code needs, and the number of keys of each row where these are a prefix."""
    batch, _, length, _ = shape
    count = torch.full((batch, 1, 1, 1), length)
    if kind == "none":
        return None, count
    if kind == "causal":
        return torch.ones(length, length, dtype=torch.bool).tril(), None
    if kind == "padding":
        count = torch.randint(length // 4, length + 1, (batch, 1, 1, 1))
        return torch.arange(length) < count, count
    mask = torch.rand(batch, 1, length, length) < 0.5
    return mask | torch.eye(length, dtype=torch.bool), None


def compile_eager(inputs, mask, dropout, grad):
    """Compiled forward and backward of eager(), or why there is none."""
    torch._dynamo.reset()
    compiled = torch.compile(eager, dynamic=False)
    try:
        torch.autograd.grad(compiled(*inputs, mask, dropout), inputs, grad)
    except Exception as error:  # a missing C++ compiler shows as one of many types
        lines = str(error).strip().splitlines()
        return None, f"torch.compile failed: {type(error).__name__}: {lines[0][:150] if lines else 'no message'}"
    return compiled, None


def implementations(case, policies, inputs, mask, count, grad):
    """{impl: forward} of a case, and {impl: why it is skipped}."""
    q, k, v = inputs
    p, causal = case.dropout, case.mask == "causal"
    batch, heads, length, _ = case.shape
    forwards, skipped = {}, {}

    # Eager code keeps three n x n tensors under dropout and has three more in flight.
    square = 6e7 if p else 1.5e8
    dense = f"{24 * case.scores / 1e9:.1f} GB in n x n tensors, seconds a step" if case.scores > square else None
    if dense:
        skipped["eager"] = dense
    else:
        forwards["eager"] = lambda: eager(q, k, v, mask, p)
    if dense and p:  # without dropout PyTorch has a kernel that needs no n x n tensor
        skipped["sdpa"] = dense
    else:
        forwards["sdpa"] = lambda: torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=None if causal else mask, dropout_p=p, is_causal=causal)
    if not case.compiled:
        skipped["compile"] = "compiled in other cases only: the compiler's time"
    else:
        compiled, reason = compile_eager(inputs, mask, p, grad)
        if compiled:
            forwards["compile"] = lambda: compiled(q, k, v, mask, p)
        else:
            skipped["compile"] = reason
    jacobian = 4 * case.scores * length
    if count is None:
        skipped["released"] = "its ranks take masks as right padding only"
    elif length > 256:
        skipped["released"] = "its one-byte ranks wrap beyond 256 keys"
    elif jacobian > 1e9:
        skipped["released"] = f"its Jacobian has {jacobian / 1e9:.1f} GB"
    else:
        forwards["released"] = lambda: released(q, k, v, count, p)
    for policy in policies:
        if policy == "exact" and case.scores > 6e7:
            skipped[policy] = f"{8 * case.scores / 1e9:.1f} GB in n x n tensors, seconds a step"
        elif policy.startswith("top") and case.mask == "arbitrary":
            skipped[policy] = "it takes causal and key-padding masks only"
        else:
            forwards[policy] = lambda policy=policy: remnant.attention(
                q, k, v, mask=None if causal else mask, causal=causal, dropout=p, policy=policy)
    return forwards, skipped


def step_of(forward, inputs, grad):
    return lambda: torch.autograd.grad(forward(), inputs, grad)


def measure_case(case, policies, repeats):
    inputs, grad = draw_inputs(case.shape, DTYPES[case.dtype])
    mask, count = draw_mask(case.mask, case.shape)
    forwards, skipped = implementations(case, policies, inputs, mask, count, grad)
    times = alternate({name: (forward, grad) for name, forward in forwards.items()}, repeats, inputs, ROW_SECONDS)
    held = [x for x in (*inputs, mask, count) if x is not None]
    rows = [{"case": str(case), "impl": name, **times[name], "kept_bytes": kept_bytes(forward, held),
             "peak_bytes": peak_bytes(step_of(forward, inputs, grad)),
             "vs_eager": times[name]["step_ms"] / times["eager"]["step_ms"] if "eager" in times else None}
            for name, forward in forwards.items()]
    return rows + [{"case": str(case), "impl": name, "skipped": reason} for name, reason in skipped.items()]


def measure_decode(repeats):
    """One query row against a cache of keys, nothing to differentiate."""
    q = torch.randn(8, 8, 1, 64)
    k, v = (torch.randn(8, 8, 2048, 64) for _ in range(2))
    forwards = {
        "eager": lambda: eager(q, k, v, None, 0.0),
        "sdpa": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v),
        "recompute": lambda: remnant.attention(q, k, v, policy="recompute"),
    }
    with torch.no_grad():
        times = alternate({name: (forward, None) for name, forward in forwards.items()}, 10 * repeats)
        return [{"case": DECODE, "impl": name, **times[name], "kept_bytes": kept_bytes(forward, (q, k, v)),
                 "peak_bytes": peak_bytes(forward), "vs_eager": times[name]["step_ms"] / times["eager"]["step_ms"]}
                for name, forward in forwards.items()]


def measure_bytes(shape, dropout):
    """Rows of bytes alone, and the figures that compare them."""
    batch, heads, length, dim = shape
    inputs, grad = draw_inputs(shape)
    mask, _ = draw_mask("padding", shape)
    forwards = {"eager": lambda: eager(*inputs, mask, dropout)}
    for policy in BYTES_POLICIES:
        forwards[policy] = lambda policy=policy: remnant.attention(*inputs, mask=mask, dropout=dropout, policy=policy)
    rows = [{"case": f"{Case(shape, dropout, 'padding')}, bytes", "impl": name,
             "kept_bytes": kept_bytes(forward, (*inputs, mask)),
             "peak_bytes": peak_bytes(step_of(forward, inputs, grad))}
            for name, forward in forwards.items()]
    key = f"b{batch}_h{heads}_n{length}_d{dim}{'_dropout' if dropout else ''}"
    figures = {f"{key}_{row['impl'].replace(':m=', '').replace(':bits=', '')}_kept_vs_eager":
               row["kept_bytes"] / rows[0]["kept_bytes"] for row in rows[1:]}
    return rows, figures


def scratch_bytes(length):
    """recompute's highest scratch in forward or backward: the peak less o, lse and the inputs' gradients."""
    inputs, grad = draw_inputs((1, 1, length, 64))
    outputs = []
    forward_peak = peak_bytes(lambda: outputs.append(remnant.attention(*inputs, dropout=0.1, policy="recompute")))
    lse = 4 * length
    backward_peak = peak_bytes(lambda: outputs.append(torch.autograd.grad(outputs[0], inputs, grad)))
    return max(forward_peak - outputs[0].nbytes - lse, backward_peak - sum(x.nbytes for x in inputs))


def measure_thread_scaling(repeats):
    """Milliseconds a step with one thread and with two."""
    inputs, grad = draw_inputs(N1024)

    def forward(threads):
        torch.set_num_threads(threads)  # the backward that follows runs with as many
        return remnant.attention(*inputs, dropout=0.1, policy="recompute")

    before = torch.get_num_threads()
    try:
        times = alternate({"1": (lambda: forward(1), grad), "2": (lambda: forward(2), grad)}, repeats, inputs)
    finally:
        torch.set_num_threads(before)
    return times["1"]["step_ms"], times["2"]["step_ms"]


def options_of_cases(parser):
    parser.add_argument("--quick", action="store_true", help="one repetition of the small cases: does it run?")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose name contains TEXT")


def main():
    options = arguments(__doc__, add_options=options_of_cases)
    repeats = 1 if options.quick else options.repeats
    largest = 1e7 if options.quick else math.inf
    torch.manual_seed(0)
    started = time.perf_counter()
    policies, rows = remnant_policies()
    figures, missing = {}, {}

    def progress(what):
        print(f"{time.perf_counter() - started:6.1f} s  {what}", file=sys.stderr, flush=True)

    for case in CASES:
        if case.scores <= largest and options.only in str(case):
            progress(case)
            rows += measure_case(case, policies, repeats)
    if options.only in DECODE:
        progress(DECODE)
        rows += measure_decode(repeats)

    step = {(row["case"], row["impl"]): row["step_ms"] for row in rows if "step_ms" in row}
    skipped = {(row["case"], row["impl"]): row["skipped"] for row in rows if "skipped" in row}
    for name, (case, ours, theirs) in RATIOS.items():
        keys = (str(case), ours), (str(case), theirs)
        if all(key in step for key in keys):
            figures[name] = step[keys[0]] / step[keys[1]]
        else:
            missing[name] = next((skipped[key] for key in keys if key in skipped), "its case was left out by an option")

    progress("bytes")
    for shape, dropout in BYTES:
        if Case(shape).scores <= largest and options.only in str(Case(shape, dropout, "padding")):
            more_rows, more_figures = measure_bytes(shape, dropout)
            rows += more_rows
            figures |= more_figures
    (q, k, v), _ = draw_inputs(N1024)
    extra = kept_bytes(lambda: remnant.attention(q, k, v, dropout=0.1, policy="recompute"), (q, k, v))
    figures["recompute_extra_bytes_per_row"] = extra / math.prod(N1024[:3])
    scratch = {length: scratch_bytes(length) for length in (1024, 8192)}
    for length, size in scratch.items():
        rows.append({"case": f"1,1,{length},64 fp32 p=0.1 none, scratch", "impl": "recompute", "scratch_bytes": size})
    figures["recompute_scratch_bytes_n8192_over_n1024"] = scratch[8192] / scratch[1024]
    q = torch.randn(1, 1, 1000, 64, requires_grad=True)
    softmax_input_and_output = 2 * 4 * 1000 * 1000
    figures["curve10_n1000_kept_over_softmax_input_and_output"] = (
        kept_bytes(lambda: remnant.attention(q, q, q, policy="curve:m=10"), (q,)) / softmax_input_and_output)

    if len(os.sched_getaffinity(0)) > 1:
        progress("threads")
        one, two = measure_thread_scaling(repeats)
        figures["thread_scaling_2_over_1"] = one / two
        rows += [{"case": f"{Case(N1024, 0.1)}, {count}", "impl": "recompute", "step_ms": ms}
                 for count, ms in (("1 thread", one), ("2 threads", two))]
    else:
        missing["thread_scaling_2_over_1"] = "this machine has one core"
    progress("done")
    write("attention", rows, figures, TARGETS, missing)


if __name__ == "__main__":
    main()
