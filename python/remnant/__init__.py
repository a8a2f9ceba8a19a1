"""Training without keeping activations: PyTorch ops that own what follows a softmax and let its output go.

    import remnant
    output = remnant.attention(query, key, value, causal=True, policy="recompute")

Everything runs in libremnant.so, the library that C++ programs link; this package loads it and gives
its ops, which are also at torch.ops.remnant, Python signatures.
"""

from remnant._library import library_path, version as __version__
from remnant._ops import (
    attention,
    attention_packed,
    attention_residual_bytes,
    conv2d,
    conv2d_inversion,
    conv2d_inversion_error,
    dropout,
    dropout_add,
    dropout_add_layer_norm,
    feed_forward,
    gelu,
    inversion_counters,
    layer_norm,
    leaky_relu,
    linear,
    linear_code_bytes,
    linear_cross_entropy,
    multihead_attention,
    relu,
    reset_inversion_counters,
    reversible_chain,
    reversible_chain_plan,
    rms_norm,
    silu,
    softmax_approximation,
    softmax_input_from_output,
)

__all__ = [
    "attention",
    "attention_packed",
    "attention_residual_bytes",
    "conv2d",
    "conv2d_inversion",
    "conv2d_inversion_error",
    "dropout",
    "dropout_add",
    "dropout_add_layer_norm",
    "feed_forward",
    "gelu",
    "inversion_counters",
    "layer_norm",
    "leaky_relu",
    "library_path",
    "linear",
    "linear_code_bytes",
    "linear_cross_entropy",
    "multihead_attention",
    "relu",
    "reset_inversion_counters",
    "reversible_chain",
    "reversible_chain_plan",
    "rms_norm",
    "silu",
    "softmax_approximation",
    "softmax_input_from_output",
]
