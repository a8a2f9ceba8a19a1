"""Python signatures of the library's ops."""

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

_ops = torch.ops.remnant


@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, causal: bool = False,
    dropout: float = 0.0, scale: float | None = None, policy: str = "recompute",
    window: Sequence[int] | None = None, generator: torch.Generator | None = None, need_weights: Literal[False] = False,
    bits: int = 0,
) -> Tensor: ...
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, causal: bool = False,
    dropout: float = 0.0, scale: float | None = None, policy: str = "recompute",
    window: Sequence[int] | None = None, generator: torch.Generator | None = None, need_weights: Literal[True],
    bits: int = 0,
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, causal: bool = False,
    dropout: float = 0.0, scale: float | None = None, policy: str = "recompute",
    window: Sequence[int] | None = None, generator: torch.Generator | None = None, need_weights: bool,
    bits: int = 0,
) -> Tensor | tuple[Tensor, Tensor]: ...
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    scale: float | None = None,
    policy: str = "recompute",
    window: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    need_weights: bool = False,
    bits: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * query key^T + mask), dropout, times value, without keeping the softmax's output.

    The forward is exact under every policy; what differs is what is kept for the backward pass.

        >>> q, k, v = (torch.randn(2, 4, 16, 8) for _ in range(3))
        >>> remnant.attention(q, k, v, causal=True, policy="recompute").shape
        torch.Size([2, 4, 16, 8])

    Args:
        query: [B, H, Nq, D], any strides; float32, float64, bfloat16 or float16.
        key: [B, Hkv, Nk, D], query's dtype; Hkv divides H (grouped-query heads).
        value: [B, Hkv, Nk, Dv], query's dtype.
        mask: broadcastable to [B, H, Nq, Nk]: boolean (True = attend) or floating point (added to the
            scores; a gradient flows to it).
        causal: query i attends keys j <= i, aligned top left.
        dropout: probability of dropping an element of the softmax's output, in [0, 1).
        scale: multiplies query key^T; 1 / sqrt(D) when None.
        policy: what is kept of the softmax's output:
            "exact": all of it. The only policy that can be differentiated twice.
            "recompute": one log-sum-exp a row; the gradient is exact.
            "curve:m=4": the m highest and m lowest elements of a row, a decay, and every element's rank;
                the gradient is approximate and biased. "curve:m=4,paper_text" follows the paper's text,
                which does not rescale a row to sum 1.
            "quantized:bits=4": 2, 4 or 8 bits an element, rounded stochastically; the gradient is unbiased.
            "sampled:m=128": m keys for every 64 rows, drawn by their share of the softmax and re-weighted;
                the gradient is unbiased, and the backward works on the drawn keys alone.
            "top:m=32": the m highest keys of a row, the rest spread evenly over its other keys; biased, and
                unsafe once attention is peaked. Only causal and boolean key-padding masks.
        window: (left, right): query i attends keys i - left <= j <= i + right; -1: no bound on that side.
        generator: source of the seeds of dropout, rounding and key draws; the device's default generator when None.
        need_weights: also return the weights before dropout, detached.
        bits: 0, or 8, 4 or 2: value and output are kept at so many bits an element, query and key at 8, by
            stochastic rounding. Policy "recompute" without weights only.

    Returns:
        [B, H, Nq, Dv] in query's dtype; with need_weights also the weights, [B, H, Nq, Nk]. A row with no
        key to attend gives 0, and gradient 0.

    Saves for backward: query, key, value, the output, and attention_residual_bytes(...) bytes; a mask,
    where given. Dropout keeps a seed of 16 bytes. Nothing under torch.no_grad().

    Raises:
        RuntimeError: shapes, dtypes, devices or options that do not fit, naming the argument, what was
            expected and what was got; a double backward under any policy but "exact".
    """
    if bits != 0:
        if policy != "recompute" or need_weights:
            raise ValueError(f"attention: bits needs policy 'recompute' without need_weights, got {policy!r}")
        return _ops.attention_coded(query, key, value, mask, causal, dropout, scale, window, bits, generator)
    op = _ops.attention_with_weights if need_weights else _ops.attention
    return op(query, key, value, mask, causal, dropout, scale, policy, window, generator)


def attention_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = False,
    dropout: float = 0.0,
    scale: float | None = None,
    policy: str = "recompute",
    window: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """attention of sequences of different lengths that lie one after the other, without padding.

    Sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1] - 1, and attends itself alone.

    Args:
        query: [Tq, H, D]; float32, float64, bfloat16 or float16.
        key: [Tk, Hkv, D], query's dtype; Hkv divides H.
        value: [Tk, Hkv, Dv], query's dtype.
        cu_seqlens_q: [B + 1] int32 or int64, rising from 0 to Tq.
        cu_seqlens_k: [B + 1], rising from 0 to Tk; the same tensor where queries and keys go together.
        causal: query i of a sequence attends its keys j <= i.
        dropout, scale, policy, window, generator: as in attention. Dropout draws what attention would draw
            for the padded batch.

    Returns:
        [Tq, H, Dv] in query's dtype.

    Saves for backward: what attention saves, for Tq rows, as wide as the longest sequence needs.

    Raises:
        RuntimeError: shapes, dtypes or boundaries that do not fit; a double backward.
    """
    return _ops.attention_packed(
        query, key, value, cu_seqlens_q, cu_seqlens_k, causal, dropout, scale, policy, window, generator
    )


def attention_residual_bytes(
    policy: str, heads: int, queries: int, keys: int, element_bytes: int, dropout: bool = False
) -> int:
    """Bytes that attention keeps for backward beyond query, key, value, output and mask.

    Args:
        policy: as in attention.
        heads: B * H.
        queries: Nq.
        keys: Nk.
        element_bytes: size of one element of the inputs' dtype.
        dropout: whether dropout is on.

    Raises:
        RuntimeError: a policy that does not parse, or a negative size.
    """
    return _ops.attention_residual_bytes(policy, heads, queries, keys, element_bytes, dropout)


def dropout(input: Tensor, p: float, *, generator: torch.Generator | None = None) -> Tensor:
    """Zeroes each element with probability `p` and divides the others by the keep rate.

    Args:
        input: any shape and floating dtype.
        p: in [0, 1). 16 random bits decide an element, so the realised rate is round(65536 p) / 65536.
        generator: source of the seed; the device's default generator when None.

    Returns:
        input's shape and dtype; `input` itself when p is 0.

    Saves for backward: a 16-byte seed, from which the mask is drawn again.

    Raises:
        RuntimeError: p outside of [0, 1), or a dtype that is not floating.
    """
    return _ops.dropout(input, p, generator)


def dropout_add(
    input: Tensor, residual: Tensor, p: float, *, generator: torch.Generator | None = None
) -> Tensor:
    """residual + dropout(input, p) in one pass, with the mask that remnant.dropout draws.

    Args:
        input: any shape; float32, float64, bfloat16 or float16.
        residual: input's shape and dtype.
        p: in [0, 1), as in dropout.
        generator: source of the seed; the device's default generator when None.

    Returns:
        input's shape and dtype.

    Saves for backward: a 16-byte seed, none when p is 0.

    Raises:
        RuntimeError: p outside of [0, 1); shapes, dtypes or devices that differ.
    """
    return _ops.dropout_add(input, residual, p, generator)


def conv_norm_act(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    norm: str = "batch",
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "relu",
    memory: str = "exact",
    generator: torch.Generator | None = None,
    recompute: bool = False,
) -> Tensor:
    """activation(norm(convolution(input, weight, bias)) + residual) as one unit that keeps one tensor, or its codes.

    Args:
        input: [N, C_in, L], [N, C_in, H, W] or [N, C_in, D, H, W], contiguous or channels-last.
        weight: [C_out, C_in / groups, kernel...], input's dtype.
        bias: [C_out] or None.
        norm_weight: [C_out] or None; input's dtype, or float32 beside a half type.
        norm_bias: as norm_weight.
        running_mean: [C_out] or None; in training updated once, in the forward.
        running_var: as running_mean.
        residual: the output's shape and dtype, added before the activation, or None.
        stride: one number, or one for each spatial dimension; padding and dilation as well.
        groups: of the convolution.
        norm: "batch", "group:groups=8" or "none".
        training: batch norm takes the batch's statistics, else the running ones as constants.
        momentum: of the running statistics.
        eps: added to the variance.
        activation: "relu", "leaky:slope=0.01", "silu" or "identity".
        memory: "eager", "exact", or "unbiased:bits=8", 4 or 2.
        generator: source of the codes' rounding; the default generator when None.
        recompute: under "exact", keep the input alone and convolve again in backward; for a convolution that is cheap
            beside what its output takes, such as a 1x1 shortcut or the first layer.

    Returns:
        The output in input's dtype and memory format.

    Saves for backward: under "exact" the sum before the activation, or the output where that gives the sum back;
    the next unit keeps the same storage instead of its input. Under "unbiased" codes of the normalised values,
    with a residual also of the sum; weight's gradient is unbiased, input's has a second-order bias. Under "eager"
    and torch.compile what PyTorch keeps.

    Raises:
        RuntimeError: shapes, dtypes, settings that do not fit, or a double backward of another memory than "eager".
    """

    def numbers(x: int | Sequence[int]) -> list[int]:
        return [x] if isinstance(x, int) else list(x)

    twice = _runs_twice()
    before = twice and _ops.look_for_derived(False)
    try:
        return _ops.conv_norm_act(
            input,
            weight,
            bias,
            norm_weight,
            norm_bias,
            running_mean,
            running_var,
            residual,
            numbers(stride),
            numbers(padding),
            numbers(dilation),
            groups,
            norm,
            training,
            momentum,
            eps,
            activation,
            memory,
            generator,
            recompute,
        )
    finally:
        if twice:
            _ops.look_for_derived(before)


def _runs_twice() -> bool:
    """In a region of torch.utils.checkpoint. There a unit keeps what it needs by itself: what the first run saves is
    dropped, so that only the second would find it with the unit before, and the two would save different things."""
    if torch.compiler.is_compiling():
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and getattr(hooks[0], "__module__", "") == "torch.utils.checkpoint"


def shortcut(input: Tensor, stride: int, channels: int, *, average: bool = False) -> Tensor:
    """A residual block's shortcut without parameters: every stride-th position, then channels of zeros.

    Args:
        input: [N, C, L], [N, C, H, W] or [N, C, D, H, W].
        stride: of every spatial dimension.
        channels: of the output, at least C.
        average: the mean of each window of stride positions a dimension instead of its first.

    Returns:
        [N, channels, ...], a new tensor in input's memory format.

    Saves for backward: nothing. conv_norm_act keeps nothing of it as residual either where input is another unit's
    output, which gives it back.

    Raises:
        RuntimeError: shapes, dtypes or numbers that do not fit.
    """
    return _ops.shortcut(input, stride, channels, average)


def layer_norm(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    policy: str = "exact",
) -> Tensor:
    """LayerNorm over the last dimension that keeps its output instead of its input.

    Args:
        input: [..., C]; float32, float64, bfloat16 or float16.
        weight: [C] or None; input's dtype, or float32 beside a half type.
        bias: as weight.
        eps: added to the variance.
        policy: "exact", or "quantized:bits=8", 4 or 2: codes of the output stand for it, the same that linear
            keeps of it at as many bits. Gradients of weight and bias stay unbiased, input's up to the codes'
            variance over C.

    Returns:
        input's shape and dtype; computed in float32 (float64 for float64).

    Saves for backward: the output, which the next op usually keeps anyway, and 1 / standard deviation, 4
    bytes a row. Columns where weight or bias hide the normalised values (|bias| > 16 |weight|, for half
    types |bias| > |weight|; weight 0 or outside of 2**-64 to 2**64) are kept aside, 4 bytes an element;
    under torch.compile every column is.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit, or a double backward.
    """
    return _ops.layer_norm(input, weight, bias, eps, policy)


def rms_norm(
    input: Tensor, weight: Tensor | None = None, *, eps: float | None = None, policy: str = "exact"
) -> Tensor:
    """RMSNorm over the last dimension, input / sqrt(mean(input ** 2) + eps) * weight.

    Args:
        input: as in layer_norm.
        weight: as in layer_norm.
        eps: added to the mean square; the machine epsilon of the type that is computed in when None.
        policy: as in layer_norm.

    Returns:
        input's shape and dtype.

    Saves for backward: what layer_norm saves.

    Raises:
        RuntimeError: as layer_norm.
    """
    return _ops.rms_norm(input, weight, eps, policy)


@overload
def dropout_add_layer_norm(
    input: Tensor, residual: Tensor, p: float, weight: Tensor | None = None, bias: Tensor | None = None, *,
    eps: float = 1e-5, generator: torch.Generator | None = None, need_sum: Literal[True] = True, policy: str = "exact",
) -> tuple[Tensor, Tensor]: ...
@overload
def dropout_add_layer_norm(
    input: Tensor, residual: Tensor, p: float, weight: Tensor | None = None, bias: Tensor | None = None, *,
    eps: float = 1e-5, generator: torch.Generator | None = None, need_sum: Literal[False], policy: str = "exact",
) -> Tensor: ...
@overload
def dropout_add_layer_norm(
    input: Tensor, residual: Tensor, p: float, weight: Tensor | None = None, bias: Tensor | None = None, *,
    eps: float = 1e-5, generator: torch.Generator | None = None, need_sum: bool, policy: str = "exact",
) -> tuple[Tensor, Tensor] | Tensor: ...
def dropout_add_layer_norm(
    input: Tensor,
    residual: Tensor,
    p: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    generator: torch.Generator | None = None,
    need_sum: bool = True,
    policy: str = "exact",
) -> tuple[Tensor, Tensor] | Tensor:
    """The sum residual + dropout(input, p) and its layer_norm, one pass forward and one backward.

    Args:
        input: [..., C]; float32, float64, bfloat16 or float16.
        residual: input's shape and dtype.
        p: in [0, 1), as in dropout.
        weight, bias, eps: as in layer_norm.
        generator: source of the seed; the device's default generator when None.
        need_sum: also return the sum, as pre-norm layers need; post-norm layers do without.
        policy: as in layer_norm.

    Returns:
        (layer_norm(sum), sum), or layer_norm(sum) alone; input's shape and dtype.

    Saves for backward: what layer_norm saves, and a 16-byte seed when p > 0; neither sum nor input.

    Raises:
        RuntimeError: as layer_norm and dropout_add.
    """
    output, total = _ops.dropout_add_layer_norm(input, residual, p, weight, bias, eps, generator, need_sum, policy)
    return (output, total) if need_sum else output


def relu(input: Tensor) -> Tensor:
    """max(input, 0).

    Args:
        input: any shape; float32, float64, bfloat16 or float16.

    Returns:
        input's shape and dtype. NaN stays NaN.

    Saves for backward: one bit an element.

    Raises:
        RuntimeError: another dtype.
    """
    return _ops.relu(input)


def leaky_relu(input: Tensor, slope: float = 0.01) -> Tensor:
    """input where it is positive, else slope * input.

    Args:
        input: as in relu.
        slope: of the negative side.

    Returns:
        input's shape and dtype.

    Saves for backward: one bit an element.

    Raises:
        RuntimeError: another dtype.
    """
    return _ops.leaky_relu(input, slope)


def gelu(input: Tensor, *, approximate: str = "none", policy: str = "exact") -> Tensor:
    """input times the normal distribution's Phi(input).

    The forward is exact under every policy.

    Args:
        input: as in relu.
        approximate: "none", or "tanh" for Phi's tanh form.
        policy: what is kept for the backward pass:
            "exact": the input.
            "fewbit:bits=4": 2, 3 or 4 bits an element, the interval that it lies in; the gradient takes the
                interval's mean derivative, which is biased (docs/numerics.md has the error).
            "quantized:bits=4": 8, 4 or 2 bits an element, the derivative by stochastic rounding; unbiased.

    Returns:
        input's shape and dtype.

    Saves for backward: see policy. Under "fewbit" 64 neighbours of a NaN or Inf get a NaN gradient.

    Raises:
        RuntimeError: another dtype, an unknown policy, or a double backward.
    """
    return _ops.gelu(input, approximate, policy)


def silu(input: Tensor, *, policy: str = "exact") -> Tensor:
    """input times its sigmoid.

    Args:
        input: as in relu.
        policy: as in gelu.

    Returns:
        input's shape and dtype.

    Saves for backward: as gelu.

    Raises:
        RuntimeError: as gelu.
    """
    return _ops.silu(input, policy)


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    policy: str = "exact",
    generator: torch.Generator | None = None,
) -> Tensor:
    """input weight^T + bias.

    Args:
        input: [..., K]; float32, float64, bfloat16 or float16.
        weight: [N, K], input's dtype; under "quantized" its own, in which products are computed.
        bias: [N] or None, weight's dtype.
        policy: what is kept of the input:
            "exact": all of it, as torch does.
            "quantized:bits=4": 8, 4 or 2 bits an element by stochastic rounding; weight's gradient is
                unbiased, the others are exact. Readers of one tensor share one copy of codes.
        generator: source of the rounding's seed; the device's default generator when None.

    Returns:
        [..., N] in weight's dtype.

    Saves for backward: see policy; linear_code_bytes(n, bits) under "quantized", where weight's gradient is
    wanted.

    Raises:
        RuntimeError: shapes or dtypes that do not fit, an unknown policy, or a double backward under
            "quantized".
    """
    return _ops.linear(input, weight, bias, policy, generator)


def linear_code_bytes(elements: int, bits: int) -> int:
    """Bytes that linear keeps of an input of so many elements under "quantized".

    Args:
        elements: how many numbers the input has.
        bits: 8, 4 or 2.

    Raises:
        RuntimeError: other bits, or a negative size.
    """
    return _ops.linear_code_bytes(elements, bits)


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    policy: str = "exact",
    generator: torch.Generator | None = None,
) -> Tensor:
    """torch.nn.functional.conv2d with zero padding, and a choice of what is kept of its input.

    Args:
        input: [N, C, H, W]; float32, float64, bfloat16 or float16.
        weight: [O, C / groups, kh, kw], input's dtype.
        bias: [O] or None.
        stride, padding, dilation, groups: as torch's, padding in numbers.
        policy: what is kept of the input, for weight's gradient:
            "exact": all of it, as torch does.
            "quantized:bits=4": 8, 4 or 2 bits an element by stochastic rounding; unbiased.
            "invert": the output and what it does not tell (the ring, coordinates of nearly singular directions); the
                backward rebuilds the input and checks it. Exact up to rounding times conv2d_inversion's
                amplification. Where that is not worth while the input is kept; conv2d_inversion says why.
            "min_norm": as "invert" without those coordinates and without the check. BIASED: the weight never leaves the
                directions that it sees at first.
        generator: source of the rounding's seed; the device's default generator when None.

    Returns:
        [N, O, H', W'] in input's dtype.

    Saves for backward: see policy; nothing of the input where weight needs no gradient.

    Raises:
        RuntimeError: shapes or dtypes that do not fit, an unknown policy, a rebuilt input that fails its check, or a
            double backward under any policy but "exact".
    """
    return _ops.conv2d(input, weight, bias, stride, padding, dilation, groups, policy, generator)


def max_pool2d(
    input: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """torch.nn.functional.max_pool2d that keeps a byte an output instead of its input and 8 bytes an output.

        >>> remnant.max_pool2d(torch.randn(2, 8, 16, 16), 3, stride=2, padding=1).shape
        torch.Size([2, 8, 8, 8])

    Args:
        input: [N, C, H, W] of any floating dtype, contiguous or channels-last.
        kernel_size, stride, padding, dilation: one number or two; stride None for kernel_size.
        ceil_mode: windows that begin inside the input count too.

    Returns:
        [N, C, H', W'] in input's dtype and memory format.

    Saves for backward: which element of its window each output is, a byte.

    Raises:
        RuntimeError: windows of more than 256 elements, shapes or dtypes that do not fit, or a double backward.
    """
    return _ops.max_pool2d(input, kernel_size, [] if stride is None else stride, padding, dilation, ceil_mode)


def conv2d_inversion(
    weight: Tensor,
    input_size: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> str:
    """What conv2d's policy "invert" would do: what share of the input it keeps and its amplification, or why not.

    Args:
        weight: [O, C / groups, kh, kw].
        input_size: [H, W].
        stride, padding, dilation, groups: as in conv2d.

    Returns:
        "invert: keeps 0.129 of the input, amplification 9.2", or "exact: " and the reason.

    Raises:
        RuntimeError: shapes that do not fit.
    """
    return _ops.conv2d_inversion(weight, input_size, stride, padding, dilation, groups)


def conv2d_inversion_error(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> tuple[float, float]:
    """How well conv2d's policy "invert" rebuilds this very input.

    Args:
        input, weight, bias, stride, padding, dilation, groups: as in conv2d; needs no gradient.

    Returns:
        (relative error of the rebuilt input, kept elements beside the output over those of the input); (0, 1) where
        the input is kept.

    Raises:
        RuntimeError: as conv2d.
    """
    return _ops.conv2d_inversion_error(input, weight, bias, stride, padding, dilation, groups)


def reversible_chain(
    input: Tensor,
    weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    running_means: Sequence[Tensor] = (),
    running_vars: Sequence[Tensor] = (),
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "leaky",
    slope: float = 0.5,
    anchors: Sequence[int] = (),
    residues: Sequence[int] = (),
    errors: Tensor | None = None,
) -> Tensor:
    """activation(batch_norm(conv2d(x))) layer after layer, in training; the backward rebuilds each layer's input.

    C++ has remnant::nn::ReversibleChain, which plans by itself. torch.compile does not trace it.

    Args:
        input: [N, C, H, W]; float32 or float64.
        weights: one [C, C, kh, kw] a layer, odd kernels, zero padding that keeps the size, no bias.
        norm_weights, norm_biases: one [C] a layer.
        running_means, running_vars: one [C] a layer, updated in place; or none.
        momentum, eps: of the norms.
        activation: "leaky" (leaky_relu with slope) or "maxmin" (larger and smaller of channels c and c + C / 2).
        slope: above 0.
        anchors: layers whose input is kept.
        residues: layers of whose input the low 16 bits are kept (float64: 32), which take an error away.
        errors: [layers] float64 on the CPU: receives each rebuilt input's measured relative error, NaN for others.

    Returns:
        [N, C, H, W] in channels-last order.

    Saves for backward: input, output; a layer: ring, signs, statistics, 4 numbers a sample; anchors, residues.

    Raises:
        RuntimeError: shapes, dtypes or options that do not fit, or a double backward.
    """
    return _ops.reversible_chain(
        input, weights, norm_weights, norm_biases, running_means, running_vars, momentum, eps, slope, activation,
        anchors, residues, errors,
    )  # fmt: skip


def reversible_chain_plan(
    samples: Tensor,
    weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    *,
    eps: float = 1e-5,
    activation: str = "leaky",
    slope: float = 0.5,
    limit: float = 2e-4,
) -> tuple[list[int], list[int]]:
    """Anchors and residues for reversible_chain, by running it on some samples and walking it back.

    Args:
        samples: a few of a batch, [n, C, H, W].
        weights, norm_weights, norm_biases, eps, activation, slope: as in reversible_chain.
        limit: largest relative error of a rebuilt input.

    Returns:
        (anchors, residues)

    Raises:
        RuntimeError: as reversible_chain.
    """
    return _ops.reversible_chain_plan(samples, weights, norm_weights, norm_biases, eps, slope, activation, limit)


def inversion_counters() -> dict[str, int]:
    """What rebuilding inputs did so far in this process.

    Returns:
        "rebuilt": inputs rebuilt in a backward; "kept": inputs kept instead, by decision of the forward; "failed":
        rebuilt inputs that failed their check; "repeated": layers whose forward ran again because of that.
    """
    return dict(zip(("rebuilt", "kept", "failed", "repeated"), _ops.inversion_counters(), strict=True))


def reset_inversion_counters() -> None:
    """Sets inversion_counters to 0."""
    _ops.reset_inversion_counters()


_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """cross_entropy(linear(input, weight, bias), target) that never makes the [N, V] logits. Exact.

        >>> x, weight = torch.randn(6, 8), torch.zeros(10, 8)
        >>> loss = remnant.linear_cross_entropy(x, weight, None, torch.arange(6))
        >>> round(float(loss), 4)  # ln 10: every class is as likely
        2.3026

    Args:
        input: [N, K], floating.
        weight: [V, K], input's dtype.
        bias: [V] or None.
        target: [N], int64, in [0, V) or ignore_index.
        reduction: "mean" over the targets that are not ignored, "sum", or "none": each row's loss, 0 where
            ignored.

    Returns:
        A scalar, or [N] for "none"; float32 (float64 for float64).

    Saves for backward: the gradients of input, weight and bias, where wanted; with fewer classes than features
    (V < K) the logits' [N, V] and weight in place of input's; float16's in float32, since a loss's scale comes with
    the backward. For "none" input, weight, bias and target, from which the backward makes its chunks of logits again.

    Raises:
        ValueError: an unknown reduction.
        RuntimeError: shapes or dtypes that do not fit, a target out of bounds, or a double backward.
    """
    if reduction not in _REDUCTIONS:
        raise ValueError(f"linear_cross_entropy: reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    return _ops.linear_cross_entropy(
        input, weight, bias, target, ignore_index, label_smoothing, _REDUCTIONS[reduction]
    )


def feed_forward(
    input: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    *,
    activation: str = "relu",
    dropout: float = 0.0,
    policy: str = "exact",
    generator: torch.Generator | None = None,
) -> Tensor:
    """linear(dropout(activation(linear(input, weight1, bias1))), weight2, bias2) that keeps no hidden layer.

        >>> x, up, down = torch.randn(5, 8), torch.randn(32, 8), torch.randn(8, 32)
        >>> remnant.feed_forward(x, up, None, down, None, activation="gelu", policy="quantized:bits=4").shape
        torch.Size([5, 8])

    Args:
        input: [..., E], floating.
        weight1, bias1: [F, E] and [F] or None, input's dtype.
        weight2, bias2: [G, F] and [G] or None, input's dtype.
        activation: "relu" or "gelu" (by the normal distribution's function, not its tanh form).
        dropout: rate on the hidden layer, in [0, 1).
        policy: "exact", or "quantized:bits=8", 4 or 2, whose gradients are unbiased.
        generator: source of the seed; the device's default generator when None.

    Returns:
        [..., G] in input's dtype.

    Saves for backward, exact: input, the weights and bias1, and for dropout a 16-byte seed; the hidden layer is
    made again, a block of rows at a time. quantized: the weights, a seed, codes of input at that many bits, and
    one code for each element of the hidden layer for both the activation and its derivative: of as many bits and
    2 bytes for each 64 elements under relu, of 8, 6 or 4 bits under gelu (above 81920 they become NaN).

    Raises:
        RuntimeError: shapes or dtypes that do not fit, an unknown activation, or a double backward.
    """
    return _ops.feed_forward(input, weight1, bias1, weight2, bias2, activation, dropout, policy, generator)


def multihead_attention(
    query: Tensor,
    memory: Tensor | None,
    in_weight: Tensor,
    in_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    heads: int,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    keep_output: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Projections, attention and output projection as one op that keeps its inputs alone. Exact.

    Args:
        query: [B, N, E], floating.
        memory: [B, M, E], what keys and values are made from; None for self-attention.
        in_weight, in_bias: [3 E, E] and [3 E] or None: query's rows, then key's, then value's.
        out_weight, out_bias: [G, E] and [G] or None.
        heads: divides E.
        mask: boolean (True = attend) or added to the scores, broadcastable to [B, heads, N, M]; needs no
            gradient.
        causal, dropout, generator: as in `attention`.
        keep_output: keep what attention gave instead of attending again in backward.

    Returns:
        [B, N, G] in query's dtype.

    Saves for backward: query, memory, the weights and in_bias, the mask, seeds of dropout (16 bytes for about
    1,024 positions on a CPU); with keep_output also [B, N, E] and a log-sum-exp a row and head.

    Raises:
        RuntimeError: shapes or dtypes that do not fit, or a double backward.
    """
    return _ops.multihead_attention(
        query, memory, in_weight, in_bias, out_weight, out_bias, heads, mask, causal, dropout, keep_output, generator
    )


class _SoftmaxApproximation:
    """softmax over the last dimension that keeps a curve instead of its output.

    Called as softmax_approximation(energy, mask, m) or softmax_approximation.apply(energy, mask, m).

    Args:
        energy: [..., n], any floating dtype.
        mask: broadcastable to energy, boolean (True = keep) or integer (0 = masked), or None. Masked
            elements give 0, a fully masked row gives 0 everywhere.
        m: how many of the highest and of the lowest elements of a row are kept; >= 1.
        paper_text: follow the paper's text, which does not rescale a row to sum 1.

    Returns:
        softmax(energy), energy's shape and dtype. Its gradient is approximate and biased.

    Saves for backward: 2 m + 2 floats and n ceil(log2 n) bits of ranks a row. The product
    `weights @ value` that usually follows keeps the output all the same, for value's gradient: only
    remnant.attention, which owns that product, can let it go.

    Raises:
        RuntimeError: a mask that does not broadcast, m < 1, a dtype that is not floating, or a double
            backward.
    """

    def __call__(self, energy: Tensor, mask: Tensor | None = None, m: int = 5, *, paper_text: bool = False) -> Tensor:
        """softmax_approximation(energy, mask, m): see the class."""
        if mask is not None and not mask.is_floating_point() and mask.dtype != torch.bool:
            mask = mask != 0
        return _ops.softmax_approximation(energy, mask, m, paper_text)

    def apply(self, energy: Tensor, mask: Tensor | None = None, m: int = 5) -> Tensor:
        """The same, in the spelling of torch.autograd.Function and of the paper's release."""
        return self(energy, mask, m)

    def __repr__(self) -> str:
        return "remnant.softmax_approximation"


softmax_approximation = _SoftmaxApproximation()
softmax_approximation.__doc__ = _SoftmaxApproximation.__doc__


def softmax_input_from_output(output: Tensor, lse: Tensor) -> Tensor:
    """The softmax's input, ln(output) + lse, from its output and lse = log sum exp(input).

    Args:
        output: [..., n], a softmax's output over the last dimension; floating.
        lse: [...], the same dtype.

    Returns:
        [..., n]; -inf where output is 0.

    Raises:
        RuntimeError: lse's shape is not output's without the last dimension.
    """
    return _ops.softmax_input_from_output(output, lse)
