#pragma once

#include <remnant/export.h>

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <optional>

namespace remnant {

/// input with each element zeroed with probability `p` and the others divided by the keep rate; any
/// shape, any floating dtype. Draws 16 bits an element by Philox (the realised rate is
/// round(65536 p) / 65536, at least 1/65536), so that the mask does not depend on threads.
///
/// Saves for backward: a 16-byte seed, from which the mask is drawn again (eager PyTorch keeps 4 bytes
/// an element on CPU, 1 on CUDA). p == 0 returns `input` itself. Throws c10::Error unless p is in [0, 1).
REMNANT_API at::Tensor dropout(const at::Tensor& input, double p,
                               const std::optional<at::Generator>& generator = std::nullopt);

}  // namespace remnant
