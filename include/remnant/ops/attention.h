#pragma once

#include <remnant/export.h>
#include <remnant/policy.h>

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>

namespace remnant {

struct AttentionOptions {
  /// Boolean (true = attend) or floating point (added to the scores; a gradient flows to it),
  /// broadcastable to [B, H, Nq, Nk]. Never expanded in memory.
  std::optional<at::Tensor> mask = std::nullopt;
  /// Query i attends keys j <= i (aligned top left, as in PyTorch).
  bool causal = false;
  /// Probability of dropping an element of the softmax output, in [0, 1).
  double dropout = 0.0;
  /// Multiplies q k^T; 1 / sqrt(D) when absent.
  std::optional<double> scale = std::nullopt;
  /// What is kept for the backward pass. `top` takes causal, a window without a bound on the left and
  /// boolean masks without a query axis (key padding, [B, 1, 1, Nk]), no others.
  Policy policy = {};
  /// (left, right): query i attends keys i - left <= j <= i + right; -1 means no bound on a side.
  std::optional<std::pair<int64_t, int64_t>> window = std::nullopt;
  /// Source of the seeds of dropout, rounding and key draws; the device's default generator when absent.
  std::optional<at::Generator> generator = std::nullopt;
  /// 0: query, key, value and output are kept as they are. 8, 4 or 2: value and output at so many bits an
  /// element, query and key at 8, by stochastic rounding. Policy `recompute` alone, `attention` alone. The
  /// gradient is linear in value and output; for query and key the rounding of 8 bits leaves a bias of second
  /// order (docs/numerics.md). Every reader of one tensor at the same bits shares its codes.
  int64_t bits = 0;
};

/// softmax(scale * query key^T + mask), dropout, times value, as one op that owns the softmax and
/// therefore need not keep it.
///
/// query [B, H, Nq, D], key [B, Hkv, Nk, D], value [B, Hkv, Nk, Dv]; Hkv divides H (grouped-query
/// heads). float32, float64, bfloat16 or float16, one dtype for the three, any strides; sums are
/// accumulated in float32 (float64 for float64). Returns [B, H, Nq, Dv] in the same dtype. A row
/// with no key to attend gives 0 and gradient 0; NaN and Inf in an input reach output and gradient.
///
/// Saves for backward: query, key, value, the output, and per row what the policy keeps
/// (attention_residual_bytes), all through save_for_backward; dropout is regenerated from a 16-byte
/// seed. Nothing under no_grad or when no input needs a gradient.
/// Backward: with g = dL/do and delta_i = g_i . o_i, dz = p (D (g v^T) - delta).
/// Double backward: only policy `exact`; others raise an error that says so.
/// Throws c10::Error, naming the argument, what was expected and what was got.
REMNANT_API at::Tensor attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                 const AttentionOptions& options = {});

/// The same, and the attention weights before dropout, [B, H, Nq, Nk], detached; computed in row
/// blocks and not kept for backward.
REMNANT_API std::tuple<at::Tensor, at::Tensor> attention_with_weights(const at::Tensor& query,
                                                                      const at::Tensor& key,
                                                                      const at::Tensor& value,
                                                                      const AttentionOptions& options = {});

/// `attention` of sequences of different lengths that lie one after the other, without padding between
/// them: sequence b is rows cu_seqlens[b] to cu_seqlens[b + 1] - 1, and attends itself alone.
///
/// query [Tq, H, D], key [Tk, Hkv, D], value [Tk, Hkv, Dv]; cu_seqlens_q and cu_seqlens_k [B + 1], int32 or
/// int64, rising from 0 to Tq and Tk (equal sequences of queries and keys: the same tensor twice). causal and
/// window count from each sequence's start; a mask is refused. Returns [Tq, H, Dv]. Dropout draws what
/// `attention` would draw for the padded batch.
/// Saves what `attention` saves, for Tq rows; table and codes are as wide as the longest sequence needs. On
/// other devices than the CPU, and for policies that the CPU's kernels do not know, sequences are padded.
/// Double backward: none, an error says so. Throws c10::Error.
REMNANT_API at::Tensor attention_packed(const at::Tensor& query, const at::Tensor& key,
                                        const at::Tensor& value, const at::Tensor& cu_seqlens_q,
                                        const at::Tensor& cu_seqlens_k, const AttentionOptions& options = {});

/// Bytes that `attention` keeps for backward beyond query, key, value, output and mask: the closed
/// form that the tests hold against measurement. heads = B * H, queries = Nq, keys = Nk;
/// element_bytes: size of one element of the input dtype. Dropout adds 16 bytes of seed.
REMNANT_API int64_t attention_residual_bytes(const Policy& policy, int64_t heads, int64_t queries,
                                             int64_t keys, int64_t element_bytes, bool dropout);

}  // namespace remnant
