#pragma once

#include <remnant/export.h>

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace remnant {

struct MultiheadAttentionCall {
  int64_t heads = 1;
  /// As in AttentionOptions (true = attend), broadcastable to [B, heads, N, M]; no gradient flows to it.
  std::optional<at::Tensor> mask = std::nullopt;
  bool causal = false;
  double dropout = 0.0;
  /// Keeps what attention gave, before the output projection, instead of attending again in backward.
  bool keep_output = false;
  std::optional<at::Generator> generator = std::nullopt;
};

/// Projections to query, key and value, attention, and the output projection as one op, so that of all its
/// tensors only the inputs need to be kept.
///
/// query [B, N, E]; memory [B, M, E], what keys and values are made from, absent for self-attention;
/// in_weight [3 E, E] with in_bias [3 E] (query's rows first, then key's, then value's, as in
/// torch.nn.MultiheadAttention), out_weight [G, E] with out_bias [G]; biases may be absent; heads divides E.
/// One dtype: float32, float64, bfloat16 or float16. Returns [B, N, G]. Works on a few sequences at a time,
/// so that scratch does not grow with B.
///
/// Saves for backward: query, memory, the weights and in_bias, the mask, and a 16-byte seed for each of those
/// parts when there is dropout; with keep_output also [B, N, E] and a log-sum-exp a row and
/// head. The backward projects again (and attends again without keep_output). Exact up to rounding. Double
/// backward raises an error. Throws c10::Error.
REMNANT_API at::Tensor multihead_attention(const at::Tensor& query, const std::optional<at::Tensor>& memory,
                                           const at::Tensor& in_weight,
                                           const std::optional<at::Tensor>& in_bias,
                                           const at::Tensor& out_weight,
                                           const std::optional<at::Tensor>& out_bias,
                                           const MultiheadAttentionCall& call);

/// Whether keeping what attention gave is the better bargain: its products with n keys cost more than those
/// of the projections that are made again anyway.
REMNANT_API bool keeps_attention_output(int64_t keys, int64_t embed_dim);

}  // namespace remnant
