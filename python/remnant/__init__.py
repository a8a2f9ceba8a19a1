"""Training without keeping activations: PyTorch ops that own what follows a softmax and let its output go.

    import remnant
    output = remnant.attention(query, key, value, causal=True, policy="recompute")

Everything runs in libremnant.so, the library that C++ programs link; this package loads it and gives
its ops, which are also at torch.ops.remnant, Python signatures.
"""

from remnant._compress import compress
from remnant._library import library_path, version as __version__
from remnant._ops import (
    attention,
    attention_packed,
    attention_residual_bytes,
    dropout,
    dropout_add,
    dropout_add_layer_norm,
    feed_forward,
    gelu,
    layer_norm,
    leaky_relu,
    linear,
    linear_code_bytes,
    linear_cross_entropy,
    multihead_attention,
    relu,
    rms_norm,
    silu,
    softmax_approximation,
    softmax_input_from_output,
)
from remnant._report import Comparison, MemoryReport, memory_report
from remnant._sdpa import scaled_dot_product_attention

__all__ = [
    "Comparison",
    "MemoryReport",
    "attention",
    "attention_packed",
    "attention_residual_bytes",
    "compress",
    "dropout",
    "dropout_add",
    "dropout_add_layer_norm",
    "feed_forward",
    "gelu",
    "layer_norm",
    "leaky_relu",
    "library_path",
    "linear",
    "linear_code_bytes",
    "linear_cross_entropy",
    "memory_report",
    "multihead_attention",
    "relu",
    "rms_norm",
    "scaled_dot_product_attention",
    "silu",
    "softmax_approximation",
    "softmax_input_from_output",
]
