"""torch.nn.functional.scaled_dot_product_attention's signature over remnant.attention."""

import torch
from torch import Tensor

from remnant._ops import attention

_NAME = "scaled_dot_product_attention"


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    store: str = "recompute",
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention, and what it keeps for backward is a choice.

    Args:
        query: [..., Hq, L, E], two dimensions or more; float32, float64, bfloat16 or float16.
        key: [..., H, S, E], query's dtype; leading dimensions broadcast with query's and value's.
        value: [..., H, S, Ev], query's dtype.
        attn_mask: broadcastable to [..., Hq, L, S]: boolean (True = attend) or floating point, float32 or
            query's dtype (added to the scores; a gradient flows to it).
        dropout_p: probability of dropping an element of the softmax's output, in [0, 1]. As in torch it is
            applied whether or not a model is training.
        is_causal: query i attends keys j <= i, aligned top left; not together with attn_mask.
        scale: multiplies query key^T; 1 / sqrt(E) when None.
        enable_gqa: key and value may have fewer heads than query, each a divisor of Hq.
        store: what is kept of the softmax's output, the policy of remnant.attention.

    Returns:
        [..., Hq, L, Ev] in query's dtype.

    Differs from torch: a row with no key to attend gives 0 and gradient 0 on every path; attn_mask together
    with is_causal is always refused; dropout draws other elements for the same seed; a double backward
    needs store="exact". Leading dimensions beyond two that broadcast are expanded first.

    Saves for backward: as remnant.attention.

    Raises:
        RuntimeError: shapes, dtypes or options that do not fit; a double backward unless store is "exact".
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.is_nested:
            raise RuntimeError(f"{_NAME}: {name} must not be nested, got a nested tensor: "
                               "use remnant.attention_packed for sequences of different lengths")
        if x.dim() < 2:
            raise RuntimeError(f"{_NAME}: {name} must have two dimensions or more, got shape {list(x.shape)}")
    if is_causal and attn_mask is not None:
        raise RuntimeError(f"{_NAME}: is_causal needs attn_mask None, got a mask of shape {list(attn_mask.shape)}: "
                           "put the causal limit into the mask")
    if not 0.0 <= dropout_p <= 1.0:
        raise RuntimeError(f"{_NAME}: dropout_p must be in [0, 1], got {dropout_p}")
    if enable_gqa:
        key, value = _grouped(query, key, value)
    q, k, v, lead = _four_dimensions(query, key, value, enable_gqa)
    mask = None if attn_mask is None else _mask(attn_mask, query, (*lead, query.size(-2), key.size(-2)))
    # remnant.attention has no rate of 1, whose 1 / (1 - rate) is infinite.
    everything = dropout_p == 1.0
    output = attention(
        q, k, v, mask=mask, causal=is_causal, dropout=0.0 if everything else dropout_p, scale=scale, policy=store
    )
    assert isinstance(output, Tensor)
    if everything:
        output = torch.dropout(output, 1.0, True)
    return output.reshape(*lead, query.size(-2), value.size(-1))


def _grouped(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """key and value with the same number of heads, a divisor of query's."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.dim() < 3:
            raise RuntimeError(f"{_NAME}: enable_gqa needs a dimension of heads, got {name} of shape {list(x.shape)}")
    heads, key_heads, value_heads = query.size(-3), key.size(-3), value.size(-3)
    for name, count in (("key", key_heads), ("value", value_heads)):
        if count == 0 or heads % count != 0:
            raise RuntimeError(f"{_NAME}: {name}'s heads must divide query's {heads}, got {count}")
    if key_heads != value_heads:
        key = key.repeat_interleave(heads // key_heads, -3)
        value = value.repeat_interleave(heads // value_heads, -3)
    return key, value


def _four_dimensions(
    query: Tensor, key: Tensor, value: Tensor, grouped: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """The three as [B, H, N, D], and the leading dimensions of the output."""
    fits = query.dim() == key.dim() == value.dim() == 4 and query.size(0) == key.size(0) == value.size(0)
    heads, key_heads = (query.size(1), key.size(1)) if fits else (0, 0)
    # One head of keys serves any number of queries' heads as it is, without being repeated.
    if fits and key_heads == value.size(1) and (grouped or key_heads in (1, heads)):
        return query, key, value, (query.size(0), heads)

    tensors = [query, key, value]
    leads = [x.shape[:-2] for x in tensors]
    if grouped:  # heads are counted below; only what lies before them broadcasts
        leads = [lead[:-1] for lead in leads]
    try:
        lead = tuple(torch.broadcast_shapes(*leads))
    except RuntimeError:
        shapes = ", ".join(str(list(x.shape)) for x in tensors)
        hint = "" if grouped or query.dim() < 3 else ": fewer heads in key and value need enable_gqa=True"
        raise RuntimeError(f"{_NAME}: the leading dimensions of query, key and value must broadcast, got {shapes}"
                           f"{hint}") from None
    keep = 3 if grouped else 2
    expanded = [x.expand(*lead, *x.shape[-keep:]) for x in tensors]
    if grouped:
        lead = (*lead, query.size(-3))
    flat = [
        x.unsqueeze(0) if x.dim() == 3 else x[None, None] if x.dim() == 2 else x if x.dim() == 4 else x.flatten(0, -4)
        for x in expanded
    ]
    return flat[0], flat[1], flat[2], lead


def _mask(mask: Tensor, query: Tensor, full: tuple[int, ...]) -> Tensor:
    """The mask as [B or 1, H or 1, L or 1, S or 1]; what it broadcasts is not copied unless it must be."""
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise RuntimeError(f"{_NAME}: attn_mask must be boolean, float32 or of query's dtype {query.dtype}, "
                           f"got {mask.dtype}")
    try:
        fits = tuple(torch.broadcast_shapes(mask.shape, full)) == full
    except RuntimeError:
        fits = False
    if not fits:
        raise RuntimeError(f"{_NAME}: attn_mask must broadcast to {list(full)}, got {list(mask.shape)}")
    if mask.dim() <= 4 and len(full) <= 4:
        if len(full) == 4:
            return mask
        while mask.dim() < 4:
            mask = mask.unsqueeze(0)
        return mask
    mask = mask.reshape((1,) * (len(full) - mask.dim()) + tuple(mask.shape))
    batch = tuple(mask.shape[:-3])
    if all(size == 1 for size in batch):
        return mask.flatten(0, -4)
    return mask.expand(*full[:-3], *mask.shape[-3:]).flatten(0, -4)
