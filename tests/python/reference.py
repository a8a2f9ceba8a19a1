"""What the ops must compute, in float64 and from the equations alone: dense products, loops over rows.

Symbols: z the logits, p their softmax, D the dropout's factors (0 or 1 / (1 - r)), a = D (g v^T),
delta_i = sum_j p_ij a_ij, dz = p (a - delta).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

NOTHING = -math.inf


class Gradients(NamedTuple):
    query: Tensor
    key: Tensor
    value: Tensor
    logits: Tensor  # dz, [B, H, Nq, Nk]

    def mask(self, shape: torch.Size) -> Tensor:
        """The gradient of an additive mask of this shape: dz summed over its broadcast axes."""
        return self.logits.sum_to_size(shape)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.size(1), dim=1) if x.size(1) else x


def sum_heads(x: Tensor, kv_heads: int) -> Tensor:
    return x.unflatten(1, (kv_heads, -1)).sum(2) if kv_heads else x


def allowed(queries: int, keys: int, causal: bool = False, window=None) -> Tensor:
    """True where causality and window let query i attend key j."""
    left, right = window if window is not None else (-1, -1)
    ahead = torch.arange(keys)[None, :] - torch.arange(queries)[:, None]  # j - i
    attend = torch.ones(queries, keys, dtype=torch.bool)
    if causal:
        attend &= ahead <= 0
    if left >= 0:
        attend &= ahead >= -left
    if right >= 0:
        attend &= ahead <= right
    return attend


def logits(query: Tensor, key: Tensor, mask: Tensor | None = None, causal: bool = False, window=None, scale=None):
    """scale q k^T + mask in float64, -inf where a key must not be attended."""
    q, k = query.detach().double(), key.detach().double()
    c = scale if scale is not None else 1 / math.sqrt(max(q.size(-1), 1))
    z = c * torch.einsum("bhid,bhjd->bhij", q, repeat_heads(k, q.size(1)))
    if mask is not None and mask.dtype != torch.bool:
        z = z + mask.detach().double()
    if mask is not None and mask.dtype == torch.bool:
        z = torch.where(mask.expand_as(z), z, torch.tensor(NOTHING, dtype=z.dtype))
    if causal or window is not None:
        attend = allowed(z.size(2), z.size(3), causal, window)
        z = torch.where(attend, z, torch.tensor(NOTHING, dtype=z.dtype))
    return z


def softmax(z: Tensor) -> Tensor:
    """exp(z) / sum exp(z) over the last dimension; 0 in a row that attends nothing."""
    if z.size(-1) == 0:
        return z.clone()
    highest = z.amax(-1, keepdim=True)
    e = torch.exp(z - torch.where(highest == NOTHING, torch.zeros_like(highest), highest))
    total = e.sum(-1, keepdim=True)
    return torch.where(total == 0, torch.zeros_like(e), e / total)


def log_sum_exp(z: Tensor) -> Tensor:
    highest = z.amax(-1, keepdim=True)
    return (highest + torch.log(torch.exp(z - highest).sum(-1, keepdim=True))).squeeze(-1)


def output(p: Tensor, value: Tensor, drop: Tensor | None = None) -> Tensor:
    v = repeat_heads(value.detach().double(), p.size(1))
    return (p if drop is None else drop.double() * p) @ v


def gradients(query, key, value, grad, p, scale=None, drop=None, delta_of=None) -> Gradients:
    """The gradients that an estimate p of the softmax gives; delta is taken from `delta_of` (p itself when None)."""
    q, k, v, g = (x.detach().double() for x in (query, key, value, grad))
    heads, kv_heads = q.size(1), k.size(1)
    c = scale if scale is not None else 1 / math.sqrt(max(q.size(-1), 1))
    d = torch.ones_like(p) if drop is None else drop.double()
    a = d * (g @ repeat_heads(v, heads).transpose(-2, -1))
    delta = ((p if delta_of is None else delta_of) * a).sum(-1, keepdim=True)
    dz = p * (a - delta)
    return Gradients(
        c * dz @ repeat_heads(k, heads),
        sum_heads(c * dz.transpose(-2, -1) @ q, kv_heads),
        sum_heads((d * p).transpose(-2, -1) @ g, kv_heads),
        dz,
    )


def gradient_magnitudes(query, key, value, grad, p, scale=None, drop=None) -> Gradients:
    """The same sums over absolute values: what a rounding error is relative to, whatever cancels."""
    q, k, v, g = (x.detach().double().abs() for x in (query, key, value, grad))
    heads, kv_heads = q.size(1), k.size(1)
    c = abs(scale) if scale is not None else 1 / math.sqrt(max(q.size(-1), 1))
    d = torch.ones_like(p) if drop is None else drop.double()
    a = d * (g @ repeat_heads(v, heads).transpose(-2, -1))
    dz = p * (a + (p * a).sum(-1, keepdim=True))
    return Gradients(
        c * dz @ repeat_heads(k, heads),
        sum_heads(c * dz.transpose(-2, -1) @ q, kv_heads),
        sum_heads((d * p).transpose(-2, -1) @ g, kv_heads),
        dz,
    )


def curve_row(z: list[float], m: int, paper_text: bool = False) -> list[float]:
    """One row through the paper's Algorithm 1: its softmax, and the middle of it replaced by a curve.

    z: logits, -inf where masked. h_1 >= ... >= h_m are the highest values, l_m >= ... >= l_1 the
    lowest. The curve s'_k = alpha exp(-beta k) stands at k = 0 for h_m and at k = N - 1 for l_m.
    """
    kept = [j for j in range(len(z)) if z[j] != NOTHING]
    approximation = [0.0] * len(z)
    if not kept:
        return approximation
    top = max(z[j] for j in kept)
    total = sum(math.exp(z[j] - top) for j in kept)
    order = sorted(kept, key=lambda j: -z[j])  # stable: equal logits keep their order
    p = [math.exp(z[j] - top) / total for j in order]
    n = len(order)
    if n > 2 * m:
        count = n - 2 * m + 2
        alpha = p[m - 1]
        log_ratio = z[order[m - 1]] - z[order[n - m]]  # ln(h_m / l_m), also where l_m underflows
        beta = (log_ratio + 2 * (p[m - 1] - p[m])) / (count * max(1 - p[m - 1], 2.0**-24))
        curve = [alpha * math.exp(-beta * k) for k in range(count)]
        if paper_text:
            p = p[:m] + curve[1:] + p[n - m + 1 :]
        else:
            missing = max(1 - sum(p[:m]) - sum(p[n - m :]), 0.0)
            # Only its shape counts here: taken relative to its first element, it cannot underflow as a whole.
            shape = [math.exp(-beta * k) if alpha > 0 else 1.0 for k in range(count - 2)]
            p = p[:m] + [missing * s / sum(shape) for s in shape] + p[n - m :]
    for j, value in zip(order, p, strict=True):
        approximation[j] = value
    return approximation


def curve(z: Tensor, m: int, paper_text: bool = False) -> Tensor:
    rows = [curve_row(row, m, paper_text) for row in z.detach().double().reshape(-1, z.size(-1)).tolist()]
    return torch.tensor(rows, dtype=torch.float64).reshape(z.shape)


SAMPLE_ROWS = 64  # rows of a tile, which share their drawn keys


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox 4x32-10."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def tile_uniform(seed: Tensor, head: int, tile: int) -> float:
    """The number in (0, 1) that decides a tile's draw: the rounding stream at (block 0, row = tile)."""
    key, word = (int(x) for x in seed)
    last = (((word & 0xFFFFFFFF) << 1) | 1) & 0xFFFFFFFF
    x, y, _, _ = philox([0, tile, head, last], [key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF])
    return ((x << 20 | y >> 12) + 0.5) * 2.0**-52


