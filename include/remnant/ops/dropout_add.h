#pragma once

#include <remnant/export.h>

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <optional>

namespace remnant {

/// residual + dropout(input, p) in one pass, with the mask that remnant::dropout draws for the same generator
/// state. input and residual: one shape, one floating dtype.
///
/// Saves for backward: a 16-byte seed; nothing when p == 0 or input needs no gradient. Throws c10::Error
/// unless p is in [0, 1), and for shapes, dtypes and devices that differ.
REMNANT_API at::Tensor dropout_add(const at::Tensor& input, const at::Tensor& residual, double p,
                                   const std::optional<at::Generator>& generator = std::nullopt);

}  // namespace remnant
