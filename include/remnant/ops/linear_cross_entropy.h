#pragma once

#include <remnant/export.h>

#include <ATen/core/Reduction.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace remnant {

/// cross_entropy(linear(input, weight, bias), target) without a [tokens, classes] tensor, unless that is the
/// smaller one: logits, loss and gradients are made chunk by chunk, the gradients in the forward but for
/// reduction none. Exact.
///
/// input [N, K], weight [V, K], bias [V] or absent, one floating dtype (half types are computed in
/// float32); target int64 [N], in [0, V) or ignore_index. reduction: at::Reduction::Mean (over the
/// targets that are not ignored), Sum, or None: each row's loss, 0 where ignored. Returns a scalar, or [N]
/// for None, in float32 (float64 for float64).
///
/// Saves for backward: the gradients themselves, input's [N, K], weight's [V, K] and bias's [V], where
/// wanted; with fewer classes than features (V < K) the logits' gradient [N, V] and weight in place of
/// input's. None: input, weight, bias and target themselves, and the backward makes
/// its chunks of logits again. Double backward raises an error.
REMNANT_API at::Tensor linear_cross_entropy(const at::Tensor& input, const at::Tensor& weight,
                                            const std::optional<at::Tensor>& bias, const at::Tensor& target,
                                            int64_t ignore_index = -100, double label_smoothing = 0.0,
                                            int64_t reduction = at::Reduction::Mean);

}  // namespace remnant