def inclusion(weights: list[float], m: int) -> list[float]:
    """min(1, c w) with c such that they sum to min(m, number of positive w)."""
    certain = {j for j, w in enumerate(weights) if w > 0}
    if len(certain) > m:
        certain = set()
        while True:  # each round takes in those that the last one's c sends above 1
            rest = sum(w for j, w in enumerate(weights) if j not in certain)
            c = (m - len(certain)) / rest
            more = {j for j, w in enumerate(weights) if j not in certain and c * w >= 1}
            if not more:
                return [1.0 if j in certain else c * w for j, w in enumerate(weights)]
            certain |= more
    return [1.0 if j in certain else 0.0 for j in range(len(weights))]


def systematic(pi: list[float], u: float) -> list[int]:
    """Keys j for which some u + k, k whole, lies in (C_{j-1}, C_j], C the running sum of pi."""
    drawn, reached = [], 0.0
    for j, probability in enumerate(pi):
        if math.floor(reached + probability - u) > math.floor(reached - u):
            drawn.append(j)
        reached += probability
    return drawn


def tile_weights(p: Tensor) -> Tensor:
    """Roots of the sums of p^2 over tiles of rows, [B, H, tiles, Nk]."""
    tiles = -(-p.size(2) // SAMPLE_ROWS)
    padded = torch.cat([p, p.new_zeros(*p.shape[:2], tiles * SAMPLE_ROWS - p.size(2), p.size(3))], 2)
    return padded.unflatten(2, (tiles, SAMPLE_ROWS)).square().sum(3).sqrt()


def reweighted(p: Tensor, codes: Tensor, table: Tensor) -> Tensor:
    """The estimate p^ of policy sampled: p / pi at a tile's drawn keys, 0 elsewhere."""
    factors = p.new_zeros(*codes.shape[:3], p.size(3) + 1)
    factors.scatter_(-1, torch.where(codes < 0, p.size(3), codes).long(), table.double())
    return p * factors[..., :-1].repeat_interleave(SAMPLE_ROWS, 2)[:, :, : p.size(2)]


def top(z: Tensor, m: int) -> Tensor:
    """The softmax with all but its m highest elements of a row at the mean of the others that are not masked."""
    result = softmax(z)
    for row, values in zip(z.reshape(-1, z.size(-1)), result.view(-1, z.size(-1)), strict=True):
        order = [j for j in row.argsort(descending=True).tolist() if row[j] != NOTHING]
        rest = order[m:]
        if rest:
            values[rest] = max(1 - values[order[:m]].sum().item(), 0.0) / len(rest)
    return result


def rank_bits(keys: int) -> int:
    return math.ceil(math.log2(keys)) if keys > 1 else 0


def residual_bytes(policy: str, heads: int, queries: int, keys: int, element_bytes: int) -> int:
    """Bytes that the policy keeps beyond query, key, value, output and mask, without dropout."""
    if policy.startswith("sampled"):
        wide = max(element_bytes, 4)
        slots = min(int(policy.split("=")[1]), keys)
        return heads * (queries * wide + -(-queries // SAMPLE_ROWS) * slots * (4 + wide))
    if policy.startswith("top"):
        return heads * queries * (max(element_bytes, 4) + 4 * min(int(policy.split("=")[1]), keys))
    return heads * queries * row_bytes(policy, keys, element_bytes)


def row_bytes(policy: str, keys: int, element_bytes: int) -> int:
    """Bytes a row that the policy keeps beyond query, key, value, output and mask."""
    name, _, parameters = policy.partition(":")
    wide = max(element_bytes, 4)
    if name == "exact":
        return keys * element_bytes
    if name == "recompute":
        return wide
    number = int(parameters.split(",")[0].split("=")[1])
    if name == "curve":
        values = min(2 * number, keys) + 2  # and the decay, and how many keys are valid
        return values * wide + math.ceil(keys * rank_bits(keys) / 8)
    return math.ceil(keys * number / 8) + wide


def curve_row_bytes(keys: int, m: int, element_bytes: int = 4) -> int:
    return row_bytes(f"curve:m={m}", keys, element_bytes)


def eager_attention(query, key, value, mask=None, causal=False, window=None, scale=None, drop=None) -> Tensor:
    """Attention as one writes it in torch, in the inputs' own precision: the path to compare errors with."""
    c = scale if scale is not None else 1 / math.sqrt(max(query.size(-1), 1))
    groups = query.size(1) // max(key.size(1), 1)
    k, v = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (key, value))
    scores = (query @ k.transpose(-2, -1)) * c
    if mask is not None:
        scores = scores.masked_fill(~mask, NOTHING) if mask.dtype == torch.bool else scores + mask
    if causal or window is not None:
        scores = scores.masked_fill(~allowed(query.size(2), key.size(2), causal, window), NOTHING)
    p = torch.softmax(scores, -1)
    return (p if drop is None else p * drop) @ v


def saved_bytes(run) -> tuple[int, list[Tensor]]:
    """Bytes of the storages that `run()` saves for backward, each counted once, and the tensors."""
    saved = []

    def pack(x):
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = run()
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved if x.numel() > 0}
    del result
    return sum(storages.values()), saved


class Allocations(NamedTuple):
    largest: int  # bytes of the largest single allocation
    peak: int  # most bytes alive at once, of those allocated within


def allocations(run) -> Allocations:
    """What `run()` asks of the allocator, as the profiler sees it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    live = peak = largest = 0
    for event in events:
        live += event.nbytes()
        peak = max(peak, live)
        largest = max(largest, event.nbytes())
    del result
    assert largest > 0, "the profiler saw no allocation"
    return Allocations(largest, peak)
