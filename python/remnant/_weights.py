"""The gradient of attention's weights, which `remnant.attention` returns without one."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Weights(torch.autograd.Function):
    """Weights as they are; backward makes them again, so that nothing is kept that attention does not hold anyway."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, query: Tensor, key: Tensor, mask: Tensor | None, causal: bool,
                scale: float) -> Tensor:
        ctx.save_for_backward(query, key, mask)
        ctx.causal, ctx.scale = causal, scale
        return weights.view_as(weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, mask = ctx.saved_tensors
        wide = torch.promote_types(query.dtype, torch.float32)
        q, k, grad = query.to(wide), key.to(wide), grad.to(wide)
        shared = q.shape[1] // k.shape[1]  # query heads to a key head
        if shared > 1:
            k = k.repeat_interleave(shared, 1)
        scores = q @ k.transpose(-2, -1) * ctx.scale
        if ctx.causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        weights = scores.softmax(-1).masked_fill(scores.isneginf().all(-1, keepdim=True), 0)
        g = weights * (grad - (weights * grad).sum(-1, keepdim=True))
        g_key = g.transpose(-2, -1) @ q * ctx.scale
        if shared > 1:
            g_key = g_key.unflatten(1, (-1, shared)).sum(2)
        g_mask = g.sum_to_size(mask.shape).to(mask.dtype) if ctx.needs_input_grad[3] else None
        return None, (g @ k * ctx.scale).to(query.dtype), g_key.to(key.dtype), g_mask, None, None


def with_gradient(weights: Tensor, query: Tensor, key: Tensor, mask: Tensor | None, causal: bool,
                  scale: float | None = None) -> Tensor:
    """Attention's `weights` [B, H, N, M] of query, key and mask as `remnant.attention` takes them, with a gradient.

    Saves for backward: query, key and mask. No second derivative.
    """
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return _Weights.apply(weights, query, key, mask, causal, scale)
