"""Training without keeping activations: PyTorch ops that own what follows a softmax and let its output go.

    import remnant
    output = remnant.attention(query, key, value, causal=True, policy="recompute")

Everything runs in libremnant.so, the library that C++ programs link; this package loads it and gives
its ops, which are also at torch.ops.remnant, Python signatures.
"""

from remnant import hf, lightning, nn
from remnant._compress import compress
from remnant._convert import Conversion, conversion, convert, revert
from remnant._library import library_path, version as __version__
from remnant._ops import (
    attention,
    attention_packed,
    attention_residual_bytes,
    conv2d,
    conv2d_inversion,
    conv2d_inversion_error,
    conv_norm_act,
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
    max_pool2d,
    multihead_attention,
    relu,
    reset_inversion_counters,
    reversible_chain,
    reversible_chain_plan,
    rms_norm,
    shortcut,
    silu,
    softmax_approximation,
    softmax_input_from_output,
)
from remnant._policy import Policy
from remnant._report import Comparison, MemoryReport, memory_report
from remnant._sdpa import scaled_dot_product_attention

__all__ = [
    "Comparison",
    "Conversion",
    "MemoryReport",
    "Policy",
    "attention",
    "attention_packed",
    "attention_residual_bytes",
    "compress",
    "conv2d",
    "conv2d_inversion",
    "conv2d_inversion_error",
    "conv_norm_act",
    "conversion",
    "convert",
    "dropout",
    "dropout_add",
    "dropout_add_layer_norm",
    "feed_forward",
    "gelu",
    "hf",
    "inversion_counters",
    "layer_norm",
    "leaky_relu",
    "library_path",
    "lightning",
    "linear",
    "linear_code_bytes",
    "linear_cross_entropy",
    "max_pool2d",
    "memory_report",
    "multihead_attention",
    "nn",
    "relu",
    "reset_inversion_counters",
    "reversible_chain",
    "reversible_chain_plan",
    "revert",
    "rms_norm",
    "scaled_dot_product_attention",
    "shortcut",
    "silu",
    "softmax_approximation",
    "softmax_input_from_output",
]
