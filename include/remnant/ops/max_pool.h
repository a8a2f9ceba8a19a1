#pragma once

#include <remnant/export.h>

#include <ATen/core/Tensor.h>

namespace remnant {

/// Max pooling, as at::max_pool2d: input [N, C, H, W] of any floating dtype, contiguous or channels-last;
/// each other argument one number or two, stride empty for kernel_size. Returns [N, C, H', W'] in input's
/// memory format.
///
/// Saves for backward: a byte an output, which of its window's elements it is; not the input and 8 bytes an
/// output as PyTorch's. Throws c10::Error for windows of more than 256 elements, for what at::max_pool2d does
/// not take, and for a double backward.
REMNANT_API at::Tensor max_pool2d(const at::Tensor& input, at::IntArrayRef kernel_size,
                                  at::IntArrayRef stride = {}, at::IntArrayRef padding = 0,
                                  at::IntArrayRef dilation = 1, bool ceil_mode = false);

}  // namespace remnant
