#pragma once

#include <remnant/export.h>

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace remnant {

/// A residual block's shortcut without parameters, where the block halves the image and adds channels: every
/// stride-th position of each spatial dimension (`average`: the mean of each stride x stride window, whole
/// ones only), then channels of zeros up to `channels`; option A of He et al., "Deep Residual Learning for
/// Image Recognition" (2015).
///
/// input [N, C, L], [N, C, H, W] or [N, C, D, H, W], contiguous or channels-last, of any floating dtype;
/// channels >= C. Returns a new tensor [N, channels, ...] in input's memory format.
///
/// Saves for backward: nothing; has a second derivative. A conv_norm_act that takes it as residual keeps
/// nothing of it either where input is another unit's output, which gives it back. Throws c10::Error.
REMNANT_API at::Tensor shortcut(const at::Tensor& input, int64_t stride, int64_t channels,
                                bool average = false);

}  // namespace remnant
