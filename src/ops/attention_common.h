#pragma once

#include <remnant/policy.h>

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <c10/core/SymInt.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

/// What the attention op's layers share: its residuals, its checks and its two backends.
namespace remnant::ops {

/// What the forward hands to the backward. Tensors that the policy does not use have shape [0].
struct AttentionResiduals {
  at::Tensor lse;            ///< recompute, sampled, top: [B, H, Nq], accumulation dtype
  at::Tensor probabilities;  ///< exact: [B, H, Nq, Nk], input dtype, before dropout
  at::Tensor codes;          ///< curve: packed ranks; quantized: packed codes. uint8 [B, H, Nq, bytes]
                             ///< sampled: the drawn keys of a tile of kernels::kSampleRows rows, ascending,
                             ///< then -1. int32 [B, H, tiles, min(m, Nk)]
                             ///< top: a row's highest keys, then -1. int32 [B, H, Nq, min(m, Nk)]
  at::Tensor table;          ///< curve: [B, H, Nq, min(2m, Nk) + 2]; quantized: row maxima [B, H, Nq, 1]
                             ///< sampled: like codes, 1 / probability of the draw, 0 beside -1
  at::Tensor seed;           ///< int64 [2], when dropout needs it again
};

/// A call's arguments after checks: mask is 4-D and unexpanded, causal is folded into the window.
struct AttentionCall {
  std::optional<at::Tensor> mask;
  int64_t left = -1, right = -1;
  double dropout = 0, scale = 1;
  Policy policy;
};

using ForwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using BackwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

/// Throws one sentence for every mistake in shapes, dtypes, devices and numbers. Works on symbolic shapes.
void check_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                     const std::optional<at::Tensor>& mask, double dropout, at::IntArrayRef window);

AttentionCall make_call(const std::optional<at::Tensor>& mask, bool causal, double dropout, double scale,
                        const std::string& policy, at::IntArrayRef window);

/// float for half types, else the type itself.
at::ScalarType accumulation_type(at::ScalarType type);

/// [B, H, N, D] laid out as [B, N, H, D], so that heads merge again without a copy.
at::Tensor empty_heads(c10::SymInt batch, c10::SymInt heads, c10::SymInt rows, c10::SymInt dim,
                       const at::TensorOptions& options);

/// Allocates what the policy keeps, with the layout documented in AttentionResiduals.
AttentionResiduals empty_residuals(const at::Tensor& query, const at::Tensor& key, const AttentionCall& call,
                                   bool keep);

/// Two random int64 on the tensor's device from its generator.
at::Tensor draw_seed(const at::Tensor& like, const std::optional<at::Generator>& generator);

struct BackwardInputs {
  at::Tensor grad_output, query, key, value, output;  // query, key, value, output: undefined when not needed
  AttentionResiduals kept;
  int64_t kv_heads = 0, keys = 0;
  std::array<bool, 4> needs{};  // query, key, value, mask
};

/// Any device, blocks of query rows, ATen operations only.
at::Tensor composite_forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                             const AttentionCall& call, const at::Tensor& seed,
                             AttentionResiduals& residuals);
BackwardResult composite_backward(const BackwardInputs& inputs, const AttentionCall& call);
/// The same over drawn keys alone: O(Nq m) in time and, in blocks, memory.
BackwardResult sampled_backward(const BackwardInputs& inputs, const AttentionCall& call);
/// The same over the kept keys, and over the others in closed form: O(Nq (m + D) D).
BackwardResult top_backward(const BackwardInputs& inputs, const AttentionCall& call);
/// Policy exact keeps its n x n softmax output, so its forward and backward are plain ATen on every device.
at::Tensor exact_forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                         const AttentionCall& call, const at::Tensor& seed, AttentionResiduals& residuals);
BackwardResult exact_backward(const BackwardInputs& inputs, const AttentionCall& call);
/// The gradient written in differentiable operations, for a gradient of the gradient.
BackwardResult exact_backward_differentiable(const BackwardInputs& inputs, const AttentionCall& call);
/// Softmax weights before dropout, [B, H, Nq, Nk], in blocks.
at::Tensor composite_weights(const at::Tensor& query, const at::Tensor& key, const AttentionCall& call);

/// Where packed sequences begin, and the end of the last; the longest one's length.
struct PackedSequences {
  std::vector<int64_t> first_query, first_key;
  int64_t longest_query = 0, longest_key = 0;
};

/// The CPU's fused kernels. Packed: tensors are [1, H, T, D].
at::Tensor cpu_forward(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                       const AttentionCall& call, const at::Tensor& seed, AttentionResiduals& residuals,
                       const PackedSequences* packed = nullptr);
BackwardResult cpu_backward(const BackwardInputs& inputs, const AttentionCall& call,
                            const PackedSequences* packed = nullptr);
/// Whether CPU tensors take the fused kernels: yes, but under REMNANT_CPU=composite.
bool fused_on_cpu();
/// Whether the fused kernels know the policy.
bool fused_policy(const AttentionCall& call);

/// Multiplies rows [first, first + rows) of [B, H, rows, Nk] by the dropout mask of `seed`, in place.
void apply_dropout_(at::Tensor block, const at::Tensor& seed, double dropout, int64_t first);
/// The mask itself: 0 or 1 / (1 - realised rate), [B, H, rows, keys].
at::Tensor dropout_mask(const at::Tensor& seed, double dropout, int64_t batch, int64_t heads, int64_t first,
                        int64_t rows, int64_t keys, const at::TensorOptions& options);
/// The mask at single elements: head (batch * heads + head), row and column are int64 and broadcast.
at::Tensor dropout_mask_at(const at::Tensor& seed, double dropout, const at::Tensor& head,
                           const at::Tensor& row, const at::Tensor& column, const at::TensorOptions& options);
/// 32-bit words (as int64) of a stream for [heads, rows, columns] elements; `columns_per_block` 4.
at::Tensor random_words(const at::Tensor& seed, uint32_t stream, int64_t heads, int64_t first, int64_t rows,
                        int64_t blocks);

/// Codes and curves in ATen operations; p and z are [..., n] in the accumulation type.
std::tuple<at::Tensor, at::Tensor> quantize(const at::Tensor& p, int64_t bits, const at::Tensor& random);
at::Tensor dequantize(const at::Tensor& codes, const at::Tensor& highest, int64_t bits, int64_t keys);
std::tuple<at::Tensor, at::Tensor> curve_encode(const at::Tensor& z, const at::Tensor& p, int64_t m);
at::Tensor curve_decode(const at::Tensor& codes, const at::Tensor& table, int64_t keys, int64_t m,
                        bool paper_text);

/// Draws keys for the tiles of rows of p [B, H, rows, Nk], the first of which is `first_tile`; `codes` and
/// `table` as in AttentionResiduals. A key's probability is min(1, c w), w its sum of p over the tile, c such
/// that they add up to min(m, keys with w > 0); the draw is systematic.
std::tuple<at::Tensor, at::Tensor> draw_keys(const at::Tensor& p, int64_t m, const at::Tensor& seed,
                                             int64_t first_tile);
/// The keys of the m highest scores of each row, int32, -1 where a row has fewer.
at::Tensor top_keys(const at::Tensor& scores, const at::Tensor& p, int64_t m);
/// lse for policies that look at a few keys of a row only: NaN where any key would give NaN, so that each
/// does.
at::Tensor lse_of_few(const at::Tensor& lse);

}  // namespace remnant::ops
