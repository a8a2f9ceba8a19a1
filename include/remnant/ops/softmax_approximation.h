#pragma once

#include <remnant/export.h>

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace remnant {

/// softmax over the last dimension that keeps the paper's curve instead of its output (Lee & Lee,
/// NeurIPS 2023, Alg. 1), for programs that keep their own matrix products.
///
/// energy [..., n], any floating dtype; mask boolean (true = keep) or absent, broadcastable to
/// energy; masked elements give 0, a fully masked row gives 0 everywhere. Saves for backward: 2m + 2
/// floats and n ceil(log2 n) bits of ranks a row; O(n) work a row in backward.
///
/// What it cannot save: the product `weights @ v` that usually follows keeps its own copy of the
/// output for dL/dv. Only remnant::attention, which owns that product, lets the output go.
/// Double backward raises an error.
REMNANT_API at::Tensor softmax_approximation(const at::Tensor& energy,
                                             const std::optional<at::Tensor>& mask = std::nullopt,
                                             int64_t m = 5, bool paper_text = false);

/// The softmax's input from its output p and lse = log sum exp(input): z = ln p + lse (Eq. 5 of the
/// paper). Elements with p = 0 give -inf. p [..., n], lse [...].
REMNANT_API at::Tensor softmax_input_from_output(const at::Tensor& output, const at::Tensor& lse);

}  // namespace remnant
