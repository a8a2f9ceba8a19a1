#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace remnant::ops {

/// remnant::shortcut below autograd or above: every stride-th position of x, or the windows' means, and
/// channels of zeros up to `channels`. `stride` has a number for each spatial dimension. May be a view.
at::Tensor shortcut_of(const at::Tensor& x, at::IntArrayRef stride, int64_t channels, bool average);

}  // namespace remnant::ops
